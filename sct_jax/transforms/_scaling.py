"""Learning-rate multipliers per component, and a bound on the rotation of columns."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sct_jax import linalg, spectral
from sct_jax.transforms import _common


def scale_components(
    *,
    uv: _common.ScalarOrSchedule = 1.0,
    s: _common.ScalarOrSchedule = 1.0,
    dense: _common.ScalarOrSchedule = 1.0,
    base_width: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales the updates of u and v, of s, and of other arrays by separate multipliers.

    Adam moves every entry of u by the learning rate, so columns rotate by the learning
    rate times sqrt(fan_in). `base_width` multiplies the updates of u and v by another
    sqrt(base_width / fan), which makes the rotation independent of the width.
    LowRankFactors are scaled by `uv`, without the width.

    Args:
      uv: multiplier, or schedule of it, for u and v.
      s: multiplier, or schedule of it, for singular values.
      dense: multiplier, or schedule of it, for arrays outside factor tuples.
      base_width: fan at which `uv` applies unscaled; None for no scaling by width.

    Raises:
      ValueError: for a multiplier that is negative or not finite, and for a width that
        is not positive.
    """
    for name, multiplier in {"uv": uv, "s": s, "dense": dense}.items():
        _common.check_number(name, multiplier, least=0)
    _common.check_number("base_width", base_width, above=0)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        uv_now, s_now, dense_now = (
            _common.value_of(x, state.count) for x in (uv, s, dense)
        )

        def times(x: Any, multiplier: Any) -> Any:
            # `optax.masked` may remove single leaves of a factor tuple.
            masked = isinstance(x, optax.MaskedNode)
            return x if masked else (x * multiplier).astype(x.dtype)

        def times_uv(x: Any) -> Any:
            if base_width is None or isinstance(x, optax.MaskedNode):
                return times(x, uv_now)
            return times(x, uv_now * (base_width / x.shape[-2]) ** 0.5)

        def scale(update):
            if spectral.is_spectral(update):
                return update._replace(
                    u=times_uv(update.u),
                    s=times(update.s, s_now),
                    v=times_uv(update.v),
                )
            if spectral.is_factors(update):
                return jax.tree.map(lambda x: times(x, uv_now), update)
            return times(update, dense_now)

        updates = jax.tree.map(scale, updates, is_leaf=spectral.is_factors)
        return updates, state.next()

    return optax.GradientTransformationExtraArgs(_common.init_count, update_fn)


def limit_rotation(
    max_rotation: float | jax.Array,
) -> optax.GradientTransformationExtraArgs:
    """Clips the norm of every column of the updates of u and v to `max_rotation`.

    A column of norm 1 that moves by d rotates by about d radians. Use it with rules
    that divide by s, under which columns of small singular values would rotate without
    bound. Place it after the learning rate.

    Args:
      max_rotation: bound, in radians.

    Raises:
      ValueError: for a bound that is negative or not finite.
    """
    _common.check_number("max_rotation", max_rotation, least=0)

    def shorten(x):
        wide = linalg.as_float32(x)
        peak = jnp.max(jnp.abs(wide), axis=-2, keepdims=True)
        divisor = linalg.range_divisor(peak)
        scaled = wide / divisor
        squares = jnp.sum(jnp.square(scaled), axis=-2, keepdims=True)
        length = linalg.safe_sqrt(squares)
        exceeds = length * divisor > max_rotation
        factor = max_rotation / jnp.where(exceeds, length, 1)
        return jnp.where(exceeds, scaled * factor, wide).astype(x.dtype)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        return jax.tree.map(
            lambda d: (
                d._replace(u=shorten(d.u), v=shorten(d.v))
                if _common.is_whole_spectral(d)
                else d
            ),
            updates,
            is_leaf=_common.is_weight,
        ), state

    return optax.GradientTransformationExtraArgs(_common.empty_of_whole, update_fn)
