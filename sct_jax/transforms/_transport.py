"""Transformations that move the first moments along with the factors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from sct_jax import linalg, spectral, stiefel
from sct_jax.transforms import _common, _moments, _retraction

# Moments are divided by s through the damped s / (s^2 + (DAMPING max|s|)^2).
DAMPING = 0.1

MOMENTS = ("gradient", "whitened")


def transport_moments(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Projects the first moments of `inner` onto the current tangent space.

    Projects the fields `mu` of the state of `inner` onto the tangent space at `params`,
    before each update. This is vector transport by projection, from the point of the
    last step to the current one. Costs 4 R FLOPs per factor entry.

    Args:
      inner: `optax.scale_by_adam`, a chain or partition with it, or any transformation
        whose state names the mean of the gradients `mu`.

    Returns:
      A transformation that needs `params`, with the state of `inner`.

    References:
      Absil, Mahony, Sepulchre, Optimization Algorithms on Matrix Manifolds, 2008,
      section 8.1
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        _common.check_whole(params)
        return inner.init(params)

    def update_fn(updates, state, params=None, **extra_args):
        params = _common.require_params(params, "transport_moments")
        state = _moments.map_first_moments(
            state, params, lambda mu: _retraction.tangent_projection(mu, params)
        )
        return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class Rotation(NamedTuple):
    """Change of basis of one weight by `retract_by_svd`: u'' = q_u p, v'' = q_v z."""

    p: Float[Array, "*L R R"]
    z: Float[Array, "*L R R"]
    old_s: Float[Array, "*L R"]
    new_s: Float[Array, "*L R"]


def retract_by_svd(
    inner: optax.GradientTransformation, *, moments: str | None = "gradient"
) -> optax.GradientTransformationExtraArgs:
    r"""Retracts the updates of `inner` by an SVD that keeps the whole product W'.

    A retraction of u and v alone drops the triangular factors, 13-36 % of a step. With
    u + du = Q_u R_u, v + dv = Q_v R_v and s' = s + ds, this one keeps them:

    .. math::
      (u + du)\,\mathrm{diag}(s')\,(v + dv)^T = Q_u (R_u\,\mathrm{diag}(s') R_v^T) Q_v^T
      = (Q_u P)\,\mathrm{diag}(s'')\,(Q_v Z)^T

    So s is positive and descending after every step. Costs 8 R FLOPs per factor entry
    and an R x R SVD per weight and layer (`linalg.jacobi_svd`). The SVD is a sequence
    of some hundred small operations, so this is by far the slowest retraction.

    Wrap it around a whole chain instead of appending `retract_to_stiefel`. The chain
    ends with the learning rate, or with a clip that has `retraction="svd"`.

    Args:
      inner: the chain.
      moments: meaning of the first moments (fields `mu`) of u and v, which determines
        how they change with the basis. "gradient": means of G_u = G_W v diag(s), so
        mu_u becomes mu_u diag(1 / s) Z diag(s''), with 1 / s damped, and mu_v likewise
        with P. "whitened": means of G_W v, so mu_u becomes mu_u Z. None: no change.
        Moments of s and second moments never change.

    Returns:
      A transformation that needs `params`, with the state of `inner`.

    Raises:
      ValueError: for unknown `moments`; at `init`, for blocks.
    """
    if moments not in (None, *MOMENTS):
        raise ValueError(
            f"unknown moments {moments!r}: choose one of {', '.join(MOMENTS)}"
        )
    inner = optax.with_extra_args_support(inner)

    def init_fn(params):
        _common.check_whole(params)
        _common.check_no_blocks(params, "the retraction 'svd'")
        return inner.init(params)

    def update_fn(updates, state, params=None, **extra_args):
        params = _common.require_params(params, "retract_by_svd")
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
            state = _moments.map_first_moments(
                state, params, lambda mu: _turn(mu, rebuild(rotations), moments)
            )
        return rebuild(new), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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
    """The factors of q_u p diag(s) z.T q_v.T, and the change of basis.

    s becomes positive and descending. Signs are chosen to keep u near the old one.
    """
    order = jnp.argsort(-jnp.abs(s), axis=-1)
    p = jnp.take_along_axis(p, order[..., None, :], axis=-1)
    z = jnp.take_along_axis(z, order[..., None, :], axis=-1)
    s = jnp.take_along_axis(s, order, axis=-1)
    z = z * jnp.where(s < 0, -1.0, 1.0).astype(z.dtype)[..., None, :]
    u = linalg.matmul(q_u, p)
    # Keep the sign of u, so that moments that do not change stay meaningful.
    along = jnp.sum(u * linalg.as_float32(old.u), axis=-2, keepdims=True)
    sign = jnp.where(along < 0, -1.0, 1.0).astype(u.dtype)
    p, z, s = p * sign, z * sign, jnp.abs(s)
    new = spectral.SpectralFactors(u * sign, s, linalg.matmul(q_v, z))
    return new, Rotation(p, z, linalg.as_float32(old.s), s)


def _turn(mu: Any, rotations: Any, moments: str | None) -> Any:
    """First moments in the new basis; `rotations` mirrors the tree of weights."""

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
    divisor = linalg.range_divisor(peak)
    s, peak = s / divisor, peak / divisor
    damped = linalg.safe_divisor(jnp.square(s) + jnp.square(DAMPING * peak))
    return s / damped / divisor
