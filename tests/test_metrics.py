import errno
import json
import math
import os
import struct
import sys
import time
import types

import numpy as np
import pytest

from sct_jax import errors, files
from sct_jax.training import cli, metrics
from sct_jax.training import config as config_lib


def row(step, **values):
    return {"step": step, "train/loss": 1.0 / step, **values}


def write_lines(path, *lines, end="\n"):
    path.write_text("\n".join(lines) + end)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


# --- metrics.jsonl.


def test_rows_are_appended_one_object_a_line(path):
    sink = metrics.JsonLines(path, resume_step=0)
    rows = [row(1), row(2, **{"eval/loss": 0.1 + 0.2})]
    for each in rows:
        sink.write(each)
    sink.flush()
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    sink.close()
    assert metrics.read_rows(path) == rows


@pytest.mark.parametrize("torn", ['{"step": 3, "train/lo', "{", '{"step": 3'])
def test_a_torn_last_line_is_dropped(path, torn):
    write_lines(path, json.dumps(row(1)), json.dumps(row(2)), torn, end="")
    assert [r["step"] for r in metrics.read_rows(path)] == [1, 2]
    sink = metrics.JsonLines(path, resume_step=9)
    sink.write(row(3))
    sink.close()
    assert metrics.read_rows(path) == [row(1), row(2), row(3)]


def test_a_lost_block_at_the_end_is_dropped(path):
    path.write_bytes(json.dumps(row(1)).encode() + b"\n" + b"\0" * 64)
    metrics.JsonLines(path, resume_step=9).close()
    assert metrics.read_rows(path) == [row(1)]


def test_a_damaged_line_is_named_and_costs_no_other(path):
    write_lines(path, json.dumps(row(1)), "{oops", json.dumps(row(3)))
    before = path.read_text()
    with pytest.raises(errors.UserError, match=r"metrics\.jsonl:2: "):
        metrics.JsonLines(path, resume_step=9)
    assert path.read_text() == before


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"[1]",
        b"3",
        b"null",
        b"[" * 100_000,
        b'{"step": ' + b"9" * 5000 + b"}",
        b'{"step": 1.5}',
        b'{"step": true}',
        b'{"step": "1"}',
        b'{"loss": 1}',
    ],
    ids=lambda line: repr(line[:20]),
)
def test_a_line_that_is_no_row_is_named(path, line):
    before = json.dumps(row(1)).encode() + b"\n" + line + b"\n"
    path.write_bytes(before)
    with pytest.raises(errors.UserError, match=r"metrics\.jsonl:2: "):
        metrics.JsonLines(path, resume_step=9)
    assert path.read_bytes() == before


def test_what_is_no_file_is_named(path):
    path.mkdir()
    with pytest.raises(errors.UserError, match=r"metrics\.jsonl: cannot be read"):
        metrics.JsonLines(path, resume_step=9)
    path.rmdir()
    os.mkfifo(path)  # waits for a writer that never comes
    with pytest.raises(errors.UserError, match=r"metrics\.jsonl: cannot be read"):
        metrics.JsonLines(path, resume_step=9)


