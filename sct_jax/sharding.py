"""The device mesh, and the table of sharding rules for every array of a state."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from sct_jax import errors

T = TypeVar("T")  # a pytree of parameters

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
REPLICAS = "data"
HEADS = "tensor"
BATCH = PartitionSpec(ROWS)

# The first match wins. A pattern matches the end of a leaf's path, from a "/" on, so
# one rule covers a parameter, its gradient and its moments. Specs are for one layer:
# stacked layers get a leading None.
#
# Rows of factors are sharded, columns (the rank) never are. So a Gram matrix is a sum
# of small products over devices, and no factor is gathered. Arrays with one entry per
# column are replicated. Between v and the next u, only the low-rank bottleneck R
# crosses `tensor`. Blocks are a leading axis too, and `tensor` does not divide them.
_IN = r"(q|k|v|gate|up|head)"  # from D to heads, F or V
_OUT = r"(o|down|embedding)"  # from heads, F or V to D
_STREAM = "(attention|mlp|final)_norm"  # one scale per entry of D


def _rules(
    stream: str | None, thin: PartitionSpec
) -> tuple[tuple[str, PartitionSpec], ...]:
    """The table of a layout.

    Args:
      stream: axis over which the entries of the residual stream are divided.
      thin: spec of the factors that face the stream.
    """
    wide = PartitionSpec((HEADS, "fsdp"), None)
    return (
        (rf"{_IN}\.(u|a)", thin),
        (rf"{_IN}\.(v|b)", wide),
        (rf"{_OUT}\.(u|a)", wide),
        (rf"{_OUT}\.(v|b)", thin),
        (r"\w+\.(s|active|right_a|right_b|ns_coeffs)", PartitionSpec(None)),
        (_STREAM, PartitionSpec(stream)),
        (r"\w+_norm", PartitionSpec(None)),
        (_IN, PartitionSpec("fsdp", HEADS)),
        (_OUT, PartitionSpec(HEADS, "fsdp")),
    )


RULES = {
    "fully_sharded": _rules(HEADS, PartitionSpec((HEADS, "fsdp"), None)),
    "thin_replicated": _rules(None, PartitionSpec("fsdp", None)),
}
"""For each layout of tensor parallelism, the spec of every leaf by its path."""

LAYOUTS = tuple(RULES)
"""The default of a run comes first.

A block of SmolLM2-1.7B with all matrices of rank 128, on tensor 4, compiled: against
one device, "fully_sharded" divides FLOPs by 4.0, parameters by 4.0 and activations by
4.1, "thin_replicated" by 2.2, 2.1 and 2.9. It moves 7 R numbers more per token and
step, and saves about 3,000 FLOPs for each of their bytes on the wire. The links between
accelerators of one machine have a byte for every 1,000 to 2,500. Between machines they
have one for 10,000 or more, where "thin_replicated" is the faster one.
"""

UNAIDED = "thin_replicated"
"""The layout for functions that XLA divides without a `Placement`.

With "fully_sharded", what XLA (jaxlib 0.10.2) chooses by itself has given wrong
gradients in steps with micro-batches.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each mesh axis; one may be -1, for all remaining devices.

    Attributes:
      data: replicas of the parameters; shards the batch. -1, here or on another axis,
        takes all remaining devices.
      fsdp: shards parameters, optimizer state and the batch.
      tensor: shards heads, d_ff and vocabulary.
      tensor_layout: what `tensor` does to the side of a matrix that faces the residual
        stream. "fully_sharded" shards the rows of every factor, and the stream over
        d_model: parameters and FLOPs are divided exactly, and a block sums 7 R numbers
        per token over `tensor` in its forward pass, 14 R in a step. "thin_replicated"
        replicates the stream and the factors that face it: 2 R forward, one R after
        attention and one after the MLP, and 7 R in a step.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    tensor_layout: str = LAYOUTS[0]

    def validate(self) -> None:
        """Raises UserError naming the first invalid field."""
        sizes = self._sizes()
        for name, size in sizes.items():
            errors.check(
                f"mesh.{name}", size == -1 or size >= 1, f"{size} must be >= 1, or -1"
            )
        errors.check(
            "mesh", list(sizes.values()).count(-1) <= 1, "only one axis may be -1"
        )
        errors.check_choice("mesh.tensor_layout", self.tensor_layout, LAYOUTS)

    def build(
        self,
        num_devices: int | None = None,
        *,
        devices: Sequence[Any] | None = None,
    ) -> Mesh:
        """Returns a mesh over all devices, or the first `num_devices`, with Auto axes.

        Args:
          num_devices: how many; all by default.
          devices: what to choose from; by default, the devices of all processes.

        Raises:
          UserError: if the product of the sizes is not the number of devices.
        """
        if num_devices is None:
            num_devices = jax.device_count() if devices is None else len(devices)
        sizes = self._sizes()
        fixed = math.prod(size for size in sizes.values() if size != -1)
        product = " x ".join(f"{n} {s}" for n, s in sizes.items())
        sizes = {n: num_devices // fixed if s == -1 else s for n, s in sizes.items()}
        errors.check(
            "mesh",
            math.prod(sizes.values()) == num_devices,
            f"{product} does not match {num_devices} devices: the sizes must multiply "
            f"to {num_devices}",
        )
        return jax.make_mesh(
            tuple(sizes.values()),
            AXES,
            axis_types=(AxisType.Auto,) * len(AXES),
            devices=devices,
        )

    def _sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in AXES}


