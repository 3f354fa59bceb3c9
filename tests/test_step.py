import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import samples

from sct_jax import model, spectral
from sct_jax.training import optimizer_config
from sct_jax.training import state as state_lib
from sct_jax.training import step as step_lib

EPS = float(np.finfo(np.float32).eps)
SMALL = dataclasses.replace(samples.SMALL, spectral=("q", "down"))
DENSE = dataclasses.replace(SMALL, spectral=())
BATCH, LENGTH = 8, 16
BOUND = 0.05


OF_EVERY_STEP = {"loss", "grad_norm", "loss_max", "grad_norm_max"} | {
    "skipped_steps",
    "skipped_in_a_row",
    "spikes",
}


def draw_params(config=SMALL):
    """Returns parameters like `model.init`, which takes seconds to compile."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), config))
    rng = np.random.default_rng(0)

    def draw(path, x):
        name = getattr(path[-1], "name", None)
        if name in ("u", "v"):
            value = np.linalg.qr(rng.normal(size=x.shape)).Q
        elif name == "s" or x.ndim < 2 or str(path[-1].key).endswith("_norm"):
            value = np.ones(x.shape)
        else:
            value = rng.normal(size=x.shape) / np.sqrt(x.shape[-2])
        return jnp.asarray(value, x.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def draw_state(tx, config=SMALL):
    params = draw_params(config)
    return state_lib.start(params, tx)


def draw_batch(seed=0, batch=BATCH):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(SMALL.vocab_size, size=(batch, LENGTH + 1), dtype=np.int32)
    segments = np.cumsum(tokens[:, :-1] == 0, axis=1, dtype=np.int32)
    arrays = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segments,
    }
    return jax.tree.map(jnp.asarray, arrays)


def dense(w) -> np.ndarray:
    u, s, v = (np.asarray(x, np.float64) for x in w)
    return (u * s[..., None, :]) @ np.swapaxes(v, -1, -2)


def factors(params):
    return [
        w
        for w in jax.tree.leaves(params, is_leaf=spectral.is_factors)
        if spectral.is_factors(w)
    ]


class Counted:
    """A train step that counts how often it is traced."""

    def __init__(self, step):
        self.traces = 0

        def traced(*arguments):
            self.traces += 1
            return step(*arguments)

        self.call = jax.jit(traced, donate_argnums=0)

    def __call__(self, *arguments):
        return self.call(*arguments)


@pytest.fixture(scope="module")
def sct():
    """A full chain and its step; a large eps keeps Adam's first step smooth."""
    config = optimizer_config.Sct(
        peak_learning_rate=0.03,
        schedule="constant",
        max_update_norm=BOUND,
        weight_decay=0.1,
        grad_clip=0.5,
        eps=1e-2,
        singular_value_lr_multiplier=2.0,
    )
    tx = config.build(100, decay_mask=model.decay_mask)
    return tx, Counted(step_lib.make_train_step(SMALL, tx))


def test_loss_is_the_mean_negative_log_likelihood():
    params, batch = draw_params(DENSE), draw_batch()
    loss = step_lib.loss_fn(params, batch, DENSE)
    logits = model.forward(
        params, batch["inputs"], DENSE, segment_ids=batch["segment_ids"]
    )
    logits = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    chosen = np.take_along_axis(logits, np.asarray(batch["targets"])[..., None], -1)
    expected = (log_z - chosen[..., 0]).mean()
    assert abs(loss - expected) < 8 * EPS * np.abs(logits).max()
    evaluate = step_lib.make_eval_step(DENSE)
    assert abs(evaluate(params, batch) - expected) < 8 * EPS * np.abs(logits).max()
    shared = step_lib.make_eval_step(DENSE, num_microbatches=2)
    assert abs(shared(params, batch) - expected) < 8 * EPS * np.abs(logits).max()
    # Logits of one share exist at a time.
    text = str(jax.make_jaxpr(shared)(params, batch))
    rows, length = batch["inputs"].shape
    assert f"[{rows // 2},{length},{SMALL.vocab_size}]" in text
    assert f"[{rows},{length},{SMALL.vocab_size}]" not in text


