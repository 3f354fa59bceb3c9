"""A rate of its own for every component of a weight."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sct_jax import spectral
from sct_jax.transforms import _common


def scale_components(
    *,
    uv: _common.ScalarOrSchedule = 1.0,
    s: _common.ScalarOrSchedule = 1.0,
    dense: _common.ScalarOrSchedule = 1.0,
    base_width: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by a rate of their own for u and v, s, and other arrays.

    Adam moves every entry of u by the learning rate, so its columns turn by that rate
    times sqrt(fan_in). With `base_width` the rates of u and v are further multiplied by
    sqrt(base_width / fan), and columns turn alike at every width. LowRankFactors are
    scaled as u and v are, without the width.

    Args:
      uv: factor, or schedule of it, for u and v.
      s: the same for singular values.
      dense: the same for arrays outside factor tuples.
      base_width: fan at which `uv` applies as it is; None switches the scaling off.
    """

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        rate_uv, rate_s, rate_dense = (
            _common.value_of(r, state.count) for r in (uv, s, dense)
        )

        def times(x: Any, rate: Any) -> Any:
            # `optax.masked` may have taken leaves out, even of a factor tuple.
            masked = isinstance(x, optax.MaskedNode)
            return x if masked else (x * rate).astype(x.dtype)

        def turn(x: Any) -> Any:
            if base_width is None or isinstance(x, optax.MaskedNode):
                return times(x, rate_uv)
            return times(x, rate_uv * (base_width / x.shape[-2]) ** 0.5)

        def scale(update):
            if spectral.is_spectral(update):
                return spectral.SpectralFactors(
                    turn(update.u),
                    times(update.s, rate_s),
                    turn(update.v),
                )
            if spectral.is_factors(update):
                return jax.tree.map(lambda x: times(x, rate_uv), update)
            return times(update, rate_dense)

        updates = jax.tree.map(scale, updates, is_leaf=spectral.is_factors)
        return updates, state.next()

    return optax.GradientTransformationExtraArgs(_common.init_count, update_fn)


def limit_rotation(
    max_rotation: float | jax.Array,
) -> optax.GradientTransformationExtraArgs:
    """Shortens every column of the updates of u and v to at most `max_rotation`.

    A column of norm 1 that moves by d turns by about d radians. For rules that divide
    by s, where small singular values would turn without bound. After the learning rate.
    """

    def shorten(x):
        length = jnp.linalg.norm(x.astype(jnp.float32), axis=-2, keepdims=True)
        factor = jnp.where(length > max_rotation, max_rotation / length, 1.0)
        return (x * factor).astype(x.dtype)

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

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