def test_a_file_that_may_not_be_written_is_named(path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(files, "replace_text", refuse)
    with pytest.raises(errors.UserError, match=r"metrics\.jsonl: cannot be written"):
        metrics.JsonLines(path, resume_step=0)


@pytest.mark.parametrize("call", ["write", "flush"])
def test_a_full_disk_names_the_file(path, call):
    sink = metrics.JsonLines(path, resume_step=0)
    sink._file.close()
    sink._file = open("/dev/full", "a", buffering=1 << 16)
    with pytest.raises(OSError) as caught:
        sink.write(row(1))
        sink.flush()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    with pytest.raises(OSError):
        sink.close()


def test_rows_beyond_the_resumed_step_are_dropped(path):
    rows = [row(1), row(2), {"step": 2, "eval/loss": 3.0}, row(3), row(4)]
    write_lines(path, *map(json.dumps, rows))
    sink = metrics.JsonLines(path, resume_step=2)
    assert metrics.read_rows(path) == rows[:3]
    sink.write(row(3, again=1))
    sink.close()
    assert metrics.read_rows(path) == [*rows[:3], row(3, again=1)]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_numbers_come_back_as_they_were(path):
    values = {"step": 1, "a": 0.1 + 0.2, "b": 1e-300, "c": math.pi, "d": math.inf}
    sink = metrics.JsonLines(path, resume_step=0)
    sink.write(values)
    sink.close()
    metrics.JsonLines(path, resume_step=1).close()
    assert metrics.read_rows(path) == [values]


def test_no_file_has_no_rows(path):
    assert metrics.read_rows(path) == []


# --- Several sinks.


class Failing:
    """A sink that works for a while."""

    def __init__(self, *, fails_on):
        self.calls = []
        self._fails_on = fails_on

    def _call(self, name):
        self.calls.append(name)
        if name == self._fails_on:
            raise OSError("disk full")

    def write(self, row):
        self._call("write")

    def flush(self):
        self._call("flush")

    def close(self):
        self._call("close")


@pytest.mark.parametrize("fails_on", ["write", "flush", "close"])
def test_an_extra_sink_that_fails_is_dropped_with_a_warning(path, fails_on):
    bad, good = Failing(fails_on=fails_on), Failing(fails_on=None)
    sinks = metrics.Sinks(metrics.JsonLines(path, resume_step=0), bad, good)

    def use():
        sinks.write(row(1))
        sinks.flush()
        sinks.write(row(2))
        sinks.close()

    with pytest.warns(UserWarning, match="Failing failed .* rows: disk full"):
        use()
    assert bad.calls[-1] == fails_on and bad.calls.count(fails_on) == 1
    assert good.calls == ["write", "flush", "write", "close"]
    assert metrics.read_rows(path) == [row(1), row(2)]


def test_the_record_may_not_fail(path):
    sinks = metrics.Sinks(Failing(fails_on="write"), Failing(fails_on=None))
    with pytest.raises(OSError, match="disk full"):
        sinks.write(row(1))


def test_tensorboard_is_an_extra(tmp_path):
    sinks = metrics.open_sinks(tmp_path, resume_step=0)
    sinks.write(row(1, learning_rate=0.5))
    sinks.close()
    assert metrics.read_rows(tmp_path / "metrics.jsonl") == [row(1, learning_rate=0.5)]
    events = [path for path in (tmp_path / "tensorboard").iterdir()]
    assert b"train/loss" in events[0].read_bytes()


def test_tensorboard_that_cannot_be_written_is_left_out(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with pytest.warns(UserWarning, match="TensorBoard gets no rows"):
        sinks = metrics.open_sinks(tmp_path, resume_step=0)
    sinks.write(row(1))
    sinks.close()
    assert metrics.read_rows(tmp_path / "metrics.jsonl") == [row(1)]


# --- Which sinks.


def test_only_the_chosen_sinks_are_opened(tmp_path):
    sinks = metrics.open_sinks(
        tmp_path, resume_step=0, log=config_lib.LogConfig(sinks=("jsonl",))
    )
    sinks.write(row(1))
    sinks.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("sink", ["tensorboard", "wandb"])
def test_a_chosen_sink_that_is_not_installed_is_named_with_its_extra(
    tmp_path, monkeypatch, sink
):
    log = config_lib.LogConfig(sinks=("jsonl", sink))
    package = {"tensorboard": "tensorboardX", "wandb": "wandb"}[sink]
    wanted = rf"^log\.sinks: '{sink}' needs .* pip install 'sct_jax\[{sink}\]'"
    # A folder of the same name, in the folder where a program starts.
    for module in (None, types.ModuleType(package)):
        monkeypatch.setitem(sys.modules, package, module)
        with pytest.raises(errors.UserError, match=wanted):
            metrics.check_sinks(log)
        with pytest.warns(UserWarning, match="gets no rows"):
            metrics.open_sinks(tmp_path, resume_step=0, log=log).close()
    metrics.check_sinks(config_lib.LogConfig())


def test_a_sink_that_was_not_chosen_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    metrics.open_sinks(tmp_path, resume_step=0).close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_training_command_ends_with_code_2_without_a_chosen_sink(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = tmp_path / "config.py"
    config.write_text(
        "from sct_jax.training import config\n"
        "get_config = lambda: config.ExperimentConfig()\n"
    )
    flags = [f"--config={config}", f"--workdir={tmp_path / 'run'}", "--dry_run"]
    with pytest.raises(SystemExit) as caught:
        cli.main([*flags, "--config.log.sinks=jsonl,wandb"])
    assert caught.value.code == 2
    assert "pip install 'sct_jax[wandb]'" in capsys.readouterr().err


def test_a_run_that_began_before_sinks_could_be_chosen_opens_with_the_default():
    values = config_lib.to_dict(config_lib.ExperimentConfig())
    del values["log"]
    assert config_lib.from_dict(values) == config_lib.ExperimentConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sinks": ("wandbb",)}, r"log\.sinks: .*did you mean 'wandb'"),
        ({"project": ""}, r"log\.project: must not be empty"),
        ({"name": ""}, r"log\.name: must not be empty"),
    ],
)
def test_settings_of_sinks_are_checked(values, message):
    with pytest.raises(errors.UserError, match=message):
        config_lib.ExperimentConfig(log=config_lib.LogConfig(**values)).validate()


def test_a_project_without_weights_and_biases_has_no_effect():
    note = lambda **values: config_lib.LogConfig(**values).unused_fields()
    assert note() == note(sinks=("wandb",), project="other", name="x") == []
    (said,) = note(sinks=("jsonl",), project="other")
    assert said.startswith("log.project: has no effect")


# --- Weights & Biases.


@pytest.fixture
def wandb_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="an extra: pip install 'sct_jax[wandb]'")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(folder))
    monkeypatch.setenv("WANDB_SILENT", "true")
    return folder / "wandb"


