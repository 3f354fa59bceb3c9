"""Clips updates by the spectral norm of the change of the composite W."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from sct_jax import linalg, spectral, stiefel
from sct_jax.transforms import _common

# Eight squarings overestimate the norm by at most 0.6 % for ranks up to 256. The
# documented tolerance is 1 %.
_SQUARINGS = 8
_TARGET = 0.97  # of the bound: the norm that the next trial aims at
_ENOUGH = 0.95  # of the bound: the search ends here, with a true norm above 0.9
_MAX_ROUNDS = 14
_TOO_LARGE = 1e37  # beyond, reciprocals soon become subnormal in float32


def clip_by_composite_spectral_norm(
    max_norm: _common.ScalarOrSchedule, *, retraction: str = "cholesky_qr"
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the update of each weight so that W moves by at most `max_norm`.

    Multiplies the update (du, ds, dv) of every SpectralFactors by a c in [0, 1] with

    .. math::
      \|W' - W\|_2 \le \text{max\_norm}, \qquad
      W' = R(u + c\,du)\,\mathrm{diag}(s + c\,ds)\,R(v + c\,dv)^T

    The bound holds for the applied update, including the retraction R. c is 1 where the
    full update satisfies it. Place it before `retract_to_stiefel` with the same method.

    Requires factors orthonormal to 1e-5 and a retraction on every step. Ensures the
    bound to 1 % plus float32 rounding (16 eps max|s| sqrt(R)), for any update. Updates
    with a NaN, an infinity or an entry beyond 1e37 become zero. If gradients may be
    non-finite, wrap the chain in `optax.apply_if_finite`: NaN persists in Adam's
    moments, and the weight would never move again.

    Method: for every c, W'(c) lies in the span of [u, E_u] and [v, E_v], with E = du -
    u u.T du. Two products with each factor (6 R FLOPs per entry) reduce the search for
    c to 2R x 2R matrices. A bound by Frobenius norms comes first. If it decides every
    weight, nothing else is computed.

    Args:
      max_norm: bound, or schedule of it.
      retraction: method of the following `retract_to_stiefel`; "svd" inside
        `retract_by_svd`, where W' = (u + c du) diag(s + c ds) (v + c dv).T.

    Returns:
      A transformation that needs `params`.

    Raises:
      ValueError: for an unknown retraction or max_norm <= 0.

    References:
      Spectron, arXiv 2602.12429, 2026, section 4. `Deviation:` the paper bounds a sum
      of norms to first order, by step radii and orthogonalised momentum. This
      transformation bounds the applied change itself, for any update.
    """
    if retraction != "svd":
        stiefel.check_method(retraction)
    if not callable(max_norm) and not isinstance(max_norm, jax.Array) and max_norm <= 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        params = _common.require_params(params, "clip_by_composite_spectral_norm")
        factors, rebuild = _common.select_spectral(updates, params)
        new_state = state.next()
        if not factors:
            return updates, new_state
        bound = jnp.asarray(_common.value_of(max_norm, state.count), jnp.float32)
        scales = _scales(factors, bound, retraction)
        return rebuild(
            [_scale_update(d, c) for (_, d), c in zip(factors, scales, strict=True)]
        ), new_state

    return optax.GradientTransformationExtraArgs(_common.init_count, update_fn)


@functools.partial(jax.jit, static_argnames="retraction")
def _scales(
    factors: list[tuple[spectral.SpectralFactors, spectral.SpectralFactors]],
    bound: Float[Array, ""],
    retraction: str,
) -> list[Float[Array, "*L"]]:
    """The c of every weight; jitted for updates outside of a jit."""
    decided = [_cheap_bound(p, d, retraction) <= bound for p, d in factors]
    return jax.lax.cond(
        jnp.all(jnp.stack([jnp.all(x) for x in decided])),
        # All ones. Under shard_map both branches must vary over the same axes, which
        # constants would not.
        lambda: [x.astype(jnp.float32) for x in decided],
        lambda: _admissible_scales(factors, bound, retraction),
    )


def _scale_update(
    d: spectral.SpectralFactors, c: Float[Array, "*L"]
) -> spectral.SpectralFactors:
    """The update times c; exactly zero where c is zero, even for infinities."""

    def scale(x, c):
        return jnp.where(c > 0, x * c, 0).astype(x.dtype)

    wide = c[..., None, None]
    return spectral.SpectralFactors(
        scale(d.u, wide), scale(d.s, c[..., None]), scale(d.v, wide)
    )


