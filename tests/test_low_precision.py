"""Moments in bfloat16: unbiased rounding, and the same Adam as in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sct_jax import optimizers, spectral, transforms

BF16 = 2.0**-8  # largest relative distance to the nearest bfloat16 number


def test_rounding_gives_a_neighbour_and_the_right_mean():
    x = jax.random.normal(jax.random.key(0), (64,)) * 10.0 ** jnp.arange(-8, 8).repeat(
        4
    )
    salts = jnp.arange(4096)
    rounded = jax.vmap(lambda salt: transforms.round_stochastically(x, salt))(salts)
    rounded = np.asarray(rounded, np.float64)
    x = np.asarray(x, np.float64)
    assert np.all(np.abs(rounded - x) < 2 * BF16 * np.abs(x))
    assert np.all([len(set(column)) <= 2 for column in rounded.T])
    # Five standard errors of a mean of 4,096 draws between two neighbours.
    slack = 5 * 0.5 * 2 * BF16 * np.abs(x) / np.sqrt(4096)
    assert np.all(np.abs(rounded.mean(axis=0) - x) <= slack)


def test_bfloat16_numbers_stay():
    x = jnp.array([0.0, -0.0, 1.0, -2.5, jnp.inf, -jnp.inf, 2.0**-120])
    for salt in range(8):
        rounded = transforms.round_stochastically(x, jnp.array(salt))
        np.testing.assert_array_equal(rounded.astype(jnp.float32), x)
    nan = transforms.round_stochastically(jnp.array([jnp.nan, -jnp.nan]), jnp.array(3))
    assert bool(jnp.all(jnp.isnan(nan)))


def test_a_second_moment_decays():
    """Rounding to nearest would keep it constant: 1/1000 is below half a step."""
    tx = transforms.scale_by_low_precision_adam(b2=0.999)
    zeros = jnp.zeros(256)
    state = tx.init(zeros)._replace(nu=jnp.ones(256, jnp.bfloat16))
    step = jax.jit(lambda state: tx.update(zeros, state)[1])
    for _ in range(300):
        state = step(state)
    mean = float(jnp.mean(state.nu.astype(jnp.float32)))
    # The deviation of an entry is below sqrt(300) / 2 steps of 1/256.
    slack = 5 * np.sqrt(300) / 2 * BF16 / np.sqrt(256)
    assert mean == pytest.approx(0.999**300, abs=slack)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("sct", {"retraction": "none"}),
        ("stiefel_muon", {"retraction": "none"}),
        ("adamw", {}),
    ],
)
def test_the_second_moment_of_bfloat16_parameters_decays_too(name, fields):
    params = {
        "w": spectral.init(jax.random.key(0), 16, 24, 4, orthonormal=False),
        "b": jnp.ones(8),
    }
    if name == "adamw":
        params = {"b": params["b"]}
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    tx = getattr(optimizers, name)(0.0, b2=0.999, **fields)
    step = jax.jit(lambda grads, state: tx.update(grads, state, params)[1])
    state = step(jax.tree.map(jnp.ones_like, params), tx.init(params))
    start = optax.tree.get_all_with_path(state, "nu")
    for _ in range(200):
        state = step(jax.tree.map(jnp.zeros_like, params), state)
    end = optax.tree.get_all_with_path(state, "nu")
    assert jax.tree.leaves(end)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(y, 0.999**200 * x, rtol=1e-4),
        [nu for _, nu in start],
        [nu for _, nu in end],
    )


def test_the_direction_is_adams():
    params = {
        "w": spectral.init(jax.random.key(0), 16, 24, 4, orthonormal=False),
        "b": jnp.ones(8),
    }
    low = transforms.scale_by_adam(0.9, 0.99, 1e-8, moment_dtype=jnp.bfloat16)
    full = transforms.scale_by_adam(0.9, 0.99, 1e-8, moment_dtype=jnp.float32)
    low_state, full_state = low.init(params), full.init(params)
    for seed in range(10):
        # Gradients of one sign avoid cancellation.
        grads = jax.tree.map(
            lambda p, seed=seed: (
                1 + jax.random.uniform(jax.random.key(seed), p.shape, p.dtype)
            ),
            params,
        )
        found, low_state = low.update(grads, low_state)
        wanted, full_state = full.update(grads, full_state)
        # Each rounding is off by 2 BF16 at most, and a mean forgets old roundings.
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=16 * BF16), found, wanted
        )
    assert jax.tree.structure(low_state) == jax.tree.structure(full_state)
    assert all(
        x.dtype == jnp.bfloat16 for x in jax.tree.leaves((low_state.mu, low_state.nu))
    )


def test_layers_round_alike_stacked_or_not():
    x = jax.random.normal(jax.random.key(0), (3, 5, 4))
    salt = jnp.array(7)
    stacked = transforms.round_stochastically(x, salt)
    for layer in range(3):
        alone = transforms.round_stochastically(x[layer], salt)
        np.testing.assert_array_equal(alone, stacked[layer])


@pytest.mark.parametrize("name", ["sct", "tsvd", "adamw"])
def test_chains_store_both_moments_in_bfloat16(name):
    params = {"w": spectral.init(jax.random.key(0), 16, 24, 4, orthonormal=False)}
    if name == "adamw":
        params = {"w": spectral.to_low_rank(params["w"])}
    tx = getattr(optimizers, name)(1e-3, moment_dtype=jnp.bfloat16)
    state = tx.init(params)
    for moment in ("mu", "nu"):
        tree = optax.tree.get(state, moment)
        assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype(jnp.bfloat16)}