def wandb_records(path):
    """The records of an offline run: framed as by LevelDB, in blocks of 32 KB."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while at + 7 < len(content):
        if (left := -at % 2**15) < 7 and left:
            at += left
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        if at + 7 + length > len(content):
            return  # is being written
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def wandb_run(path):
    """Id, project, name, configuration, rows and summary of an offline run."""
    run, config, rows, summary = None, {}, [], {}
    deadline = time.monotonic() + 30
    records = []
    # A process of its own writes the file.
    while "exit" not in (record.WhichOneof("record_type") for record in records):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        records = list(wandb_records(path))
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
        updates = {"run": record.run.config.update, "config": record.config.update}
        for item in updates.get(kind, ()):
            config[item.key or tuple(item.nested_key)] = json.loads(item.value_json)
        if kind == "history":
            items = record.history.item
            values = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}
            rows.append({k: v for k, v in values.items() if not k.startswith("_")})
        for item in record.summary.update if kind == "summary" else ():
            summary[item.key or item.nested_key[0]] = json.loads(item.value_json)
    return run, config, rows, summary


def write_to_wandb(workdir, *rows, resume_step):
    about = {
        "config": {"seed": 7, "model": {"rank": 4}},
        "summary": {"parameters": 12, "bytes": {"total": 34}},
    }
    sinks = metrics.open_sinks(
        workdir,
        resume_step=resume_step,
        log=config_lib.LogConfig(sinks=("wandb",), project="ours", name="first"),
        about=about,
    )
    for each in rows:
        sinks.write(each)
    sinks.flush()
    sinks.close()
    return json.loads((workdir / "wandb.json").read_text())["id"]


def test_a_resumed_run_is_one_run_of_weights_and_biases(tmp_path, wandb_folder):
    workdir = tmp_path / "run"
    workdir.mkdir()
    first = [row(1), row(2), {"step": 2, "eval/loss": 0.5}]
    id_ = write_to_wandb(workdir, *first, resume_step=0)
    (written,) = wandb_folder.glob("offline-run-*/*.wandb")
    run, config, rows, summary = wandb_run(written)
    assert (run.run_id, run.project, run.display_name) == (id_, "ours", "first")
    assert config["seed"] == 7 and config["model"] == {"rank": 4}
    assert rows == first
    assert summary["parameters"] == 12 and summary["bytes.total"] == 34

    assert write_to_wandb(workdir, row(2), row(3), resume_step=1) == id_
    again = set(wandb_folder.glob("offline-run-*/*.wandb")) - {written}
    run, _, rows, _ = wandb_run(again.pop())
    assert run.run_id == id_ and rows == [row(2), row(3)]
    # Another run in the same folder.
    assert write_to_wandb(workdir, row(1), resume_step=0) != id_


def test_files_of_weights_and_biases_are_in_the_workdir(
    tmp_path, wandb_folder, monkeypatch
):
    monkeypatch.delenv("WANDB_DIR")
    write_to_wandb(tmp_path, row(1), resume_step=0)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_weights_and_biases_that_fail_cost_no_row(tmp_path, wandb_folder, monkeypatch):
    import wandb

    log = config_lib.LogConfig(sinks=("wandb",))
    sinks = metrics.open_sinks(tmp_path, resume_step=0, log=log)
    monkeypatch.setattr(type(sinks._others[0]._run), "log", None)
    with pytest.warns(UserWarning, match="WandB failed") as caught:
        sinks.write(row(1))
        sinks.write(row(2))
        sinks.close()
    assert len(caught) == 1
    wandb.finish()

    def refuse(**_):
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.warns(UserWarning, match="Weights & Biases gets no rows: no network"):
        sinks = metrics.open_sinks(tmp_path, resume_step=2, log=log)
    sinks.write(row(3))
    sinks.close()
    read = metrics.read_rows(tmp_path / "metrics.jsonl")
    assert read == [row(1), row(2), row(3)]


# --- Rows of steps.


class Rows(list):
    """A sink that keeps its rows."""

    write = list.append
    flush = close = lambda self: None


def test_a_row_is_written_once_the_next_step_runs_and_times_steps_alone(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    fake = types.SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr(metrics, "time", fake)
    rows = Rows()
    log = metrics.StepLog(
        rows,
        learning_rate=lambda count: 0.5**count,
        tokens_per_step=64,
        start_step=10,
        tokens_before=5,
    )
    assert log.flush() is None
    clock.now += 1000  # compilation
    log.start()
    for step in (11, 12, 13):
        clock.now += 2.0
        if step == 12:  # is not logged
            continue
        values = {"loss": step, "loss_max": step + 1, "grad_norm": 1}
        counts = {"skipped_steps": 0}
        log.hold(step, {k: np.float32(v) for k, v in (values | counts).items()})
        assert len(rows) == (step - 11) // 2
        with log.paused():  # a checkpoint
            clock.now += 100
        assert log.flush() == rows[-1]
    assert [row["step"] for row in rows] == [11, 13]
    assert [row["tokens_per_second"] for row in rows] == pytest.approx([32, 32])
    assert [row["tokens"] for row in rows] == [64 * 11 + 5, 64 * 13 + 5]
    # The learning rate of the update that the row is about.
    assert [row["learning_rate"] for row in rows] == [0.5**10, 0.5**12]
    assert rows[1]["train/loss"] == 13 and rows[1]["grad_norm"] == 1
    assert "mfu" not in rows[0]


def test_a_known_peak_gives_the_utilisation(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    fake = types.SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr(metrics, "time", fake)
    rows = Rows()
    log = metrics.StepLog(
        rows,
        learning_rate=lambda count: 0.1,
        tokens_per_step=64,
        start_step=0,
        peak_tokens_per_second=128.0,
    )
    values = {"loss": 1, "loss_max": 1, "skipped_steps": 0}
    log.hold(1, {k: np.float32(v) for k, v in values.items()})
    clock.now += 2.0
    assert log.flush()["mfu"] == 32 / 128
