"""The command line: experiments.pretrain in processes of its own, on one device."""

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import pretrain
from sct_jax.training import accounting, metrics, overrides
from sct_jax.training import workdir as workdir_lib

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "smollm_r128.py"
NUM_STEPS = 200


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(100):
        rng = random.Random(number)
        syllables = ["ka", "to", "mi", "ren", "lu", "\n", "sha"]
        words = ["".join(rng.choices(syllables, k=3)) for _ in range(100)]
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def flags(corpus, root, **changes):
    """A run of the tiny variant made smaller still."""
    values = {
        "num_steps": NUM_STEPS,
        "log_every": 1,
        "model.d_model": 32,
        "model.d_ff": 48,
        "model.num_layers": 2,
        "model.vocab_size": 300,
        "model.rank": 4,
        "model.spectral": "gate,up,down",
        "data.source": corpus / "*.txt",
        "data.cache_dir": root / "cache",
        "data.batch_size": 8,
        "data.seq_len": 16,
        "optimizer.warmup_steps": 4,
        "checkpoint.every": 10,
        "eval.every": 100,
        "eval.num_batches": 2,
    }
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    return [
        f"--config={CONFIG}:tiny",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]


def environment(root):
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return env | {
        "JAX_PLATFORMS": "cpu",
        "GLIBC_TUNABLES": "",  # set: programs do not start themselves again
        "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "PYTHONUNBUFFERED": "1",
    }


@contextlib.contextmanager
def started(arguments, root):
    """The command as a process of its own, killed if it is left running."""
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.pretrain", *arguments],
        cwd=ROOT,
        env=environment(root),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run(arguments, root):
    with started(arguments, root) as process:
        out, err = process.communicate(timeout=250)
        return process.returncode, out, err


def last_step(workdir) -> int:
    logged = metrics.read_rows(workdir / "metrics.jsonl")
    return max((row["step"] for row in logged), default=0)


def newest_checkpoint(workdir) -> int:
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def interrupt(arguments, root, workdir, *, number):
    """Starts the command and signals it 20 steps on; exit code, output, step before."""
    before = newest_checkpoint(workdir)
    with started(arguments, root) as process:
        while newest_checkpoint(workdir) < before + 20:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)  # a poll, not a wait for something to have happened
        process.send_signal(number)
        out, err = process.communicate(timeout=250)
        return process.returncode, out, err


@pytest.fixture(scope="module")
def whole(corpus, root):
    """An uninterrupted run: workdir, and what it printed."""
    workdir = root / "whole"
    code, out, err = run([*flags(corpus, root), f"--workdir={workdir}"], root)
    assert code == 0, err
    return workdir, out


