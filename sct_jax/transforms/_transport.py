"""Moments that follow the factors: transport, and the lossless retraction."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from sct_jax import linalg, spectral, stiefel
from sct_jax.transforms import _common, _retraction

# 1 / s is damped to s / (s^2 + (DAMPING max|s|)^2) wherever a moment is divided by s.
DAMPING = 0.1

MOMENTS = ("gradient", "whitened")


def transport_moments(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Carries the first moments of u and v into the tangent space where they are used.

    Before each update of `inner` the fields `mu` of its state are projected on the
    tangent space at `params`: the vector transport by projection from the point of the
    last step, applied once that point has moved. 4 R FLOPs per factor entry.

    Args:
      inner: `optax.scale_by_adam`, a chain or partition that holds one, or any
        transformation that calls its mean of gradients `mu`.

    Returns:
      A transformation that needs `params`, with the state of `inner`.

    References:
      Absil, Mahony, Sepulchre, Optimization Algorithms on Matrix Manifolds, 2008,
      section 8.1
    """
    inner = optax.with_extra_args_support(inner)

    def update_fn(updates, state, params=None, **extra_args):
        params = _common.require(params, "transport_moments")
        state = _common.map_first_moments(
            state, lambda mu: _retraction.tangent_projection(mu, params)
        )
        return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


class Rotation(NamedTuple):
    """What the lossless retraction did to one weight: u'' = q_u p, v'' = q_v z."""

    p: Float[Array, "*L R R"]
    z: Float[Array, "*L R R"]
    old_s: Float[Array, "*L R"]
    new_s: Float[Array, "*L R"]


def retract_by_svd(
    inner: optax.GradientTransformation, *, moments: str | None = "gradient"
) -> optax.GradientTransformationExtraArgs:
    r"""Makes the updates of `inner` end on the manifold with nothing of them lost.

    A retraction of u and v alone drops the triangular factors, 13-36 % of a step. With
    u + du = Q_u R_u, v + dv = Q_v R_v and s' = s + ds the whole product is kept:

    .. math::
      (u + du)\,\mathrm{diag}(s')\,(v + dv)^T = Q_u (R_u\,\mathrm{diag}(s') R_v^T) Q_v^T
      = (Q_u P)\,\mathrm{diag}(s'')\,(Q_v Z)^T

    so s is positive and descending after every step. Costs 8 R FLOPs per factor entry
    and an SVD of R x R per weight and layer (`linalg.jacobi_svd`), which is
    some hundred small operations in sequence: by far the slowest of the retractions.

    Stands around a whole chain that ends with the learning rate (and a clip, with
    `retraction="lossless"`), in the place of `retract_to_stiefel`.

    Args:
      inner: the chain.
      moments: what the first moments (fields `mu`) of u and v are, which turn with the
        basis. "gradient": means of G_u = G_W v diag(s), so that mu_u becomes mu_u
        diag(1 / s) Z diag(s''), with 1 / s damped, and mu_v likewise with P.
        "whitened": means of G_W v, so that mu_u becomes mu_u Z. None: they stay. The
        moments of s, and second moments, always stay.

    Returns:
      A transformation that needs `params`, with the state of `inner`.

    Raises:
      ValueError: for another value of `moments`.
    """
    if moments not in (None, *MOMENTS):
        raise ValueError(
            f"unknown moments {moments!r}: choose one of {', '.join(MOMENTS)}"
        )
    inner = optax.with_extra_args_support(inner)

    def update_fn(updates, state, params=None, **extra_args):
        params = _common.require(params, "retract_by_svd")
        updates, state = inner.update(updates, state, params, **extra_args)
        factors, rebuild = _common.select_spectral(updates, params)
        moved = [
            jax.tree.map(lambda x, dx: linalg.as_float32(x + dx), p, d)
            for p, d in factors
        ]
        points = stiefel.retract([(w.u, w.v) for w in moved])
        cores = [_core(w, *q) for w, q in zip(moved, points, strict=True)]
        triples = linalg.map_batched(linalg.jacobi_svd, cores, fill=0.0)
        new, rotations = [], []
        for (p, _), q, triple in zip(factors, points, triples, strict=True):
            w, rotation = _assemble(p, *q, *triple)
            new.append(jax.tree.map(lambda x, y: (x - y).astype(y.dtype), w, p))
            rotations.append(rotation)
        if moments is not None:
            state = _common.map_first_moments(
                state, lambda mu: _turn(mu, rebuild(rotations), moments)
            )
        return rebuild(new), state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _core(
    moved: spectral.SpectralFactors,
    q_u: Float[Array, "*L I R"],
    q_v: Float[Array, "*L O R"],
) -> Float[Array, "*L R R"]:
    """The matrix with u diag(s) v.T = q_u core q_v.T."""
    r_u, r_v = linalg.gram(q_u, moved.u), linalg.gram(q_v, moved.v)
    return linalg.matmul(r_u * moved.s[..., None, :], linalg.transpose(r_v))


def _assemble(
    old: spectral.SpectralFactors,
    q_u: Float[Array, "*L I R"],
    q_v: Float[Array, "*L O R"],
    p: Float[Array, "*L R R"],
    s: Float[Array, "*L R"],
    z: Float[Array, "*L R R"],
) -> tuple[spectral.SpectralFactors, Rotation]:
    """q_u p diag(s) z.T q_v.T with s positive and descending, and u near the old."""
    order = jnp.argsort(-jnp.abs(s), axis=-1)
    p = jnp.take_along_axis(p, order[..., None, :], axis=-1)
    z = jnp.take_along_axis(z, order[..., None, :], axis=-1)
    s = jnp.take_along_axis(s, order, axis=-1)
    z = z * jnp.where(s < 0, -1.0, 1.0).astype(z.dtype)[..., None, :]
    u = linalg.matmul(q_u, p)
    # Of the two signs of a pair the one that keeps u: moments then stay meaningful.
    along = jnp.sum(u * linalg.as_float32(old.u), axis=-2, keepdims=True)
    sign = jnp.where(along < 0, -1.0, 1.0).astype(u.dtype)
    p, z, s = p * sign, z * sign, jnp.abs(s)
    new = spectral.SpectralFactors(u * sign, s, linalg.matmul(q_v, z))
    return new, Rotation(p, z, linalg.as_float32(old.s), s)


def _turn(mu: Any, rotations: Any, moments: str | None) -> Any:
    """First moments in the new basis; `rotations` stand where the weights stand."""

    def turn(m, rotation, r):
        x = linalg.as_float32(m)
        if moments == "whitened":
            return linalg.matmul(x, rotation).astype(m.dtype)
        x = linalg.matmul(x * damped_inverse(r.old_s)[..., None, :], rotation)
        return (x * r.new_s[..., None, :]).astype(m.dtype)

    def turn_weight(m, r):
        if not _common.is_whole_spectral(m):
            return m
        return m._replace(u=turn(m.u, r.z, r), v=turn(m.v, r.p, r))

    return jax.tree.map(turn_weight, mu, rotations, is_leaf=_common.is_weight)


def damped_inverse(s: Float[Array, "*L R"]) -> Float[Array, "*L R"]:
    """Returns s / (s^2 + (DAMPING max|s|)^2), and 0 for an all-zero s."""
    peak = jnp.max(jnp.abs(s), axis=-1, keepdims=True)
    return s / linalg.safe_divisor(jnp.square(s) + jnp.square(DAMPING * peak))
