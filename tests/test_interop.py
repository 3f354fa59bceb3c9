"""The chains inside other libraries: Equinox, MaxText, the wrappers of optax."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sct_jax import optimizers, spectral

EPS = float(np.finfo(np.float32).eps)
ORTHONORMAL = 4e-6
FAN_IN, FAN_OUT, RANK = 12, 9, 4
NUM_STEPS = 12

# The function of the chain, its options and its learning rate. QR compiles fastest.
CHAINS = {
    "sct": (optimizers.sct, {"max_update_norm": 0.1, "retraction": "qr"}, 3e-2),
    "tsvd": (optimizers.tsvd, {"retraction": "qr"}, 3e-2),
    "stiefel_muon": (optimizers.stiefel_muon, {"retraction": "qr"}, 3e-2),
    "spectron": (optimizers.spectron, {}, 0.3),
    "muon": (optimizers.muon, {}, 3e-2),
    "adamw": (optimizers.adamw, {}, 3e-2),
}
LOW_RANK = ("spectron", "muon", "adamw")
each_chain = pytest.mark.parametrize("name", CHAINS)


def build(name):
    chain, options, rate = CHAINS[name]
    return chain(rate, **options)


@pytest.fixture(scope="module")
def factors():
    key = jax.random.key(0)
    return jax.jit(lambda: spectral.init(key, FAN_IN, FAN_OUT, RANK, scale=0.5))()


@pytest.fixture
def weight(factors, name):
    return spectral.to_low_rank(factors) if name in LOW_RANK else factors


@pytest.fixture
def params(weight):
    return {"w": weight, "bias": jnp.zeros(FAN_OUT)}


def draw(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def data():
    x = draw((32, FAN_IN), 0)
    return x, jnp.tanh(x @ draw((FAN_IN, FAN_OUT), 1) / 3)


def loss_of(predicted, y):
    return jnp.mean(jnp.square(predicted - y))


def loss_fn(params):
    x, y = data()
    return loss_of(spectral.linear(x, params["w"]) + params["bias"], y)


def check(params, losses=None):
    """Asserts finite params on the manifold, and a loss that fell."""
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(params))
    assert spectral.orthonormality_error(params) < ORTHONORMAL
    if losses is not None:
        assert losses[-1] < 0.9 * losses[0]


def assert_same(found, expected):
    """Bitwise."""
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def differ(tree, other):
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return any(np.any(x != y) for x, y in pairs)


# --- loops -----------------------------------------------------------------------


@each_chain
def test_in_a_loop_like_that_of_maxtext(name, params):
    """It passes extra arguments and adds the updates itself."""
    tx, traces = build(name), []

    @jax.jit
    def step(params, state):
        traces.append(None)
        loss, grads = jax.value_and_grad(loss_fn)(params)
        norm = optax.tree.norm(grads)
        updates, state = tx.update(grads, state, params, loss=loss, grad_norm=norm)
        return jax.tree.map(lambda p, u: p + u, params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(NUM_STEPS):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    check(params, losses)
    assert len(traces) == 1
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


class Layer(eqx.Module):
    """`eqx.nn.Linear` with leaves that are not arrays."""

    weight: spectral.SpectralFactors | spectral.LowRankFactors
    bias: jax.Array
    activation: object
    calls: int = 0

    def __call__(self, x):
        return self.activation(spectral.linear(x, self.weight) + self.bias)


@each_chain
def test_in_a_module_of_equinox(name, weight):
    tx, traces = build(name), []
    model = Layer(weight, jnp.zeros(FAN_OUT), jnp.tanh)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        traces.append(None)
        x, y = data()
        loss, grads = eqx.filter_value_and_grad(lambda m: loss_of(m(x), y))(model)
        updates, state = tx.update(
            grads, state, eqx.filter(model, eqx.is_inexact_array)
        )
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for _ in range(NUM_STEPS):
        model, state, loss = step(model, state)
        losses.append(float(loss))
    check(eqx.filter(model, eqx.is_inexact_array), losses)
    assert type(model.weight) is type(weight)
    assert model.calls == 0
    assert len(traces) == 1


# --- wrappers of optax -----------------------------------------------------------


def stepper(tx):
    """A jitted step along given gradients, and a list that counts its traces."""
    traces = []

    def step(grads, state, params):
        traces.append(None)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step), traces


def gradients(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params
    )


@each_chain
def test_inside_masked(name, params):
    tx = optax.masked(build(name), {"w": True, "bias": False})
    step, traces = stepper(tx)
    state, start = tx.init(params), params
    for seed in range(2):
        params, state = step(gradients(params, seed), state, params)
    check(params)
    assert differ(params["w"], start["w"])
    # `optax.masked` passes other gradients through.
    passed = start["bias"] + gradients(start)["bias"] + gradients(start, 1)["bias"]
    np.testing.assert_allclose(params["bias"], passed, rtol=4 * EPS, atol=4 * EPS)
    assert len(traces) == 1


@each_chain
def test_inside_partition(name, params):
    labels = {"w": "factors", "bias": "rest"}
    tx = optax.partition({"factors": build(name), "rest": optax.sgd(0.5)}, labels)
    step, traces = stepper(tx)
    state, start = tx.init(params), params
    for seed in range(2):
        params, state = step(gradients(params, seed), state, params)
    check(params)
    assert differ(params["w"], start["w"])
    moved = gradients(start)["bias"] + gradients(start, 1)["bias"]
    np.testing.assert_allclose(params["bias"], -0.5 * moved, atol=8 * EPS)
    assert len(traces) == 1


@each_chain
def test_inside_multi_steps(name, params):
    tx = optax.MultiSteps(build(name), every_k_schedule=2)
    step, traces = stepper(tx)
    state = tx.init(params)
    for _ in range(2):
        kept, state = step(gradients(params, 0), state, params)
        assert_same(kept, params)
        moved, state = step(gradients(params, 1), state, kept)
        assert differ(moved["w"], params["w"])
        check(moved)
        params = moved
    assert len(traces) == 1


@each_chain
def test_inside_apply_if_finite(name, params):
    tx = optax.apply_if_finite(build(name), max_consecutive_errors=3)
    step, traces = stepper(tx)
    grads = gradients(params)
    params, state = step(grads, tx.init(params), params)
    for bad in (jnp.nan, jnp.inf):
        spoilt = grads | {"bias": grads["bias"].at[0].set(bad)}
        kept, after = step(spoilt, state, params)
        assert_same(kept, params)
        assert_same(after.inner_state, state.inner_state)
        assert after.notfinite_count == 1
        assert after.total_notfinite == state.total_notfinite + 1
    params, state = step(grads, after, params)
    assert state.notfinite_count == 0
    check(params)
    assert differ(params["w"], kept["w"])
    assert len(traces) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"retraction_tolerance": 1e-3},
        {"retraction_every": 2},
        {"max_update_norm": 0.1, "static": "retraction_every"},
    ],
)
def test_a_lazy_retraction_may_be_injected(fields, factors):
    params, fields = {"w": factors, "bias": jnp.zeros(FAN_OUT)}, dict(fields)
    fields["retraction"] = "qr"
    static = fields.pop("static", ())
    injected = optax.inject_hyperparams(optimizers.tsvd, static_args=static)
    plain = optimizers.tsvd(1e-2, **fields)
    tx = injected(1e-2, **fields)
    found = expected = params
    (step, _), (plain_step, _) = stepper(tx), stepper(plain)
    state, other = tx.init(params), plain.init(params)
    for _ in range(3):
        found, state = step(gradients(found), state, found)
        expected, other = plain_step(gradients(expected), other, expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=16 * EPS), found, expected
    )


@each_chain
def test_inside_inject_hyperparams(name, params):
    chain, options, rate = CHAINS[name]
    tx = optax.inject_hyperparams(chain)(rate, **options)
    step, traces = stepper(tx)
    state = tx.init(params)
    params, state = step(gradients(params), state, params)
    check(params)
    state = optax.tree.set(state, learning_rate=jnp.float32(0.0))
    kept, state = step(gradients(params), state, params)
    np.testing.assert_array_equal(kept["bias"], params["bias"])
    # The retraction moves an orthonormal point by rounding only.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=4 * EPS * np.sqrt(RANK)),
        kept,
        params,
    )
    state = optax.tree.set(state, learning_rate=jnp.float32(rate))
    moved, state = step(gradients(params), state, kept)
    assert differ(moved["bias"], kept["bias"])
    assert len(traces) == 1