def _cheap_bound(
    p: spectral.SpectralFactors, d: spectral.SpectralFactors, retraction: str
) -> Float[Array, "*L"]:
    """An upper bound of ||W' - W||_2 by elementwise operations; NaN for a NaN in d.

    For orthonormal x and ||e||_F < 1, QR and polar retractions satisfy ||R(x + e) -
    x||_F <= (1 + sqrt 2) ||e||_F / (1 - ||e||_F) (Sun, Perturbation bounds for the
    Cholesky and QR factorizations, BIT 31, 1991). For every e, ||W' - W|| <= ||W'|| +
    ||W||.
    """
    old_s = jnp.max(jnp.abs(p.s), axis=-1)
    new_s = jnp.max(jnp.abs(p.s + d.s), axis=-1)
    change_s = jnp.max(jnp.abs(d.s), axis=-1)

    size_u, size_v = (linalg.frobenius_norm(x.astype(jnp.float32)) for x in (d.u, d.v))

    def rotation(e):
        return (1 + 2**0.5) * jnp.where(e < 1, e / (1 - e), jnp.inf)

    if retraction == "svd":
        moved = new_s * (size_u + size_v + size_u * size_v) + change_s
    else:
        moved = new_s * rotation(size_u) + change_s + old_s * rotation(size_v)
        moved = jnp.minimum(moved, old_s + new_s)
    # Squares may overflow, and a NaN must not pass as decided.
    usable = jnp.isfinite(size_u + size_v + change_s)
    return jnp.where(usable, moved, jnp.inf)


def _admissible_scales(
    factors: list[tuple[spectral.SpectralFactors, spectral.SpectralFactors]],
    bound: Float[Array, ""],
    retraction: str,
) -> list[Float[Array, "*L"]]:
    """The c of every weight, by one search over the small matrices of all weights."""
    operands: list[tuple[Array, ...]] = []
    units, valid = [], []
    for p, d in factors:
        p, d = jax.tree.map(lambda x: x.astype(jnp.float32), (p, d))
        peak = jnp.maximum(_peak(d.u, (-2, -1)), _peak(d.v, (-2, -1)))
        finite = peak + _peak(d.s, (-1,)) < _TOO_LARGE
        # In units of its largest entry, the square of a huge update cannot overflow.
        unit = jnp.where(finite, jnp.maximum(peak, 1.0), 1.0)
        d = _scale_update(d, jnp.where(finite, 1 / unit, 0))
        p_u, e_u = spectral.split_along(p.u, d.u)
        p_v, e_v = spectral.split_along(p.v, d.v)
        eye = jnp.eye(p.s.shape[-1], dtype=jnp.float32)
        diagonals = [x[..., None] * eye for x in (p.s, d.s, unit[..., None])]
        q_u, q_v = linalg.gram(e_u), linalg.gram(e_v)
        operands.append((p_u, q_u, p_v, q_v, *diagonals))
        units.append(unit)
        valid.append(finite)
    search = functools.partial(_search_scales, bound=bound, retraction=retraction)
    found = linalg.map_batched(search, *zip(*operands, strict=True), fill=0.0)
    return [
        jnp.where(ok, c / unit, 0.0)
        for c, unit, ok in zip(found, units, valid, strict=True)
    ]


def _search_scales(
    p_u: Float[Array, "N K K"],
    q_u: Float[Array, "N K K"],
    p_v: Float[Array, "N K K"],
    q_v: Float[Array, "N K K"],
    s: Float[Array, "N K K"],
    ds: Float[Array, "N K K"],
    unit: Float[Array, "N K K"],
    *,
    bound: Float[Array, ""],
    retraction: str,
) -> Float[Array, " N"]:
    """The c in [0, unit] with which the applied update satisfies the bound, per weight.

    `s`, `ds` and `unit` are diagonal matrices, because `linalg.map_batched` pads square
    matrices.
    """
    s, ds, unit = (jnp.diagonal(x, axis1=-2, axis2=-1) for x in (s, ds, unit))
    unit = unit[:, 0]
    # `spectral_radius_bound` may overestimate the norm by this factor.
    accepted = bound * 1.0005 * (2 * s.shape[-1]) ** (0.5 / 2 ** (_SQUARINGS + 1))
    norm_at = _norm_along_path(
        p_u, q_u, p_v, q_v, s, ds, accepted=accepted, retraction=retraction
    )
    # For displacements of norm above 1, the path is far from a straight line.
    lengths = [
        jnp.sqrt(jnp.sum(jnp.square(p), (-2, -1)) + jnp.trace(q, axis1=-2, axis2=-1))
        for p, q in ((p_u, q_u), (p_v, q_v))
    ]
    straight = 1 / jnp.maximum(jnp.maximum(*lengths), 1 / unit)
    return largest_admissible(norm_at, unit, straight, bound=bound, accepted=accepted)


