"""Signals in every phase of a run, other text, changes on request: in one process."""

import dataclasses
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import rich.console
import samples

from sct_jax import data, errors, files
from sct_jax.training import (
    checkpoint,
    hardware,
    loop,
    metrics,
    optimizer_config,
    sample,
    trainer,
    watchdog,
)
from sct_jax.training import config as config_lib
from sct_jax.training import workdir as workdir_lib

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


@pytest.fixture(scope="module", autouse=True)
def small_and_quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        patch.setattr(sample, "sample_document", lambda *_, **__: "a sample")
        yield


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    return config_lib.ExperimentConfig(
        num_steps=6,
        log_every=1,
        model=samples.SHAPE,
        data=data.DataConfig(
            source=samples.write_corpus(root / "corpus"),
            cache_dir=str(root / "cache"),
            batch_size=4,
            seq_len=16,
        ),
        optimizer=optimizer_config.Sct(peak_learning_rate=0.02, warmup_steps=2),
        checkpoint=config_lib.CheckpointConfig(every=4, keep=10),
        eval=config_lib.EvalConfig(every=3, num_batches=1),
    )


def train(config, path, **options):
    output = rich.console.Console(file=io.StringIO(), width=200, color_system=None)
    result = loop.train(config, path, output=output, **options)
    return result, output.file.getvalue()


