"""Clips updates by the spectral norm of the change of the composite W."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from sct_jax import linalg, spectral, stiefel
from sct_jax.transforms import _common

# Eight squarings overestimate the norm by at most 0.6 % for ranks up to 256. The
# documented tolerance is 1 %.
_SQUARINGS = 8
_TARGET = 0.97  # of the bound: the norm that the next trial aims at
_ENOUGH = 0.95  # of the bound: the search ends here, with a true norm above 0.9
_MAX_ROUNDS = 14
_ROUNDING = 2e-3  # of the bound: the most that rounding may add to an accepted norm
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

    BlockSpectralFactors have two c per block: one for u_i and the entries of s that it
    feeds, one for v_j. Each half may move by max_norm / 2, which bounds W as in
    `spectral.composite_update_norm`.

    Requires factors orthonormal to 3e-5 and a retraction on every step. Ensures the
    bound to 1 % plus float32 rounding (16 eps max|s| sqrt(R)), for any update. A c at
    which u + c du or v + c dv is too close to rank-deficient for float32 is not taken,
    since rounding decides there what R returns. Updates with a NaN, an infinity or an
    entry beyond 1e37 become zero. Derivatives take c as constant. If gradients may be
    non-finite, wrap the chain in `optax.apply_if_finite`: NaN persists in Adam's
    moments, and the weight would never move again.

    Method: for every c, W'(c) lies in the span of [u, E_u] and [v, E_v], with E = du -
    u u.T du. Two products with each factor (6 R FLOPs per entry) reduce the search for
    c to 2R x 2R matrices. A bound by Frobenius norms comes first, and c is 1 where it
    decides. If it decides every weight, nothing else is computed.

    Args:
      max_norm: bound, or schedule of it.
      retraction: method of the following `retract_to_stiefel`; "svd" inside
        `retract_by_svd`, where W' = (u + c du) diag(s + c ds) (v + c dv).T.

    Returns:
      A transformation that needs `params`.

    Raises:
      ValueError: for an unknown retraction, or a bound that is not positive and finite.

    References:
      Spectron, arXiv 2602.12429, 2026, section 4. `Deviation:` the paper bounds a sum
      of norms to first order, by step radii and orthogonalised momentum. This
      transformation bounds the applied change itself, for any update.
    """
    if retraction != "svd":
        stiefel.check_method(retraction)
    _common.check_number("max_norm", max_norm, above=0)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        params = _common.require_params(params, "clip_by_composite_spectral_norm")
        factors, rebuild = _common.select_spectral(updates, params)
        new_state = state.next()
        if not factors:
            return updates, new_state
        bound = jnp.asarray(_common.value_of(max_norm, state.count), jnp.float32)
        parts = [part for pair in factors for part in _parts(*pair)]
        # Reverse mode refuses the loops of the search.
        scales = _scales(*jax.lax.stop_gradient((parts, bound)), retraction)
        scaled = iter(
            [_scale_update(d, c) for (_, d), c in zip(parts, scales, strict=True)]
        )
        return rebuild([_joined(d, scaled) for _, d in factors]), new_state

    def init_fn(params):
        if retraction == "svd":
            _common.check_no_blocks(params, "the retraction 'svd'")
        return _common.count_of_whole(params)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _parts(
    p: Any, d: Any
) -> list[tuple[spectral.SpectralFactors, spectral.SpectralFactors]]:
    """The weight and its update; of blocks, both halves, of which each moves by 2 c."""
    if not spectral.is_blocks(p):
        return [(p, d)]
    (p_in, p_out), (d_in, d_out) = spectral.halves(p), spectral.halves(d)
    # The halves share the bound: twice s is twice the norm.
    p_in, p_out, d_in = (w._replace(s=2 * w.s) for w in (p_in, p_out, d_in))
    zeros = jax.tree.map(jnp.zeros_like, d_in)
    return [
        (p_in, d_in._replace(v=zeros.v)),
        (p_out, d_out._replace(u=zeros.v, s=zeros.s)),
    ]


