"""Whether the devices can be used, what memory they have, and which kernels serve."""

import contextlib
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from sct_jax import attention, attention_kernels, errors, model
from sct_jax.training import processes

# FLOP/s of dense bfloat16 products with float32 sums, by `device_kind` of a JAX device
# that is a whole chip. JAX shows TPU v2, v3 and v7x by core, so these are left out.
# Where NVIDIA states the figure with sparsity, this is half of it.
PEAK_FLOPS = {
    "NVIDIA A100-PCIE-40GB": 312e12,  # NVIDIA A100 datasheet
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,  # NVIDIA H100 architecture whitepaper, SXM5
    "NVIDIA H100 PCIe": 756e12,  # the same
    "NVIDIA H100 NVL": 835.5e12,  # NVIDIA H100 datasheet: 1,671 with sparsity
    "NVIDIA H200": 989.5e12,  # NVIDIA H200 datasheet, SXM: 1,979 with sparsity
    "NVIDIA H200 NVL": 835.5e12,  # the same: 1,671 with sparsity
    "NVIDIA B200": 2250e12,  # NVIDIA HGX B200: 36,000 with sparsity, of eight
    "NVIDIA L4": 121e12,  # NVIDIA L4 datasheet: 242 with sparsity
    "NVIDIA L40S": 362.05e12,  # NVIDIA L40S datasheet
    "NVIDIA GeForce RTX 3090": 71e12,  # NVIDIA GA102 architecture whitepaper
    "NVIDIA GeForce RTX 4090": 165.2e12,  # NVIDIA Ada architecture whitepaper
    "TPU v4": 275e12,  # cloud.google.com/tpu/docs/v4
    "TPU v5 lite": 197e12,  # cloud.google.com/tpu/docs/v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # cloud.google.com/tpu/docs/v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # cloud.google.com/tpu/docs/v6e
    "TPU v6e": 918e12,
}

_MEMORY = pathlib.Path("/proc/meminfo")
_CGROUP = pathlib.Path("/sys/fs/cgroup")
_OWN_CGROUP = pathlib.Path("/proc/self/cgroup")


def check_backend() -> None:
    """Raises UserError, naming the platform, if JAX finds no devices."""
    try:
        jax.devices()
    except Exception as error:  # of any type: JAX asserts that there is one
        wanted = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        reason = " ".join(str(error).split())
        raise errors.UserError(
            f"JAX_PLATFORMS: no device of {wanted or 'any platform'!r} can be used"
            f"{f' ({reason})' if reason else ''}; install the JAX for it, or set "
            "JAX_PLATFORMS=cpu"
        ) from error


def peak_flops(devices: Iterable[Any]) -> float | None:
    """Returns the sum of `PEAK_FLOPS` over devices; None if one is not known.

    The figure for bfloat16 whatever the run computes in, as is usual: one number that
    compares all runs on a device.
    """
    peaks = [PEAK_FLOPS.get(device.device_kind) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) if len(known) == len(peaks) else None


def memory_bytes(devices: Iterable[Any]) -> int | None:
    """Returns the memory that each device has at least; None if it is unknown.

    Accelerators: the memory of the smallest device. CPU: devices share the host's. All
    processes call this together, and all get the same figure.

    Args:
      devices: of a mesh.
    """
    local = [d for d in devices if d.process_index == jax.process_index()]
    if local[0].platform != "cpu":
        own = _device_bytes(local)
    else:
        available = host_bytes()
        own = None if available is None else available // len(local)
    known = [size for size in processes.exchange("memory", own) if size is not None]
    return min(known, default=None)


def select_attention(
    config: model.ModelConfig,
    device: Any,
    *,
    seq_len: int,
    documents: bool,
    tensor: int = 1,
) -> tuple[str, str]:
    """Returns the attention that a model uses on a device, and why; see `select`.

    Args:
      config: the model.
      device: one of those that run it, all alike.
      seq_len: tokens per sequence.
      documents: whether sequences hold several documents.
      tensor: number of devices that divide the heads.

    Raises:
      UserError: naming `model.attention`, for one that cannot serve.
    """
    work = attention_kernels.Workload(
        platform=_platform(device),
        compute_capability=getattr(device, "compute_capability", None),
        head_dim=config.head_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        seq_len=seq_len,
        dtype=config.compute_dtype,
        documents=documents,
        tensor=tensor,
    )
    return attention.select(config.attention, work)


def _platform(device: Any) -> str:
    """The platform; JAX calls GPUs of all makers "gpu"."""
    if device.platform not in ("gpu", "cuda", "rocm"):
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def host_bytes() -> int | None:
    """Returns the memory and swap that this process may use; None if unknown."""
    try:
        lines = _MEMORY.read_text().splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    swap = sizes["SwapTotal"]
    limits = [sizes["MemTotal"] + swap]
    for group in _control_groups():
        memory = _read_limit(group / "memory.max")
        if memory is not None:
            own_swap = _read_limit(group / "memory.swap.max")
            limits.append(memory + (swap if own_swap is None else own_swap))
        memory = _read_limit(group / "memory.limit_in_bytes")  # version 1
        if memory is not None:
            both = _read_limit(group / "memory.memsw.limit_in_bytes")
            limits.append(memory + swap if both is None else both)
    return min(limits)


def host_device() -> Any:
    """Returns a device whose work does not queue behind steps, if there is one."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return None


def shard_bytes(tree: Any) -> int:
    """Returns the bytes that each device holds of a tree with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _control_groups() -> list[pathlib.Path]:
    """Folders of the control groups that bound the memory of this process.

    Those of versions 1 and 2, with all that contain them. The root comes alone where
    the groups have other names on the host than in this container.
    """
    own = {_CGROUP: "/"}
    with contextlib.suppress(OSError):
        for line in _OWN_CGROUP.read_text().splitlines():
            hierarchy, controllers, path = line.split(":", 2)
            if hierarchy == "0":
                own[_CGROUP] = path
            elif "memory" in controllers.split(","):
                own[_CGROUP / "memory"] = path
    found = []
    for root, path in own.items():
        group = root / path.lstrip("/")
        found += [group, *(up for up in group.parents if up.is_relative_to(root))]
    return found


def _read_limit(path: pathlib.Path) -> int | None:
    """A limit of a control group; None for none."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _device_bytes(devices: Sequence[Any]) -> int | None:
    """The memory of the smallest device; None if the backend does not tell."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    known = [limit for limit in limits if limit]
    return min(known) if known else None
