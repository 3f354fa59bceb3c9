"""Step counts, schedules, checks, and access to the factors of a tree."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from sct_jax import errors, sharding, spectral

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


def count_of_whole(params: optax.Params) -> CountState:
    """`init_count`, for rules that constrain whole weights; see `check_whole`."""
    check_whole(params)
    return init_count(params)


def empty_of_whole(params: optax.Params) -> optax.EmptyState:
    """The state of rules without one that act on whole weights; see `check_whole`."""
    check_whole(params)
    return optax.EmptyState()


def check_whole(params: optax.Params) -> None:
    """Raises ValueError if a rule on whole weights would miss some of them.

    A weight of which `optax.masked` or `optax.partition` removed some factors but not
    all, or one in the single vector of `optax.flatten`, would leave the manifold.
    """
    if getattr(params, "ndim", None) == 1:
        raise ValueError(
            "the parameters are one vector, in which factors would lose their "
            "constraint: inside optax.flatten, use only rules for single entries"
        )
    for path, w in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight):
        if not spectral.is_factors(w):
            continue
        removed = [name for name in w._fields if is_masked(getattr(w, name))]
        if 0 < len(removed) < len(w):
            raise ValueError(
                f"{sharding.path_name(path) or 'the weight'} is split: a mask or label "
                f"removed {' and '.join(removed)} and kept the rest. Mask or label "
                "factor tuples as a whole: jax.tree.map(..., params, "
                "is_leaf=spectral.is_factors)"
            )


def check_no_blocks(params: optax.Params, rule: str) -> None:
    """Raises ValueError for blocks, which a rule on the SVD of W does not know.

    Args:
      params: the parameters.
      rule: what does not apply, for the message.
    """
    for path, w in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight):
        if spectral.is_blocks(w):
            raise ValueError(
                f"{sharding.path_name(path) or 'the weight'} is in blocks, to which "
                f"{rule} does not apply: its shuffle fixes which columns of u and v "
                "meet, so a rotation of them changes W. Use another rule, or no blocks"
            )


def value_of(value: ScalarOrSchedule, count: Int[Array, ""]) -> Any:
    """Returns the value, or the value of the schedule at `count`."""
    return value(count) if callable(value) else value


def check_number(
    name: str,
    value: Any,
    *,
    least: int | None = None,
    above: int | None = None,
    below: int | None = None,
    integer: bool = False,
) -> None:
    """Raises ValueError unless a hyperparameter is a number within its bounds.

    It has to meet them once rounded to float32 too, and be finite there. None,
    schedules and tracers pass: their numbers are not known yet.

    Args:
      name: of the hyperparameter, for the message.
      value: number, array, schedule or None.
      least: inclusive lower bound.
      above: exclusive lower bound.
      below: exclusive upper bound.
      integer: whether the number must be an integer.
    """
    if value is None or callable(value) or isinstance(value, jax.core.Tracer):
        return
    bounds = [
        (sign, bound, holds)
        for sign, bound, holds in (
            (">=", least, operator.ge),
            (">", above, operator.gt),
            ("<", below, operator.lt),
        )
        if bound is not None
    ]
    number = np.asarray(jax.device_get(value))
    valid = (
        number.ndim == 0
        and jnp.issubdtype(number.dtype, jnp.number)
        and not jnp.issubdtype(number.dtype, jnp.complexfloating)
        and abs(number) <= float(jnp.finfo(jnp.float32).max)
        and all(
            holds(rounded, bound)
            for rounded in (number, errors.to_float32(float(number)))
            for _, bound, holds in bounds
        )
        and not (integer and number % 1)
    )
    if not valid:
        kind = "an integer" if integer else "a finite number"
        wanted = " and ".join([kind, *(f"{sign} {bound}" for sign, bound, _ in bounds)])
        raise ValueError(f"{name} must be {wanted}, got {value}")


def check_steps(newton_schulz_steps: Any) -> None:
    """Raises ValueError unless the number of steps is a Python integer >= 0."""
    if not isinstance(newton_schulz_steps, int) or newton_schulz_steps < 0:
        raise ValueError(
            "newton_schulz_steps must be an integer >= 0, named in the static_args of "
            f"optax.inject_hyperparams, got {newton_schulz_steps}"
        )


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
    list[tuple[Any, Any]],
    Callable[[list[Any]], Any],
]:
    """Returns the (param, update) pairs of all spectral weights, and a function back.

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


def is_whole_spectral(
    x: Any,
) -> TypeGuard[spectral.SpectralFactors | spectral.BlockSpectralFactors]:
    """Returns whether `spectral.is_spectral(x)`, and no part is masked."""
    return spectral.is_spectral(x) and not any(map(is_masked, x))


def is_masked(x: Any) -> bool:
    """Returns whether `optax.masked` removed this leaf."""
    return isinstance(x, optax.MaskedNode)
