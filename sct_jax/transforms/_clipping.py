"""The bound of what an update does to the composite W."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from sct_jax import linalg, spectral, stiefel
from sct_jax.transforms import _common

LOSSLESS = "lossless"  # keeps all of the product, see `_transport.retract_by_svd`

# With eight squarings the norm used to clip lies above the true one by at most 0.6 %
# for ranks up to 256; the promise is 1 %.
_SQUARINGS = 8
_AIM = 0.97  # of the bound: where the next trial should land
_ENOUGH = 0.95  # of the bound: then the search ends; the norm itself is above 0.9
_MAX_ROUNDS = 14
_TOO_LARGE = 1e37  # the reciprocal of more is no normal float32 number


def clip_by_composite_spectral_norm(
    max_norm: _common.ScalarOrSchedule, *, retraction: str = "cholesky_qr"
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the update of each weight so that it moves W by at most `max_norm`.

    For every SpectralFactors the update (du, ds, dv) is multiplied by the c in [0, 1]
    for which

    .. math::
      \|W' - W\|_2 \le \text{max\_norm}, \qquad
      W' = R(u + c\,du)\,\mathrm{diag}(s + c\,ds)\,R(v + c\,dv)^T

    holds for the update as applied, retraction R included; c = 1 wherever that holds
    already. Stands before `retract_to_stiefel` with the same method.

    Requires factors orthonormal to 1e-5, and a retraction on every step. Ensures the
    bound to 1 % and float32 rounding (16 eps max|s| sqrt(R)), for any update. One with
    a NaN, an infinity or an entry beyond 1e37 becomes zero. Where such a gradient may
    come, the chain belongs into `optax.apply_if_finite`: Adam's moments stay NaN once
    they are, and the weight would never move again.

    How: the whole path W'(c) lives in the span of [u, E_u] and [v, E_v], E = du - u u.T
    du, whatever c is. Two products with each factor (6 R FLOPs per entry) give 2R x 2R
    matrices in which every trial of c is small work. A bound from Frobenius norms comes
    first, and where it decides for all weights nothing else is computed.

    Args:
      max_norm: bound, or schedule of it.
      retraction: method of the `retract_to_stiefel` that follows, or "lossless" inside
        `retract_by_svd`, where W' = (u + c du) diag(s + c ds) (v + c dv).T.

    Returns:
      A transformation that needs `params`.

    Raises:
      ValueError: for an unknown retraction, or a max_norm that is not positive.

    References:
      Spectron, arXiv 2602.12429, 2026, section 4. `Deviation:` the paper bounds a sum
      of norms by step radii and orthogonalised momentum, to first order; here the
      applied change itself is bounded, for any update.
    """
    if retraction != LOSSLESS:
        stiefel.check_method(retraction)
    if not callable(max_norm) and not isinstance(max_norm, jax.Array) and max_norm <= 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        params = _common.require(params, "clip_by_composite_spectral_norm")
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
    """The c of every weight; compiled once, for those who update outside of a jit."""
    decided = [_cheap_bound(p, d, retraction) <= bound for p, d in factors]
    return jax.lax.cond(
        jnp.all(jnp.stack([jnp.all(x) for x in decided])),
        # All are true: 1, as varied over the axes of a shard_map as the other branch.
        lambda: [x.astype(jnp.float32) for x in decided],
        lambda: _admissible_scales(factors, bound, retraction),
    )


def _scale_update(
    d: spectral.SpectralFactors, c: Float[Array, "*L"]
) -> spectral.SpectralFactors:
    """The update times c; exactly zero where c is, even for infinities."""

    def scale(x, c):
        return jnp.where(c > 0, x * c, 0).astype(x.dtype)

    wide = c[..., None, None]
    return spectral.SpectralFactors(
        scale(d.u, wide), scale(d.s, c[..., None]), scale(d.v, wide)
    )


