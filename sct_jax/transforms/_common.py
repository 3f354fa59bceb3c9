"""What every transformation needs: counts, schedules, and the factors of a tree."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from sct_jax import spectral

T = TypeVar("T")  # an optimizer state

ScalarOrSchedule = float | jax.Array | optax.Schedule


class CountState(NamedTuple):
    """Number of updates seen, for schedules and intervals."""

    count: Int[Array, ""]

    def next(self) -> "CountState":
        """Returns the state after one more update; the largest integer is kept."""
        return CountState(jnp.asarray(optax.safe_increment(self.count)))


def init_count(params: optax.Params) -> CountState:
    """Returns the state before the first update."""
    del params
    return CountState(jnp.zeros([], jnp.int32))


def value_of(rate: ScalarOrSchedule, count: Int[Array, ""]) -> Any:
    """Returns the rate at this count."""
    return rate(count) if callable(rate) else rate


@jax.jit  # a power of a count that is no tracer compiles anew for every count
def share_seen(decay: float | jax.Array, count: Int[Array, ""]) -> Float[Array, ""]:
    """Returns 1 - decay^count, by which a mean that started at 0 is too small."""
    return 1 - decay**count


def require(params: optax.Params | None, name: str) -> optax.Params:
    """Returns params; raises ValueError where the caller of `name` left them out."""
    if params is None:
        raise ValueError(f"{name} needs params: call tx.update(updates, state, params)")
    return params


def select_spectral(
    updates: optax.Updates, params: optax.Params
) -> tuple[
    list[tuple[spectral.SpectralFactors, spectral.SpectralFactors]],
    Callable[[list[Any]], Any],
]:
    """Pairs (param, update) of all SpectralFactors, and how to put others back.

    Where a wrapper such as `optax.masked` has put something else in the place of a
    factor tuple, it is left alone.
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


def running_mean(old: Array, new: Array, decay: float | Array) -> Array:
    """Returns decay old + (1 - decay) new in the precision of the old mean."""
    return (decay * old + (1 - decay) * new.astype(old.dtype)).astype(old.dtype)


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
    """Returns whether x is a factor tuple, or what a mask put in a weight's place."""
    return spectral.is_factors(x) or is_masked(x)


def is_whole_spectral(x: Any) -> TypeGuard[spectral.SpectralFactors]:
    """Returns whether x is a SpectralFactors of which no part is masked."""
    return spectral.is_spectral(x) and not any(map(is_masked, x))


def is_masked(x: Any) -> bool:
    """Returns whether `optax.masked` has taken this leaf out."""
    return isinstance(x, optax.MaskedNode)


def map_first_moments(state: T, fn: Callable[[Any], Any]) -> T:
    """Returns an optimizer state with `fn` applied to every field named `mu`.

    That is what optax and this package call a mean of gradients, wherever it stands in
    a chain or a partition.
    """

    def holds_mu(x):
        return "mu" in getattr(x, "_fields", ())

    return jax.tree.map(
        lambda x: x._replace(mu=fn(x.mu)) if holds_mu(x) else x, state, is_leaf=holds_mu
    )
