"""Step counts, schedules, and access to the factors of a tree."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from sct_jax import spectral

ScalarOrSchedule = float | jax.Array | optax.Schedule


class CountState(NamedTuple):
    """Number of updates so far, for schedules and intervals."""

    count: Int[Array, ""]

    def next(self) -> "CountState":
        """Returns the state after one more update; the count saturates."""
        return CountState(jnp.asarray(optax.safe_increment(self.count)))


def init_count(params: optax.Params) -> CountState:
    """Returns the state before the first update."""
    del params
    return CountState(jnp.zeros([], jnp.int32))


def value_of(value: ScalarOrSchedule, count: Int[Array, ""]) -> Any:
    """Returns the value, or the value of the schedule at `count`."""
    return value(count) if callable(value) else value


@jax.jit  # outside of a jit, a power of a concrete count compiles for each new count
def bias_correction(
    decay: float | jax.Array, count: Int[Array, ""]
) -> Float[Array, ""]:
    """Returns 1 - decay^count, which divides a moving average that started at zero."""
    return 1 - decay**count


def running_mean(old: Array, new: Array, decay: float | Array) -> Array:
    """Returns decay old + (1 - decay) new in the dtype of the old mean."""
    return (decay * old + (1 - decay) * new.astype(old.dtype)).astype(old.dtype)


def require_params(params: optax.Params | None, name: str) -> optax.Params:
    """Returns params.

    Args:
      params: as passed to the update function.
      name: of the transformation, for the message.

    Raises:
      ValueError: if params is None.
    """
    if params is None:
        raise ValueError(f"{name} needs params: call tx.update(updates, state, params)")
    return params


def select_spectral(
    updates: optax.Updates, params: optax.Params
) -> tuple[
    list[tuple[spectral.SpectralFactors, spectral.SpectralFactors]],
    Callable[[list[Any]], Any],
]:
    """Returns the (param, update) pairs of all SpectralFactors, and a function back.

    The function takes one value per pair and returns `updates` with these values as the
    new updates. Weights that `optax.masked` removed are left alone.
    """
    leaves, treedef = jax.tree.flatten(updates, is_leaf=is_weight)
    param_leaves = treedef.flatten_up_to(params)
    chosen = [i for i, leaf in enumerate(leaves) if is_whole_spectral(leaf)]

    def rebuild(new: list[Any]) -> Any:
        filled = list(leaves)
        for i, value in zip(chosen, new, strict=True):
            filled[i] = value
        return jax.tree.unflatten(treedef, filled)

    return [(param_leaves[i], leaves[i]) for i in chosen], rebuild


def per_weight(
    fn: Callable[[Any], Any], params: optax.Params, is_chosen: Callable[[Any], bool]
) -> Any:
    """Returns fn(w) for every chosen weight, a `MaskedNode` for every other leaf."""
    return jax.tree.map(
        lambda w: fn(w) if is_chosen(w) else optax.MaskedNode(),
        params,
        is_leaf=is_weight,
    )


def is_weight(x: Any) -> bool:
    """Returns whether x is a factor tuple or a masked leaf; meant as `is_leaf`."""
    return spectral.is_factors(x) or is_masked(x)


def is_whole_spectral(x: Any) -> TypeGuard[spectral.SpectralFactors]:
    """Returns whether x is a SpectralFactors without masked parts."""
    return spectral.is_spectral(x) and not any(map(is_masked, x))


def is_masked(x: Any) -> bool:
    """Returns whether `optax.masked` removed this leaf."""
    return isinstance(x, optax.MaskedNode)
