"""Numbers at the edge: null and huge columns, ties, odd dtypes, split weights."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.faults import cases, runs
from sct_jax import (
    flax_layers,
    linalg,
    losses,
    optimizers,
    rank,
    spectral,
    stiefel,
    transforms,
)

_METHODS = stiefel.RETRACTION_NAMES
_ORTHONORMAL = 3e-5  # what the retractions promise for every finite matrix
_HUGE = 1e30


# --- Ingredients, in float64.


def _generator(context: cases.Context) -> np.random.Generator:
    return np.random.default_rng(context.rng.getrandbits(64))


def _point(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Matrices with orthonormal columns."""
    q, r = np.linalg.qr(rng.normal(size=shape))
    return q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]


def _factors(
    rng: np.random.Generator, s: Any, fans: tuple[int, int], *layers: int
) -> spectral.SpectralFactors:
    s = np.broadcast_to(np.asarray(s, np.float64), (*layers, len(s)))
    u, v = (_point(rng, *layers, fan, s.shape[-1]) for fan in fans)
    return spectral.SpectralFactors(*_as_float32((u, s, v)))


def _as_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def _dense(w: Any) -> np.ndarray:
    u, s, v = (np.asarray(x, np.float64) for x in w)
    return (u * s[..., None, :]) @ v.swapaxes(-1, -2)


def _distance(old: Any, new: Any) -> np.ndarray:
    """||W' - W||_2 per layer."""
    return np.linalg.norm(_dense(new) - _dense(old), ord=2, axis=(-2, -1))


def _orthonormality_error(x: Any) -> float:
    x = np.asarray(x, np.float64)
    gram = x.swapaxes(-1, -2) @ x
    return float(np.max(np.abs(gram - np.eye(x.shape[-1]))))


def _is_finite(tree: Any) -> bool:
    return all(bool(np.all(np.isfinite(x))) for x in jax.tree.leaves(tree))


def _orthonormal(seen: cases.Seen, x: Any, what: str) -> None:
    seen.that(_is_finite(x), "finite", what)
    error = _orthonormality_error(x)
    seen.that(
        error < _ORTHONORMAL, f"orthonormal to {_ORTHONORMAL}", f"{what}: {error}"
    )


# --- Columns and singular values.


def _odd_columns(rng: np.random.Generator) -> dict[str, np.ndarray]:
    points = {}
    for name in ("null", "repeated", "huge", "all null", "all alike", "mixed"):
        x = _point(rng, 40, 8)
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
    seen, rng = cases.Seen(), _generator(context)
    points = _odd_columns(rng)
    for method in _METHODS:
        for name, x in points.items():
            found = stiefel.retract(jnp.asarray(x, jnp.float32), method=method)
            _orthonormal(seen, found, f"{method}, {name}")
        together = stiefel.retract(_as_float32(points), method=method)
        for name, found in together.items():
            _orthonormal(seen, found, f"{method}, {name} among others")
    for method in _METHODS:
        tx = transforms.retract_to_stiefel(method)
        for name, x in points.items():
            w = _factors(rng, np.ones(8), (40, 12))
            target = w._replace(u=jnp.asarray(x, jnp.float32))
            d = jax.tree.map(jnp.subtract, target, w)
            new = _apply(tx, w, d)
            _orthonormal(seen, new.u, f"update, {method}, {name}")
    return seen.outcome(f"columns {', '.join(points)}; {', '.join(_METHODS)}")


@functools.partial(jax.jit, static_argnums=0)
def _apply(tx: optax.GradientTransformation, w: Any, d: Any) -> Any:
    updates, _ = tx.update(d, tx.init(w), w)
    return optax.apply_updates(w, updates)


