"""Fused attention kernels of GPUs and TPUs, what each can serve, and on which mesh.

cudnn    cuDNN's flash attention, through `jax.nn.dot_product_attention`.
triton   JAX's Pallas kernel for GPUs. The one for documents there: through JAX's
         public functions cuDNN takes documents only as an L x L mask. Its packed layout
         is private to JAX, keeps statistics for a fixed number of documents per
         sequence, and before JAX 0.12 misreads grouped keys.
splash   JAX's Pallas kernel for TPUs. It skips blocks above the diagonal, and takes
         documents and grouped keys as they are.

All of them lower without a device: `jit(f).trace(..).lower(lowering_platforms=..)`.
For cuDNN, JAX asks the installed CUDA plugin for its version while it traces, and
refuses without one; the device's compute capability matters only beyond head_dim 128.
JAX 0.12 needs the name of a GPU for Triton (`jax.sharding.AbstractDevice`).

`tokamax`, the successor of these Pallas kernels, needs Python 3.12; this package
supports 3.11. JAX 0.12 deprecates its Triton kernel; where it is gone, "triton" is
refused, and "auto" takes something else.

Axes: B batch, L query and key length, H heads, G kv heads, K head_dim.
"""

import dataclasses
import functools
import importlib
import math
import types
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from sct_jax import sharding

KERNELS = ("cudnn", "triton", "splash")

_TRITON = "jax.experimental.pallas.ops.gpu.attention"
_SPLASH = "jax.experimental.pallas.ops.tpu.splash_attention"

