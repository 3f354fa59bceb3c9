"""Where every array lives: the device mesh and the one table of sharding rules."""

import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sct_jax import errors

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# First match wins; a name is matched from a "/" to the end of a leaf's path, so one
# rule serves a parameter, its gradient and its moments. Axes are those of one layer:
# stacked layers get a leading None. Rows of factors are sharded, columns (the rank)
# never are, so a Gram matrix is a sum over devices of small products and no factor is
# gathered for it. What there is one of per column is replicated.
# The low-rank bottleneck R is all that crosses `tensor` between v and the next u.
_IN = r"(q|k|v|gate|up|head)"  # D to heads, F or V
_OUT = r"(o|down|embedding)"  # back to D
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
    """Devices along each mesh axis; one of them may be -1 for all that remain.

    Attributes:
      data: replicas of the parameters, each with its share of the batch.
      fsdp: shards of parameters and optimizer state, and of the batch.
      tensor: shards of heads, d_ff and vocabulary.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def validate(self) -> None:
        """Raises UserError, naming the field, for sizes that make no mesh."""
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            errors.check(
                f"mesh.{name}", size == -1 or size >= 1, f"{size} must be >= 1, or -1"
            )
        errors.check(
            "mesh", list(sizes.values()).count(-1) <= 1, "only one axis may be -1"
        )

    def build(self, num_devices: int | None = None) -> Mesh:
        """Returns the mesh over all devices, with Auto axes.

        Raises:
          UserError: where the sizes do not multiply to the number of devices.
        """
        devices = jax.device_count() if num_devices is None else num_devices
        sizes = dataclasses.asdict(self)
        fixed = math.prod(size for size in sizes.values() if size != -1)
        product = " x ".join(f"{n} {s}" for n, s in sizes.items())
        sizes = {n: devices // fixed if s == -1 else s for n, s in sizes.items()}
        errors.check(
            "mesh",
            math.prod(sizes.values()) == devices,
            f"{product} does not multiply to the {devices} devices at hand",
        )
        return jax.make_mesh(
            tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES)
        )


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a readable path: "/" before a key or index, "." before an attribute."""
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
    """Returns the spec that the rule table gives to a leaf.

    Scalars are replicated. Leading axes beyond the rule's are layers, not sharded.

    Raises:
      ValueError: for a leaf that no rule covers.
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
      UserError: where an axis is not divisible by its mesh axes; names the leaf.
      ValueError: for a leaf that no rule covers.
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
    """Returns ShapeDtypeStructs that carry the shardings, for a restore."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree,
        tree_shardings,
    )