def _steps(tx: optax.GradientTransformation, params: Any, grads: list[Any]) -> Any:
    """The parameters after a step per gradient."""
    state, step = tx.init(params), jax.jit(tx.update)
    for grad in grads:
        updates, state = step(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def _odd_singular_values(context: cases.Context) -> cases.Outcome:
    seen, rng = cases.Seen(), _generator(context)
    spectra = ([0, 0, 0, 0], [1, 1, 1, 1], [1, -1, 0, 1], [2, -2, 1e-30, -0.0])
    params = {str(s): _factors(rng, s, (12, 9)) for s in spectra}
    chains = {
        "sct": optimizers.sct(1e-2, max_update_norm=0.3, weight_decay=0.1),
        "sct, polar": optimizers.sct(1e-2, retraction="polar"),
        "sct, svd": optimizers.sct(1e-2, retraction="svd", max_update_norm=0.3),
        "tsvd": optimizers.tsvd(1e-2, retraction_tolerance=1e-3),
        "stiefel_muon": optimizers.stiefel_muon(1e-2, coordinates="svd"),
    }
    normal = lambda x: rng.normal(size=x.shape)
    grads = [_as_float32(jax.tree.map(normal, params)) for _ in range(3)]
    grads.append(jax.tree.map(jnp.zeros_like, params))
    for name, tx in chains.items():
        new, state = _steps(tx, params, grads)
        seen.that(_is_finite(new), "finite after four steps of each chain", name)
        seen.that(_is_finite(state), "finite moments", name)
    low = {name: spectral.to_low_rank(w) for name, w in params.items()}
    low_grads = [_as_float32(jax.tree.map(normal, low)) for _ in range(3)]
    for name, tx in (
        ("spectron", optimizers.spectron(1e-2)),
        ("muon", optimizers.muon(1e-2)),
    ):
        new, _ = _steps(tx, low, low_grads)
        seen.that(_is_finite(new), "finite after four steps of each chain", name)
    for name, w in params.items():
        moved = w._replace(s=w.s + 0.5)
        norm = float(spectral.composite_update_norm(w, moved))
        wanted = float(_distance(w, moved))
        seen.that(abs(norm - wanted) < 1e-4, "the right norm", f"{name}: {norm}")
        slope = jax.grad(
            lambda s, w=w: spectral.composite_update_norm(w, w._replace(s=s))
        )
        seen.that(_is_finite(slope(w.s)), "finite derivatives", name)
        parts = jax.grad(lambda w: sum(jnp.sum(x**2) for x in spectral.to_low_rank(w)))
        seen.that(_is_finite(parts(w)), "finite derivatives", name)
        energy = int(spectral.energy_rank(w.s, 0.5))
        seen.that(1 <= energy <= 4, "a rank in 1..4", f"{name}: {energy}")
    return seen.outcome(f"s = {', '.join(params)}; {', '.join(chains)}, spectron, muon")


def _annihilating_update(context: cases.Context) -> cases.Outcome:
    seen, rng, count = cases.Seen(), _generator(context), 200
    for method in _METHODS:
        for s in ([1.0], [1.0, 0.7, 0.4]):
            w = _factors(rng, s, (9, 7), count)
            noise = 0.05 * rng.normal(size=w.u.shape)
            noise[..., 0] = -np.asarray(w.u)[..., 0]
            d = spectral.SpectralFactors(
                jnp.asarray(noise, jnp.float32),
                jnp.asarray(0.05 * rng.normal(size=w.s.shape), jnp.float32),
                jnp.asarray(0.05 * rng.normal(size=w.v.shape), jnp.float32),
            )
            worst = float(np.max(_distance(w, _clipped(method, 0.8)(w, d)))) / 0.8
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
    return functools.partial(_apply, tx)


CLIPPED = 10_000
_CLIPPED_SHAPES = (((9, 7), 1), ((12, 9), 4), ((24, 16), 8))


def _clipped_updates(context: cases.Context) -> cases.Outcome:
    seen, rng, bound = cases.Seen(), _generator(context), 0.3
    each = -(-CLIPPED // (len(_METHODS) * len(_CLIPPED_SHAPES)))
    above = at_bound = 0
    kinds: dict[str, int] = {}
    worst = 0.0
    for fans, number in _CLIPPED_SHAPES:
        s = np.geomspace(2, 0.2, number) * np.resize([1, -1], number)
        for method in _METHODS:
            w = _factors(rng, s, fans, each)
            d = _random_updates(rng, w, kinds)
            new = _clipped(method, bound)(w, d)
            norms = _distance(w, new)
            seen.that(_is_finite(new), "finite", method)
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
    return spectral.SpectralFactors(*_as_float32((du, ds, dv)))


# --- Extreme sizes.


def _extremes(context: cases.Context) -> cases.Outcome:
    seen, rng = cases.Seen(), _generator(context)
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
        np.asarray(x, np.float64) for x in linalg.jacobi_svd(_as_float32(1e-25 * m))
    )
    back = (p * s[:, None, :]) @ z.swapaxes(-1, -2) / 1e-25
    seen.that(np.max(np.abs(back - m)) < 1e-4, "SVD of 1e-25 times a matrix")
    for scale in (1e20, 1e-30):
        old = _factors(rng, scale * np.array([2.0, -1.0, 0.5]), (9, 7))
        new = old._replace(s=old.s * jnp.asarray([1.5, 1.0, 2.0]))
        found, wanted = (
            float(spectral.composite_update_norm(old, new)),
            _distance(old, new),
        )
        seen.that(abs(found / wanted - 1) < 1e-4, "norms at s = 1e20 and 1e-30", found)
    key = jax.random.key(0)
    zero = spectral.init(key, 12, 9, 3, scale=0, rescale=True)
    seen.that(_is_finite(zero) and not np.any(zero.s), "scale 0 gives W = 0", zero.s)
    _raises(seen, "scale", lambda: spectral.init(key, 12, 9, 3, scale=-1))
    w = _factors(rng, [2.0, 1.0, 0.5], (12, 9))
    d = jax.tree.map(jnp.zeros_like, w)
    d = d._replace(
        u=d.u.at[:, 1].set(jnp.asarray(_HUGE * rng.normal(size=12), jnp.float32))
    )
    new = _apply(transforms.retract_by_svd(optax.identity()), w, d)
    _orthonormal(seen, new.u, "retraction by SVD")
    _orthonormal(seen, new.v, "retraction by SVD")
    wide = w._replace(u=w.u.at[:, 1].multiply(_HUGE))
    projected = transforms.project_to_tangent()
    for params, updates in ((wide, w), (w, wide)):
        found, _ = projected.update(updates, projected.init(params), params)
        seen.that(_is_finite(found), "finite projections of a column of 1e30")
    return seen.outcome(
        "entries up to 3e38, 1e-25 times a matrix, s = 1e20 and 1e-30, scale 0 and -1, "
        "columns of 1e30"
    )


def _raises(seen: cases.Seen, word: str, refused: Callable[[], Any]) -> None:
    """Notes whether a call is refused with a message that has the word."""
    try:
        refused()
    except ValueError as error:
        seen.that(word in str(error), f"refused by {word}", error)
    else:
        seen.that(False, f"refused by {word}", "accepted")


def _impossible_numbers(context: cases.Context) -> cases.Outcome:
    seen = cases.Seen()
    clip = transforms.clip_by_composite_spectral_norm
    for value in (math.nan, -1.0, jnp.float32(math.nan), jnp.float32(-1), np.inf):
        _raises(seen, "max_norm", lambda value=value: clip(value))
        _raises(
            seen,
            "max_update_norm",
            lambda value=value: optimizers.sct(1e-3, max_update_norm=value),
        )
    fractions: tuple[Any, ...] = (2.5, 0, -1)
    for value in fractions:
        _raises(
            seen,
            "retraction_every",
            lambda value=value: optimizers.tsvd(1e-3, retraction_every=value),
        )
    fields = {
        "optimizer.peak_learning_rate": "1e300",
        "model.rope_theta": "1e-320",
        "optimizer.max_update_norm": "nan",
        "optimizer.weight_decay": "-1",
    }
    for name, value in fields.items():
        flags = context.space.flags(context.folder / "run", {name: value})
        seen.refused(runs.call(*flags, "--dry-run"), name)
    given = ", ".join(f"{name}={value}" for name, value in fields.items())
    return seen.outcome(
        f"bounds of NaN, -1 and inf, as numbers and arrays; retraction_every 2.5, 0 "
        f"and -1; {given}"
    )


# --- Layers, losses, optimizer states.


def _integers(context: cases.Context) -> cases.Outcome:
    seen, rng = cases.Seen(), _generator(context)
    w = _factors(rng, [2.0, -1.0, 0.5], (12, 9))
    layer = flax_layers.SpectralDense(9, rank=3)
    variables = layer.init(jax.random.key(0), jnp.ones((2, 12)))
    for dtype in (np.int32, np.uint8, np.bool_):
        x = rng.integers(0, 2 if dtype == np.bool_ else 50, size=(4, 12)).astype(dtype)
        real = x.astype(np.float32)
        for name, function in (
            ("linear", lambda x: spectral.linear(x, w)),
            ("SpectralDense", lambda x: layer.apply(variables, x)),
        ):
            found, wanted = (np.asarray(function(jnp.asarray(y))) for y in (x, real))
            seen.that(
                np.any(wanted) and np.array_equal(found, wanted),
                "the product of the same numbers as floats",
                f"{name}, {np.dtype(dtype)}",
            )
    return seen.outcome("int32, uint8 and bool through linear and SpectralDense")


def _losses(context: cases.Context) -> cases.Outcome:
    seen, rng = cases.Seen(), _generator(context)
    logits = rng.normal(size=(4, 9, 11))
    targets = rng.integers(0, 11, size=(4, 9))
    ignored = rng.random(targets.shape) < 0.4
    shifted = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
    nats = -np.take_along_axis(shifted, targets[..., None], -1)[..., 0]
    wanted = float(np.mean(nats[~ignored]))
    loss = losses.next_token_cross_entropy
    given = jnp.asarray(logits, jnp.float32)
    found = float(loss(given, jnp.asarray(np.where(ignored, -100, targets))))
    seen.that(abs(found - wanted) < 1e-5, "targets of -100 are ignored", found)
    spoiled = jnp.where(ignored[..., None], jnp.nan, given)
    mask = jnp.asarray(~ignored, jnp.float32)
    value, gradient = jax.value_and_grad(
        lambda x: loss(x, jnp.asarray(targets), mask=mask)
    )(spoiled)
    seen.that(
        abs(float(value) - wanted) < 1e-5, "NaN where the mask is 0 is too", value
    )
    seen.that(_is_finite(gradient), "with a finite gradient")
    ones = jnp.ones((1, 3001), jnp.bfloat16)
    even = float(loss(jnp.zeros((1, 3001, 4)), jnp.zeros((1, 3001), int), mask=ones))
    seen.that(abs(even - math.log(4)) < 1e-5, "sums of a bfloat16 mask", even)
    return seen.outcome(
        "targets of -100, NaN logits under a mask, a bfloat16 mask of 3,001 ones"
    )


def _resized_beside(context: cases.Context) -> cases.Outcome:
    seen, rng = cases.Seen(), _generator(context)
    w = lambda: _factors(rng, [2.0, -1.0, 0.5, 0.1], (12, 9))
    params = {"kernel": w(), "mu": {"kernel": w()}}
    tx = optimizers.tsvd(1e-2)
    grads = [
        _as_float32(jax.tree.map(lambda x: rng.normal(size=x.shape), params))
        for _ in range(3)
    ]
    params, state = _steps(tx, params, grads)
    new = rank.resize(
        params,
        state,
        active={"mu/kernel": 2},
        ranks={"mu/kernel": 3},
        key=jax.random.key(0),
    )
    before, after = (dict(_named(tree)) for tree in ((params, state), new))
    seen.that(before.keys() == after.keys(), "the same structure")
    resized = beside = 0
    for name, x in before.items():
        y = after.get(name)
        if "['mu']" in name and x.ndim:
            resized += 1
            seen.that(y is not None and y.shape[-1] == 3, "it is resized", name)
        else:
            beside += 1
            same = y is not None and np.array_equal(x, y)
            seen.that(same, "all else is unchanged", name)
    cases.injected(resized >= 9 and beside >= 9, f"{resized} and {beside} arrays")
    return seen.outcome('the weight "mu/kernel" resized beside one called "kernel"')


def _named(tree: Any) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path), np.asarray(leaf)