# Tests run the Pallas kernels on CPU.
_INTERPRET = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What attention is asked to do, and where.

    Attributes:
      platform: "cpu", "cuda", "rocm" or "tpu".
      compute_capability: of an NVIDIA GPU, such as "9.0"; None if unknown.
      head_dim: K.
      num_heads: H.
      num_kv_heads: G.
      seq_len: L.
      dtype: of queries, keys and values.
      documents: whether sequences hold several documents, which do not see each other.
      tensor: number of devices that divide the heads.
    """

    platform: str
    compute_capability: str | None = None
    head_dim: int
    num_heads: int
    num_kv_heads: int
    seq_len: int
    dtype: str
    documents: bool = True
    tensor: int = 1


def obstacle(name: str, work: Workload) -> str | None:
    """Returns why a kernel cannot serve, as the end of a sentence; None if it can."""
    interpreted = _INTERPRET and name != "cudnn"
    wanted = {"cudnn": "cuda", "triton": "cuda", "splash": "tpu"}[name]
    if work.platform != wanted and not interpreted:
        named = {"cuda": "an NVIDIA GPU", "tpu": "a TPU"}[wanted]
        return f"needs {named}, not {work.platform!r}"
    if work.num_heads % work.tensor or work.num_kv_heads % work.tensor:
        return (
            f"needs heads that mesh.tensor = {work.tensor} divides, not "
            f"{work.num_heads} and {work.num_kv_heads}"
        )
    of_kernel = {
        "cudnn": _cudnn_obstacle,
        "triton": _triton_obstacle,
        "splash": _splash_obstacle,
    }
    return of_kernel[name](work)


def attend(
    name: str,
    q: Float[Array, "B L H K"],
    k: Float[Array, "B L G K"],
    v: Float[Array, "B L G K"],
    segment_ids: Int[Array, "B L"] | None,
) -> Float[Array, "B L H K"]:
    """Returns causal attention from one of `KERNELS`, each device for its own part.

    On a mesh with several devices, `on_mesh` or `jax.set_mesh` has to name it: rows are
    then divided over its axes data and fsdp, and heads over tensor.

    Raises:
      ValueError: for "cudnn" with `segment_ids`.
    """
    if name == "cudnn":
        if segment_ids is not None:
            raise ValueError('attention "cudnn" does not take segment_ids')
        kernel = _cudnn
    else:
        kernel = {"triton": _triton, "splash": _splash}[name]
    mesh = jax.sharding.get_abstract_mesh()
    free = [
        axis
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    ]
    if math.prod(mesh.shape[axis] for axis in free) == 1:
        return kernel(q, k, v, segment_ids)
    rows = tuple(axis for axis in sharding.ROWS if axis in free) or None
    heads = sharding.HEADS if sharding.HEADS in free else None
    by_head = PartitionSpec(rows, None, heads, None)
    operands = [(x, by_head) for x in (q, k, v)]
    if segment_ids is not None:
        operands.append((segment_ids, PartitionSpec(rows, None)))
    arrays, specs = zip(*operands, strict=True)
    if AxisType.Explicit in mesh.axis_types:
        arrays = [
            jax.sharding.reshard(x, spec) for x, spec in zip(arrays, specs, strict=True)
        ]

    def local(q, k, v, segment_ids=None):
        return kernel(q, k, v, segment_ids)

    return jax.shard_map(
        local,
        in_specs=specs,
        out_specs=by_head,
        axis_names=set(free),
        check_vma=False,  # kernels do not say over which axes their results vary
    )(*arrays)


def on_mesh(function: Callable[..., Any], mesh: Mesh | AbstractMesh):
    """Returns a function whose kernels, while it is traced, divide over this mesh."""
    abstract = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh

    @functools.wraps(function)
    def placed(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(abstract):
            return function(*args, **kwargs)

    return placed


# --- NVIDIA: cuDNN.


def _cudnn_obstacle(work: Workload) -> str | None:
    if work.documents:
        return (
            "does not keep documents apart (data.cross_document_attention = false) "
            "without an L x L mask"
        )
    if work.dtype not in ("bfloat16", "float16"):
        return f"needs model.compute_dtype = 'bfloat16', not {work.dtype!r}"
    hopper = _capability(work) >= (9, 0)
    largest = 256 if hopper else 128
    if work.head_dim > largest or work.head_dim % 8:
        return (
            f"needs a head_dim of at most {largest} that 8 divides, not {work.head_dim}"
        )
    if (0, 0) < _capability(work) < (8, 0):
        return f"needs compute capability 8.0, not {work.compute_capability}"
    return None


def _cudnn(q, k, v, segment_ids):
    del segment_ids
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


# --- NVIDIA: Pallas to Triton.


def _triton_obstacle(work: Workload) -> str | None:
    if (0, 0) < _capability(work) < (8, 0):
        return f"needs compute capability 8.0, not {work.compute_capability}"
    if work.head_dim > 256 or work.head_dim < 16:
        return f"needs a head_dim of 16 to 256, not {work.head_dim}"
    if work.seq_len % _TRITON_ROWS:
        return (
            f"needs data.seq_len to be a multiple of {_TRITON_ROWS}, not {work.seq_len}"
        )
    if _module(_TRITON) is None:
        return f"needs {_TRITON}, which JAX {jax.__version__} does not have"
    return None


_TRITON_ROWS = 128  # the largest block


def _triton(q, k, v, segment_ids):
    module = _module(_TRITON)
    assert module is not None
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    # 16 KB per block of queries, keys or values: all of them then fit into the shared
    # memory of every GPU since Ampere.
    size = 16 * 1024 // (q.dtype.itemsize * max(64, q.shape[-1]))
    size = min(128, q.shape[1], 2 ** (size.bit_length() - 1))
    small = min(32, size)
    blocks = module.BlockSizes(
        block_q=size,
        block_k=size,
        block_q_dkv=small,
        block_kv_dkv=small,
        block_q_dq=small,
        block_kv_dq=small,
    )
    return module.mha(
        q,
        k,
        v,
        segment_ids,
        1 / math.sqrt(q.shape[-1]),
        True,  # causal
        blocks,
        interpret=_INTERPRET,
    )


def _capability(work: Workload) -> tuple[int, ...]:
    """(0, 0) if unknown."""
    parts = (work.compute_capability or "0.0").split(".")
    return tuple(int(part) for part in parts)


# --- TPU: Pallas to Mosaic.

_SPLASH_BLOCKS = (512, 256, 128)  # of queries and keys, the first that divides L


def _splash_obstacle(work: Workload) -> str | None:
    smallest = _SPLASH_BLOCKS[-1]
    if work.seq_len % smallest:
        return f"needs data.seq_len to be a multiple of {smallest}, not {work.seq_len}"
    if work.head_dim % 8:
        return f"needs a head_dim that 8 divides, not {work.head_dim}"
    if _module(f"{_SPLASH}.splash_attention_kernel") is None:
        return f"needs {_SPLASH}, which JAX {jax.__version__} does not have"
    return None


def _splash(q, k, v, segment_ids):
    kernel_lib = _module(f"{_SPLASH}.splash_attention_kernel")
    mask_lib = _module(f"{_SPLASH}.splash_attention_mask")
    assert kernel_lib is not None
    assert mask_lib is not None
    _, length, heads, size = q.shape
    block = next((b for b in _SPLASH_BLOCKS if length % b == 0), None)
    if block is None:
        raise ValueError(f'attention "splash" needs a multiple of 128, got {length}')
    kernel = kernel_lib.make_splash_mha(
        mask_lib.MultiHeadMask([mask_lib.CausalMask((length, length))] * heads),
        block_sizes=kernel_lib.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=_INTERPRET,
    )

    def one(q, k, v, segment_ids):
        documents = None
        if segment_ids is not None:
            documents = kernel_lib.SegmentIds(q=segment_ids, kv=segment_ids)
        return kernel(q, k, v, segment_ids=documents)

    q = q * (1 / math.sqrt(size))  # the kernel does not scale
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(one)(q, k, v, segment_ids).swapaxes(1, 2)


@functools.cache
def _module(name: str) -> types.ModuleType | None:
    """A module of JAX, loaded when it is needed; None if this JAX does not have it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return importlib.import_module(name)
        except ImportError:
            return None