def _joined(d: Any, scaled: Iterator[spectral.SpectralFactors]) -> Any:
    """The update of a weight from its scaled parts, the next ones of `scaled`."""
    first = next(scaled)
    if not spectral.is_blocks(d):
        return first
    return d._replace(u=first.u, s=spectral.fed_s(first.s / 2), v=next(scaled).v)


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
        lambda: [
            jnp.where(known, 1.0, c)
            for known, c in zip(
                decided, _admissible_scales(factors, bound, retraction), strict=True
            )
        ],
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
    factors = [
        jax.tree.map(lambda x: x.astype(jnp.float32), (p, d)) for p, d in factors
    ]
    sides, valid = [], []
    for p, d in factors:
        peaks_u, peaks_v = _peak(d.u, (-2,)), _peak(d.v, (-2,))
        peak = jnp.maximum(_peak(peaks_u, (-1,)), _peak(peaks_v, (-1,)))
        finite = peak + _peak(d.s, (-1,)) < _TOO_LARGE
        sides.append((p.u, d.u, _units(peaks_u, finite), finite))
        sides.append((p.v, d.v, _units(peaks_v, finite), finite))
        valid.append(finite)
    alongs = [linalg.gram(x, _in_units(*step)) for x, *step in sides]
    # A branch is a computation of its own. Within one, XLA merges sums over devices in
    # an order of its own: one weight's x.T d with the E.T E of another, one by one. The
    # branch divides by the units again, as memory would hold all that it is given.
    squares = jax.lax.cond(
        jnp.any(jnp.stack([jnp.any(finite) for finite in valid])),
        lambda: [
            linalg.gram(_in_units(*step) - linalg.matmul(x, along))
            for (x, *step), along in zip(sides, alongs, strict=True)
        ],
        lambda: [0 * along for along in alongs],
    )
    operands: list[tuple[Array, ...]] = []
    for i, ((p, d), finite) in enumerate(zip(factors, valid, strict=True)):
        u, v = 2 * i, 2 * i + 1
        vectors = sides[u][2], sides[v][2], p.s, jnp.where(finite[..., None], d.s, 0)
        operands.append((alongs[u], squares[u], alongs[v], squares[v], *vectors))
    search = functools.partial(_search_scales, bound=bound, retraction=retraction)
    found = linalg.map_batched(search, *zip(*operands, strict=True), fill=0.0)
    return [jnp.where(ok, c, 0.0) for c, ok in zip(found, valid, strict=True)]


def _units(
    peaks: Float[Array, "*L R"], finite: Bool[Array, "*L"]
) -> Float[Array, "*L R"]:
    """Units of the columns of an update, from their largest entries.

    Squares of huge columns do not overflow in these units, and those of other columns
    do not vanish beside them.
    """
    return jnp.where(finite[..., None], jnp.maximum(peaks, 1.0), 1.0)


def _in_units(
    d: Float[Array, "*L n R"], units: Float[Array, "*L R"], finite: Bool[Array, "*L"]
) -> Float[Array, "*L n R"]:
    """The columns of d over their units; zeros where it is not finite."""
    return jnp.where(finite[..., None, None], d * (1 / units)[..., None, :], 0)


class _Side(NamedTuple):
    """The update of u or of v in the small space.

    x.T d = p units and E.T E = units q units, by columns.
    """

    p: Float[Array, "N K K"]
    q: Float[Array, "N K K"]
    units: Float[Array, "N K"]


class _Moved(NamedTuple):
    """Columns u + c du of one side, divided by `wide`, and their matrix z.

    Attributes:
      along: coefficients along u.
      steps: coefficients along E, in its units.
      gram: of the columns.
      z: R(u + c du) = (columns) z.
      wide: at least 1, so that no square overflows.
      travel: 1 + c ||du||, divided by `wide`.
    """

    along: Float[Array, "N K K"]
    steps: Float[Array, "N K"]
    gram: Float[Array, "N K K"]
    z: Float[Array, "N K K"]
    wide: Float[Array, "N K"]
    travel: Float[Array, "N K"]


def _search_scales(
    p_u: Float[Array, "N K K"],
    q_u: Float[Array, "N K K"],
    p_v: Float[Array, "N K K"],
    q_v: Float[Array, "N K K"],
    units_u: Float[Array, "N K"],
    units_v: Float[Array, "N K"],
    s: Float[Array, "N K"],
    ds: Float[Array, "N K"],
    *,
    bound: Float[Array, ""],
    retraction: str,
) -> Float[Array, " N"]:
    """The c in [0, 1] with which the applied update satisfies the bound, per weight."""
    sides = (_Side(p_u, q_u, units_u), _Side(p_v, q_v, units_v))
    # `spectral_radius_bound` may overestimate the norm by this factor.
    accepted = bound * 1.0005 * (2 * s.shape[-1]) ** (0.5 / 2 ** (_SQUARINGS + 1))
    norm_at = _norm_along_path(
        sides, s, ds, bound=bound, accepted=accepted, retraction=retraction
    )
    # For displacements of norm above 1, the path is far from a straight line.
    straight = 1 / jnp.maximum(jnp.maximum(*map(_displacement, sides)), 1)
    # Units are at least 1. Under shard_map, c must vary over the same axes as they do.
    full = jnp.minimum(units_u[:, 0], 1)
    return largest_admissible(norm_at, full, straight, bound=bound, accepted=accepted)


def _displacement(side: _Side) -> Float[Array, " N"]:
    """The Frobenius norm of du."""
    top = _peak(side.units, (-1,))
    share = side.units / top[:, None]
    p, q = side.p * share[:, None, :], side.q * share[:, None, :] * share[:, :, None]
    squares = jnp.sum(jnp.square(p), (-2, -1)) + jnp.trace(q, axis1=-2, axis2=-1)
    return top * jnp.sqrt(squares)