def path_name(path: tuple[Any, ...]) -> str:
    """Formats a key path: "/" before keys and indices, "." before attributes."""
    parts = []
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey):
            parts.append(f".{key.name}")
        elif isinstance(key, jax.tree_util.SequenceKey):
            parts.append(f"/{key.idx}")
        else:
            parts.append(f"/{getattr(key, 'key', key)}")
    return "".join(parts).lstrip("/.")


def partition_spec(
    name: str, shape: tuple[int, ...], layout: str = UNAIDED
) -> PartitionSpec:
    """Returns the spec of a leaf from the first rule that matches.

    Scalars are replicated. Additional leading axes are layers, which are not sharded.

    Args:
      name: path of the leaf, from `path_name`.
      shape: shape of the leaf.
      layout: one of `LAYOUTS`.

    Raises:
      ValueError: if no rule covers the leaf.
    """
    if not shape:
        return PartitionSpec()
    for pattern, spec in RULES[layout]:
        if re.search(rf"(^|/){pattern}$", name):
            if len(spec) > len(shape):
                continue
            return PartitionSpec(*[None] * (len(shape) - len(spec)), *spec)
    raise ValueError(f"no sharding rule covers {name!r} of shape {shape}")


def shardings(tree: Any, mesh: Mesh | AbstractMesh, layout: str = UNAIDED) -> Any:
    """Returns the sharding of every leaf of a tree of arrays or abstract arrays.

    Args:
      tree: parameters, or a state that mirrors them.
      mesh: the devices.
      layout: one of `LAYOUTS`.

    Raises:
      UserError: if an axis is not divisible by its mesh axes; names the leaf.
      ValueError: if no rule covers a leaf.
    """

    def one(path, leaf):
        name = path_name(path)
        spec = partition_spec(name, leaf.shape, layout)
        for axis, names in enumerate(spec):
            names = (names,) if isinstance(names, str) else names or ()
            parts = math.prod(mesh.shape[n] for n in names)
            used = [n for n in names if mesh.shape[n] > 1] or names
            size = leaf.shape[axis]
            errors.check(
                f"mesh.{'/'.join(used)}",
                size % parts == 0,
                f"axis {axis} of {name} {leaf.shape} is not divisible by {parts}: "
                f"{_nearest_sizes(size, parts)}",
            )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)


