import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from sct_jax import linalg, optimizers, spectral, transforms

EPS = float(np.finfo(np.float32).eps)
NUM_STEPS = 10
# The quintic multiplies the smallest singular values, and their rounding, by a^5.
AMPLIFICATION = linalg.QUINTIC[0] ** 5


def weight(seed=0, fan_in=14, fan_out=9, rank=3):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(fan_in, rank)) / np.sqrt(fan_in)
    b = rng.normal(size=(fan_out, rank)) / np.sqrt(fan_out)
    return spectral.LowRankFactors(
        jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    )


def gradients(step, a, b):
    """Noise plus a term by which every step depends on the one before."""
    rng = np.random.default_rng(100 + step)
    return tuple(rng.normal(size=x.shape) + 0.3 * x for x in (a, b))


def train(tx, w, num_steps=NUM_STEPS):
    state, update = tx.init({"w": w}), jax.jit(tx.update)
    history = []
    for step in range(num_steps):
        a, b = reference.float64(w)
        grads = spectral.LowRankFactors(
            *(jnp.asarray(g, jnp.float32) for g in gradients(step, a, b))
        )
        updates, state = update({"w": grads}, state, {"w": w})
        w = optax.apply_updates({"w": w}, updates)["w"]
        history.append(w)
    return history


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": True},
        {"shape_factor": True},
        {"weight_decay": 0.1},
        {"nesterov": True, "shape_factor": True, "weight_decay": 0.01},
    ],
    ids=str,
)
def test_ten_steps_match_float64(options):
    rates = np.linspace(0.05, 0.02, NUM_STEPS)
    w = weight()
    tx = optimizers.spectron(lambda count: jnp.asarray(rates)[count], **options)
    found = train(tx, w)
    expected = reference.spectron(*w, gradients, rates, **options)
    atol = np.sum(rates) * AMPLIFICATION * EPS * 2
    for ours, theirs in zip(found, expected, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=atol)
    assert np.max(np.abs(found[-1].a - w.a)) > 100 * atol


def test_stacked_layers_are_updated_one_by_one():
    layers = [weight(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
    tx = transforms.scale_by_spectron()
    update = jax.jit(lambda w: tx.update(w, tx.init(w), w)[0])
    together = update(stacked)
    for i, w in enumerate(layers):
        alone = update(w)
        one = jax.tree.map(lambda x, i=i: x[i], together)
        for x, y in zip(one, alone, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=AMPLIFICATION * EPS)


def test_the_power_iteration_follows_the_norms():
    """With a warm start, one iteration per step converges to the spectral norms."""
    w = weight()
    tx = transforms.scale_by_spectron()
    state, grads = tx.init(w), jax.tree.map(jnp.ones_like, w)
    update = jax.jit(tx.update)
    for _ in range(40):
        updates, state = update(grads, state, w)
    norm_a, norm_b = (reference.spectral_norm(x) for x in reference.float64(w))
    direction = reference.newton_schulz(np.ones(w.a.shape))
    expected = direction / (norm_a + norm_b + 1)
    np.testing.assert_allclose(updates.a, expected, rtol=1e-4, atol=1e-6)


def test_the_change_of_the_product_is_about_the_rate():
    """At most eta times the overshoot of the quintic, 1.25."""
    rate, w = 0.03, weight()
    history = [w, *train(optimizers.spectron(rate), w)]
    for old, new in itertools.pairwise(map(reference.float64, history)):
        change = new.a @ new.b.T - old.a @ old.b.T
        assert 0.2 * rate < reference.spectral_norm(change) < 1.25 * rate


def test_other_leaves_pass_without_state():
    params = {
        "w": weight(),
        "dense": jnp.ones((4, 3)),
        "spectral": spectral.init(jax.random.key(0), 6, 5, 2, orthonormal=False),
    }
    tx = transforms.scale_by_spectron()
    state = tx.init(params)
    assert len(jax.tree.leaves(state)) == 4  # two means, two vectors
    updates, state = tx.update(params, state, params)
    np.testing.assert_array_equal(updates["dense"], params["dense"])
    np.testing.assert_array_equal(updates["spectral"].u, params["spectral"].u)
    assert not np.array_equal(updates["w"].a, params["w"].a)


def test_zero_gradients_and_factors_give_finite_updates():
    zero = jax.tree.map(jnp.zeros_like, weight())
    tx = transforms.scale_by_spectron()
    update = jax.jit(tx.update)
    for params, grads in ((zero, weight()), (weight(), zero), (zero, zero)):
        updates, state = update(grads, tx.init(params), params)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))


def test_dense_leaves_get_adamw():
    params = {"w": weight(), "dense": jnp.ones((4, 3)), "norm": jnp.ones(3)}
    tx = optimizers.spectron(0.05, weight_decay=0.1, dense_lr_multiplier=0.5)
    other = optax.adamw(
        0.025,
        b1=0.9,
        b2=0.95,
        eps=1e-10,
        weight_decay=0.1,
        mask={"dense": True, "norm": False},
    )
    rest = {name: params[name] for name in ("dense", "norm")}
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    expected, _ = other.update(rest, other.init(rest), rest)
    for name in rest:
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-6)


def test_every_product_is_of_the_highest_precision():
    params = {"w": weight()}
    tx = transforms.scale_by_spectron()
    state = tx.init(params)
    precisions = reference.matmul_precisions(
        lambda g: tx.update(g, state, params), params
    )
    assert precisions
    assert set(precisions) == {reference.HIGHEST}
