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


def weight(seed=0, fan_in=14, fan_out=11, rank=4):
    rng = np.random.default_rng(seed)
    u = reference.signed_qr(rng.normal(size=(fan_in, rank)))
    v = reference.signed_qr(rng.normal(size=(fan_out, rank)))
    s = np.array([2.0, -1.2, 0.7, 0.5])[:rank]
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), spectral.SpectralFactors(u, s, v)
    )


def gradients(step, u, s, v):
    """Noise plus a term by which every step depends on the one before."""
    rng = np.random.default_rng(100 + step)
    return tuple(rng.normal(size=x.shape) + 0.3 * x for x in (u, s, v))


def train(tx, w, num_steps=NUM_STEPS):
    state, update = tx.init({"w": w}), jax.jit(tx.update)
    history = []
    for step in range(num_steps):
        grads = gradients(step, *reference.float64(w))
        grads = spectral.SpectralFactors(*(jnp.asarray(g, jnp.float32) for g in grads))
        updates, state = update({"w": grads}, state, {"w": w})
        w = optax.apply_updates({"w": w}, updates)["w"]
        history.append(w)
    return history


@pytest.mark.parametrize("coordinates", transforms.COORDINATES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_ten_steps_match_float64(coordinates, nesterov):
    rates = np.linspace(0.05, 0.02, NUM_STEPS)
    w = weight()
    tx = optimizers.stiefel_muon(
        lambda count: jnp.asarray(rates)[count],
        coordinates=coordinates,
        nesterov=nesterov,
        max_rotation=0.03,
        retraction="qr",
    )
    found = train(tx, w)
    expected = reference.stiefel_muon(
        *w,
        gradients,
        rates,
        coordinates=coordinates,
        nesterov=nesterov,
        max_rotation=0.03,
    )
    # 1 / s is at most 1 / .5 here.
    atol = np.sum(rates) * AMPLIFICATION * EPS * 4
    for ours, theirs in zip(found, expected, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=atol)
    assert np.max(np.abs(found[-1].u - w.u)) > 100 * atol


def test_columns_rotate_by_about_the_learning_rate():
    w = weight()
    history = [w, *train(optimizers.stiefel_muon(1e-3, retraction="qr"), w)]
    for before, after in itertools.pairwise(history):
        for x, y in ((before.u, after.u), (before.v, after.v)):
            turn = np.linalg.norm(np.asarray(y - x), axis=0)
            # Singular values of the quintic lie in about [.5, 1.25].
            assert np.all(turn < 1.3e-3)
            assert np.max(turn) > 3e-4


def test_svd_coordinates_bound_the_step_before_the_retraction():
    """To first order, a learning rate eta changes W by at most 1.25 eta for any s."""
    rate, w = 1e-3, weight()
    tx = optax.chain(
        transforms.scale_by_stiefel_muon(coordinates="svd"), optax.scale(-rate)
    )
    rng = np.random.default_rng(0)
    state, update = tx.init(w), jax.jit(tx.update)
    for _ in range(10):
        grads = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), w
        )
        updates, state = update(grads, state, w)
        change = reference.dense(*optax.apply_updates(w, updates)) - reference.dense(*w)
        assert 0.1 * rate < reference.spectral_norm(change) < 1.25 * rate


@pytest.mark.parametrize("coordinates", transforms.COORDINATES)
@pytest.mark.parametrize("retraction", ["qr", "svd"])
def test_with_a_clip_the_applied_change_is_bounded(coordinates, retraction):
    bound, w = 0.02, weight()
    tx = optimizers.stiefel_muon(
        0.3, coordinates=coordinates, retraction=retraction, max_update_norm=bound
    )
    history = [w, *train(tx, w)]
    norms = [
        reference.composite_update_norm(old, new)
        for old, new in itertools.pairwise(history)
    ]
    assert max(norms) < 1.01 * bound
    assert max(norms) > 0.9 * bound
    for x in (history[-1].u, history[-1].v):
        assert reference.orthonormality_error(x) < 4e-6


def test_limit_rotation_shortens_long_columns_alone():
    d = jax.tree.map(jnp.ones_like, weight())
    d = d._replace(u=d.u * jnp.array([1.0, 1e-3, 0.0, 10.0]))
    params = {"w": d, "dense": jnp.full((3, 2), 9.0)}
    found, _ = transforms.limit_rotation(0.1).update(params, optax.EmptyState())
    lengths = np.linalg.norm(np.asarray(found["w"].u), axis=0)
    np.testing.assert_allclose(lengths, [0.1, 1e-3 * 14**0.5, 0, 0.1], rtol=1e-5)
    np.testing.assert_array_equal(found["w"].s, d.s)
    np.testing.assert_array_equal(found["dense"], params["dense"])


def test_stacked_layers_are_updated_one_by_one():
    layers = [weight(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
    for coordinates in transforms.COORDINATES:
        tx = transforms.scale_by_stiefel_muon(coordinates=coordinates)
        update = jax.jit(tx.update)
        grads = jax.tree.map(lambda x: jnp.sin(9 * x), stacked)
        together, _ = update(grads, tx.init(stacked), stacked)
        for i, w in enumerate(layers):
            grad = jax.tree.map(lambda x, i=i: x[i], grads)
            alone, _ = update(grad, tx.init(w), w)
            one = jax.tree.map(lambda x, i=i: x[i], together)
            for x, y in zip(one, alone, strict=True):
                np.testing.assert_allclose(x, y, rtol=0, atol=4 * AMPLIFICATION * EPS)


def test_other_leaves_get_adamw():
    rest = {"dense": jnp.ones((4, 3)), "norm": jnp.ones(3)}
    params = rest | {"w": weight()}
    tx = optimizers.stiefel_muon(
        0.05, weight_decay=0.1, dense_lr_multiplier=0.2, retraction="none"
    )
    other = optax.adamw(
        0.01, b1=0.9, b2=0.95, weight_decay=0.1, mask={"dense": True, "norm": False}
    )
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    expected, _ = other.update(rest, other.init(rest), rest)
    for name in rest:
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-6)


@pytest.mark.parametrize("coordinates", transforms.COORDINATES)
def test_zero_gradients_and_singular_values_give_finite_updates(coordinates):
    w = weight()
    zero = jax.tree.map(jnp.zeros_like, w)
    tx = transforms.scale_by_stiefel_muon(coordinates=coordinates)
    update = jax.jit(tx.update)
    for params, grads in ((w._replace(s=zero.s), w), (w, zero)):
        updates, state = update(grads, tx.init(params), params)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))


@pytest.mark.parametrize("coordinates", transforms.COORDINATES)
def test_every_product_is_of_the_highest_precision(coordinates):
    params = {"w": weight()}
    tx = transforms.scale_by_stiefel_muon(coordinates=coordinates)
    state = tx.init(params)
    precisions = reference.matmul_precisions(
        lambda g: tx.update(g, state, params), params
    )
    assert precisions
    assert set(precisions) == {reference.HIGHEST}
