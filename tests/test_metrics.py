import errno
import json
import math
import os
import types

import numpy as np
import pytest

from sct_jax import errors, files
from sct_jax.training import metrics


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
