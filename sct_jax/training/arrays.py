"""The arrays of a state by name, and what the record of a checkpoint says of them."""

import re
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sct_jax import errors, sharding
from sct_jax.training import records
from sct_jax.training import state as state_lib

# Counts of applied updates, which differ from the step by those that were skipped.
_COUNT = re.compile(r"opt_state.*[./]count")
_PIECE = 1 << 18


def by_name(state: state_lib.TrainState) -> dict[str, Any]:
    """Returns the arrays in order, without masked leaves, which differ by layout."""
    return {
        sharding.path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def is_of_guard(name: str) -> bool:
    """Returns whether an array is of `guard`, which states did not always have."""
    return re.split("[./]", name)[0] == "guard"


def stack_and_free(arrays: Sequence[jax.Array]) -> jax.Array:
    """Stacks the arrays of all layers and frees them: a state may not fit twice."""
    stacked = jax.block_until_ready(jnp.stack(arrays))
    for array in arrays:
        array.delete()
    return stacked


def summarise(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns what a record says about the arrays of a state.

    `finite` tells whether parameters and optimizer state are. Half of the cores are
    left to whatever writes the arrays meanwhile.
    """
    leaves, finite = {}, True
    digest = lambda name: _digest(arrays[name])
    for name, found in records.in_parallel(digest, arrays, share=0.5).items():
        leaves[name], is_finite = found
        if name.startswith(("params", "opt_state")):
            finite = finite and is_finite
    return {"leaves": leaves, "finite": finite}


def summarise_parts(arrays: dict[str, jax.Array]) -> dict[str, Any]:
    """Returns what `summarise` does, without CRC-32, for arrays in several processes.

    The files of a checkpoint have sums of their own.
    """
    leaves = {
        name: {"shape": list(array.shape), "dtype": str(array.dtype)}
        for name, array in arrays.items()
    }
    counted = [x for n, x in arrays.items() if n.startswith(("params", "opt_state"))]
    return {"leaves": leaves, "finite": bool(_all_finite(counted))}


@jax.jit
def _all_finite(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(array)) for array in arrays]))


def describe(arrays: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns shape, dtype and CRC-32 of every array."""
    return records.in_parallel(lambda name: _digest(arrays[name])[0], arrays)


def _digest(array: Any) -> tuple[dict[str, Any], bool]:
    """Shape, dtype and CRC-32 of an array, and whether it is finite."""
    flat = np.ascontiguousarray(array).reshape(-1)
    crc, finite = 0, True
    # Both by pieces that stay in a core's cache.
    step = max(_PIECE // flat.itemsize, 1)
    for start in range(0, flat.size, step):
        piece = flat[start : start + step]
        crc = zlib.crc32(piece.view(np.uint8).data, crc)
        finite = finite and _is_finite(piece)
    described = {"shape": list(array.shape), "dtype": str(array.dtype), "crc32": crc}
    return described, finite


def _is_finite(array: np.ndarray) -> bool:
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return True
    with np.errstate(all="ignore"):
        # Much faster than to look at each number, and a finite sum is proof enough.
        if np.isfinite(array.sum(dtype=np.result_type(array.dtype, np.float32))):
            return True
    return bool(np.isfinite(array).all())


def check_step(arrays: dict[str, Any], step: int, *, first: int = 0) -> None:
    """Raises DamagedError where the state itself is of another step.

    Args:
      arrays: by name.
      step: that the state claims to be of.
      first: steps before its phase, which its optimizer does not count.
    """
    applied = step - first - int(arrays.get("guard.skipped", 0))
    for name, leaf in arrays.items():
        counts = leaf.ndim == 0 and jnp.issubdtype(leaf.dtype, jnp.integer)
        if name == "step":
            wanted = step
        elif counts and _COUNT.fullmatch(name):
            wanted = applied
        else:
            continue
        if int(leaf) != wanted:
            raise records.DamagedError(f"{name} is {int(leaf)}, not {wanted}")


def check_shapes(
    target: dict[str, Any], leaves: dict[str, dict[str, Any]], step: int
) -> None:
    """Raises UserError, listing the arrays whose shape or dtype differs."""
    wanted = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in target.items()}
    saved = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in leaves.items()}
    found = [
        f"{name}: {saved.get(name, 'absent')} saved, {wanted.get(name, 'absent')} now"
        for name in sorted(wanted.keys() | saved.keys())
        if wanted.get(name) != saved.get(name)
    ]
    errors.check(
        "workdir",
        not found,
        f"checkpoint {step} has other arrays than this configuration; choose another "
        "--workdir, or undo:\n  " + "\n  ".join(found[:20]),
    )