@pytest.mark.parametrize("none_in_a_share", [False, True])
def test_ignored_targets_weigh_nothing_in_any_share(none_in_a_share):
    """The loss is a mean over tokens, however they are spread over micro-batches."""
    params, batch = draw_params(DENSE), draw_batch()
    ignored = np.random.default_rng(1).random(batch["targets"].shape) < 0.7
    ignored[:, :8] = False
    if none_in_a_share:
        ignored[::4] = True  # a share holds every fourth row
    batch["targets"] = jnp.where(ignored, -100, batch["targets"])
    losses, steps = [], []
    for count in (1, 4):
        evaluate = step_lib.make_eval_step(DENSE, num_microbatches=count)
        losses.append(float(jax.jit(evaluate)(params, batch)))
        tx = optax.sgd(1.0)
        train = jax.jit(step_lib.make_train_step(DENSE, tx, num_microbatches=count))
        steps.append(train(state_lib.start(params, tx), batch, jnp.array(True)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    (one, found), (four, others) = steps
    assert float(found["loss"]) == pytest.approx(losses[0], rel=1e-5)
    assert float(others["loss"]) == pytest.approx(losses[0], rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        one.params,
        four.params,
    )


def test_documents_do_not_see_each_other():
    params, batch = draw_params(DENSE), draw_batch()
    apart = step_lib.loss_fn(params, batch, DENSE)
    del batch["segment_ids"]
    assert abs(step_lib.loss_fn(params, batch, DENSE) - apart) > 1e-4


def test_a_step_is_the_update_of_its_gradient(sct):
    tx, step = sct
    state, batch = draw_state(tx), draw_batch()
    loss, grads = jax.jit(jax.value_and_grad(step_lib.loss_fn), static_argnums=2)(
        state.params, batch, SMALL
    )
    updates, opt_state = jax.jit(tx.update)(grads, state.opt_state, state.params)
    expected = jax.device_get(optax.apply_updates(state.params, updates))
    new, metrics = step(state, batch, jnp.array(True))
    assert int(new.step) == 1
    # Gradients of two compilations differ by rounding. Adam with eps = 1e-2 turns a
    # difference g into at most lr g / eps.
    size = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    tolerance = 0.06 * 64 * EPS * size / 1e-2 + 8 * EPS
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance),
        new.params,
        expected,
    )
    for moment in ("mu", "nu"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7),
            optax.tree.get(new.opt_state, moment),
            optax.tree.get(opt_state, moment),
        )
    assert metrics["loss"] == pytest.approx(float(loss), rel=8 * EPS)
    squares = sum(
        np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(grads)
    )
    # Before clipping at 0.5.
    assert metrics["grad_norm"] == pytest.approx(np.sqrt(squares), rel=64 * EPS)
    assert np.sqrt(squares) > 0.5


def test_diagnostics_describe_the_applied_update(sct):
    tx, step = sct
    old = jax.device_get(draw_params())
    new, metrics = step(draw_state(tx), draw_batch(), jnp.array(True))
    pairs = list(zip(factors(old), factors(new.params), strict=True))
    assert len(pairs) == 2
    norms = [
        np.linalg.norm(dense(b) - dense(a), ord=2, axis=(-2, -1)) for a, b in pairs
    ]
    # `spectral.composite_update_norm` promises 1e-5 relative, eps max|s| absolute.
    expected = np.max(norms)
    difference = abs(float(metrics["composite_update_norm"]) - expected)
    assert difference < 2e-5 * expected + 2 * EPS
    assert 0.5 * BOUND < expected <= BOUND * 1.01 + 16 * EPS * 2
    worst = 0.0
    for _, w in pairs:
        for x in (w.u, w.v):
            x = np.asarray(x, np.float64)
            gram = np.swapaxes(x, -1, -2) @ x
            worst = max(worst, np.abs(gram - np.eye(gram.shape[-1])).max())
    # float32 adds its own rounding.
    assert abs(float(metrics["orthonormality_error"]) - worst) < 8 * EPS
    assert worst < 1e-5


def test_diagnostics_only_where_asked_and_one_compilation(sct):
    tx, step = sct
    state = draw_state(tx)
    losses = []
    for number in range(12):
        asked = number % 3 == 0
        state, metrics = step(state, draw_batch(), jnp.array(asked))
        diagnosed = {"orthonormality_error", "composite_update_norm"}
        assert set(metrics) == OF_EVERY_STEP | diagnosed
        assert (metrics["composite_update_norm"] > 0) == asked
        assert (metrics["orthonormality_error"] > 0) == asked
        if asked:
            assert metrics["orthonormality_error"] < 1e-5
            assert metrics["composite_update_norm"] <= BOUND * 1.01 + 32 * EPS
        losses.append(float(metrics["loss"]))
    assert step.traces == 1
    assert int(state.step) == 12
    assert losses[-1] < losses[0] - 0.1


def test_the_state_is_donated(sct):
    tx, step = sct
    state = draw_state(tx)
    new, _ = step(state, draw_batch(), jnp.array(False))
    big = [x for x in jax.tree.leaves((state.params, state.opt_state)) if x.ndim]
    assert all(x.is_deleted() for x in big)
    assert not any(x.is_deleted() for x in jax.tree.leaves(new))


@pytest.fixture(scope="module")
def sgd():
    """A chain whose update is the gradient, and its step on dense matrices."""

    def diagnose(old, new):
        return {"moved": optax.tree.norm(optax.tree.sub(new, old))}

    tx = optax.sgd(1.0)
    return tx, jax.jit(step_lib.make_train_step(DENSE, tx, diagnose=diagnose))