def _cheap_bound(
    p: spectral.SpectralFactors, d: spectral.SpectralFactors, retraction: str
) -> Float[Array, "*L"]:
    """An upper bound of ||W' - W||_2 by elementwise work; NaN for a NaN in d.

    For orthonormal x and ||e||_F < 1 both retractions satisfy ||R(x + e) - x||_F <=
    (1 + sqrt 2) ||e||_F / (1 - ||e||_F) (Sun, Perturbation bounds for the Cholesky and
    QR factorizations, BIT 31, 1991); and whatever e is, ||W' - W|| <= ||W'|| + ||W||.
    """
    old_s = jnp.max(jnp.abs(p.s), axis=-1)
    new_s = jnp.max(jnp.abs(p.s + d.s), axis=-1)
    change_s = jnp.max(jnp.abs(d.s), axis=-1)

    size_u, size_v = (linalg.frobenius_norm(x.astype(jnp.float32)) for x in (d.u, d.v))

    def rotation(e):
        return (1 + 2**0.5) * jnp.where(e < 1, e / (1 - e), jnp.inf)

    if retraction == LOSSLESS:
        moved = new_s * (size_u + size_v + size_u * size_v) + change_s
    else:
        moved = new_s * rotation(size_u) + change_s + old_s * rotation(size_v)
        moved = jnp.minimum(moved, old_s + new_s)
    # Squares that overflow decide nothing; nor may a NaN pass as decided.
    usable = jnp.isfinite(size_u + size_v + change_s)
    return jnp.where(usable, moved, jnp.inf)


def _admissible_scales(
    factors: list[tuple[spectral.SpectralFactors, spectral.SpectralFactors]],
    bound: Float[Array, ""],
    retraction: str,
) -> list[Float[Array, "*L"]]:
    """The c of every weight, found in the small space for all weights at once."""
    operands: list[tuple[Array, ...]] = []
    units, valid = [], []
    for p, d in factors:
        p, d = jax.tree.map(lambda x: x.astype(jnp.float32), (p, d))
        peak = jnp.maximum(_peak(d.u, (-2, -1)), _peak(d.v, (-2, -1)))
        finite = peak + _peak(d.s, (-1,)) < _TOO_LARGE
        # In units of its largest entry the square of a huge update cannot overflow.
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
    """The c in [0, unit] for which the applied update keeps the bound, per weight.

    `s`, `ds` and `unit` come as diagonal matrices, so that one padding serves all.
    """
    s, ds, unit = (jnp.diagonal(x, axis1=-2, axis2=-1) for x in (s, ds, unit))
    unit = unit[:, 0]
    # By as much may `spectral_radius_bound` lie above the norm itself.
    accepted = bound * 1.0005 * (2 * s.shape[-1]) ** (0.5 / 2 ** (_SQUARINGS + 1))
    norm_at = _norm_along_path(
        p_u, q_u, p_v, q_v, s, ds, accepted=accepted, retraction=retraction
    )
    # Beyond displacements of norm 1 the path is no longer near a straight line.
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

    Exact only as far as to tell it from `accepted`; infinite where the step is too
    large to be judged in float32.
    """
    eye = jnp.eye(s.shape[-1], dtype=s.dtype)
    # Columns of E in units of their lengths, so that no product is out of balance.
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
            if retraction == LOSSLESS
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
    """A c of [0, unit] with norm_at(c) <= accepted: unit, or one near the bound.

    `norm_at` is about proportional to c up to `straight`.
    """

    def propose(b: _Bracket) -> Array:
        shrunk = b.high * jnp.where(
            jnp.isfinite(b.high_norm),
            jnp.minimum(_AIM * bound / b.high_norm, 1.0),
            0.25,
        )
        # Between an accepted scale and a rejected one: as if the norm were c^p.
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
    """The largest scale known to keep the bound, the least known not to, per weight."""

    low: Float[Array, " N"]
    low_norm: Float[Array, " N"]
    high: Float[Array, " N"]
    high_norm: Float[Array, " N"]
    rounds: Int[Array, ""]


def _peak(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.max(jnp.abs(x), axis=axes)
