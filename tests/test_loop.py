import dataclasses
import errno
import fcntl
import functools
import io
import json
import math
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
import samples

from sct_jax import data, errors, model, rank, sharding
from sct_jax.training import (
    accounting,
    checkpoint,
    hardware,
    loop,
    metrics,
    optimizer_config,
    trainer,
)
from sct_jax.training import config as config_lib
from sct_jax.training import step as step_lib
from sct_jax.training import workdir as workdir_lib

MARK = "<|endoftext|>"
BATCH, LENGTH = 8, 16
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
TRAIN_KEYS = {
    "step",
    "train/loss",
    "train/loss_max",
    "learning_rate",
    "tokens",
    "tokens_per_second",
    "grad_norm",
    "grad_norm_max",
    "skipped_steps",
    "skipped_in_a_row",
    "spikes",
    "orthonormality_error",
    "composite_update_norm",
}
EVAL_KEYS = {"step", "eval/loss", "eval/perplexity", "eval/bits_per_byte"}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    return config_lib.ExperimentConfig(
        num_steps=8,
        log_every=2,
        model=dataclasses.replace(
            samples.SMALL, vocab_size=300, spectral=("gate", "up", "down")
        ),
        data=data.DataConfig(
            source=samples.write_corpus(root / "corpus"),
            cache_dir=str(root / "cache"),
            batch_size=BATCH,
            seq_len=LENGTH,
            split="documents",
        ),
        optimizer=optimizer_config.Sct(
            peak_learning_rate=0.02,
            schedule="constant",
            warmup_steps=2,
            max_update_norm=0.5,
        ),
        checkpoint=config_lib.CheckpointConfig(every=3, keep=10),
        eval=config_lib.EvalConfig(every=4, num_batches=2),
    )


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Meshes of one device; `test_sharding` and others have eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        yield


def train(config, path, **options):
    """How it ended, and what was printed."""
    output = rich.console.Console(file=io.StringIO(), width=200, color_system=None)
    result = loop.train(config, path, output=output, **options)
    return result.status, output.file.getvalue()