@pytest.mark.parametrize("wanted", [True, False])
def test_diagnostics_may_be_replaced(sgd, wanted):
    tx, step = sgd
    _, metrics = step(draw_state(tx, DENSE), draw_batch(), jnp.array(wanted))
    assert set(metrics) == OF_EVERY_STEP | {"moved"}
    moved = float(metrics["grad_norm"]) if wanted else 0.0
    assert metrics["moved"] == pytest.approx(moved, rel=1e-5)


def test_linear_multiplies_by_every_matrix_of_the_step_it_is_made_for():
    shapes, steps = [], []

    def linear_at(step):
        steps.append(step.shape)

        def linear(x, w):
            shapes.append(w.shape)
            return spectral.linear(x, w)

        return linear

    step = step_lib.make_train_step(DENSE, optax.sgd(0.1), linear_at=linear_at)
    state = draw_state(optax.sgd(0.1), DENSE)
    jax.eval_shape(step, state, draw_batch(), jnp.array(True))
    assert steps == [()]
    head = (SMALL.d_model, SMALL.vocab_size)
    assert set(shapes) == {(32, 32), (32, 16), (32, 48), (48, 32), head}


def test_the_state_starts_from_other_parameters_if_given():
    tx = optax.sgd(0.1, momentum=0.9)
    init_params = lambda key: {"w": jax.random.normal(key, (3,))}
    key = jax.random.key(1)
    state = state_lib.init(key, SMALL, tx, init_params=init_params)
    np.testing.assert_array_equal(state.params["w"], init_params(key)["w"])
    assert int(state.step) == 0
    assert optax.tree.get(state.opt_state, "trace")["w"].shape == (3,)
    shapes = state_lib.abstract(SMALL, tx, init_params=init_params)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)


def test_a_dense_model_has_no_factor_diagnostics():
    tx = optax.sgd(0.1)
    step = jax.eval_shape(
        step_lib.make_train_step(DENSE, tx),
        draw_state(tx, DENSE),
        draw_batch(),
        jnp.array(True),
    )
    assert set(step[1]) == OF_EVERY_STEP


def test_micro_batches_give_the_gradient_of_the_batch(sgd):
    tx, full_step = sgd
    batch, state = draw_batch(), draw_state(tx, DENSE)
    full, full_metrics = full_step(state, batch, jnp.array(False))
    step = jax.jit(step_lib.make_train_step(DENSE, tx, num_microbatches=4))
    new, metrics = step(state, batch, jnp.array(False))
    jax.tree.map(
        # Rounding of p - g, with |p| <= 4, and of sums over the tokens of a batch.
        lambda a, b: np.testing.assert_allclose(a, b, rtol=4 * EPS, atol=16 * EPS),
        new.params,
        full.params,
    )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), new.params, state.params)
    assert min(jax.tree.leaves(moved)) > 1e-3
    for name in ("loss", "grad_norm"):
        assert metrics[name] == pytest.approx(float(full_metrics[name]), rel=16 * EPS)


def test_bfloat16_compute_updates_float32_parameters():
    config = dataclasses.replace(SMALL, compute_dtype="bfloat16", remat="dots")
    tx = optimizer_config.Sct(max_update_norm=0.1).build(10)
    new, metrics = jax.eval_shape(
        step_lib.make_train_step(config, tx),
        draw_state(tx),
        draw_batch(),
        jnp.array(True),
    )
    assert {x.dtype for x in jax.tree.leaves(new.params)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(metrics)} == {jnp.dtype("float32")}


def shapes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (out.aval.shape for out in eqn.outvars)
        for part in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(part, "eqns"):
                yield from shapes(getattr(part, "jaxpr", part))


@pytest.mark.parametrize(
    ("scan_layers", "remat"),
    [(True, "none"), (False, "full")],
    ids=["stacked", "apart-recomputed"],
)
def test_no_step_ever_builds_a_dense_weight(scan_layers, remat):
    # No other axis (tokens, ranks, heads) has these sizes.
    config = model.ModelConfig(
        d_model=60,
        d_ff=104,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        vocab_size=97,
        rank=7,
        spectral=(*model.BLOCK_MATRICES, "embedding", "head"),
        tie_embeddings=False,
        scan_layers=scan_layers,
        remat=remat,
    )
    tx = optimizer_config.Sct(
        max_update_norm=0.1, weight_decay=0.1, grad_clip=1.0
    ).build(10, decay_mask=model.decay_mask)
    step = step_lib.make_train_step(config, tx, num_microbatches=2)
    ids = jax.ShapeDtypeStruct((6, 13), jnp.int32)
    batch = {"inputs": ids, "targets": ids, "segment_ids": ids}
    jaxpr = jax.make_jaxpr(step)(state_lib.abstract(config, tx), batch, jnp.array(True))
    built = set(shapes(jaxpr.jaxpr))
    assert (3, 13, 60) in built and (3, 13, 7) in built  # the walk reaches the blocks
    for fan_in, fan_out in config.matrix_shapes().values():
        for pair in ((fan_in, fan_out), (fan_out, fan_in)):
            assert not [shape for shape in built if shape[-2:] == pair]
