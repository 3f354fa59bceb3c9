"""Freezes the columns that a weight stores but does not use."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from sct_jax.transforms import _common


class ActiveColumns(NamedTuple):
    """Marks the singular triples that a weight uses; s is 0 in the others."""

    active: Bool[Array, "*layers R"]


class FreezeInactiveColumnsState(NamedTuple):
    """`ActiveColumns` per SpectralFactors, a `MaskedNode` for every other leaf."""

    columns: Any


def freeze_inactive_columns() -> optax.GradientTransformationExtraArgs:
    """Keeps s at zero, and u and v constant, in the columns marked as inactive.

    Stacked layers share one stored rank. A layer that needs a lower rank has inactive
    columns. All columns start active; `rank.resize` changes the marks in the state.
    Place it after the learning rate, before the clip and the retraction.

    Returns:
      A transformation that needs `params`.
    """

    def init_fn(params):
        _common.check_whole(params)
        return FreezeInactiveColumnsState(
            _common.per_weight(
                lambda w: ActiveColumns(jnp.ones(w.s.shape, bool)),
                params,
                _common.is_whole_spectral,
            )
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        params = _common.require_params(params, "freeze_inactive_columns")

        def freeze(d, p, columns):
            if not _common.is_whole_spectral(d):
                return d
            active = columns.active
            wide = active[..., None, :]
            return d._replace(
                u=jnp.where(wide, d.u, 0),
                s=jnp.where(active, d.s, -p.s.astype(d.s.dtype)),
                v=jnp.where(wide, d.v, 0),
            )

        updates = jax.tree.map(
            freeze, updates, params, state.columns, is_leaf=_common.is_weight
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
