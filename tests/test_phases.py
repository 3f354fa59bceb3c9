"""Runs that start dense or wider, and are truncated on the way."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import samples

from sct_jax import compression, data, errors, model, rank, sharding, spectral
from sct_jax.training import config as config_lib
from sct_jax.training import (
    loop,
    metrics,
    optimizer_config,
    origin,
    phases,
    switching,
    trainer,
    workdir,
)

SHAPE = dataclasses.replace(samples.SHAPE, spectral=model.BLOCK_MATRICES)
DENSE_THEN_TWICE = phases.PhasesConfig(
    switch_at=(4.0, 8.0),
    rank_multiples=(phases.DENSE, 2.0),
    dense_optimizer="muon",
    dense_learning_rate=0.02,
    warmup_steps=2,
)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phases")
    return config_lib.ExperimentConfig(
        num_steps=12,
        log_every=1,
        model=SHAPE,
        data=data.DataConfig(
            source=samples.write_corpus(folder / "corpus"),
            cache_dir=str(folder / "cache"),
            batch_size=8,
            seq_len=16,
        ),
        optimizer=optimizer_config.StiefelMuon(
            peak_learning_rate=0.02, schedule="wsd", warmup_steps=2, decay_ratio=0.5
        ),
        phases=DENSE_THEN_TWICE,
        truncation=config_lib.TruncationConfig(num_batches=2),
        checkpoint=config_lib.CheckpointConfig(every=3),
        eval=config_lib.EvalConfig(every=6, num_batches=1),
    )


def train(config, path, **options):
    text = io.StringIO()
    console = rich.console.Console(file=text, width=200)
    return loop.train(config, path, output=console, **options), text.getvalue()


@pytest.fixture(scope="module")
def finished(experiment, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    result, text = train(experiment, path)
    assert result.status == "finished"
    return path, text


def losses_of(path):
    return {
        row["step"]: row["train/loss"]
        for row in metrics.read_rows(path / "metrics.jsonl")
        if "train/loss" in row
    }


def state_of(config, path):
    run = trainer.Trainer(
        config_lib.phases_of(config)[-1].config, sharding.MeshConfig().build(1)
    )
    with workdir.reading(path) as checkpoints:
        return checkpoints.restore(run.abstract_at, run.mesh)


# --- What phases are.


def test_phases_are_runs_of_their_own(experiment):
    first, second, third = config_lib.phases_of(experiment)
    assert [(p.first, p.last) for p in (first, second, third)] == [
        (0, 4),
        (4, 8),
        (8, 12),
    ]
    assert first.config.model.spectral == ()
    assert first.config.optimizer.name == "muon"
    assert first.config.optimizer.peak_learning_rate == 0.02
    assert second.config.model.matrix_rank("down") == 8
    assert second.config.optimizer.schedule == "constant"
    assert third.config.model == experiment.model
    assert third.config.optimizer == experiment.optimizer  # warmup of the phases: alike
    assert all(p.config.num_steps == 4 for p in (first, second, third))
    for step, number in ((0, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (99, 2)):
        assert config_lib.phase_at(experiment, step).first == 4 * number


def test_without_phases_a_run_is_its_own(experiment):
    plain = dataclasses.replace(experiment, phases=phases.PhasesConfig())
    assert config_lib.phases_of(plain) == (config_lib.Phase(0, 12, plain),)


@pytest.mark.parametrize("shares", [(0.4,), (0.2, 0.5)])
def test_shares_are_of_the_flops(shares):
    costs = [9.0, 4.0, 2.0][-len(shares) - 1 :]
    ends = phases.flop_ends(shares, costs, 100_000)
    assert ends[-1] == 100_000
    counts = np.diff([0, *ends])
    spent = np.cumsum(counts * costs)
    np.testing.assert_allclose(spent[:-1] / spent[-1], shares, atol=1e-4)


def test_ranks_are_clamped_to_the_matrix(experiment):
    wide = dataclasses.replace(
        DENSE_THEN_TWICE, switch_at=(4.0,), rank_multiples=(100.0,)
    )
    (shape, _) = wide.models(SHAPE)
    for name, sides in SHAPE.matrix_shapes().items():
        if name in model.BLOCK_MATRICES:
            assert shape.matrix_rank(name) == min(sides)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"switch_at": (12.0,)}, r"phases\.switch_at: 12 is neither a step in 1\.\.11"),
        ({"switch_at": (0.0,)}, r"phases\.switch_at: 0 is neither"),
        ({"switch_at": (-0.5,)}, r"phases\.switch_at: -0\.5 is neither"),
        ({"switch_at": (2.5,)}, r"phases\.switch_at: 2\.5 is neither"),
        ({"switch_at": (0.5, 4.0)}, r"must ascend, all steps or all shares"),
        ({"switch_at": (4.0, 4.0)}, r"must ascend"),
        ({"switch_at": (0.001,)}, r"so one phase would have no step; take other"),
        ({"rank_multiples": (2.0,)}, r"has 1 values for 2 in phases\.switch_at"),
        ({"rank_multiples": (2.0, 0.0)}, r"phases\.rank_multiples.*must fall"),
        ({"rank_multiples": (0.0, 1.0)}, r"stay above 1"),
        (
            {"rank_multiples": (9.0, 8.0)},  # both are clamped to the matrices
            r"phases\.rank_multiples: the phase to step 4 has the ranks of the next",
        ),
        (
            {"switch_at": (4.0,), "rank_multiples": (1.1,)},
            r"phases\.rank_multiples: the phase to step 4 has the ranks of the next",
        ),
        ({"dense_optimizer": "sgd"}, r"phases\.dense_optimizer"),
        ({"dense_learning_rate": 0.0}, r"phases\.dense_learning_rate"),
        ({"decay_ratio": 1.5}, r"phases\.decay_ratio"),
        ({"warmup_steps": -1}, r"phases\.warmup_steps"),
    ],
)
def test_impossible_phases_are_refused(experiment, changes, message):
    fields = {"switch_at": (4.0, 8.0), "rank_multiples": ()} | changes
    if "rank_multiples" not in changes and len(fields["switch_at"]) == 2:
        fields["rank_multiples"] = (0.0, 2.0)
    changed = dataclasses.replace(
        experiment, phases=dataclasses.replace(DENSE_THEN_TWICE, **fields)
    )
    with pytest.raises(errors.UserError, match=message):
        changed.validate()


def test_other_layouts_cannot_switch(experiment):
    dense = dataclasses.replace(
        experiment, model=dataclasses.replace(SHAPE, spectral=())
    )
    with pytest.raises(errors.UserError, match=r"model\.spectral is empty"):
        dataclasses.replace(
            dense, optimizer=optimizer_config.AdamW(), phases=DENSE_THEN_TWICE
        ).validate()
    blocks = dataclasses.replace(SHAPE, num_blocks=2, rank=4)
    with pytest.raises(errors.UserError, match=r"phases\.rank_multiples: blocks only"):
        dataclasses.replace(experiment, model=blocks).validate()


def test_fields_without_effect_are_noted(experiment):
    plain = dataclasses.replace(
        experiment, phases=phases.PhasesConfig(decay_ratio=0.5, dense_learning_rate=0.1)
    )
    notes = " ".join(plain.unused_fields())
    assert "phases.decay_ratio: has no effect without phases.switch_at" in notes
    assert "phases.dense_learning_rate: has no effect without a dense phase" in notes


# --- Runs.


def test_a_run_goes_through_its_phases(experiment, finished):
    path, text = finished
    table = " ".join(text.replace("│", " ").split())
    assert "dense to step 4 (" in table and "rank 4 to step 12 (" in table
    assert "step 4: truncated to rank 8; held-out loss" in text
    assert "step 8: truncated to rank 4; held-out loss" in text
    run = workdir.load_run(path)
    assert run.config.model.matrix_rank("q") == 4
    down = model.unstack_layers(run.params)["layers"][0]["down"]
    assert spectral.is_spectral(down) and down.s.shape == (4,)
    assert float(spectral.orthonormality_error(run.params)) < 1e-5
    rows = metrics.read_rows(path / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == [*range(1, 13)]
    rates = [row["learning_rate"] for row in rows if "train/loss" in row]
    # Each phase warms up again; only the last decays.
    np.testing.assert_allclose(rates[:8], [0.01, 0.02, 0.02, 0.02] * 2, rtol=1e-6)
    np.testing.assert_allclose(rates[8:10], [0.01, 0.02], rtol=1e-6)
    assert rates[-1] < 0.02


def train_until(stop, config, path):
    """Trains as if a signal came during step `stop`."""
    agreed = loop.processes.agreed_stop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loop.processes,
            "agreed_stop",
            lambda step, received: 15 if step == stop else agreed(step, received),
        )
        result, _ = train(config, path)
    assert (result.status, result.step) == ("interrupted", stop)


@pytest.mark.parametrize("stop", [2, 4, 5, 8])
def test_a_run_resumes_bitwise_in_and_between_phases(
    experiment, finished, tmp_path, stop
):
    path = tmp_path / "run"
    train_until(stop, experiment, path)
    result, _ = train(experiment, path)
    assert result.status == "finished"
    (state, record), (expected, _) = (
        state_of(experiment, p) for p in (path, finished[0])
    )
    assert record["phase_start"] == 8
    jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.parametrize(("stop", "rank"), [(3, None), (6, 8)])
def test_parameters_of_every_phase_can_be_read(experiment, tmp_path, stop, rank):
    """As generation, evaluation and export do, while the run goes on."""
    train_until(stop, experiment, tmp_path / "run")
    run = workdir.load_run(tmp_path / "run")
    assert run.config.model.matrix_rank("q") == rank
    model.forward(run.params, jnp.zeros((1, 4), jnp.int32), run.config.model)


def test_a_switch_keeps_what_ranks_allow(experiment):
    """At full rank nothing changes but rounding, whitened or not."""
    full = dataclasses.replace(
        SHAPE,
        rank_ratios=model.MatrixRankRatios(**dict.fromkeys(model.BLOCK_MATRICES, 9.0)),
    )
    for method in ("plain", "whitened"):
        config = dataclasses.replace(
            experiment,
            model=full,
            phases=phases.PhasesConfig(switch_at=(4.0,), dense_learning_rate=0.01),
            truncation=config_lib.TruncationConfig(method=method, num_batches=1),
        )
        before, after = (
            trainer.Trainer(p.config, sharding.MeshConfig().build(1))
            for p in config_lib.phases_of(config)
        )
        corpus = data.prepare(config.data, vocab_size=config.model.vocab_size)
        state = before.init(jax.random.key(1))
        state = state.replace(
            step=jnp.array(4), guard=state.guard._replace(count=jnp.array(4))
        )
        loss = before.evaluate(state.params, before.held_out(corpus))["eval/loss"]
        text = switching.calibration_text(after, corpus, step=4, seed=0)
        assert (text is None) == (method == "plain")
        state = switching.switch(state, before, after, text=text)
        assert state.step == 4 and state.guard.count == 0
        same = after.evaluate(state.params, after.held_out(corpus))["eval/loss"]
        assert same == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("truncation", "rows"),
    [
        ({"num_batches": 3}, [4] * 6),
        ({"num_batches": 3, "max_tokens": 4 * 16 * 5}, [4] * 5),
        ({"max_tokens": 1}, [4]),  # never none
    ],
)
def test_inputs_are_measured_on_bounded_text(experiment, truncation, rows):
    config = dataclasses.replace(
        experiment,
        phases=phases.PhasesConfig(),
        data=dataclasses.replace(experiment.data, num_microbatches=2),
        truncation=config_lib.TruncationConfig(**truncation),
    )
    run = trainer.Trainer(config, sharding.MeshConfig().build(1))
    corpus = data.prepare(config.data, vocab_size=config.model.vocab_size)
    text = switching.calibration_text(run, corpus, step=0, seed=0)
    assert [len(tokens) for tokens in text.tokens] == rows


def test_eight_devices_switch_like_one(experiment, finished, tmp_path):
    mesh = sharding.MeshConfig(data=2, fsdp=2, tensor=2)
    spread = dataclasses.replace(experiment, mesh=mesh)
    result, _ = train(spread, tmp_path / "run")
    assert result.status == "finished"
    found, expected = losses_of(tmp_path / "run"), losses_of(finished[0])
    assert found == pytest.approx(expected, rel=2e-4)


def test_a_damaged_end_falls_back_to_an_earlier_phase(experiment, finished, tmp_path):
    path = tmp_path / "run"
    rarely = dataclasses.replace(
        experiment, checkpoint=config_lib.CheckpointConfig(every=100)
    )
    train(rarely, path)
    with workdir.reading(path) as checkpoints:
        assert checkpoints.steps() == [8, 12]
    for file in (path / "checkpoints" / "12" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[::-1])
    result, text = train(rarely, path)
    assert result.status == "finished"
    assert "12 is damaged" in text and "step 8: truncated to rank 4" in text
    rows = metrics.read_rows(path / "metrics.jsonl")
    switched = [row["step"] for row in rows if "truncation/loss_after" in row]
    assert switched == [4, 8]
    assert losses_of(path)[12] == losses_of(finished[0])[12]


def test_a_longer_run_must_not_move_a_switch(experiment, tmp_path):
    shares = dataclasses.replace(DENSE_THEN_TWICE, switch_at=(0.4,), rank_multiples=())
    short = dataclasses.replace(experiment, num_steps=6, phases=shares)
    train(short, tmp_path / "run")
    longer = dataclasses.replace(short, num_steps=12)
    with pytest.raises(errors.UserError, match=r"num_steps: the phases of the run"):
        train(longer, tmp_path / "run")
    switch = config_lib.phases_of(short)[0].last
    kept = dataclasses.replace(
        longer, phases=dataclasses.replace(shares, switch_at=(float(switch),))
    )
    result, _ = train(kept, tmp_path / "run", allow_change=["phases.switch_at"])
    assert (result.status, result.step) == ("finished", 12)


@pytest.mark.slow
def test_layerwise_steps_switch_too(experiment, tmp_path):
    layerwise = dataclasses.replace(
        experiment,
        step="layerwise",
        model=dataclasses.replace(SHAPE, scan_layers=False),
        optimizer=dataclasses.replace(experiment.optimizer, grad_clip=None),
    )
    layerwise.validate()
    result, text = train(layerwise, tmp_path / "run")
    assert result.status == "finished"
    assert "step 8: truncated to rank 4" in text


def test_a_dense_run_starts_a_truncated_one(experiment, tmp_path):
    dense = dataclasses.replace(
        experiment,
        num_steps=3,
        phases=phases.PhasesConfig(),
        model=dataclasses.replace(SHAPE, spectral=()),
        optimizer=optimizer_config.AdamW(peak_learning_rate=1e-2),
    )
    train(dense, tmp_path / "dense")
    low = dataclasses.replace(experiment, num_steps=2, phases=phases.PhasesConfig())
    result, text = train(low, tmp_path / "low", init_from=str(tmp_path / "dense"))
    assert result.status == "finished"
    assert "starting from the parameters of step 3" in text
    assert "truncating from dense to rank 4" in text
    assert workdir.load_run(tmp_path / "low").config.model.matrix_rank("q") == 4
    # Before its first step it is the truncation of the other run.
    run = trainer.Trainer(low, sharding.MeshConfig().build(1))
    found = origin.find(str(tmp_path / "dense"))
    corpus = data.prepare(low.data, vocab_size=low.model.vocab_size)
    text = switching.calibration_text(run, corpus, step=0, seed=low.seed)
    state, _ = origin.start(run, found, text=text, log=lambda line: None)
    expected = compression.truncate(
        model.stack_layers(workdir.load_run(tmp_path / "dense").params),
        dense.model,
        low.model,
        text=text,
    )
    for name in model.BLOCK_MATRICES:
        np.testing.assert_allclose(
            spectral.to_dense(state.params["layers"][name]),
            spectral.to_dense(expected["layers"][name]),
            atol=1e-5,
        )
    plain = compression.truncate(
        model.stack_layers(workdir.load_run(tmp_path / "dense").params),
        dense.model,
        low.model,
    )
    down = [spectral.to_dense(p["layers"]["down"]) for p in (expected, plain)]
    assert np.abs(down[0] - down[1]).max() > 1e-3


def test_momentum_follows_the_factors(experiment):
    """Of u and v, by the chain rule; that of s and of other arrays starts at zero."""
    config = dataclasses.replace(
        experiment,
        phases=dataclasses.replace(
            DENSE_THEN_TWICE,
            switch_at=(4.0,),
            rank_multiples=(),
            carry_momentum=True,
        ),
    )
    config.validate()
    before, after = (
        trainer.Trainer(p.config, sharding.MeshConfig().build(1))
        for p in config_lib.phases_of(config)
    )
    corpus = data.prepare(config.data, vocab_size=config.model.vocab_size)
    batches = data.train_batches(corpus, config.data, seed=0)
    state = before.init(jax.random.key(0))
    for _ in range(2):
        state, _ = before.step(state, next(batches), diagnose=False)
    means = jax.device_get(switching.first_moments(state.opt_state, state.params))
    state = switching.switch(state, before, after, text=None, carry_momentum=True)
    moved = jax.device_get(switching.first_moments(state.opt_state, state.params))
    for name in model.BLOCK_MATRICES:
        w = jax.device_get(state.params["layers"][name])
        g = means["layers", name].astype(np.float64)
        np.testing.assert_allclose(
            moved["layers", name, "u"], g @ (w.v * w.s[:, None]), rtol=1e-4, atol=1e-6
        )
        transposed = np.swapaxes(g, 1, 2)
        np.testing.assert_allclose(
            moved["layers", name, "v"],
            transposed @ (w.u * w.s[:, None]),
            rtol=1e-4,
            atol=1e-6,
        )
        assert np.abs(g).max() > 0 and not moved["layers", name, "s"].any()
    assert not moved["embedding",].any()


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (optimizer_config.Sct(), "only optimizer.name = 'stiefel_muon'"),
        (
            optimizer_config.StiefelMuon(coordinates="svd", retraction="svd"),
            "is of other directions",
        ),
    ],
)
def test_momentum_needs_a_chain_that_takes_it(experiment, chain, message):
    changed = dataclasses.replace(
        experiment,
        optimizer=chain,
        phases=dataclasses.replace(DENSE_THEN_TWICE, carry_momentum=True),
    )
    with pytest.raises(errors.UserError, match=rf"phases\.carry_momentum: .*{message}"):
        changed.validate()


def test_losses_around_a_truncation_are_logged(finished):
    rows = metrics.read_rows(finished[0] / "metrics.jsonl")
    found = {r["step"]: r for r in rows if "truncation/loss_after" in r}
    assert found.keys() == {4, 8}
    for step, row in found.items():
        (evaluated,) = [r for r in rows if r["step"] == step and "eval/loss" in r]
        assert row["truncation/loss_before"] == pytest.approx(evaluated["eval/loss"])
        assert row["truncation/loss_after"] != row["truncation/loss_before"]


@pytest.mark.slow
def test_adaptive_ranks_belong_to_the_last_phase(experiment, tmp_path):
    adaptive = dataclasses.replace(
        experiment,
        optimizer=optimizer_config.Tsvd(peak_learning_rate=0.01),
        phases=phases.PhasesConfig(switch_at=(4.0,), dense_learning_rate=0.01),
        adaptive_rank=rank.AdaptiveRankConfig(
            energy=0.5, every=2, warmup_steps=2, floor=1, multiple=1
        ),
    )
    result, text = train(adaptive, tmp_path / "run")
    assert result.status == "finished"
    assert "step 4: truncated to rank 4" in text and "stored ranks" in text
    stored = workdir.newest_record(tmp_path / "run")["ranks"]
    assert min(stored.values()) < 4
    train_until(7, adaptive, tmp_path / "again")
    train(adaptive, tmp_path / "again")
    again = workdir.newest_record(tmp_path / "again")
    assert again["ranks"] == stored
    assert again["leaves"] == workdir.newest_record(tmp_path / "run")["leaves"]


@pytest.mark.slow
def test_dense_weights_become_blocks(experiment, tmp_path):
    blocks = dataclasses.replace(
        experiment,
        num_steps=6,
        model=dataclasses.replace(SHAPE, num_blocks=2),
        phases=phases.PhasesConfig(switch_at=(4.0,), dense_learning_rate=0.01),
    )
    result, _ = train(blocks, tmp_path / "run")
    assert result.status == "finished"
    run = workdir.load_run(tmp_path / "run")
    assert spectral.is_blocks(run.params["layers"]["down"])
    assert float(spectral.orthonormality_error(run.params)) < 1e-5
