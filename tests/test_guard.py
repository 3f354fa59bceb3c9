"""Steps that are not applied: not finite, or spikes; fused and layer by layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples

from sct_jax import data, model, sharding, spectral
from sct_jax.training import config as config_lib
from sct_jax.training import guard as guard_lib
from sct_jax.training import layerwise, optimizer_config, trainer
from sct_jax.training import state as state_lib
from sct_jax.training import step as step_lib

SHAPE = samples.SHAPE
LOW_RANK = dataclasses.replace(SHAPE, factors="low_rank")
DENSE = dataclasses.replace(SHAPE, spectral=())
APART = dataclasses.replace(LOW_RANK, scan_layers=False)
GUARD = guard_lib.Guard(max_skipped=4)
TRUE, FALSE = jnp.array(True), jnp.array(False)

CHAINS = {
    "sct": (optimizer_config.Sct(), SHAPE),
    "clip": (optimizer_config.Sct(max_update_norm=0.02), SHAPE),
    "svd": (optimizer_config.Sct(retraction="svd", max_update_norm=0.02), SHAPE),
    "tsvd": (optimizer_config.Tsvd(retraction_every=2), SHAPE),
    "stiefel_muon": (optimizer_config.StiefelMuon(), SHAPE),
    "spectron": (optimizer_config.Spectron(), LOW_RANK),
    "adamw": (optimizer_config.AdamW(moment_dtype="bfloat16"), LOW_RANK),
    "muon": (optimizer_config.Muon(grad_clip=1.0), DENSE),
}
FAST = ("clip", "spectron")


def draw_batch(seed=0):
    ids = np.random.default_rng(seed).integers(300, size=(2, 7), dtype=np.int32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:]}


@jax.custom_vjp
def with_gradient_times(w, factor):
    """The weight, whose gradient is multiplied by the factor."""
    return w


with_gradient_times.defvjp(
    lambda w, factor: (w, factor),
    lambda factor, dw: (jax.tree.map(lambda g: g * factor, dw), None),
)


# By which the gradient of `down` is multiplied in each step.
FACTORS = (1.0, np.nan, np.inf, -1e38, 1.0)


def linear_at(taken):
    """Multiplication with a spoilt gradient, after so many steps."""

    def linear(x, w):
        width = w[0].shape[-2] if spectral.is_factors(w) else w.shape[-2]
        if width == SHAPE.d_ff:
            w = with_gradient_times(w, jnp.array(FACTORS)[taken])
        return spectral.linear(x, w)

    return linear


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def build(optimizer, shape, guard=GUARD):
    tx = optimizer.build(
        10, decay_mask=model.decay_mask, matrix_mask=model.hidden_matrices
    )
    step = step_lib.make_train_step(shape, tx, linear_at=linear_at, guard=guard)
    state = jax.jit(lambda key: state_lib.init(key, shape, tx))(jax.random.key(0))
    return state, jax.jit(step)


@pytest.mark.parametrize(
    "name",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CHAINS],
)
def test_a_gradient_that_is_not_finite_changes_nothing(name):
    state, step = build(*CHAINS[name])
    first, _ = step(state, draw_batch(1), TRUE)
    state = first
    for skipped in (1, 2, 3):
        state, metrics = step(state, draw_batch(2), TRUE)
        assert bits((state.params, state.opt_state)) == bits(
            (first.params, first.opt_state)
        )
        assert int(state.step) == 1 + skipped
        assert metrics["skipped_steps"] == metrics["skipped_in_a_row"] == skipped
    last, metrics = step(state, draw_batch(3), TRUE)
    assert (metrics["skipped_steps"], metrics["skipped_in_a_row"]) == (3, 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(last))
    # The step after them is the one that would have come in their place.
    expected, _ = step(first.replace(step=state.step), draw_batch(3), TRUE)
    assert bits((last.params, last.opt_state)) == bits(
        (expected.params, expected.opt_state)
    )


def test_a_guard_that_is_off_applies_every_step():
    off = guard_lib.Guard(max_skipped=None)
    state, step = build(*CHAINS["spectron"], guard=off)
    for seed in range(2):
        state, metrics = step(state, draw_batch(seed), TRUE)
    assert metrics["skipped_steps"] == 0
    assert not all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_eight_devices_skip_alike():
    config = config_lib.ExperimentConfig(
        model=SHAPE, data=data.DataConfig(batch_size=8, seq_len=8)
    )
    run = trainer.Trainer(
        config,
        sharding.MeshConfig(data=2, fsdp=2, tensor=2).build(8),
        linear_at=lambda step: (
            lambda x, w: spectral.linear(
                x, jax.tree.map(lambda p: p * jnp.where(step == 1, jnp.nan, 1.0), w)
            )
        ),
    )
    ids = np.random.default_rng(0).integers(300, size=(8, 9), dtype=np.int32)
    batch = {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "segment_ids": np.ones((8, 8), np.int32),
    }
    state, _ = run.step(run.init(jax.random.key(0)), batch, diagnose=False)
    before = bits((state.params, state.opt_state))
    state, metrics = run.step(state, batch, diagnose=False)
    assert bits((state.params, state.opt_state)) == before
    assert metrics["skipped_in_a_row"] == 1
    for leaf in jax.tree.leaves(state):
        shards = {}
        for shard in leaf.addressable_shards:
            shards.setdefault(str(shard.index), set()).add(
                np.asarray(shard.data).tobytes()
            )
        assert all(len(copies) == 1 for copies in shards.values())


# --- The decision alone.


@jax.jit
def plain(state, loss, norm):
    guard = guard_lib.Guard(max_skipped=3, spikes="skip")
    accepted = guard.accepts(state, loss, norm)
    after, metrics = guard.after(state, loss, norm, accepted=accepted, logged=FALSE)
    return after, metrics | {"accepted": accepted}


def follow(losses, norms=None, state=None):
    state = state or guard_lib.init()
    norms = np.ones(len(losses)) if norms is None else norms
    accepted = []
    for loss, norm in zip(losses, norms, strict=True):
        state, metrics = plain(state, np.float32(loss), np.float32(norm))
        accepted.append(bool(metrics["accepted"]))
    return state, accepted


def noise(count, *, level=3.0, seed=0):
    return level + 0.05 * np.random.default_rng(seed).standard_normal(count)


def test_after_enough_bad_steps_in_a_row_none_is_applied():
    state, accepted = follow([3, np.nan, np.inf, 3, np.nan, np.nan, np.nan, 3, 3])
    assert accepted == [True, False, False, True] + [False] * 5
    assert (int(state.skipped), int(state.skipped_in_a_row)) == (7, 5)


def test_a_norm_that_is_not_finite_counts_too():
    state, accepted = follow([3, 3, 3], norms=[1, np.inf, 1])
    assert accepted == [True, False, True]
    assert int(state.skipped) == 1


@pytest.mark.parametrize("of", ["loss", "norm"])
def test_a_spike_is_skipped_and_the_trend_survives_it(of):
    losses, norms = noise(120), np.exp(noise(120, level=0.0, seed=1))
    {"loss": losses, "norm": norms}[of][100] *= 100
    state, accepted = follow(losses, norms)
    assert [i for i, ok in enumerate(accepted) if not ok] == [100]
    assert (int(state.spikes), int(state.skipped)) == (1, 1)
    assert int(state.skipped_in_a_row) == 0
    assert float(state.loss.mean) == pytest.approx(3.0, abs=0.05)


def test_noise_trends_and_the_start_have_no_spikes():
    steps = np.arange(2000)
    losses = (
        3
        + 6 * np.exp(-steps / 100)
        + 0.05 * np.random.default_rng(3).standard_t(4, size=2000)
    )
    norms = np.exp(0.3 * np.random.default_rng(4).standard_normal(2000))
    state, accepted = follow(losses, norms)
    assert all(accepted)
    assert int(state.spikes) == 0
    state, accepted = follow([3.0] * 20 + [300.0] + [3.0] * 5)
    assert all(accepted)


def test_a_lasting_change_of_level_is_followed():
    state, _ = follow(noise(100))
    _, accepted = follow(noise(400, level=6.0), state=state)
    assert not accepted[0]
    assert all(accepted[-100:])


def test_a_constant_loss_is_followed_when_it_moves():
    _, accepted = follow([1e-3] * 200 + [1.05e-3] * 5)
    assert all(accepted)


def test_the_maxima_cover_the_steps_since_the_last_logged_one():
    guard, state = guard_lib.Guard(), guard_lib.init()
    seen = []
    for loss, logged in ((5.0, True), (2.0, False), (900.0, False), (3.0, True)):
        loss = jnp.float32(loss)
        state, metrics = guard.after(
            state, loss, 2 * loss, accepted=TRUE, logged=jnp.array(logged)
        )
        seen.append((float(metrics["loss_max"]), float(metrics["grad_norm_max"])))
    assert seen == [(5, 10), (2, 4), (900, 1800), (900, 1800)]
    assert float(state.largest_loss) == 0


# --- Layer by layer.


def build_layerwise():
    tx = optimizer_config.Spectron().build(10)
    step = layerwise.make_train_step(layerwise.stack_of(APART), tx, guard=GUARD)
    return step, step.init(jax.random.key(0))


def test_a_layerwise_step_whose_loss_is_not_finite_changes_nothing():
    step, state = build_layerwise()
    state, _ = step(state, draw_batch(1), True)
    spoilt = state.params | {"final_norm": state.params["final_norm"] * np.nan}
    state = state.replace(params=spoilt)
    before = bits((state.params, state.opt_state))
    state, metrics = step(state, draw_batch(2), True)
    assert bits((state.params, state.opt_state)) == before
    assert int(state.step) == 2
    assert (metrics["skipped_steps"], metrics["skipped_in_a_row"]) == (1, 1)


def test_the_two_steps_report_the_same_metrics():
    step, state = build_layerwise()
    tx = optimizer_config.Spectron().build(10)
    fused = jax.jit(step_lib.make_train_step(APART, tx, guard=GUARD))
    _, wanted = fused(jax.tree.map(jnp.copy, state), draw_batch(1), TRUE)
    _, rejected = step(jax.tree.map(jnp.copy, state), draw_batch(1), True, reject=True)
    _, found = step(state, draw_batch(1), True)
    assert found.keys() == wanted.keys() == rejected.keys()
    assert found["loss"] == pytest.approx(float(wanted["loss"]), rel=1e-5)
    assert found["loss"] == rejected["loss"]


@pytest.mark.parametrize("at", ["head", "first layer"])
def test_a_layerwise_gradient_that_is_not_finite(at, monkeypatch):
    step, state = build_layerwise()
    original = step._block_grads if at == "first layer" else step._head_grads
    calls = []

    def spoil(*args):
        calls.append(at)
        results = original(*args)
        bad = at == "head" or len(calls) == APART.num_layers
        if not bad:
            return results
        if at == "head":
            loss, grads, *rest = results
            return loss, jax.tree.map(lambda g: g * np.nan, grads), *rest
        grads, dx = results
        return grads | {"q": jax.tree.map(lambda g: g * np.nan, grads["q"])}, dx

    name = "_block_grads" if at == "first layer" else "_head_grads"
    monkeypatch.setattr(step, name, spoil)
    before = bits((state.params, state.opt_state))
    if at == "head":  # nothing was updated before
        state, metrics = step(state, draw_batch(1), False)
        assert bits((state.params, state.opt_state)) == before
        assert metrics["skipped_in_a_row"] == 1
        return
    with pytest.raises(layerwise.TornStep, match="step 1"):
        step(state, draw_batch(1), False)


def test_a_layerwise_gradient_that_is_not_finite_is_applied_where_it_may(monkeypatch):
    tx = optimizer_config.Spectron().build(10)
    guard = guard_lib.Guard(max_skipped=None, spikes="skip")
    step = layerwise.make_train_step(layerwise.stack_of(APART), tx, guard=guard)
    original = step._block_grads

    def spoil(*args):
        grads, dx = original(*args)
        return grads | {"q": jax.tree.map(lambda g: g * np.nan, grads["q"])}, dx

    monkeypatch.setattr(step, "_block_grads", spoil)
    state, metrics = step(step.init(jax.random.key(0)), draw_batch(1), False)
    assert metrics["skipped_steps"] == 0
    moved = jax.tree.leaves(state.params["layers"][0]["q"])
    assert not np.isfinite(np.asarray(moved[0])).any()