def _split_weights(context: cases.Context) -> cases.Outcome:
    seen, rng = cases.Seen(), _generator(context)
    params = {"w": _factors(rng, [2.0, -1.0, 0.5], (12, 9))}
    factors = spectral.SpectralFactors
    for name, chain in (
        ("sct", optimizers.sct(1e-2)),
        ("stiefel_muon", optimizers.stiefel_muon(1e-2)),
    ):
        parts: dict[Any, optax.GradientTransformation] = {
            "a": chain,
            "b": optax.sgd(1e-2),
        }
        split = optax.partition(parts, {"w": factors("a", "b", "a")})  # pyright: ignore
        _raises(seen, "split", lambda tx=split: tx.init(params))
        mask = {"w": factors(True, False, True)}  # pyright: ignore
        masked = optax.masked(chain, mask)
        _raises(seen, "split", lambda tx=masked: tx.init(params))
        flat = optax.flatten(chain)
        _raises(seen, "optax.flatten", lambda tx=flat: tx.init(params))
        whole = optax.partition(parts, {"w": "a"})
        with contextlib.suppress(ValueError):
            new, _ = _steps(whole, params, [params])
            error = _orthonormality_error(new["w"].u)
            seen.that(error < 1e-5, "a whole weight is accepted", f"{name}: {error}")
    return seen.outcome("u, s and v of one weight in two partitions, masked, flattened")