@pytest.fixture(scope="module")
def broken(corpus, root, whole):
    """A run that Ctrl-C, SIGKILL and SIGTERM end before it comes to its end."""
    workdir = root / "broken"
    arguments = [*flags(corpus, root), f"--workdir={workdir}"]
    ends = {}
    for number in (signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
        result = interrupt(arguments, root, workdir, number=number)
        ends[number] = (*result, newest_checkpoint(workdir), last_step(workdir))
    ends[None] = run(arguments, root)
    return workdir, ends


def test_the_command_trains_to_the_end(whole):
    workdir, out = whole
    assert f"finished: {NUM_STEPS} steps" in out
    assert str(workdir) in out
    assert "\x1b[" not in out  # no terminal, no colours
    logged = metrics.read_rows(workdir / "metrics.jsonl")
    losses = [row["train/loss"] for row in logged if "train/loss" in row]
    assert len(losses) == NUM_STEPS
    assert np.mean(losses[-10:]) < losses[0] - 1
    errors = [row["orthonormality_error"] for row in logged if "train/loss" in row]
    assert max(errors) < 1e-5


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_signal_saves_and_exits_with_its_code(broken, number, code):
    _, ends = broken
    returned, out, err, saved, logged = ends[number]
    assert returned == code, err
    assert f"interrupted: saved at step {saved}" in out
    # The last step computed is saved, and logged: none is lost.
    assert saved == logged < NUM_STEPS
    assert "Traceback" not in err


def test_a_killed_run_stands_half_way(broken):
    _, ends = broken
    returned, _, _, saved, _ = ends[signal.SIGKILL]
    assert returned == -signal.SIGKILL
    assert ends[signal.SIGINT][3] < saved < NUM_STEPS


def test_a_broken_run_equals_an_uninterrupted_one(whole, broken):
    workdir, ends = broken
    code, out, err = ends[None]
    assert code == 0, err
    assert "resumed at step" in out
    expected = metrics.read_rows(whole[0] / "metrics.jsonl")
    found = metrics.read_rows(workdir / "metrics.jsonl")
    # repr of a float is exact, so equal JSON numbers are equal bits.
    timeless = lambda rows: [
        {k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows
    ]
    assert timeless(found) == timeless(expected)
    params, expected_params = (
        workdir_lib.load_run(folder).params for folder in (workdir, whole[0])
    )
    import jax

    assert jax.tree.structure(params) == jax.tree.structure(expected_params)
    for a, b in zip(
        jax.tree.leaves(params), jax.tree.leaves(expected_params), strict=True
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_the_same_command_again_says_that_it_is_finished(whole, corpus, root):
    workdir, _ = whole
    before = (workdir / "metrics.jsonl").read_bytes()
    arguments = [*flags(corpus, root), f"--workdir={workdir}"]
    code, out, err = run(arguments, root)
    assert code == 0, err
    assert f"finished: {NUM_STEPS} steps are done" in out
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_dry_run_of_the_largest_model_needs_neither_text_nor_memory(root):
    workdir = root / "dry"
    arguments = [f"--config={CONFIG}", f"--workdir={workdir}", "--dry-run"]
    arguments += ["--config.data.source=nowhere/*.txt"]
    code, out, err = run(arguments, root)
    assert code == 0, err
    assert "597,797,888" in out and "1,711,376,384" in out
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["parameters"] == 597_797_888
    assert summary["dense_equivalent_parameters"] == 1_711_376_384
    experiment = overrides.load(str(CONFIG))
    assert summary["flops_per_token"] == accounting.flops_per_token(
        experiment.model, seq_len=experiment.data.seq_len
    )
    assert summary["bytes"]["parameters"] == 4 * 597_797_888
    assert [path.name for path in workdir.iterdir()] == ["summary.json"]


def test_an_earlier_name_of_a_field_works_and_is_noted(root, capsys):
    arguments = [f"--config={CONFIG}:tiny", f"--workdir={root / 'noted'}", "--dry_run"]
    arguments += ["--config.optimizer.dense_rate=1.5", "--config.step=whole"]
    assert pretrain.main(arguments) == 0
    noted = capsys.readouterr().err.splitlines()
    assert len(noted) == 2 and all(line.startswith("note: ") for line in noted)
    assert "optimizer.dense_lr_multiplier" in noted[0] and "step=fused" in noted[1]


# --- Bad input: exit code 2, one message that names the field, no traceback.


def assert_one_message(text: str, *parts: str) -> None:
    assert "Traceback" not in text
    assert text.startswith("error: ")
    lines = text.strip().splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert len(lines) <= 4
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config.model.d_modle=64"], ["model.d_modle", "'model.d_model'"]),
        (["--config.num_step=64"], ["num_step", "'num_steps'"]),
        (["--config.batch_size=64"], ["batch_size", "'data.batch_size'"]),
        (["--config.num_steps=many"], ["num_steps", "'many'", "int"]),
        (["--config.num_steps=1.5"], ["num_steps", "'1.5'"]),
        (["--config.model.scan_layers=perhaps"], ["model.scan_layers", "bool"]),
        (["--config.optimizer.b1=x"], ["optimizer.b1", "float"]),
        (["--config.model=3"], ["model"]),
        (["--config.model.rank=0"], ["model.rank", "0"]),
        (["--config.model.rank=-1"], ["model.rank", "-1"]),
        (["--config.model.rank=257"], ["model.rank", "257", "256"]),
        (["--config.model.ranks.k=300"], ["model.ranks.k", "300", "256 x 256"]),
        (["--config.model.spectral=q,gat"], ["model.spectral", "'gate'"]),
        (["--config.model.num_heads=3"], ["model.num_heads", "256"]),
        (["--config.model.num_kv_heads=3"], ["model.num_kv_heads", "num_heads = 2"]),
        (["--config.num_steps=-5"], ["num_steps", "-5"]),
        (["--config.num_steps=0"], ["num_steps", "0"]),
        (["--config.data.batch_size=0"], ["data.batch_size", "0"]),
        (["--config.data.seq_len=0"], ["data.seq_len"]),
        (["--config.mesh.data=3"], ["mesh", "8 devices"]),
        (["--config.mesh.tensor=16"], ["mesh", "8 devices"]),
        (["--config.data.batch_size=12"], ["data.batch_size", "12", "8"]),
        (["--config.mesh.data=2", "--config.mesh.fsdp=4"], None),
        (["--config.data.source=nowhere/*.txt"], ["data.source", "nowhere/*.txt"]),
        (["--config.data.source=nowhere.txt"], ["data.source", "nowhere.txt"]),
        (["--config.data.source=EMPTY"], ["data.source"]),
        (["--config.data.source=FOLDER"], ["data.source"]),
        (["--config.data.source=tfds:no_such_dataset"], ["data.source", "no_such_dat"]),
        (["--config.data.source=SHORT"], ["data.batch_size"]),
        (["--config.data.tokenizer=nowhere.json"], ["data.tokenizer"]),
        (["--config.data.tokenizer=EMPTY"], ["data.tokenizer"]),
        (["--config.data.cache_dir=EMPTY"], ["data.cache_dir"]),
        (["--workdir=EMPTY"], ["workdir"]),
        (["--workdir=EMPTY/below"], ["workdir"]),
        (["--workdr=x"], ["--workdr", "'--workdir'"]),
        (["tiny"], ["'tiny'"]),
    ],
    ids=lambda value: " ".join(value or []),
)
def test_bad_input(arguments, parts, corpus, tmp_path, capsys, monkeypatch):
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "SHORT").write_text("a few words, far too few of them. " * 5)
    monkeypatch.chdir(tmp_path)
    base = [
        f"--config={CONFIG}:tiny",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        "--workdir=run",
    ]
    if not any("data.source" in word for word in arguments):
        base.append(f"--config.data.source={corpus / '*.txt'}")
    if parts is None:
        assert pretrain.main([*base, *arguments, "--dry_run"]) == 0
        return
    with pytest.raises(SystemExit) as caught:
        pretrain.main([*base, *arguments])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert_one_message(printed.err, *parts)
    assert "compiled" not in printed.out


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (f"{CONFIG}:tinny", ["variant", "'tinny'", "'tiny'"]),
        (f"{CONFIG}:", None),
        ("configs/smolm_r128.py", ["--config", "smolm_r128.py", "smollm_r128.py"]),
        ("configs/smollm_r128", ["--config", "smollm_r128.py"]),
        ("configs", ["--config"]),
        ("README.md", ["--config"]),
        ("", ["--config"]),
    ],
    ids=str,
)
def test_bad_config_file(config, parts, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    arguments = [f"--config={config}", f"--workdir={tmp_path / 'run'}", "--dry_run"]
    if parts is None:
        assert pretrain.main(arguments) == 0
        return
    with pytest.raises(SystemExit) as caught:
        pretrain.main(arguments)
    assert caught.value.code == 2
    assert_one_message(capsys.readouterr().err, *parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--config.mesh.fsdp=2", "--config.mesh.data=2"], ["mesh", "1 devices"]),
        (["--config.data.source=nowhere/*.txt"], ["data.source"]),
        (["--config.num_steps=9"], ["workdir", "num_steps", "rank"]),
    ],
    ids=["mesh", "no text", "another run's workdir"],
)
def test_bad_input_in_a_process_of_its_own(arguments, parts, corpus, root, whole):
    workdir = whole[0] if "workdir" in parts else root / f"bad {parts[0]}"
    base = flags(corpus, root)
    if "workdir" in parts:
        base += ["--config.model.rank=3"]
    code, out, err = run([*base, *arguments, f"--workdir={workdir}"], root)
    assert code == 2
    assert "Traceback" not in out + err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert all(part in err for part in parts)
    assert "compiled" not in out
