"""Retractions and tangent projections of whole trees, as additive updates."""

import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from sct_jax import stiefel
from sct_jax.transforms import _common


def retract_to_stiefel(
    method: str = "cholesky_qr",
    *,
    every: int | jax.Array = 1,
    tolerance: float | jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Modifies updates so that `params + updates` has orthonormal u and v.

    .. math::
      \Delta u \leftarrow R(u + \Delta u) - u, \qquad
      \Delta v \leftarrow R(v + \Delta v) - v

    Place it last in a chain, after the learning rate. Ensures an orthonormality error
    below 4e-6 for factors in float32 whose columns moved independently, and below 3e-5
    for every update. Rounding to bfloat16 alone costs up to 2e-2, more
    for smaller factors.

    Args:
      method: retraction, see `stiefel.retract`.
      every: lazy retraction: number of updates between retractions.
      tolerance: lazy retraction: retract when max |x.T x - I| of any factor would
        exceed this value. With `every`, retract when either condition holds.

    Returns:
      A transformation that needs `params`.

    Raises:
      ValueError: for an unknown method, for an interval that is no integer above 0, and
        for a tolerance that is not positive and finite.

    Example:
      >>> import jax, optax
      >>> from sct_jax import spectral, transforms
      >>> params = {"w": spectral.init(jax.random.key(0), 16, 24, 4)}
      >>> tx = optax.chain(optax.adam(1e-2), transforms.retract_to_stiefel())
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Kohlberger et al., Spectral Compact Training, arXiv 2604.00733, 2026, Algorithm 1
      TSVD, arXiv 2605.28573, 2026 (lazy orthonormality; the rule is our own)
    """
    stiefel.check_method(method)
    _common.check_number("every", every, least=1, integer=True)
    _common.check_number("tolerance", tolerance, above=0)
    always = not isinstance(every, jax.Array) and every == 1 and tolerance is None

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        params = _common.require_params(params, "retract_to_stiefel")
        factors, rebuild = _common.select_spectral(updates, params)
        if not factors:
            return updates, state.next()
        moved = [(p.u + d.u, p.v + d.v) for p, d in factors]
        if always:
            retracted = stiefel.retract(moved, method=method)
        else:
            due = (state.count + 1) % every == 0
            if tolerance is not None:
                errors = [
                    stiefel.orthonormality_error(x) for x in jax.tree.leaves(moved)
                ]
                # NaN, of factors with a NaN, must not pass as orthonormal.
                drifted = ~(jnp.max(jnp.stack(errors)) <= tolerance)
                # The default every = 1 would always be due: the tolerance decides.
                due = (due & (every > 1)) | drifted
            retracted = _retract_when(due, moved, method)
        updates = rebuild(
            [
                d._replace(u=u - p.u, v=v - p.v)
                for (p, d), (u, v) in zip(factors, retracted, strict=True)
            ]
        )
        return updates, state.next()

    return optax.GradientTransformationExtraArgs(_common.count_of_whole, update_fn)


@functools.partial(jax.jit, static_argnames="method")
def _retract_when(
    due: Bool[Array, ""], moved: list[tuple[Array, Array]], method: str
) -> list[tuple[Array, Array]]:
    """Retracted points if due, else `moved`; jitted for updates outside of a jit."""
    retraction = functools.partial(stiefel.retract, method=method)
    return jax.lax.cond(due, retraction, lambda x: x, moved)


def project_to_tangent() -> optax.GradientTransformationExtraArgs:
    r"""Projects the updates of u and v onto the tangent space of the Stiefel manifold.

    .. math::
      \Delta u \leftarrow \Delta u - u\,\mathrm{sym}(u^T \Delta u), \qquad
      \Delta v \leftarrow \Delta v - v\,\mathrm{sym}(v^T \Delta v)

    At the start of a chain it turns gradients into Riemannian gradients. Before the
    retraction it removes the part of a displacement that the retraction would undo.
    Costs 4 R FLOPs per factor entry.

    Returns:
      A transformation that needs `params` and has no state.

    References:
      Absil, Mahony, Sepulchre, Optimization Algorithms on Matrix Manifolds, 2008, eq.
      3.35
    """

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        params = _common.require_params(params, "project_to_tangent")
        return tangent_projection(updates, params), state

    return optax.GradientTransformationExtraArgs(_common.empty_of_whole, update_fn)


def tangent_projection(updates: optax.Updates, params: optax.Params) -> optax.Updates:
    """Returns the updates with u and v projected as in `project_to_tangent`."""
    factors, rebuild = _common.select_spectral(updates, params)
    return rebuild(
        [
            d._replace(
                u=stiefel.tangent_projection(p.u, d.u).astype(d.u.dtype),
                v=stiefel.tangent_projection(p.v, d.v).astype(d.v.dtype),
            )
            for p, d in factors
        ]
    )