CASES = (
    cases.Case(
        12,
        "factors with null, repeated and 1e30 columns",
        "a finite orthonormal result, never NaN",
        _degenerate_columns,
        group="numerics",
        quick=True,
    ),
    cases.Case(
        13,
        "singular values of zero, of either sign, and ties",
        "no NaN anywhere",
        _odd_singular_values,
        group="numerics",
    ),
    cases.Case(
        30,
        "a weight resized beside one whose name ends alike",
        "moments of the other one are unchanged",
        _resized_beside,
        group="numerics",
        quick=True,
    ),
    cases.Case(
        31,
        "integers and booleans as input of a layer",
        "promoted as dense layers do",
        _integers,
        group="numerics",
        quick=True,
    ),
    cases.Case(
        32,
        "an update that annihilates a column",
        "the change of W keeps its bound",
        _annihilating_update,
        group="numerics",
        quick=True,
    ),
    cases.Case(
        33,
        "targets of -100, NaN under a mask, a bfloat16 mask",
        "ignored positions never matter; sums in float32",
        _losses,
        group="numerics",
        quick=True,
    ),
    cases.Case(
        35,
        "a weight split by partition, masked or flatten",
        "an error when the chain is initialised",
        _split_weights,
        group="numerics",
        quick=True,
    ),
    cases.Case(
        36,
        "hyperparameters of NaN, below zero, fractional or beyond float32",
        "refused by name",
        _impossible_numbers,
        group="numerics",
        quick=True,
    ),
    cases.Case(
        38,
        "entries up to 3e38, values of 1e-30, scales of 0 and -1",
        "right to rounding, or refused",
        _extremes,
        group="numerics",
        quick=True,
    ),
    cases.Case(
        60,
        f"{CLIPPED:,} clipped updates, a third with null, scaled or equal columns",
        "none above 1.01 of the bound, in float64",
        _clipped_updates,
        group="numerics",
    ),
)
