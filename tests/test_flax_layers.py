"""Spectral layers in Flax: what they compute, and that every chain trains them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training import train_state as flax_train_state

from sct_jax import flax_layers, optimizers, spectral

EPS = float(np.finfo(np.float32).eps)
ORTHONORMAL = 4e-6
FAN_IN, FAN_OUT, RANK = 12, 9, 4
HIDDEN = 10
MAX_NORM = 0.05
NUM_STEPS = 20


def draw(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def linen_layer(x, **options):
    """A call of a fresh layer on x, and its params."""
    layer = flax_layers.SpectralDense(FAN_OUT, rank=RANK, **options)
    params = layer.init(jax.random.key(0), x)["params"]
    if "bias" in params:
        params |= {"bias": draw(FAN_OUT, 1)}
    return (lambda x: layer.apply({"params": params}, x)), params


def nnx_layer(x, **options):
    layer = flax_layers.SpectralLinear(
        x.shape[-1], FAN_OUT, rank=RANK, rngs=nnx.Rngs(0), **options
    )
    params = {"kernel": layer.kernel.get_value()}
    if layer.bias is not None:
        layer.bias.set_value(draw(FAN_OUT, 1))
        params["bias"] = layer.bias.get_value()
    return layer, params


each_flax = pytest.mark.parametrize("build", [linen_layer, nnx_layer])


def expected(x, params):
    """The dense layer in float64, and the size that its rounding errors relate to."""
    x, params = jax.tree.map(lambda p: np.asarray(p, np.float64), (x, params))
    u, s, v = params["kernel"]
    y = x @ (u * s) @ v.T
    size = np.abs(x) @ np.abs(u * s) @ np.abs(v).T
    if "bias" in params:
        y, size = y + params["bias"], size + np.abs(params["bias"])
    return y, size


@each_flax
@pytest.mark.parametrize(("use_bias", "flatten_rows"), [(True, False), (False, True)])
@pytest.mark.parametrize("layout", [(), (5,), (2, 5)], ids=str)
def test_the_output_is_that_of_the_dense_layer(build, use_bias, flatten_rows, layout):
    x = draw((*layout, FAN_IN), 0)
    layer, params = build(x, use_bias=use_bias, flatten_rows=flatten_rows)
    y, size = expected(x, params)
    found = layer(x)
    assert found.dtype == jnp.float32
    # Each entry is a sum of FAN_IN products, then one of RANK.
    assert np.all(np.abs(found - y) <= 4 * EPS * np.sqrt(FAN_IN + RANK) * size)
    dense = x @ spectral.to_dense(params["kernel"]) + params.get("bias", 0.0)
    assert np.all(np.abs(found - dense) <= 8 * EPS * np.sqrt(FAN_IN + RANK) * size)


@each_flax
def test_without_a_bias_there_is_none(build):
    _, params = build(draw((5, FAN_IN), 0), use_bias=False)
    assert set(params) == {"kernel"}


@each_flax
def test_bfloat16_computes_on_float32_parameters(build):
    x = draw((5, FAN_IN), 0)
    layer, params = build(x, dtype=jnp.bfloat16)
    found = layer(x)
    assert found.dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    y, size = expected(x, params)
    # Roundings of x, u, s, v, bias, and of four intermediate results.
    unit = float(jnp.finfo(jnp.bfloat16).eps) / 2
    assert np.all(np.abs(np.asarray(found, np.float64) - y) <= 9 * unit * size)
    assert np.any(np.asarray(found, np.float64) != np.asarray(build(x)[0](x)))


@each_flax
def test_without_a_dtype_the_input_decides(build):
    x = draw((5, FAN_IN), 0).astype(jnp.bfloat16)
    layer, params = build(x)
    assert layer(x).dtype == jnp.bfloat16
    assert params["kernel"].u.dtype == jnp.float32


def dense_of(build, x, params, dtype=None):
    """The layer of Flax with the same matrix and bias."""
    kernel, bias = spectral.to_dense(params["kernel"]), params["bias"]
    if build is linen_layer:
        layer = linen.Dense(FAN_OUT, dtype=dtype)
        return layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    layer = nnx.Linear(x.shape[-1], FAN_OUT, dtype=dtype, rngs=nnx.Rngs(0))
    layer.kernel.set_value(kernel)
    layer.bias.set_value(bias)
    return layer(x)


WHOLE = ("int32", "uint8", "int8", "uint32", "bool")


@each_flax
@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=str)
def test_integers_and_booleans_are_promoted_as_by_the_dense_layer(build, kind, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 2 if kind == "bool" else 100, (5, FAN_IN)), kind)
    layer, params = build(x, dtype=dtype)
    found, dense = layer(x), dense_of(build, x, params, dtype)
    assert found.dtype == dense.dtype == (dtype or jnp.float32)
    y, size = expected(x, params)
    unit = float(jnp.finfo(found.dtype).eps)
    assert np.all(np.abs(np.asarray(found, np.float64) - y) <= 16 * unit * size)
    assert np.max(np.abs(y)) > 0.1


@each_flax
def test_whole_numbers_give_the_numbers_of_equal_floats(build):
    x = jnp.arange(2 * FAN_IN).reshape(2, FAN_IN)
    layer, _ = build(x)
    np.testing.assert_array_equal(layer(x), layer(x.astype(jnp.float32)))


@each_flax
def test_float64_stays(build):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(5, FAN_IN)))
        layer, params = build(x)
        assert layer(x).dtype == dense_of(build, x, params).dtype == jnp.float64


@each_flax
@pytest.mark.parametrize("dtype", [jnp.int32, bool])
def test_a_dtype_without_fractions_is_refused(build, dtype):
    with pytest.raises(ValueError, match=r"dtype must be a floating-point dtype"):
        build(draw((5, FAN_IN), 0), dtype=dtype)[0](draw((5, FAN_IN), 0))


@each_flax
def test_no_axis_is_added_by_itself(build):
    for layout in ((), (5,), (2, 5)):
        layer, _ = build(draw((*layout, FAN_IN), 0))
        with jax.numpy_rank_promotion("raise"):
            assert layer(draw((*layout, FAN_IN), 0)).shape == (*layout, FAN_OUT)


@each_flax
def test_a_rank_that_is_too_large_is_refused(build):
    with pytest.raises(ValueError, match=r"rank .*1\.\.3"):
        build(draw((5, 3), 0))


@pytest.mark.parametrize("rank", [0, FAN_OUT + 1])
def test_a_rank_that_cannot_be_names_the_layer(rank):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return flax_layers.SpectralDense(FAN_OUT, rank=rank, name="out")(x)

    with pytest.raises(ValueError, match=r"^out/kernel: rank .* got \d+"):
        jax.eval_shape(Net().init, jax.random.key(0), jnp.ones((5, FAN_IN)))


@each_flax
def test_the_scale_multiplies_the_singular_values(build):
    x = draw((5, FAN_IN), 0)
    (_, one), (_, half) = build(x), build(x, scale=0.5)
    np.testing.assert_array_equal(half["kernel"].s, 0.5 * one["kernel"].s)
    np.testing.assert_array_equal(half["kernel"].u, one["kernel"].u)


def test_linen_holds_one_factor_tuple():
    variables = flax_layers.SpectralDense(FAN_OUT, rank=RANK).init(
        jax.random.key(0), jnp.ones((5, FAN_IN))
    )
    assert set(variables) == {"params"}
    assert set(variables["params"]) == {"kernel", "bias"}
    assert spectral.is_spectral(variables["params"]["kernel"])
    shapes = jax.tree.map(jnp.shape, variables["params"]["kernel"])
    assert shapes == spectral.SpectralFactors((FAN_IN, RANK), (RANK,), (FAN_OUT, RANK))


def test_nnx_holds_one_factor_tuple():
    layer = flax_layers.SpectralLinear(FAN_IN, FAN_OUT, rank=RANK, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert set(params) == {"kernel", "bias"}
    assert spectral.is_spectral(params["kernel"])
    shapes = jax.tree.map(jnp.shape, params["kernel"])
    assert shapes == spectral.SpectralFactors((FAN_IN, RANK), (RANK,), (FAN_OUT, RANK))


def test_linen_and_nnx_compute_the_same():
    x = draw((5, FAN_IN), 0)
    of_linen, params = linen_layer(x)
    of_nnx, _ = nnx_layer(x)
    of_nnx.kernel.set_value(params["kernel"])
    np.testing.assert_array_equal(of_linen(x), of_nnx(x))


def test_linen_stacks_layers_in_front():
    """`linen.scan` gives u (L, I, R), as the transformations expect it."""

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return flax_layers.SpectralDense(x.shape[-1], rank=RANK)(x), None

    stack = linen.scan(
        Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )()
    x = draw((5, FAN_IN), 0)
    variables = stack.init(jax.random.key(0), x, None)
    kernel = variables["params"]["SpectralDense_0"]["kernel"]
    assert kernel.u.shape == kernel.v.shape == (3, FAN_IN, RANK)
    y, _ = stack.apply(variables, x, None)
    for w in spectral.to_dense(kernel):
        x = x @ w
    # Three layers of sums over FAN_IN and RANK; entries below 4.
    np.testing.assert_allclose(y, x, atol=3 * 4 * 4 * EPS * np.sqrt(FAN_IN + RANK))


# --- training --------------------------------------------------------------------


class LinenMLP(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.relu(flax_layers.SpectralDense(HIDDEN, rank=RANK)(x))
        return flax_layers.SpectralDense(FAN_OUT, rank=RANK)(x)


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden = flax_layers.SpectralLinear(FAN_IN, HIDDEN, rank=RANK, rngs=rngs)
        self.out = flax_layers.SpectralLinear(HIDDEN, FAN_OUT, rank=RANK, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


def data():
    x = draw((32, FAN_IN), 0)
    return x, jnp.tanh(x @ draw((FAN_IN, FAN_OUT), 1) / 3)


def loss_of(predicted, y):
    return jnp.mean(jnp.square(predicted - y))


def chain():
    return optimizers.sct(3e-2, max_update_norm=MAX_NORM)


def kernels(params):
    leaves = jax.tree.leaves(params, is_leaf=spectral.is_factors)
    return [w for w in leaves if spectral.is_spectral(w)]


def check_training(history, losses):
    """Of the params before and after every step, and the losses."""
    measure = jax.jit(
        lambda old, new: (
            spectral.orthonormality_error(new),
            spectral.max_composite_update_norm(old, new),
        )
    )
    moves = []
    for old, new in itertools.pairwise(history):
        assert len(kernels(new)) == 2
        error, move = measure(old, new)
        assert error < ORTHONORMAL
        largest = max(np.max(np.abs(w.s)) for w in kernels(old))
        assert move <= MAX_NORM * 1.01 + 16 * EPS * largest * np.sqrt(RANK)
        moves.append(move)
    assert max(moves) > 0.8 * MAX_NORM  # else the clip would not have been tried
    assert losses[-1] < 0.7 * losses[0]


@pytest.fixture(scope="module")
def start():
    return LinenMLP().init(jax.random.key(0), data()[0])["params"]


@pytest.fixture(scope="module")
def linen_history(start):
    """Params before and after every step in the TrainState of Linen, and the losses."""
    x, y = data()
    state = flax_train_state.TrainState.create(
        apply_fn=LinenMLP().apply, params=start, tx=chain()
    )

    @jax.jit
    def step(state):
        def loss_fn(params):
            return loss_of(state.apply_fn({"params": params}, x), y)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    history, losses = [state.params], []
    for _ in range(NUM_STEPS):
        state, loss = step(state)
        history.append(state.params)
        losses.append(float(loss))
    return history, losses


def layers_of(net):
    return {"SpectralDense_0": net.hidden, "SpectralDense_1": net.out}


@pytest.fixture(scope="module")
def nnx_history(start):
    """The same by `nnx.Optimizer`, in Linen's names, from the same factors."""
    x, y = data()
    net = NnxMLP(nnx.Rngs(0))
    for name, layer in layers_of(net).items():
        layer.kernel.set_value(start[name]["kernel"])
    optimizer = nnx.Optimizer(net, flax_layers.for_nnx(chain()), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(net, optimizer):
        traces.append(None)
        loss, grads = nnx.value_and_grad(lambda net: loss_of(net(x), y))(net)
        optimizer.update(net, grads)
        return loss

    def params():
        return {
            name: {"kernel": layer.kernel.get_value(), "bias": layer.bias.get_value()}
            for name, layer in layers_of(net).items()
        }

    history, losses = [params()], []
    for _ in range(NUM_STEPS):
        losses.append(float(step(net, optimizer)))
        history.append(params())
    assert len(traces) == 1
    assert optimizer.step.get_value() == NUM_STEPS
    count = optax.tree.get(
        nnx.as_pure(optimizer.opt_state),
        "count",
        filtering=lambda path, _: "Adam" in str(path[-1]),
    )
    assert count == NUM_STEPS
    return history, losses


def test_training_in_the_train_state_of_linen(linen_history):
    check_training(*linen_history)


def test_training_by_the_optimizer_of_nnx(nnx_history):
    check_training(*nnx_history)


def test_linen_and_nnx_train_alike(linen_history, nnx_history):
    (of_linen, losses), (of_nnx, others) = linen_history, nnx_history
    np.testing.assert_allclose(others[:2], losses[:2], rtol=1e-3)
    # The bound of a step is kept to a tenth, in which the search for a scale may end.
    for step in range(2):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * MAX_NORM),
            of_nnx[step],
            of_linen[step],
        )


@pytest.mark.parametrize(
    "tx",
    [optimizers.stiefel_muon(1e-2), optimizers.tsvd(1e-2), optax.adam(1e-2)],
    ids=["stiefel_muon", "tsvd", "adam of optax"],
)
def test_nnx_holds_the_state_of_any_chain(tx):
    """Two updates: the first one is what leaves a state in another shape."""
    layer = flax_layers.SpectralLinear(FAN_IN, FAN_OUT, rank=RANK, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(layer, flax_layers.for_nnx(tx), wrt=nnx.Param)
    before = jax.tree.structure(optimizer.opt_state)

    @nnx.jit
    def step(layer, optimizer):
        grads = nnx.grad(lambda layer: loss_of(layer(data()[0]), data()[1]))(layer)
        optimizer.update(layer, grads, loss=jnp.ones([]))

    for _ in range(2):
        step(layer, optimizer)
    assert jax.tree.structure(optimizer.opt_state) == before
    assert spectral.is_spectral(layer.kernel.get_value())
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(nnx.state(layer)))
