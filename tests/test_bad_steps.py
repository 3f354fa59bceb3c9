"""Runs with steps that are not applied: counted, resumed, ended."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import samples

from sct_jax import data
from sct_jax.training import config as config_lib
from sct_jax.training import layerwise, loop, optimizer_config, trainer, workdir

LENGTH = 16


@pytest.fixture
def experiment(text_files, tmp_path_factory):
    return config_lib.ExperimentConfig(
        num_steps=8,
        log_every=2,
        model=samples.SHAPE,
        data=data.DataConfig(
            source=text_files,
            batch_size=8,
            seq_len=LENGTH,
            cache_dir=str(tmp_path_factory.getbasetemp() / "tokens"),
        ),
        optimizer=optimizer_config.Sct(skip_nonfinite=3, max_update_norm=0.1),
        checkpoint=config_lib.CheckpointConfig(every=3, keep=9),
        eval=config_lib.EvalConfig(every=8, num_batches=1),
    )


@pytest.fixture
def spoil(monkeypatch):
    """Makes the loss of some steps NaN, by targets outside the vocabulary."""

    def spoil_steps(*steps):
        original = data.train_batches

        def batches(*args, start_step=0, **kwargs):
            rows = original(*args, start_step=start_step, **kwargs)
            for step, batch in enumerate(rows, start_step + 1):
                if step in steps:
                    batch = batch | {"targets": np.full_like(batch["targets"], 999)}
                yield batch

        monkeypatch.setattr(data, "train_batches", batches)

    return spoil_steps


def train(experiment, path, capsys):
    result = loop.train(experiment, path)
    return result, capsys.readouterr().out


def rows_of(path):
    rows = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row for row in rows if "train/loss" in row}


def state_of(experiment, path):
    run = trainer.Trainer(experiment, experiment.mesh.build())
    with workdir.reading(path) as checkpoints:
        return checkpoints.restore(run.abstract_at, run.mesh)[0]


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_bad_step_is_skipped_counted_and_said(experiment, spoil, tmp_path, capsys):
    spoil(3, 5)
    result, text = train(experiment, tmp_path, capsys)
    assert result == loop.Result("finished", 8)
    counts = {step: row["skipped_steps"] for step, row in rows_of(tmp_path).items()}
    assert counts == {1: 0, 2: 0, 4: 1, 6: 2, 8: 2}
    assert text.count("not applied") == 2
    assert "1 of the steps up to 4 were not applied (1 so far)" in text
    state = state_of(experiment, tmp_path)
    assert (int(state.step), int(state.guard.skipped)) == (8, 2)
    assert int(state.opt_state[0].count) == 6


def test_a_run_with_a_bad_step_resumes_bitwise(experiment, spoil, tmp_path, capsys):
    spoil(3, 5)
    train(experiment, tmp_path / "whole", capsys)
    # Checkpoint 3 remembers that its last step was skipped.
    for name in ("6", "8"):
        (tmp_path / "whole" / "checkpoints" / name).rename(tmp_path / name)
    whole = state_of(experiment, tmp_path / "whole")
    assert int(whole.guard.skipped_in_a_row) == 1
    _, text = train(experiment, tmp_path / "whole", capsys)
    assert "resumed at step 3" in text
    again = state_of(experiment, tmp_path / "whole")
    (tmp_path / "whole" / "checkpoints" / "8").rename(tmp_path / "second")
    (tmp_path / "8").rename(tmp_path / "whole" / "checkpoints" / "8")
    assert_equal(again, state_of(experiment, tmp_path / "whole"))


def test_too_many_bad_steps_end_the_run(experiment, spoil, tmp_path, capsys):
    spoil(*range(4, 9))
    result, text = train(experiment, tmp_path, capsys)
    assert result.status == "diverged"
    assert text.count("diverged:") == 1
    assert "3 steps in a row, up to step 6, have a loss or gradient" in text
    assert "the checkpoint of step 3 is kept" in text
    kept = {p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {"3"}
    assert "finished" not in text


def test_a_torn_step_is_left_out_of_a_second_attempt(
    experiment, spoil, tmp_path, monkeypatch, capsys
):
    config = dataclasses.replace(
        experiment,
        step="layerwise",
        model=dataclasses.replace(experiment.model, scan_layers=False),
    )
    original = layerwise.LayerwiseStep.backward

    def tear(self, state, tape, batch, diagnose, *, reject=False):
        if int(state.step) + 1 == 5 and not reject:
            raise layerwise.TornStep(5)
        return original(self, state, tape, batch, diagnose, reject=reject)

    with monkeypatch.context() as patch:
        patch.setattr(layerwise.LayerwiseStep, "backward", tear)
        result, text = train(config, tmp_path / "torn", capsys)
    assert result == loop.Result("finished", 8)
    assert "resumed at step 3" in text
    assert text.count("from the newest checkpoint again") == 1
    rows = rows_of(tmp_path / "torn")
    assert list(rows) == [1, 2, 4, 6, 8]
    assert (rows[4]["skipped_steps"], rows[8]["skipped_steps"]) == (0, 1)
    # As if the loss had shown it before the first update.
    spoil(5)
    train(config, tmp_path / "known", capsys)
    torn, known = (state_of(config, tmp_path / name) for name in ("torn", "known"))
    assert_equal((torn.params, torn.opt_state), (known.params, known.opt_state))