def _norm_along_path(
    p_u: Float[Array, "N K K"],
    q_u: Float[Array, "N K K"],
    p_v: Float[Array, "N K K"],
    q_v: Float[Array, "N K K"],
    s: Float[Array, "N K"],
    ds: Float[Array, "N K"],
    *,
    accepted: Float[Array, ""],
    retraction: str,
) -> Callable[[Float[Array, " N"]], Float[Array, " N"]]:
    """The function c -> ||W'(c) - W||_2, per weight.

    Accurate enough to compare with `accepted`. Infinite where float32 cannot represent
    the step.
    """
    eye = jnp.eye(s.shape[-1], dtype=s.dtype)
    # Columns of E in units of their lengths, to keep all products well scaled.
    lengths_u, lengths_v = (
        linalg.safe_divisor(jnp.sqrt(jnp.diagonal(q, axis1=-2, axis2=-1)))
        for q in (q_u, q_v)
    )
    unit_q_u, unit_q_v = (
        q / (x[:, :, None] * x[:, None, :])
        for q, x in ((q_u, lengths_u), (q_v, lengths_v))
    )

    def norm_at(c):
        c = c[:, None, None]
        along = [eye + c * p for p in (p_u, p_v)]
        grams = [
            linalg.gram(a) + c**2 * q for a, q in zip(along, (q_u, q_v), strict=True)
        ]
        z_u, z_v = (
            [jnp.broadcast_to(eye, g.shape) for g in grams]
            if retraction == "svd"
            else stiefel.retraction_matrices(grams, method=retraction)
        )
        k = spectral.small_space_difference(
            linalg.matmul(along[0], z_u),
            linalg.matmul(along[1], z_v),
            s,
            s + c[..., 0] * ds,
            c * lengths_u[..., None] * z_u,
            c * lengths_v[..., None] * z_v,
        )
        peak = _peak(k, (-2, -1))
        k = k / linalg.safe_divisor(peak)[:, None, None]
        radius = linalg.spectral_radius_bound(
            spectral.small_space_product(k, unit_q_u, unit_q_v),
            squarings=_SQUARINGS,
            threshold=jnp.square(accepted / linalg.safe_divisor(peak)),
        )
        norm = peak * jnp.sqrt(radius)
        return jnp.where(jnp.isfinite(norm), norm, jnp.inf)

    return norm_at


def largest_admissible(
    norm_at: Callable[[Float[Array, " N"]], Float[Array, " N"]],
    unit: Float[Array, " N"],
    straight: Float[Array, " N"],
    *,
    bound: Float[Array, ""],
    accepted: Float[Array, ""],
) -> Float[Array, " N"]:
    """Returns a c in [0, unit] with norm_at(c) <= accepted: unit, or near the bound.

    Args:
      norm_at: from c to the norm.
      unit: largest c.
      straight: the norm is about proportional to c up to here.
      bound: desired norm.
      accepted: largest norm that counts as within the bound.
    """

    def propose(b: _Bracket) -> Array:
        shrunk = b.high * jnp.where(
            jnp.isfinite(b.high_norm),
            jnp.minimum(_TARGET * bound / b.high_norm, 1.0),
            0.25,
        )
        # Between an accepted and a rejected c, interpolate as if the norm were c^p.
        tiny = jnp.finfo(unit.dtype).tiny
        low, low_norm = jnp.maximum(b.low, tiny), jnp.maximum(b.low_norm, tiny)
        slope = jnp.log(b.high / low) / jnp.log(b.high_norm / low_norm)
        between = jnp.where(
            jnp.isfinite(b.high_norm),
            low * (bound / low_norm) ** slope,
            jnp.sqrt(low * b.high),
        )
        between = jnp.clip(between, 1.02 * low, 0.98 * b.high)
        return jnp.where(b.low > 0, between, jnp.minimum(shrunk, straight))

    def finished(b: _Bracket) -> Array:
        return (b.low == unit) | (b.low_norm >= _ENOUGH * bound)

    def trial(b: _Bracket) -> _Bracket:
        c = jnp.where(b.rounds == 0, unit, propose(b))
        norm = norm_at(c)
        ok, done = norm <= accepted, finished(b)
        raises, lowers = ok & ~done, ~ok & ~done
        return _Bracket(
            jnp.where(raises, c, b.low),
            jnp.where(raises, norm, b.low_norm),
            jnp.where(lowers, c, b.high),
            jnp.where(lowers, norm, b.high_norm),
            b.rounds + 1,
        )

    zero = jnp.zeros_like(unit)
    bracket = jax.lax.while_loop(
        lambda b: ~jnp.all(finished(b)) & (b.rounds < _MAX_ROUNDS),
        trial,
        _Bracket(zero, zero, unit, zero + jnp.inf, jnp.array(0)),
    )
    return bracket.low


class _Bracket(NamedTuple):
    """The largest accepted and the smallest rejected c so far, per weight."""

    low: Float[Array, " N"]
    low_norm: Float[Array, " N"]
    high: Float[Array, " N"]
    high_norm: Float[Array, " N"]
    rounds: Int[Array, ""]


def _peak(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.max(jnp.abs(x), axis=axes)