@pytest.fixture(scope="module")
def finished(experiment, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "workdir"
    assert train(experiment, path)[0] == loop.Result("finished", 6)
    return path


@pytest.fixture
def workdir(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "workdir")
    return tmp_path / "workdir"


def half(workdir):
    """The run as it was after step 4."""
    shutil.rmtree(workdir / "checkpoints" / "6")
    return workdir


def saved(workdir):
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    assert all(name.isdigit() for name in names)
    return {int(name) for name in names}


def rows(workdir):
    return [
        {k: v for k, v in row.items() if k != "tokens_per_second"}
        for row in metrics.read_rows(workdir / "metrics.jsonl")
    ]


def assert_same_run(a, b):
    assert rows(a) == rows(b)
    params = [jax.tree.leaves(workdir_lib.load_run(path).params) for path in (a, b)]
    for x, y in zip(*params, strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# --- Signals.


def signalling(owner, name, number, *, on_call=1):
    """A patch of a function: a signal comes before one of its calls does its work."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        if len(calls) == on_call:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    return owner, name, wrapped


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (files, "lock"),
        (data, "prepare"),
        (workdir_lib, "restore_or_init"),
        (metrics, "open_sinks"),
        (trainer.Trainer, "compile"),
    ],
    ids=["claim", "corpus", "state", "files", "compile"],
)
def test_a_signal_before_the_first_step_saves_nothing(
    experiment, finished, tmp_path, monkeypatch, owner, name, number
):
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(*signalling(owner, name, number))
        result, text = train(experiment, path)
    assert result == loop.Result("interrupted", 0, number)
    assert text.splitlines()[-1].endswith("nothing to save")
    assert not saved(path)


def test_the_same_command_starts_after_such_a_signal(
    experiment, finished, tmp_path, monkeypatch
):
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(*signalling(trainer.Trainer, "compile", signal.SIGTERM))
        train(experiment, path)
    assert train(experiment, path)[0].status == "finished"
    assert_same_run(path, finished)


@pytest.mark.parametrize(
    ("owner", "name", "on_call", "step"),
    [
        (trainer.Trainer, "step", 1, 1),
        slow(trainer.Trainer, "step", 2, 2),
        slow(trainer.Trainer, "evaluate", 1, 4),  # of step 3
        (checkpoint.Checkpointer, "save", 1, 5),  # of step 4
        slow(trainer.Trainer, "step", 6, 6),
        (trainer.Trainer, "evaluate", 2, 6),
        slow(checkpoint.Checkpointer, "save", 2, 6),
        slow(sample, "sample_document", 1, 6),
    ],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_a_signal_saves_once_and_loses_no_step(
    experiment, finished, tmp_path, monkeypatch, owner, name, on_call, step
):
    path, number = tmp_path / "run", signal.SIGHUP
    with monkeypatch.context() as patch:
        patch.setattr(*signalling(owner, name, number, on_call=on_call))
        result, text = train(experiment, path)
    assert result == loop.Result("interrupted", step, number)
    assert "saved" in text.splitlines()[-1]
    assert saved(path) == {step} | ({4} if step >= 4 else set())
    assert max(row["step"] for row in rows(path)) == step
    result, text = train(experiment, path)
    assert result == loop.Result("finished", 6)
    assert ("resumed at step" in text) == (step < 6)
    assert_same_run(path, finished)


def test_a_signal_ends_a_trace(experiment, tmp_path):
    path, number = tmp_path / "run", signal.SIGTERM
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*signalling(trainer.Trainer, "step", number, on_call=3))
        result, text = train(experiment, path, profile=(2, 6))
    assert result == loop.Result("interrupted", 3, number)
    assert f"profile: steps 2 to 3 are in {path / 'profile'}" in text
    assert len(list(path.glob("profile/**/*.xplane.pb"))) == 1
    result, text = train(experiment, path, profile=(2, 3))
    assert result.status == "finished" and "--profile=2:3 traces nothing" in text
    assert "profile: steps" not in text
    assert "--profile=2:3 traces nothing" in train(experiment, path, profile=(2, 3))[1]


def test_a_library_that_makes_an_error_of_a_signal(experiment, tmp_path, monkeypatch):
    def prepare(*args, **kwargs):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise RuntimeError("a worker failed") from error

    monkeypatch.setattr(data, "prepare", prepare)
    result, _ = train(experiment, tmp_path / "run")
    assert result == loop.Result("interrupted", 0, signal.SIGTERM)


# --- A run that hangs.

HANGING = """
import sys, threading
from experiments import pretrain
from sct_jax.training import process, trainer
step = trainer.Trainer.step
def hang(self, state, batch, **options):
    if int(state.step) == 2: threading.Event().wait()
    return step(self, state, batch, **options)
trainer.Trainer.step = hang
process.run(pretrain.main)
"""


@pytest.mark.slow
def test_a_step_that_hangs_ends_the_process(experiment, tmp_path):
    config = json.dumps(config_lib.to_dict(experiment))
    (tmp_path / "mine.py").write_text(
        "import json\nfrom sct_jax.training import config\n"
        f"def get_config(): return config.from_dict(json.loads({config!r}))"
    )
    ended = subprocess.run(
        [
            *(sys.executable, "-c", HANGING, f"--config={tmp_path / 'mine.py'}"),
            *(f"--workdir={tmp_path / 'run'}", "--stall-timeout=5"),
        ],
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert ended.returncode == 5, ended.stderr
    assert "error: stalled: nothing happened for 5 seconds" in ended.stderr
    (stacks,) = (tmp_path / "run").glob("stacks-*.txt")
    assert "hang" in stacks.read_text()
    assert "PATH" not in stacks.read_text()


def test_every_step_evaluation_and_save_is_progress(experiment, workdir, monkeypatch):
    kicks = []

    class Watch(watchdog.Watchdog):
        def kick(self):
            kicks.append(None)

    monkeypatch.setattr(watchdog, "Watchdog", Watch)
    train(experiment, half(workdir), stall_timeout=1000.0)
    # The compilations of step and evaluation, steps 5 and 6, an evaluation and a save.
    assert len(kicks) == 6


# --- Text that moved.


@pytest.fixture
def moved(experiment, tmp_path):
    """The configuration with its text at another path."""
    folder = os.path.dirname(experiment.data.source)
    shutil.copytree(folder, tmp_path / "moved")
    source = str(tmp_path / "moved" / "*.txt")
    text = dataclasses.replace(experiment.data, source=source)
    return dataclasses.replace(experiment, data=text)


def test_a_run_resumes_with_its_text_elsewhere(moved, finished, workdir):
    result, text = train(moved, half(workdir))
    assert result.status == "finished" and "resumed at step 4" in text
    assert_same_run(workdir, finished)
    assert load(workdir).config.data.source == moved.data.source


def test_a_finished_run_reads_text_that_moved(moved, finished, workdir, tmp_path):
    before = (workdir / "metrics.jsonl").read_bytes()
    result, text = train(moved, workdir)
    assert result == loop.Result("finished", 6) and "6 steps are done" in text
    assert "compiled" not in text and "sample" not in text
    assert (workdir / "metrics.jsonl").read_bytes() == before
    os.remove(tmp_path / "moved" / "7.txt")
    with pytest.raises(errors.UserError, match=r"^data: .*corpus with hash") as caught:
        train(moved, workdir)
    assert "data.source: " in str(caught.value)
    assert moved.data.source in str(caught.value)


def test_a_finished_run_does_not_claim_a_text_that_is_not_there(
    experiment, workdir, tmp_path
):
    text = dataclasses.replace(experiment.data, source=str(tmp_path / "typo/*.txt"))
    with pytest.raises(errors.UserError, match=r"^data\.source: "):
        train(dataclasses.replace(experiment, data=text), workdir)


# --- Changes on request.


def with_data(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def position(workdir, step):
    with workdir_lib.reading(workdir) as checkpoints:
        return checkpoints.read_record(step)["data_position"]


def test_another_batch_size_on_request(experiment, workdir, monkeypatch):
    larger = with_data(experiment, batch_size=8)
    half(workdir)
    with pytest.raises(errors.UserError, match=r"--allow-change=FIELD"):
        train(larger, workdir)
    taken = []
    batches = data.train_batches

    def record(*args, **kwargs):
        for batch in batches(*args, **kwargs):
            taken.append(batch["inputs"])
            yield batch

    allowed = {"allow_change": ("data.batch_size",)}
    with monkeypatch.context() as patch:
        patch.setattr(data, "train_batches", record)
        patch.setattr(*signalling(trainer.Trainer, "step", signal.SIGTERM))
        result, text = train(larger, workdir, **allowed)
        assert "data.batch_size: 4 before, 8 now" in text
        assert result == loop.Result("interrupted", 5, signal.SIGTERM)
        result, text = train(larger, workdir)  # a save later it is the configuration
    assert result.status == "finished" and "changed" not in text
    corpus = data.prepare(experiment.data, vocab_size=300, log=lambda line: None)
    order = batches(corpus, experiment.data, seed=0)
    windows = np.concatenate([next(order)["inputs"] for _ in range(8)])
    assert (np.concatenate(taken[:2]) == windows[16:32]).all()
    assert [position(workdir, step) for step in (4, 5, 6)] == [16, 24, 32]
    tokens = {row["step"]: row["tokens"] for row in rows(workdir) if "tokens" in row}
    assert [tokens[step] for step in (4, 5, 6)] == [16 * 16, 24 * 16, 32 * 16]
    assert load(workdir).config.data.batch_size == 8
    assert workdir_lib.read_config(workdir).data.batch_size == 8


def test_another_rate_on_request(experiment, workdir):
    slower = dataclasses.replace(
        experiment,
        optimizer=dataclasses.replace(experiment.optimizer, peak_learning_rate=0.001),
    )
    allowed = ("optimizer.peak_learning_rate", "data.seq_len")
    result, text = train(slower, half(workdir), allow_change=allowed)
    assert result.status == "finished"
    assert "the learning rate at this step changes from " in text
    assert rows(workdir)[-1]["step"] == 6


def test_another_shape_is_refused_even_on_request(experiment, workdir):
    wider = dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, rank=3)
    )
    with pytest.raises(errors.UserError, match=r"^--allow-change: model\.rank "):
        train(wider, half(workdir), allow_change=("model.rank",))


# --- What is in the way.


@pytest.mark.parametrize(
    "name",
    [
        *(".lock", "config.json", "metrics.jsonl", "summary.json", "tokenizer.json"),
        *("checkpoints", "profile", "tensorboard"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_has_a_name_of_the_run_is_refused(experiment, tmp_path, name, dry_run):
    path = tmp_path / "run"
    path.mkdir()
    if name in ("checkpoints", "profile", "tensorboard"):
        (path / name).write_text("")
    else:
        (path / name).mkdir()
    with pytest.raises(errors.UserError, match=r"^workdir: ") as caught:
        train(experiment, path, dry_run=dry_run)
    assert f"run/{name} " in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"num_steps": "abc"}',
        b'{"model": []}',
        b'{"num_step": 5}',
        b'{"num_steps": 5.5}',
        b'{"num_steps": 1000000000000000000}',
        b'{"model": {"num_layers": 1000000000000000000}}',
        b'{"optimizer": {"peak_learning_rate": NaN}}',
        b'{"num_steps": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda content: repr(content[:40]),
)
def test_a_config_json_that_is_none_is_named(experiment, workdir, content):
    (workdir / "config.json").write_bytes(content)
    for use in (lambda: train(experiment, workdir), lambda: load(workdir)):
        with pytest.raises(errors.UserError) as caught:
            use()
        assert "config.json" in str(caught.value)


def load(workdir):
    return workdir_lib.load_run(workdir)


@pytest.mark.parametrize("name", ["x" * 300, "nul\0", "x/" * 3000])
def test_a_workdir_that_cannot_be_made_is_refused(experiment, tmp_path, name):
    with pytest.raises(errors.UserError, match=r"^workdir: cannot write to "):
        train(experiment, tmp_path / name, dry_run=True)


def test_a_run_is_loaded_from_home(finished, monkeypatch):
    monkeypatch.setenv("HOME", str(finished.parent))
    assert load(f"~/{finished.name}").config.num_steps == 6


def test_a_state_beyond_the_memory_is_refused_before_it_is_made(
    experiment, tmp_path, monkeypatch
):
    monkeypatch.setattr(hardware, "host_bytes", lambda: 1000)
    monkeypatch.setattr(data, "prepare", lambda *_, **__: pytest.fail("read the text"))
    with pytest.raises(errors.UserError, match=r"^model: .* which has 1 KB; "):
        train(experiment, tmp_path / "run")
    assert train(experiment, tmp_path / "run", dry_run=True)[0].status == "dry_run"


def test_nothing_of_the_environment_is_written(experiment, finished):
    secret = os.environ["PATH"].split(os.pathsep)[0]
    known = {"config.json", "summary.json", "metrics.jsonl", "tokenizer.json", ".lock"}
    files = {path.name for path in finished.iterdir() if path.is_file()}
    assert files == known
    assert set(json.loads((finished / "config.json").read_text())) == {
        field.name for field in dataclasses.fields(experiment)
    }
    for name in files:
        assert secret not in (finished / name).read_text()