@pytest.fixture(scope="module")
def finished(experiment, tmp_path_factory):
    """A finished run, not to be changed, and what it printed."""
    workdir = tmp_path_factory.mktemp("run") / "workdir"
    status, text = train(experiment, workdir)
    assert status == "finished"
    return workdir, text


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of the finished run."""
    shutil.copytree(finished[0], tmp_path / "workdir")
    return tmp_path / "workdir"


def rows(workdir):
    return metrics.read_rows(workdir / "metrics.jsonl")


def timeless(rows):
    of_time = ("tokens_per_second", "mfu")
    return [{k: v for k, v in r.items() if k not in of_time} for r in rows]


def forget_after(workdir, step):
    for folder in (workdir / "checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > step:
            shutil.rmtree(folder)


def assert_same_params(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def assert_same_run(a, b):
    assert_same_params(workdir_lib.load_run(a).params, workdir_lib.load_run(b).params)


def snapshot(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


# --- A run from start to end.


def test_a_run_prints_what_it_is_and_what_came_out(experiment, finished):
    workdir, text = finished
    assert f"{accounting.parameters(experiment.model):,}" in text
    assert "step 8: held-out loss" in text
    assert "sample:" in text
    assert text.rstrip().splitlines()[-1].startswith("finished: 8 steps")
    assert str(workdir) in text


def test_a_warm_up_that_never_ends_is_noted(experiment, tmp_path):
    optimizer = dataclasses.replace(experiment.optimizer, warmup_steps=8)
    config = dataclasses.replace(experiment, optimizer=optimizer)
    note = "note: optimizer.warmup_steps: 8 of 8 steps"
    assert note in train(config, tmp_path, dry_run=True)[1]
    assert "warmup_steps" not in train(experiment, tmp_path, dry_run=True)[1]


def test_fields_without_effect_are_told(experiment, tmp_path):
    config = dataclasses.replace(
        experiment,
        optimizer=dataclasses.replace(experiment.optimizer, decay_ratio=0.9),
        adaptive_rank=rank.AdaptiveRankConfig(every=5),
    )
    _, text = train(config, tmp_path, dry_run=True)
    assert (
        'optimizer.decay_ratio: has no effect without optimizer.schedule = "wsd"'
        in text
    )
    assert "adaptive_rank.every: has no effect without adaptive_rank.energy" in text
    decaying = dataclasses.replace(config.optimizer, schedule="wsd")
    in_use = dataclasses.replace(
        config,
        optimizer=decaying,
        adaptive_rank=dataclasses.replace(config.adaptive_rank, energy=0.9),
    )
    assert in_use.unused_fields() == []
    divided = dataclasses.replace(
        in_use, data=dataclasses.replace(in_use.data, split="files")
    )
    (note,) = divided.unused_fields()
    assert note.startswith("data.split: ")
    constant = dataclasses.replace(experiment.optimizer, final_rate_ratio=0.5)
    (note,) = constant.unused_fields()
    assert note.startswith("optimizer.final_rate_ratio")
    turned = optimizer_config.StiefelMuon(max_rotation=0.5)
    (note,) = turned.unused_fields()
    assert (
        'optimizer.max_rotation: has no effect without optimizer.coordinates = "svd"'
        in note
    )
    assert not dataclasses.replace(turned, coordinates="svd").unused_fields()


def test_logged_rows(experiment, finished):
    logged = [r for r in rows(finished[0]) if "train/loss" in r]
    assert [r["step"] for r in logged] == [1, 2, 4, 6, 8]
    for r in logged:
        assert set(r) == TRAIN_KEYS
        assert r["tokens"] == r["step"] * BATCH * LENGTH
        assert 0 < r["tokens_per_second"] < math.inf
        assert 0 < r["grad_norm"] < math.inf
        # The rate of the update that the row is of: half the peak, then the peak.
        assert r["learning_rate"] == pytest.approx(0.01 if r["step"] == 1 else 0.02)
        assert 0 < r["orthonormality_error"] < 1e-5
        assert 0 < r["composite_update_norm"] <= 0.505
    # A fresh model knows nothing: about log(300) nats.
    assert 4.5 < logged[0]["train/loss"] < 7
    assert logged[-1]["train/loss"] < logged[0]["train/loss"]


def test_evaluation_rows(experiment, finished):
    workdir = finished[0]
    evaluated = [r for r in rows(workdir) if "eval/loss" in r]
    assert [r["step"] for r in evaluated] == [4, 8]
    assert all(set(r) == EVAL_KEYS for r in evaluated)
    config, params, tokenizer = workdir_lib.load_run(workdir)
    corpus = data.prepare(config.data, vocab_size=300, log=lambda line: None)
    batches = data.eval_batches(corpus, config.data, num_batches=2)
    step = jax.jit(step_lib.make_eval_step(config.model))
    losses = [step(params, jax.tree.map(jnp.asarray, batch)) for batch in batches]
    last = evaluated[-1]
    assert last["eval/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert last["eval/perplexity"] == pytest.approx(math.exp(last["eval/loss"]))
    # Bytes of the text that was predicted; a document mark is none.
    targets = [ids for batch in batches for ids in batch["targets"]]
    text = "".join(tokenizer.decode(ids) for ids in targets).replace(MARK, "")
    nats = last["eval/loss"] * sum(ids.size for ids in targets)
    bits = nats / math.log(2) / len(text)
    assert last["eval/bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def spoilt(step, change):
    """`Trainer.step` with the results of one step changed."""
    original = trainer.Trainer.step

    def wrapped(self, state, batch, **kwargs):
        state, values = original(self, state, batch, **kwargs)
        return change(state, values) if int(state.step) == step else (state, values)

    return wrapped


def applying_every_step(experiment):
    optimizer = dataclasses.replace(experiment.optimizer, skip_nonfinite=None)
    return dataclasses.replace(experiment, optimizer=optimizer)


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(
    experiment, tmp_path, monkeypatch
):
    experiment = applying_every_step(experiment)
    with monkeypatch.context() as patch:
        lose = lambda state, values: (state, values | {"loss": values["loss"] * np.nan})
        patch.setattr(trainer.Trainer, "step", spoilt(2, lose))
        status, text = train(experiment, tmp_path)
    assert status == "diverged"
    assert "diverged: the loss of step 2 is nan; nothing is saved" in text
    assert text.count("diverged:") == 1
    assert "finished" not in text and "sample" not in text
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))
    # Nothing was trained, so the same folder may be used with another rate.
    other = dataclasses.replace(experiment, seed=3, num_steps=2)
    assert train(other, tmp_path)[0] == "finished"


def test_a_loss_that_is_not_logged_is_checked_before_a_save(
    experiment, tmp_path, monkeypatch
):
    def spoil(state, values):
        lost = {"loss": values["loss"] * np.nan}
        params = jax.tree.map(lambda p: p * np.nan, state.params)
        return state.replace(params=params), values | lost

    monkeypatch.setattr(trainer.Trainer, "step", spoilt(3, spoil))
    config = dataclasses.replace(applying_every_step(experiment), log_every=100)
    status, text = train(config, tmp_path)
    assert status == "diverged"
    assert text.count("diverged:") == 1
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_parameters_that_are_not_finite_are_not_saved(
    experiment, tmp_path, monkeypatch
):
    def blow_up(state, values):  # the loss is of the step before, and finite
        norm = state.params["final_norm"] * np.inf
        return state.replace(params=state.params | {"final_norm": norm}), values

    monkeypatch.setattr(trainer.Trainer, "step", spoilt(6, blow_up))
    status, text = train(experiment, tmp_path)
    assert status == "diverged"
    assert "diverged: the largest parameter of step 6 is inf" in text
    assert "the checkpoint of step 3 is kept" in text
    kept = {p.name for p in (tmp_path / "checkpoints").glob("[0-9]*")}
    assert kept == {"3"}


def test_files_of_a_run(experiment, finished):
    workdir = finished[0]
    written = json.loads((workdir / "config.json").read_text())
    assert config_lib.from_dict(written) == experiment
    summary = json.loads((workdir / "summary.json").read_text())
    tx = experiment.optimizer.build(experiment.num_steps)
    counted = accounting.summary(experiment.model, tx, seq_len=LENGTH)
    assert summary | {"bytes": 0} == counted | {"bytes": 0}
    activations = accounting.activation_bytes(
        dataclasses.replace(experiment.model, remat="dots"),  # "auto" on CPU
        tx,
        rows=experiment.data.batch_size,
        seq_len=LENGTH,
        num_microbatches=experiment.data.num_microbatches,
    )
    total = counted["bytes"]["total"] + activations
    expected = counted["bytes"] | {"activations": activations, "total": total}
    assert summary["bytes"] == expected
    kept = {p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {"3", "6", "8"}
    assert {path.name for path in workdir.iterdir()} <= {
        ".lock",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "tensorboard",
        "tokenizer.json",
    }


def test_a_run_can_be_loaded(experiment, finished):
    config, params, tokenizer = workdir_lib.load_run(finished[0])
    assert config == experiment
    assert tokenizer.decode(tokenizer.encode("katomi renlu")) == "katomi renlu"
    ids = jnp.array([tokenizer.encode("katomi renlu")], jnp.int32)
    logits = model.forward(params, ids, config.model)
    assert logits.shape == (1, ids.shape[1], 300)
    assert np.isfinite(logits).all()
    assert {x.sharding.num_devices for x in jax.tree.leaves(params)} == {1}


def test_loading_a_run_changes_nothing_in_its_folder(workdir):
    # A notebook looks on while another process trains, and saves.
    half = workdir / "checkpoints" / "9.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "x").write_text("being written")
    before = snapshot(workdir)
    workdir_lib.load_run(workdir)
    assert snapshot(workdir) == before


def test_there_is_no_run_to_load(tmp_path, workdir):
    with pytest.raises(errors.UserError, match=r"^workdir: .*config\.json"):
        workdir_lib.load_run(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(errors.UserError, match=r"^workdir: .*no checkpoint"):
        workdir_lib.load_run(workdir)


# --- The same command again.


def test_a_finished_run_says_so(experiment, workdir):
    before = snapshot(workdir)
    status, text = train(experiment, workdir)
    assert status == "finished"
    assert "finished: 8 steps are done" in text
    assert snapshot(workdir) == before


def test_a_resumed_run_equals_an_uninterrupted_one(experiment, finished, workdir):
    forget_after(workdir, 3)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "train/lo')  # as a kill leaves it
    status, text = train(experiment, workdir)
    assert status == "finished"
    assert "resumed at step 3" in text
    assert timeless(rows(workdir)) == timeless(rows(finished[0]))
    assert_same_params(
        workdir_lib.load_run(workdir).params, workdir_lib.load_run(finished[0]).params
    )


def test_a_layerwise_run_resumes_and_is_the_ordinary_one(experiment, tmp_path):
    config = dataclasses.replace(
        experiment,
        step="layerwise",
        model=dataclasses.replace(
            experiment.model, scan_layers=False, spectral=("down",)
        ),
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(config, whole)[0] == "finished"
    shutil.copytree(whole, parts)
    forget_after(parts, 3)
    assert train(config, parts)[0] == "finished"
    assert timeless(rows(parts)) == timeless(rows(whole))
    assert_same_params(
        workdir_lib.load_run(parts).params, workdir_lib.load_run(whole).params
    )
    ordinary = dataclasses.replace(config, step="fused")
    assert train(ordinary, tmp_path / "ordinary")[0] == "finished"
    found, wanted = rows(whole), rows(tmp_path / "ordinary")
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        if "train/loss" in row:
            assert row["train/loss"] == pytest.approx(other["train/loss"], rel=1e-3)


def test_a_run_can_be_made_longer_and_logged_otherwise(experiment, finished, workdir):
    longer = dataclasses.replace(experiment, num_steps=11, log_every=1)
    status, text = train(longer, workdir)
    assert status == "finished"
    assert "resumed at step 8" in text
    assert "the learning rate at this step" not in text  # it is constant
    before, after = rows(finished[0]), rows(workdir)
    assert after[: len(before)] == before
    new = [(r["step"], "eval/loss" in r) for r in after[len(before) :]]
    assert new == [(9, False), (10, False), (11, False), (11, True)]
    assert workdir_lib.load_run(workdir)[0] == longer
    # It is finished with 11 steps, and with the 8 of the first command too.
    for config in (longer, experiment):
        before = snapshot(workdir)
        status, text = train(config, workdir)
        assert status == "finished"
        assert "finished" in text
        assert "compiled" not in text
        assert snapshot(workdir) == before


def test_a_run_goes_on_in_another_layout(experiment, finished, workdir):
    """On more devices, in smaller parts, with separate layers: the same to rounding."""
    forget_after(workdir, 6)
    moved = dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, scan_layers=False, remat="full"),
        data=dataclasses.replace(experiment.data, num_microbatches=2),
        mesh=sharding.MeshConfig(fsdp=2),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 2)
        status, text = train(moved, workdir)
    assert status == "finished"
    assert "resumed at step 6" in text
    found, wanted = rows(workdir), rows(finished[0])
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        for name in row.keys() & {"train/loss", "eval/loss"}:
            assert row[name] == pytest.approx(other[name], rel=1e-3)
    # It can be read, and goes on, as it was configured first.
    assert workdir_lib.load_run(workdir)[0] == moved
    assert train(dataclasses.replace(experiment, num_steps=9), workdir)[0] == "finished"


def test_a_longer_run_prints_the_change_in_learning_rate(experiment):
    decaying = dataclasses.replace(
        experiment.optimizer, schedule="cosine", final_rate_ratio=0.0
    )
    short = dataclasses.replace(experiment, num_steps=3, optimizer=decaying)
    run = trainer.Trainer(
        dataclasses.replace(short, num_steps=4), sharding.MeshConfig().build(1)
    )
    record = {"config": config_lib.to_dict(short), "step": 3}

    class Saved(checkpoint.Checkpointer):
        def __init__(self):
            pass

        def restore(self, abstract_at, mesh, **options):
            zeros = lambda x: np.zeros(x.shape, x.dtype)
            guard = jax.tree.map(zeros, run.abstract_state.guard)
            return run.abstract_state.replace(guard=guard), record

    lines = []
    _, step = workdir_lib.restore_or_init(
        run.config, lambda _: run, Saved(), {}, log=lines.append
    )
    assert step == 3
    # Of the one step of decay nothing is left; of two, a half.
    assert "num_steps changed from 3 to 4" in lines[1]
    assert "changes from 0.00e+00 to 1.00e-02" in lines[2]


@pytest.mark.parametrize(("damaged", "older"), [(6, 3), (8, 6)], ids=["", "the last"])
def test_a_damaged_checkpoint_is_reported_and_trained_again(
    experiment, finished, workdir, damaged, older
):
    forget_after(workdir, damaged)
    folder = workdir / "checkpoints" / str(damaged)
    largest = max(
        (path for path in folder.rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    raw = bytearray(largest.read_bytes())
    raw[len(raw) // 2] ^= 1
    largest.write_bytes(raw)
    status, text = train(experiment, workdir)
    assert status == "finished"
    assert f"warning: checkpoint {damaged} is damaged" in text
    assert f"resumed at step {older}" in text
    assert timeless(rows(workdir)) == timeless(rows(finished[0]))


def test_an_empty_last_checkpoint_does_not_finish_a_run(experiment, finished, workdir):
    forget_after(workdir, 6)
    (workdir / "checkpoints" / "8").mkdir()
    status, text = train(experiment, workdir)
    assert status == "finished"
    assert "resumed at step 6" in text
    assert_same_params(
        workdir_lib.load_run(workdir).params, workdir_lib.load_run(finished[0]).params
    )


# --- What is refused, before anything is compiled.


def refusal(config, workdir, **options) -> str:
    with pytest.raises(errors.UserError) as caught:
        train(config, workdir, **options)
    return str(caught.value)


def test_another_configuration_is_refused_with_each_difference(experiment, workdir):
    other = dataclasses.replace(
        experiment,
        seed=5,
        num_steps=7,
        log_every=1,
        model=dataclasses.replace(experiment.model, rank=3),
    )
    message = refusal(other, workdir)
    assert message.startswith("workdir: ")
    for difference in ("seed: 0 in", "model.rank: 4 in", "num_steps: 8 in"):
        assert difference in message
    assert "log_every" not in message


def test_a_refused_workdir_stays_as_it_was(experiment, workdir):
    before = snapshot(workdir)
    other = dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, rank=3)
    )
    refusal(other, workdir)
    assert snapshot(workdir) == before


def test_a_second_trainer_is_refused(experiment, workdir):
    before = snapshot(workdir)
    with (workdir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = refusal(experiment, workdir)
    assert message.startswith("workdir: another process")
    assert snapshot(workdir) == before
    # The lock dies with its holder.
    assert train(experiment, workdir)[0] == "finished"


def test_a_folder_without_locks_is_trained_in_with_a_warning(
    experiment, workdir, monkeypatch
):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="cannot be locked"):
        assert train(experiment, workdir)[0] == "finished"


def test_another_tokenizer_is_refused(experiment, workdir, monkeypatch):
    forget_after(workdir, 3)
    kept = (workdir / "tokenizer.json").read_bytes()
    monkeypatch.setattr(data.Tokenizer, "hash", "0" * 64)
    assert "tokenizer with hash" in refusal(experiment, workdir)
    assert (workdir / "tokenizer.json").read_bytes() == kept


def test_another_corpus_is_refused(experiment, workdir, monkeypatch):
    forget_after(workdir, 3)
    prepare = data.prepare

    def prepare_other_text(*args, **kwargs):
        # The same name now holds other text.
        return dataclasses.replace(prepare(*args, **kwargs), hash="0" * 64)

    monkeypatch.setattr(data, "prepare", prepare_other_text)
    assert refusal(experiment, workdir).startswith("data")


def test_checkpoints_without_their_config_are_not_trained_on_with_another(
    experiment, workdir
):
    forget_after(workdir, 6)
    (workdir / "config.json").unlink()
    other = dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, rank=3)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refusal(other, workdir)
    # The right one still goes on from where the run was.
    _, text = train(experiment, workdir)
    assert "resumed at step 6" in text


PEAK = 1e9  # FLOP/s


@pytest.fixture(scope="module", params=["stacked", slow("separate")])
def adaptive(request, experiment, tmp_path_factory):
    """A finished run whose ranks changed, its configuration, and what it printed."""
    config = dataclasses.replace(
        experiment,
        model=dataclasses.replace(
            experiment.model, rank=8, scan_layers=request.param == "stacked"
        ),
        optimizer=experiment.optimizer.to(optimizer_config.Tsvd),
        # On this text, one of the two decisions changes no shape.
        data=dataclasses.replace(experiment.data, split="paths"),
        adaptive_rank=rank.AdaptiveRankConfig(
            energy=0.6, every=3, warmup_steps=2, floor=2, multiple=2
        ),
        checkpoint=config_lib.CheckpointConfig(every=2, keep=10),
    )
    config.validate()
    workdir = tmp_path_factory.mktemp("adaptive") / "workdir"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "peak_flops", lambda devices: PEAK)
        status, text = train(config, workdir)
    assert status == "finished"
    return config, workdir, text


def test_ranks_change_during_a_run_and_every_change_is_logged(adaptive):
    config, workdir, text = adaptive
    changes = [row for row in rows(workdir) if any("rank/" in key for key in row)]
    assert [row["step"] for row in changes] == [3, 6]
    params = workdir_lib.load_run(workdir).params
    stored = rank.stored_ranks(params)
    assert len(stored) == (3 if config.model.scan_layers else 6)
    for name, value in stored.items():
        assert changes[-1][f"rank/{name}"] == value
        assert 2 <= changes[-1][f"active_rank/{name}"] <= value <= 8
    assert min(stored.values()) < 8
    assert "step 3: stored ranks layers/" in text
    # A change of what is in use alone compiles nothing.
    reshaped = sum("->" in line for line in text.splitlines() if "ranks" in line)
    assert text.count("compiled in") == 1 + reshaped
    # Of six matrices apart one or another may be reshaped at each of the two.
    assert reshaped < 2 or not config.model.scan_layers
    errors = [row["orthonormality_error"] for row in rows(workdir) if "tokens" in row]
    assert max(errors) < 1e-5


def test_the_utilisation_is_that_of_the_present_ranks(adaptive):
    config, workdir, _ = adaptive
    flops = lambda model: accounting.flops_per_token(model, seq_len=config.data.seq_len)
    stored = rank.stored_ranks(workdir_lib.load_run(workdir).params)
    now = accounting.at_ranks(config.model, stored)
    assert flops(now) < flops(config.model)
    found = {row["step"]: row for row in rows(workdir) if "mfu" in row}
    for step, shape in ((1, config.model), (config.num_steps, now)):
        row = found[step]
        assert row["mfu"] * PEAK == pytest.approx(
            row["tokens_per_second"] * flops(shape)
        )


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_resumes_over_a_change_of_rank(adaptive, tmp_path, step):
    """From before both changes, and from between them."""
    config, finished, _ = adaptive
    workdir = tmp_path / "workdir"
    shutil.copytree(finished, workdir)
    forget_after(workdir, step)
    status, text = train(config, workdir)
    assert status == "finished"
    assert f"resumed at step {step}" in text
    assert timeless(rows(workdir)) == timeless(rows(finished))
    assert_same_params(
        workdir_lib.load_run(workdir).params, workdir_lib.load_run(finished).params
    )


@pytest.mark.parametrize(
    ("optimizer", "factors"),
    [
        slow(
            {"name": "stiefel_muon", "coordinates": "svd", "retraction": "svd"},
            "spectral",
        ),
        ({"name": "spectron", "nesterov": True}, "low_rank"),
        ({"name": "muon"}, None),
        slow({"name": "adamw"}, "low_rank"),
        slow({"name": "tsvd", "retraction_tolerance": 1e-3}, "spectral"),
        slow({"transport_moments": True, "tangent_projection": "gradient"}, "spectral"),
    ],
    ids=str,
)
def test_every_chain_trains_saves_and_resumes(experiment, tmp_path, optimizer, factors):
    start = dataclasses.replace(experiment.optimizer, max_update_norm=None)
    fields = dict(optimizer)
    kind = optimizer_config.CHAINS[fields.pop("name", "sct")]
    config = dataclasses.replace(
        experiment,
        num_steps=4,
        model=dataclasses.replace(
            experiment.model,
            factors=factors or "spectral",
            spectral=experiment.model.spectral if factors else (),
        ),
        optimizer=start.to(kind, **fields),
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(config, whole)[0] == "finished"
    shutil.copytree(whole, parts)
    forget_after(parts, 3)
    assert train(config, parts)[0] == "finished"
    assert timeless(rows(parts)) == timeless(rows(whole))
    assert_same_params(
        workdir_lib.load_run(parts).params, workdir_lib.load_run(whole).params
    )


@pytest.mark.parametrize("content", ["", "{", "[]", '{"num_steps": 8'])
def test_a_damaged_config_json_is_refused(experiment, workdir, content):
    (workdir / "config.json").write_text(content)
    assert "config.json" in refusal(experiment, workdir)


def test_a_typo_in_the_source_does_not_claim_the_workdir(experiment, tmp_path):
    wrong = dataclasses.replace(
        experiment,
        data=dataclasses.replace(experiment.data, source=str(tmp_path / "typo/*.txt")),
    )
    assert refusal(wrong, tmp_path / "run").startswith("data.source: ")
    # The corrected command is the first that this folder is of; a dry run asks least.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_train", lambda *_, **__: loop.Result("finished"))
        status, _ = train(experiment, tmp_path / "run")
    assert status == "finished"


@pytest.mark.parametrize(
    ("group", "changes", "field"),
    [
        ("data", {"batch_size": 12, "num_microbatches": 5}, "data.num_microbatches"),
        ("data", {"source": "nowhere/*.txt"}, "data.source"),
        ("mesh", {"data": 3}, "mesh"),
        ("mesh", {"fsdp": 2}, "mesh"),
        ("model", {"vocab_size": 200}, "model.vocab_size"),
        ("data", {"batch_size": 100_000}, "data.batch_size"),
        ("eval", {"every": 0}, "eval.every"),
    ],
    ids=str,
)
def test_bad_input_names_the_field(experiment, tmp_path, group, changes, field):
    part = dataclasses.replace(getattr(experiment, group), **changes)
    config = dataclasses.replace(experiment, **{group: part})
    assert refusal(config, tmp_path / "run").startswith(f"{field}: ")


def test_a_batch_that_the_mesh_does_not_divide_is_refused(experiment, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 8)
        config = dataclasses.replace(
            experiment, data=dataclasses.replace(experiment.data, num_microbatches=2)
        )
        assert refusal(config, tmp_path / "run").startswith("data.batch_size: ")


def test_a_workdir_that_cannot_be_written_is_refused(experiment, tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        assert refusal(experiment, workdir).startswith("workdir: ")


# --- Profile, utilisation.


def test_a_profile_is_written_and_changes_no_result(experiment, finished, tmp_path):
    path = tmp_path / "run"
    status, text = train(experiment, path, profile=(2, 3))
    assert status == "finished"
    assert f"profile: steps 2 to 3 are in {path / 'profile'}" in text
    assert len(list((path / "profile").rglob("*.xplane.pb"))) == 1
    assert_same_run(path, finished[0])
    assert not (finished[0] / "profile").exists()


def test_a_run_that_diverges_ends_its_trace(experiment, tmp_path, monkeypatch):
    lose = lambda state, values: (state, values | {"loss": values["loss"] * np.nan})
    monkeypatch.setattr(trainer.Trainer, "step", spoilt(2, lose))
    config = applying_every_step(experiment)
    status, text = train(config, tmp_path, profile=(2, 8))
    assert status == "diverged"
    assert "profile: steps 2 to 3 are in " in text
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


def test_a_range_without_a_step_is_refused(experiment, tmp_path):
    with pytest.raises(errors.UserError, match=r"^--profile: 9:12 .* num_steps = 8"):
        train(experiment, tmp_path / "run", profile=(9, 12))
    assert not (tmp_path / "run").exists()


def test_rows_have_the_utilisation_of_known_devices(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "peak_flops", lambda devices: len(list(devices)) * 7)
    _, text = train(experiment, tmp_path)
    assert "  MFU " in text
    flops = accounting.flops_per_token(experiment.model, seq_len=LENGTH)
    logged = [row for row in rows(tmp_path) if "train/loss" in row]
    assert logged
    for row in logged:
        expected = row["tokens_per_second"] * flops / 7
        assert row["mfu"] == pytest.approx(expected, rel=1e-12)


# --- Dry run, generation.


def test_a_dry_run_compiles_without_parameters(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.Trainer, "init", lambda *_: pytest.fail("allocates"))
    status, text = train(experiment, tmp_path, dry_run=True, compile_step=True)
    assert status == "dry_run"
    assert "compiled in " in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    sizes = summary["compiled"]
    assert sizes.keys() == {
        "argument_bytes",
        "output_bytes",
        "temporary_bytes",
        "total_bytes",
    }
    # Parameters, optimizer state, three arrays of tokens, and counters.
    state = summary["bytes"]["parameters"] + summary["bytes"]["optimizer"]
    assert 0 <= sizes["argument_bytes"] - state - 3 * 4 * BATCH * LENGTH < 1000
    assert 0 <= sizes["output_bytes"] < 1000  # the state is donated
    assert sizes["temporary_bytes"] > summary["bytes"]["gradients"]
    for size in sizes.values():
        assert f"{size:,} (" in text
    counted = summary["bytes"]["gradients"] + summary["bytes"]["activations"]
    assert f"{counted:,} (" in text.split("bytes per device")[1]


def test_a_dry_run_compiles_only_on_request(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.Trainer, "compile", lambda *_: pytest.fail("compiles"))
    train(experiment, tmp_path, dry_run=True)
    assert "compiled" not in json.loads((tmp_path / "summary.json").read_text())
    with pytest.raises(ValueError, match="dry_run"):
        train(experiment, tmp_path, compile_step=True)


def test_a_backend_without_figures_is_noted(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda self: None)
    _, text = train(experiment, tmp_path, dry_run=True, compile_step=True)
    assert "note: this backend does not tell" in text
    assert "compiled" not in json.loads((tmp_path / "summary.json").read_text())


def test_the_layerwise_step_is_no_program_to_compile(experiment, tmp_path):
    config = dataclasses.replace(
        experiment,
        step="layerwise",
        model=dataclasses.replace(experiment.model, scan_layers=False),
        optimizer=dataclasses.replace(experiment.optimizer, grad_clip=None),
    )
    status, text = train(config, tmp_path, dry_run=True, compile_step=True)
    assert status == "dry_run"
    assert "is compiled in parts" in " ".join(text.split())
    assert "compiled" not in json.loads((tmp_path / "summary.json").read_text())


def test_a_dry_run_needs_no_corpus_and_writes_the_summary(experiment, tmp_path):
    config = dataclasses.replace(
        experiment, data=dataclasses.replace(experiment.data, source="nowhere/*")
    )
    status, text = train(config, tmp_path / "run", dry_run=True)
    assert status == "dry_run"
    parameters = accounting.parameters(config.model)
    assert f"{parameters:,}" in text
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["summary.json"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["parameters"] == parameters


def test_a_dry_run_leaves_the_summary_of_another_run(experiment, workdir):
    before = (workdir / "summary.json").read_text()
    other = dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, rank=2)
    )
    status, text = train(other, workdir, dry_run=True)
    assert status == "dry_run"
    assert "holds another run" in text
    assert (workdir / "summary.json").read_text() == before
    (workdir / "summary.json").unlink()
    assert "another run" not in train(experiment, workdir, dry_run=True)[1]
    assert (workdir / "summary.json").read_text() == before


def test_a_run_keeps_its_split_without_its_config(experiment, finished, tmp_path):
    """The checkpoint knows what config.json said."""
    either = dataclasses.replace(
        experiment, data=dataclasses.replace(experiment.data, split=None)
    )
    stdlib = dataclasses.replace(
        either, data=dataclasses.replace(either.data, source="stdlib")
    )
    assert workdir_lib.resolve(stdlib, tmp_path).data.split == "pieces"
    assert workdir_lib.resolve(either, tmp_path).data.split == "documents"
    path = tmp_path / "run"
    shutil.copytree(finished[0], path)
    (path / "config.json").unlink()
    earlier = workdir_lib.committed_config(path)
    assert earlier == experiment
    assert workdir_lib.resolve(either, path) == experiment
    assert workdir_lib.resolve(stdlib, path).data.split == "pieces"
    too_long = tmp_path / ("x" * 300)
    assert workdir_lib.resolve(stdlib, too_long).data.split == "pieces"


def test_a_run_that_began_when_names_divided_the_text_goes_on(experiment, tmp_path):
    """It names no kind of split, and resumes on the same text without one."""
    by_path, either = (
        dataclasses.replace(
            experiment, data=dataclasses.replace(experiment.data, split=split)
        )
        for split in ("paths", None)
    )
    status, _ = train(by_path, tmp_path)
    assert status == "finished"
    forget_after(tmp_path, 3)
    earlier = config_lib.to_dict(by_path)
    del earlier["data"]["split"]
    (tmp_path / "config.json").write_text(json.dumps(earlier))
    status, text = train(either, tmp_path)
    assert status == "finished"
    assert "resumed at step 3" in text
    assert workdir_lib.load_run(tmp_path).config.data.split == "paths"
    # A new run takes other text.
    hashes = {
        data.prepare(config.data, vocab_size=300, log=str).hash
        for config in (by_path, either)
    }
    assert len(hashes) == 2


def test_a_workdir_of_any_name_is_printed_as_it_is(experiment, finished, tmp_path):
    workdir = tmp_path / "[run] a[/b]"
    shutil.copytree(finished[0], workdir)
    status, text = train(experiment, workdir)
    assert status == "finished"
    assert str(workdir) in text
