"""The device mesh, and the table of sharding rules for every array of a state."""

import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sct_jax import errors

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
HEADS = "tensor"
BATCH = PartitionSpec(ROWS)

# The first match wins. A pattern matches the end of a leaf's path, from a "/" on, so
# one rule covers a parameter, its gradient and its moments. Specs are for one layer:
# stacked layers get a leading None.
#
# Rows of factors are sharded, columns (the rank) never are. So a Gram matrix is a sum
# of small products over devices, and no factor is gathered. Arrays with one entry per
# column are replicated. Between v and the next u, only the low-rank bottleneck R
# crosses `tensor`.
_IN = r"(q|k|v|gate|up|head)"  # from D to heads, F or V
_OUT = r"(o|down|embedding)"  # from heads, F or V to D
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (rf"{_IN}\.(u|a)", PartitionSpec("fsdp", None)),
    (rf"{_IN}\.(v|b)", PartitionSpec(("tensor", "fsdp"), None)),
    (rf"{_OUT}\.(u|a)", PartitionSpec(("tensor", "fsdp"), None)),
    (rf"{_OUT}\.(v|b)", PartitionSpec("fsdp", None)),
    (r"\w+\.(s|active|right_a|right_b|ns_coeffs)", PartitionSpec(None)),
    (r"\w+_norm", PartitionSpec(None)),
    (_IN, PartitionSpec("fsdp", "tensor")),
    (_OUT, PartitionSpec("tensor", "fsdp")),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each mesh axis; one may be -1, for all remaining devices.

    Attributes:
      data: replicas of the parameters; shards the batch.
      fsdp: shards parameters, optimizer state and the batch.
      tensor: shards heads, d_ff and vocabulary.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def validate(self) -> None:
        """Raises UserError naming the first invalid field."""
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            errors.check(
                f"mesh.{name}", size == -1 or size >= 1, f"{size} must be >= 1, or -1"
            )
        errors.check(
            "mesh", list(sizes.values()).count(-1) <= 1, "only one axis may be -1"
        )

    def build(self, num_devices: int | None = None) -> Mesh:
        """Returns a mesh over all devices, or the first `num_devices`, with Auto axes.

        Raises:
          UserError: if the product of the sizes is not the number of devices.
        """
        devices = jax.device_count() if num_devices is None else num_devices
        sizes = dataclasses.asdict(self)
        fixed = math.prod(size for size in sizes.values() if size != -1)
        product = " x ".join(f"{n} {s}" for n, s in sizes.items())
        sizes = {n: devices // fixed if s == -1 else s for n, s in sizes.items()}
        errors.check(
            "mesh",
            math.prod(sizes.values()) == devices,
            f"{product} does not match {devices} devices: the sizes must multiply to "
            f"{devices}",
        )
        return jax.make_mesh(
            tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES)
        )


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


def partition_spec(name: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Returns the spec of a leaf from the first rule that matches.

    Scalars are replicated. Additional leading axes are layers, which are not sharded.

    Args:
      name: path of the leaf, from `path_name`.
      shape: shape of the leaf.

    Raises:
      ValueError: if no rule covers the leaf.
    """
    if not shape:
        return PartitionSpec()
    for pattern, spec in RULES:
        if re.search(rf"(^|/){pattern}$", name):
            if len(spec) > len(shape):
                continue
            return PartitionSpec(*[None] * (len(shape) - len(spec)), *spec)
    raise ValueError(f"no sharding rule covers {name!r} of shape {shape}")


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns the sharding of every leaf of a tree of arrays or abstract arrays.

    Raises:
      UserError: if an axis is not divisible by its mesh axes; names the leaf.
      ValueError: if no rule covers a leaf.
    """

    def one(path, leaf):
        name = path_name(path)
        spec = partition_spec(name, leaf.shape)
        for axis, names in enumerate(spec):
            names = (names,) if isinstance(names, str) else names or ()
            parts = math.prod(mesh.shape[n] for n in names)
            errors.check(
                f"mesh.{'/'.join(names)}",
                leaf.shape[axis] % parts == 0,
                f"axis {axis} of {name} {leaf.shape} is not divisible by {parts}",
            )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)


def abstract(tree: Any, tree_shardings: Any) -> Any:
    """Returns ShapeDtypeStructs with the given shardings, as a restore needs them."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree,
        tree_shardings,
    )
