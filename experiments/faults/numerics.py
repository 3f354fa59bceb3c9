"""Numbers at the edge: null and huge columns, ties, entries of any size."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.faults import cases, matrices
from sct_jax import linalg, optimizers, spectral, stiefel, transforms

_METHODS = stiefel.RETRACTION_NAMES
_ORTHONORMAL = 3e-5  # what the retractions promise for every finite matrix
_HUGE = 1e30


def _orthonormal(seen: cases.Seen, x: Any, what: str) -> None:
    seen.that(matrices.is_finite(x), "finite", what)
    error = matrices.orthonormality_error(x)
    seen.that(
        error < _ORTHONORMAL, f"orthonormal to {_ORTHONORMAL}", f"{what}: {error}"
    )


# --- Columns and singular values.


def _odd_columns(rng: np.random.Generator) -> dict[str, np.ndarray]:
    points = {}
    for name in ("null", "repeated", "huge", "all null", "all alike", "mixed"):
        x = matrices.point(rng, 40, 8)
        if name in ("null", "mixed"):
            x[:, 2] = 0
        if name in ("repeated", "mixed"):
            x[:, 5] = x[:, 1]
        if name in ("huge", "mixed"):
            x[:, 7] *= _HUGE
        if name == "all null":
            x[:] = 0
        if name == "all alike":
            x[:] = x[:, :1]
        points[name] = x
    return points


def _degenerate_columns(context: cases.Context) -> cases.Outcome:
    seen, rng = cases.Seen(), matrices.generator(context)
    points = _odd_columns(rng)
    for method in _METHODS:
        for name, x in points.items():
            found = stiefel.retract(jnp.asarray(x, jnp.float32), method=method)
            _orthonormal(seen, found, f"{method}, {name}")
        together = stiefel.retract(matrices.as_float32(points), method=method)
        for name, found in together.items():
            _orthonormal(seen, found, f"{method}, {name} among others")
    for method in _METHODS:
        tx = transforms.retract_to_stiefel(method)
        for name, x in points.items():
            w = matrices.factors(rng, np.ones(8), (40, 12))
            target = w._replace(u=jnp.asarray(x, jnp.float32))
            d = jax.tree.map(jnp.subtract, target, w)
            new = matrices.apply(tx, w, d)
            _orthonormal(seen, new.u, f"update, {method}, {name}")
    return seen.outcome(f"columns {', '.join(points)}; {', '.join(_METHODS)}")


def _odd_singular_values(context: cases.Context) -> cases.Outcome:
    seen, rng = cases.Seen(), matrices.generator(context)
    spectra = ([0, 0, 0, 0], [1, 1, 1, 1], [1, -1, 0, 1], [2, -2, 1e-30, -0.0])
    params = {str(s): matrices.factors(rng, s, (12, 9)) for s in spectra}
    chains = {
        "sct": optimizers.sct(1e-2, max_update_norm=0.3, weight_decay=0.1),
        "sct, polar": optimizers.sct(1e-2, retraction="polar"),
        "sct, svd": optimizers.sct(1e-2, retraction="svd", max_update_norm=0.3),
        "tsvd": optimizers.tsvd(1e-2, retraction_tolerance=1e-3),
        "stiefel_muon": optimizers.stiefel_muon(1e-2, coordinates="svd"),
    }
    normal = lambda x: rng.normal(size=x.shape)
    grads = [matrices.as_float32(jax.tree.map(normal, params)) for _ in range(3)]
    grads.append(jax.tree.map(jnp.zeros_like, params))
    for name, tx in chains.items():
        new, state = matrices.steps(tx, params, grads)
        seen.that(matrices.is_finite(new), "finite after steps of each chain", name)
        seen.that(matrices.is_finite(state), "finite moments", name)
    low = {name: spectral.to_low_rank(w) for name, w in params.items()}
    low_grads = [matrices.as_float32(jax.tree.map(normal, low)) for _ in range(3)]
    for name, tx in (
        ("spectron", optimizers.spectron(1e-2)),
        ("muon", optimizers.muon(1e-2)),
    ):
        new, _ = matrices.steps(tx, low, low_grads)
        seen.that(matrices.is_finite(new), "finite after steps of each chain", name)
    for name, w in params.items():
        moved = w._replace(s=w.s + 0.5)
        norm = float(spectral.composite_update_norm(w, moved))
        wanted = float(matrices.distance(w, moved))
        seen.that(abs(norm - wanted) < 1e-4, "the right norm", f"{name}: {norm}")
        slope = jax.grad(
            lambda s, w=w: spectral.composite_update_norm(w, w._replace(s=s))
        )
        seen.that(matrices.is_finite(slope(w.s)), "finite derivatives", name)
        parts = jax.grad(lambda w: sum(jnp.sum(x**2) for x in spectral.to_low_rank(w)))
        seen.that(matrices.is_finite(parts(w)), "finite derivatives", name)
        energy = int(spectral.energy_rank(w.s, 0.5))
        seen.that(1 <= energy <= 4, "a rank in 1..4", f"{name}: {energy}")
    return seen.outcome(f"s = {', '.join(params)}; {', '.join(chains)}, spectron, muon")


def _annihilating_update(context: cases.Context) -> cases.Outcome:
    seen, rng, count = cases.Seen(), matrices.generator(context), 200
    for method in _METHODS:
        for s in ([1.0], [1.0, 0.7, 0.4]):
            w = matrices.factors(rng, s, (9, 7), count)
            noise = 0.05 * rng.normal(size=w.u.shape)
            noise[..., 0] = -np.asarray(w.u)[..., 0]
            d = spectral.SpectralFactors(
                jnp.asarray(noise, jnp.float32),
                jnp.asarray(0.05 * rng.normal(size=w.s.shape), jnp.float32),
                jnp.asarray(0.05 * rng.normal(size=w.v.shape), jnp.float32),
            )
            worst = (
                float(np.max(matrices.distance(w, _clipped(method, 0.8)(w, d)))) / 0.8
            )
            seen.that(
                worst <= 1.01, "at most 1.01 of the bound", f"{method}: {worst:.3f}"
            )
    return seen.outcome(
        f"du = -u in one column, {count} weights of shape (9, 7) and rank 1 and 3, "
        "bound .8"
    )


@functools.cache
def _clipped(method: str, bound: float) -> Callable[[Any, Any], Any]:
    """From a weight and its update to the new weight, under the bound."""
    tx = optax.chain(
        transforms.clip_by_composite_spectral_norm(bound, retraction=method),
        transforms.retract_to_stiefel(method),
    )
    return functools.partial(matrices.apply, tx)


CLIPPED = 10_000
_CLIPPED_SHAPES = (((9, 7), 1), ((12, 9), 4), ((24, 16), 8))


def _clipped_updates(context: cases.Context) -> cases.Outcome:
    seen, rng, bound = cases.Seen(), matrices.generator(context), 0.3
    each = -(-CLIPPED // (len(_METHODS) * len(_CLIPPED_SHAPES)))
    above = at_bound = 0
    kinds: dict[str, int] = {}
    worst = 0.0
    for fans, number in _CLIPPED_SHAPES:
        s = np.geomspace(2, 0.2, number) * np.resize([1, -1], number)
        for method in _METHODS:
            w = matrices.factors(rng, s, fans, each)
            d = _random_updates(rng, w, kinds)
            new = _clipped(method, bound)(w, d)
            norms = matrices.distance(w, new)
            seen.that(matrices.is_finite(new), "finite", method)
            above += int(np.sum(~(norms <= 1.01 * bound)))
            at_bound += int(np.sum(norms >= 0.9 * bound))
            worst = max(worst, float(np.max(norms)) / bound)
    total = each * len(_METHODS) * len(_CLIPPED_SHAPES)
    odd = total - kinds["plain"]
    cases.injected(3 * odd >= 0.9 * total, f"{odd} of {total} have odd columns")
    cases.injected(at_bound > total / 4, f"only {at_bound} were clipped")
    seen.equal("updates above 1.01 of the bound", above, 0)
    seen.that(worst <= 1.01, f"the largest has {worst:.4f} of it", worst)
    told = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    return seen.outcome(f"{total:,} updates ({told})")


def _random_updates(
    rng: np.random.Generator, w: Any, kinds: dict[str, int]
) -> spectral.SpectralFactors:
    """An update per layer; a third null, scale or duplicate columns."""
    layers, number = w.s.shape
    size = 10.0 ** rng.uniform(-3, 2, layers)
    du, ds, dv = (
        rng.normal(size=x.shape) * size.reshape(-1, *[1] * (x.ndim - 1)) for x in w
    )
    sides = ((du, np.asarray(w.u, np.float64)), (dv, np.asarray(w.v, np.float64)))
    for layer in range(layers):
        kind = "plain"
        if rng.random() < 0.36:
            d, x = sides[rng.integers(2)]
            column, other = rng.integers(number), rng.integers(number)
            kind = ("null", "scaled", "duplicated")[rng.integers(3)]
            if kind == "duplicated" and column == other:
                kind = "null"
            if kind == "null":
                d[layer, :, column] = -x[layer, :, column]
            elif kind == "scaled":
                d[layer, :, column] *= 10.0 ** rng.uniform(3, 30)
            else:
                moved = x[layer, :, other] + d[layer, :, other]
                d[layer, :, column] = moved - x[layer, :, column]
        kinds[kind] = kinds.get(kind, 0) + 1
    return spectral.SpectralFactors(*matrices.as_float32((du, ds, dv)))


# --- Extreme sizes.


def _extremes(context: cases.Context) -> cases.Outcome:
    seen, rng = cases.Seen(), matrices.generator(context)
    base = jnp.asarray(rng.normal(size=(20, 5)), jnp.float32)
    huge = base * (3e38 / jnp.max(jnp.abs(base)))
    for method in _METHODS:
        found = stiefel.retract(huge, method=method)
        apart = np.max(np.abs(found - stiefel.retract(base, method=method)))
        seen.that(
            apart < 1e-5, "retraction of entries up to 3e38", f"{method}: {apart}"
        )
    m = rng.normal(size=(3, 6, 6))
    p, s, z = (
        np.asarray(x, np.float64)
        for x in linalg.jacobi_svd(matrices.as_float32(1e-25 * m))
    )
    back = (p * s[:, None, :]) @ z.swapaxes(-1, -2) / 1e-25
    seen.that(np.max(np.abs(back - m)) < 1e-4, "SVD of 1e-25 times a matrix")
    for scale in (1e20, 1e-30):
        old = matrices.factors(rng, scale * np.array([2.0, -1.0, 0.5]), (9, 7))
        new = old._replace(s=old.s * jnp.asarray([1.5, 1.0, 2.0]))
        found, wanted = (
            float(spectral.composite_update_norm(old, new)),
            matrices.distance(old, new),
        )
        seen.that(abs(found / wanted - 1) < 1e-4, "norms at s = 1e20 and 1e-30", found)
    key = jax.random.key(0)
    zero = spectral.init(key, 12, 9, 3, scale=0, rescale=True)
    seen.that(
        matrices.is_finite(zero) and not np.any(zero.s), "scale 0 gives W = 0", zero.s
    )
    seen.raises("scale", lambda: spectral.init(key, 12, 9, 3, scale=-1))
    w = matrices.factors(rng, [2.0, 1.0, 0.5], (12, 9))
    d = jax.tree.map(jnp.zeros_like, w)
    d = d._replace(
        u=d.u.at[:, 1].set(jnp.asarray(_HUGE * rng.normal(size=12), jnp.float32))
    )
    new = matrices.apply(transforms.retract_by_svd(optax.identity()), w, d)
    _orthonormal(seen, new.u, "retraction by SVD")
    _orthonormal(seen, new.v, "retraction by SVD")
    wide = w._replace(u=w.u.at[:, 1].multiply(_HUGE))
    projected = transforms.project_to_tangent()
    for params, updates in ((wide, w), (w, wide)):
        found, _ = projected.update(updates, projected.init(params), params)
        seen.that(matrices.is_finite(found), "finite projections of a column of 1e30")
    return seen.outcome(
        "entries up to 3e38, 1e-25 times a matrix, s = 1e20 and 1e-30, scale 0 and -1, "
        "columns of 1e30"
    )


CASES = (
    cases.Case(
        12,
        "factors with null, repeated and 1e30 columns",
        "a finite orthonormal result, never NaN",
        _degenerate_columns,
        group="numerics",
    ),
    cases.Case(
        13,
        "singular values of zero, of either sign, and ties",
        "no NaN anywhere",
        _odd_singular_values,
        group="numerics",
    ),
    cases.Case(
        32,
        "an update that annihilates a column",
        "the change of W keeps its bound",
        _annihilating_update,
        group="numerics",
    ),
    cases.Case(
        38,
        "entries up to 3e38, values of 1e-30, scales of 0 and -1",
        "right to rounding, or refused",
        _extremes,
        group="numerics",
    ),
    cases.Case(
        60,
        f"{CLIPPED:,} clipped updates, a third with null, scaled or equal columns",
        "none above 1.01 of the bound, in float64",
        _clipped_updates,
        group="numerics",
    ),
)
