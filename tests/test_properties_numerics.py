"""What holds for every finite input: retractions, the clip, and every chain."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from hypothesis import strategies

from sct_jax import optimizers, spectral, stiefel, transforms

EPS = float(np.finfo(np.float32).eps)
ORTHONORMAL = 3e-5  # what the docstrings promise for every finite matrix
METHODS = stiefel.RETRACTION_NAMES
SETTINGS = {"deadline": None, "derandomize": True, "database": None}


# --- the bound of the clip -------------------------------------------------------

FAN_IN, FAN_OUT = 9, 7


def draw_weights(rng, count, rank):
    """Float64 factors with s of every size, signs, zeros and ties."""
    s = 10.0 ** rng.uniform(-2, 1, size=(count, rank))
    s = s * rng.choice([-1, 1], size=s.shape) * (rng.random(s.shape) > 0.05)
    tied = rng.random(count) < 0.1
    s[tied] = s[tied, :1]
    return spectral.SpectralFactors(
        reference.signed_qr(rng.normal(size=(count, FAN_IN, rank))),
        s,
        reference.signed_qr(rng.normal(size=(count, FAN_OUT, rank))),
    )


def spoil(rng, x, dx):
    """Changes an update in place: null, turned, scaled or duplicate columns."""
    rank = x.shape[-1]
    j, other = rng.integers(rank), rng.integers(rank)
    size = 10.0 ** rng.uniform(-30, 30)
    near = 1 + rng.choice([-1, 1]) * 10.0 ** rng.uniform(-9, -1)
    kind = rng.integers(8)
    if kind == 0:
        dx[:, j] = -x[:, j]
    elif kind == 1:
        dx[:, j] = -near * x[:, j]
    elif kind == 2:
        dx[:, j] = -rng.uniform(1.5, 4) * x[:, j]
    elif kind == 3:
        dx[:, j] *= size
    elif kind == 4:
        dx[:, j] = x[:, other] + dx[:, other] - x[:, j]
    elif kind == 5:
        dx[:, j] = size * x[:, other] - x[:, j]
    elif kind == 6:
        dx[:] = -rng.choice([1, 1 + 1e-6, 2, 3]) * x
    else:
        dx[:] = x @ (rng.normal(size=(rank, rank)) * 10.0 ** rng.uniform(-2, 3))


def draw_updates(rng, w):
    """Updates of every size, of which two in three have spoilt columns."""
    count = len(w.s)
    size = 10.0 ** rng.uniform(-3, 1, size=(count, 1, 1))
    d = spectral.SpectralFactors(
        size * rng.normal(size=w.u.shape) / np.sqrt(FAN_IN),
        size[:, 0] * rng.normal(size=w.s.shape),
        size * rng.normal(size=w.v.shape) / np.sqrt(FAN_OUT),
    )
    for x in d:
        x[rng.random(count) < 0.2] = 0
    for i in range(count):
        if rng.random() < 2 / 3:
            for side in [("u",), ("v",), ("u", "v")][rng.integers(3)]:
                spoil(rng, getattr(w, side)[i], getattr(d, side)[i])
    return d


@functools.cache
def compiled_clip(retraction):
    @jax.jit
    def step(params, updates, max_norm):
        clip = transforms.clip_by_composite_spectral_norm(
            max_norm, retraction=retraction
        )
        if retraction == "svd":
            tx = transforms.retract_by_svd(clip)
        else:
            tx = optax.chain(clip, transforms.retract_to_stiefel(retraction))
        updates, _ = tx.update(updates, tx.init(params), params)
        return optax.apply_updates(params, updates)

    return step


def excess_over_the_bound(retraction, *, seed, count):
    """The norms of `count` changes, without rounding, over their bound."""
    rng = np.random.default_rng(seed)
    old, wanted = {}, {}
    for rank in (1, 3):
        w = draw_weights(rng, count // 2, rank)
        old[rank], wanted[rank] = w, draw_updates(rng, w)
    old, wanted = (
        jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
        for tree in (old, wanted)
    )
    max_norm = 10.0 ** rng.uniform(-3, 0.5)
    new = compiled_clip(retraction)(old, wanted, jnp.float32(max_norm))
    ratios = []
    for rank in old:
        assert all(np.all(np.isfinite(x)) for x in new[rank])
        for x in (new[rank].u, new[rank].v):
            assert reference.orthonormality_error(x) < ORTHONORMAL
        norms = reference.composite_update_norm(old[rank], new[rank])
        peaks = [np.max(np.abs(w[rank].s), axis=-1) for w in (old, new)]
        rounding = 16 * EPS * np.maximum(*peaks) * np.sqrt(rank)
        ratios.append((norms - rounding) / max_norm)
    return np.concatenate(ratios)


@pytest.mark.parametrize("retraction", [*METHODS, "svd"])
def test_hundreds_of_updates_keep_the_bound(retraction):
    ratios = [
        excess_over_the_bound(retraction, seed=seed, count=100) for seed in range(4)
    ]
    assert np.max(ratios) <= 1.01
    assert np.max(ratios) > 0.9  # the bound was used


@pytest.mark.slow
@pytest.mark.parametrize("retraction", [*METHODS, "svd"])
def test_ten_thousand_updates_keep_the_bound(retraction):
    worst = [
        np.max(excess_over_the_bound(retraction, seed=seed, count=1000))
        for seed in range(100, 110)
    ]
    assert max(worst) <= 1.01


# --- retractions -----------------------------------------------------------------

SHAPES = {"tall": (9, 3), "square": (4, 4), "stacked": (2, 7, 3), "one": (5, 1)}


@functools.cache
def compiled_retraction(method):
    return jax.jit(functools.partial(stiefel.retract, method=method))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", METHODS)
@hypothesis.settings(max_examples=12, **SETTINGS)
@hypothesis.given(data=strategies.data())
def test_every_finite_matrix_has_an_orthonormal_retraction(method, dtype, data):
    seed = data.draw(strategies.integers(0, 10**6))
    largest = float(jnp.finfo(dtype).max)
    limit = np.log10(largest)
    exponents = strategies.floats(-limit, limit)
    rng = np.random.default_rng(seed)
    tree = {}
    for name, shape in SHAPES.items():
        x = rng.normal(size=shape)
        x = x / np.max(np.abs(x)) * 10.0 ** data.draw(exponents)
        column = data.draw(strategies.integers(0, shape[-1] - 1))
        kind = data.draw(strategies.sampled_from(["null", "equal", "scaled", "none"]))
        if kind == "null":
            x[..., column] = 0
        elif kind == "equal":
            x[..., column] = x[..., 0]
        elif kind == "scaled":
            x[..., column] = x[..., column] * 10.0 ** data.draw(exponents)
        tree[name] = jnp.asarray(np.clip(x, -largest, largest), dtype)
    found = compiled_retraction(method)(tree)
    rounding = 2 * float(jnp.finfo(dtype).eps) if dtype != "float32" else 0
    for x in found.values():
        assert x.dtype == dtype
        x = np.asarray(x.astype(jnp.float32))
        assert np.all(np.isfinite(x))
        assert reference.orthonormality_error(x) < ORTHONORMAL + rounding


# --- every chain -----------------------------------------------------------------

CHAINS = {
    "sct": lambda: optimizers.sct(0.1, max_update_norm=0.05, weight_decay=0.1),
    "sct, qr": lambda: optimizers.sct(0.1, max_update_norm=0.05, retraction="qr"),
    "sct, polar": lambda: optimizers.sct(0.1, max_update_norm=0.05, retraction="polar"),
    "sct, svd": lambda: optimizers.sct(0.1, max_update_norm=0.05, retraction="svd"),
    "sct, tangent": lambda: optimizers.sct(
        0.1, tangent_projection="gradient", transport_moments=True, base_width=8
    ),
    "sct, bfloat16": lambda: optimizers.sct(
        0.1, tangent_projection="displacement", moment_dtype=jnp.bfloat16
    ),
    "tsvd": lambda: optimizers.tsvd(0.1, max_update_norm=0.05),
    "tsvd, lazy": lambda: optimizers.tsvd(
        0.1, retraction_every=2, retraction_tolerance=1e-2
    ),
    "stiefel_muon": lambda: optimizers.stiefel_muon(0.1, max_update_norm=0.05),
    "stiefel_muon, svd": lambda: optimizers.stiefel_muon(
        0.1, coordinates="svd", retraction="svd", max_update_norm=0.05
    ),
    "spectron": lambda: optimizers.spectron(0.1, weight_decay=0.1, shape_factor=True),
    "adamw": lambda: optimizers.adamw(0.1, weight_decay=0.1),
    "muon": lambda: optimizers.muon(0.1, weight_decay=0.1),
}
LOW_RANK = ("spectron", "adamw", "muon")


def parameters(chain, dtypes=("float32", "float32")):
    """A stack and a single weight, each of its dtype, beside dense arrays."""
    rng = np.random.default_rng(0)
    shapes = (((2,), 12, 9, 4), ((), 8, 6, 3))
    tree = {}
    for name, (layers, fan_in, fan_out, rank), dtype in zip(
        "ab", shapes, dtypes, strict=True
    ):
        point = lambda n, layers=layers, rank=rank: reference.signed_qr(
            rng.normal(size=(*layers, n, rank))
        )
        s = np.broadcast_to(np.linspace(2, -1, rank), (*layers, rank))
        w = spectral.SpectralFactors(point(fan_in), s, point(fan_out))
        w = jax.tree.map(lambda x, dtype=dtype: jnp.asarray(x, dtype), w)
        tree[name] = spectral.to_low_rank(w) if chain in LOW_RANK else w
    dense = {"dense": rng.normal(size=(6, 5)), "norm": np.ones(6)}
    return tree | jax.tree.map(lambda x: jnp.asarray(x, dtypes[1]), dense)


def spoilt(params):
    """Weights with zero, repeated and huge columns; s with zeros, signs and ties."""
    w = params["b"]
    if not spectral.is_spectral(w):
        yield params | {"b": w._replace(a=w.a.at[:, 1].set(0))}
        yield params | {"b": w._replace(a=w.a.at[:, 1].set(w.a[:, 0]))}
        yield params | {"b": w._replace(a=w.a.at[:, 1].set(1e15))}
        yield params | {"b": jax.tree.map(jnp.zeros_like, w)}
        return
    for column in (0.0, w.u[:, 0], 1e30):
        yield params | {"b": w._replace(u=w.u.at[:, 1].set(column))}
    for s in ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1e-30, 1.0, -2.0]):
        yield params | {"b": w._replace(s=jnp.asarray(s, w.s.dtype))}


@pytest.mark.parametrize("chain", CHAINS)
def test_no_column_and_no_singular_value_makes_a_nan(chain):
    tx, regular = CHAINS[chain](), parameters(chain)

    @jax.jit
    def two_steps(params, size):
        state = tx.init(params)
        for _ in range(2):
            grads = jax.tree.map(lambda p: size * jnp.cos(9 * p), params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    for params in spoilt(regular):
        for size in (0.0, 1.0):
            new, state = two_steps(params, jnp.float32(size))
            assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((new, state)))
            if chain not in LOW_RANK:
                assert spectral.orthonormality_error(new) < ORTHONORMAL


@pytest.mark.parametrize("chain", CHAINS)
def test_no_rank_is_promoted_and_no_dtype_changes(chain):
    """By tracing alone, on a tree that mixes float64 and float32."""
    tx = CHAINS[chain]()

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return updates, state

    with jax.enable_x64(), jax.numpy_rank_promotion("raise"):
        params = parameters(chain, ("float64", "float32"))
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(step, params, state, params)
        abstract = jax.eval_shape(lambda: params)
        strip = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        assert strip(updates) == strip(abstract)
        assert strip(after) == strip(state)