def _nearest_sizes(size: int, parts: int) -> str:
    """What to change where `parts` devices do not divide an axis."""
    below = size // parts * parts
    sizes = f"{below} or {below + parts}" if below else f"{parts}"
    fewer = max((n for n in range(1, parts) if size % n == 0), default=1)
    return f"{sizes} would be, or {size} by {fewer}"


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of parts into which a mesh divides the rows of a batch."""
    return math.prod(mesh.shape[name] for name in ROWS)


def check_heads(
    mesh: Mesh | AbstractMesh, *, num_heads: int, num_kv_heads: int
) -> None:
    """Raises UserError unless each device gets whole heads of queries, keys and values.

    Rows of q.v divide by `tensor` even where heads do not. Attention would then move
    parts of heads between devices. Where `tensor` divides `num_kv_heads`, it divides
    `num_heads`, which is a multiple of it.
    """
    parts = mesh.shape[HEADS]
    heads = f"model.num_kv_heads = {num_kv_heads}"
    if num_heads == num_kv_heads:
        heads = f"model.num_heads = {heads}"
    divisors = [n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0]
    errors.check(
        f"mesh.{HEADS}",
        num_kv_heads % parts == 0,
        f"{parts} does not divide {heads}, and every device needs whole heads: set it "
        f"to one of {', '.join(map(str, divisors))}, or the heads to a multiple of "
        f"{parts}",
    )


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the model's arrays are, for functions that XLA partitions.

    XLA may choose another division for what nothing constrains: of activations by the
    axis of the weights, for example. On one device every method returns its argument.
    Within `on_each_replica`, the methods see the devices of one replica.

    Attributes:
      mesh: the devices.
      layout: one of `LAYOUTS`.
    """

    mesh: Mesh | AbstractMesh
    layout: str = UNAIDED

    @property
    def row_shards(self) -> int:
        """Number of parts of a batch."""
        return math.prod(size for name, size in self._sizes() if name in ROWS)

    @property
    def num_replicas(self) -> int:
        """Number of copies of the parameters that `on_each_replica` tells apart.

        It is 1 on a mesh of all three axes, where XLA (jaxlib 0.10.2) would abort.
        """
        others = [self.mesh.shape[name] for name in AXES if name != REPLICAS]
        return 1 if min(others) > 1 else self.mesh.shape[REPLICAS]

    @property
    def num_devices(self) -> int:
        """Number of devices."""
        return math.prod(size for _, size in self._sizes())

    @property
    def gathers_weights(self) -> bool:
        """Whether `weights` moves anything."""
        return self.mesh.shape["fsdp"] > 1

    def stream(self, x: Float[Array, "B ... D"]) -> Float[Array, "B ... D"]:
        """Divides the residual stream: rows over `ROWS`, D as the layout says."""
        columns = HEADS if self.layout == "fully_sharded" else None
        return self._constrain(x, ROWS, *[None] * (x.ndim - 2), columns)

    def bottleneck(self, h: Float[Array, "... R"]) -> Float[Array, "... R"]:
        """Gives all devices along `tensor` all R numbers of their rows.

        The gradient is placed alike. Gradients of a replicated factor are then local,
        not sums over `tensor`.
        """
        return self._constrain(h, *[PartitionSpec.UNCONSTRAINED] * (h.ndim - 1), None)

    def weights(self, tree: T, dtype: jax.typing.DTypeLike) -> T:
        """Gathers matrices and factors over `fsdp`, in the dtype of products.

        Each device gets its own rows of the gradients, not all of them.
        """
        if not self.gathers_weights:
            return tree

        def one(path, leaf):
            spec = partition_spec(path_name(path), leaf.shape, self.layout)
            whole = [_without(axes, "fsdp") for axes in spec]
            if whole == list(spec):
                return leaf
            rows = self._constrain(leaf, *spec)
            return self._constrain(rows.astype(dtype), *whole)

        return jax.tree_util.tree_map_with_path(one, tree)

    def copies(self, tree: T, dtype: jax.typing.DTypeLike) -> T:
        """Gives each part of a batch what `weights` returns, along a new first axis.

        All uses of a copy add their gradients on its devices, and the sum over the
        copies is one reduction. A single part gets the arrays without that axis.
        """
        tree = self.weights(tree, dtype)
        if self.row_shards == 1:
            return tree

        def one(path, leaf):
            spec = partition_spec(path_name(path), leaf.shape, self.layout)
            copies = jnp.broadcast_to(leaf, (self.row_shards, *leaf.shape))
            return self._constrain(copies, ROWS, *(_without(a, "fsdp") for a in spec))

        return jax.tree_util.tree_map_with_path(one, tree)

    def on_each_replica(
        self, fn: Callable[[T, Any], tuple[Any, ...]], params: T, rows: Any
    ) -> tuple[Any, ...]:
        """Returns the mean over `data` of fn(params, rows), a tree of floats.

        Sums within `fn` stay on a replica, and cross `data` once.

        Args:
          fn: a function of the parameters and the rows of one replica.
          params: replicated over `data`.
          rows: tree of arrays (N, B, ...), whose axis B is divided by `ROWS`.
        """
        if self.num_replicas == 1:
            return fn(params, rows)

        def mean(params, rows):
            return jax.tree.map(lambda x: jax.lax.pmean(x, REPLICAS), fn(params, rows))

        return jax.shard_map(
            mean,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), PartitionSpec(None, REPLICAS)),
            out_specs=PartitionSpec(),
            axis_names={REPLICAS},
            check_vma=False,
        )(params, rows)

    def _sizes(self) -> list[tuple[str, int]]:
        """Axes and their sizes, without those that `on_each_replica` divides."""
        manual = _manual_axes()
        return [pair for pair in self.mesh.shape.items() if pair[0] not in manual]

    def _constrain(self, x: Array, *spec: Any) -> Array:
        if self.num_devices == 1:
            return x
        manual = _manual_axes()
        mesh = jax.sharding.get_abstract_mesh() if manual else self.mesh
        for name in manual:
            spec = tuple(
                axes if axes is PartitionSpec.UNCONSTRAINED else _without(axes, name)
                for axes in spec
            )
        place = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.lax.with_sharding_constraint(x, place)


UNPLACED = Placement(AbstractMesh((1,) * len(AXES), AXES))
"""One device; or a mesh on which XLA chooses, with the layout `UNAIDED`."""


def _manual_axes() -> tuple[str, ...]:
    """The axes that a `jax.shard_map` around this call divides by hand."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Manual)


def _without(axes: str | tuple[str, ...] | None, name: str) -> Any:
    """The axes of one dimension without this one."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    left = tuple(n for n in names if n != name)
    return left[0] if len(left) == 1 else left or None


def abstract(tree: Any, tree_shardings: Any) -> Any:
    """Returns ShapeDtypeStructs with the given shardings, as a restore needs them."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree,
        tree_shardings,
    )