def _norm_along_path(
    sides: tuple[_Side, _Side],
    s: Float[Array, "N K"],
    ds: Float[Array, "N K"],
    *,
    bound: Float[Array, ""],
    accepted: Float[Array, ""],
    retraction: str,
) -> Callable[[Float[Array, " N"]], Float[Array, " N"]]:
    """The function c -> ||W'(c) - W||_2, per weight.

    Accurate enough to compare with `accepted`. Infinite where float32 cannot represent
    the step, or where rounding could raise an accepted norm beyond the tolerance.
    """
    # Columns of E in units of their lengths, to keep all products well scaled.
    lengths = [
        linalg.safe_divisor(jnp.sqrt(jnp.diagonal(q, axis1=-2, axis2=-1)))
        for _, q, _ in sides
    ]
    unit_qs = [
        q / (x[:, :, None] * x[:, None, :])
        for (_, q, _), x in zip(sides, lengths, strict=True)
    ]
    tolerated = _ROUNDING / jnp.finfo(s.dtype).eps * bound + 8 * _peak(s, (-1,))

    def norm_at(c):
        c = c[:, None]
        moved = _move(sides, c, retraction)
        new_s, size_s = s + c * ds, jnp.abs(s) + c * jnp.abs(ds)
        if retraction == "svd":
            new_s = new_s * moved[0].wide * moved[1].wide
        c_u, c_v = (linalg.matmul(m.along, m.z) for m in moved)
        t_u, t_v = (
            (m.steps * x)[..., None] * m.z for m, x in zip(moved, lengths, strict=True)
        )
        k = spectral.small_space_difference(c_u, c_v, s, new_s, t_u, t_v)
        peak = _peak(k, (-2, -1))
        k = k / linalg.safe_divisor(peak)[:, None, None]
        radius = linalg.spectral_radius_bound(
            spectral.small_space_product(k, *unit_qs),
            squarings=_SQUARINGS,
            threshold=jnp.square(accepted / linalg.safe_divisor(peak)),
        )
        norm = peak * jnp.sqrt(radius)
        error = _rounding_error(moved, size_s, retraction)
        usable = jnp.isfinite(norm) & ((norm > accepted) | (error <= tolerated))
        return jnp.where(usable, norm, jnp.inf)

    return norm_at


def _move(
    sides: tuple[_Side, _Side], c: Float[Array, "N 1"], retraction: str
) -> list[_Moved]:
    moved = []
    for side in sides:
        steps = c * side.units
        wide = jnp.maximum(steps, 1)
        if retraction == "polar":  # depends on the ratios of columns
            wide = jnp.broadcast_to(jnp.max(wide, axis=-1, keepdims=True), wide.shape)
        eye = jnp.eye(wide.shape[-1], dtype=wide.dtype)[None]
        along = (eye + side.p * steps[:, None, :]) / wide[:, None, :]
        squares = jnp.sum(jnp.square(side.p), axis=-2)
        squares = squares + jnp.diagonal(side.q, axis1=-2, axis2=-1)
        travel = (1 + steps * jnp.sqrt(squares)) / wide
        steps = steps / wide
        gram = linalg.gram(along) + steps[:, :, None] * steps[:, None, :] * side.q
        z = jnp.broadcast_to(eye, gram.shape)
        moved.append(_Moved(along, steps, gram, z, wide, travel))
    if retraction == "svd":
        return moved
    zs = stiefel.retraction_matrices([m.gram for m in moved], method=retraction)
    return [m._replace(z=z) for m, z in zip(moved, zs, strict=True)]


def _rounding_error(
    moved: list[_Moved], s: Float[Array, "N K"], retraction: str
) -> Float[Array, " N"]:
    """About how far rounding moves W', in units of eps; NaN if it cannot be told.

    A moved column carries an error of eps (1 + c ||du||). Relative to its distance from
    the span of the others, that error turns R. The search itself reads R from a Gram
    matrix, which squares that distance.

    Args:
      moved: columns of u and of v.
      s: |s| + c |ds|.
      retraction: as in `clip_by_composite_spectral_norm`.
    """
    if retraction == "svd":
        u, v = (m.travel * m.wide for m in moved)
        return jnp.max(u * s * v, axis=-1)
    turns = jnp.zeros([], s.dtype)
    for m in moved:
        lengths = jnp.sqrt(jnp.diagonal(m.gram, axis1=-2, axis2=-1))
        # 1 / rows of z are the distances of columns from the span of the others.
        rows = linalg.safe_sqrt(jnp.sum(jnp.square(m.z), axis=-1))
        if retraction == "polar":
            closeness = jnp.max(lengths, axis=-1) * jnp.max(rows, axis=-1)
        else:
            closeness = jnp.max(lengths * rows, axis=-1)
        turns = turns + jnp.square(closeness) * jnp.max(m.travel / lengths, axis=-1)
    return turns * jnp.max(s, axis=-1)


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
