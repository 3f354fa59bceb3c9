import io
import json
import math

import pytest
import rich.console

from sct_jax import errors
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

    with pytest.warns(UserWarning, match="Failing failed and is dropped: disk full"):
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


# --- What a person sees.


def console(*, terminal: bool) -> rich.console.Console:
    return rich.console.Console(
        file=io.StringIO(), force_terminal=terminal, width=100, color_system=None
    )


def shown(row_step, loss=2.5):
    return {
        "step": row_step,
        "train/loss": loss,
        "learning_rate": 1e-3,
        "tokens_per_second": 12345.6,
    }


SUMMARY = {
    "parameters": 597_797_888,
    "dense_equivalent_parameters": 1_711_376_384,
    "flops_per_token": 5_000_000_000,
    "bytes": {
        "parameters": 2_391_191_552,
        "gradients": 2_391_191_552,
        "optimizer": 4_782_383_112,
        "total": 9_564_766_216,
    },
}


@pytest.mark.parametrize("width", [80, 100])
def test_the_start_table_has_the_figures(width):
    out = rich.console.Console(file=io.StringIO(), width=width, color_system=None)
    out.print(
        metrics.start_table(
            SUMMARY,
            devices="8 x cpu",
            mesh={"data": 2, "fsdp": 4, "tensor": 1},
            tokens_per_step=1000,
            num_steps=50,
        )
    )
    text = out.file.getvalue()
    for figure in (
        "597,797,888",
        "1,711,376,384",
        "2.86x",
        "2,391,191,552 (2.39 GB)",
        "4,782,383,112 (4.78 GB)",
        "9,564,766,216 (9.56 GB)",
        "5,000,000,000",
        "50,000",
        "8 x cpu",
        "data 2, fsdp 4, tensor 1",
    ):
        assert figure in text, figure


def test_progress_off_a_terminal_prints_plain_lines():
    out = console(terminal=False)
    progress = metrics.Progress(out, start_step=10, num_steps=30)
    progress.advance(11)
    progress.show(shown(11))
    progress.show(shown(12))  # less than two seconds later: not shown
    progress.print("a [bold]note[/bold]")
    progress.advance(30)
    progress.show(shown(30, loss=1.25))
    progress.close()
    text = out.file.getvalue()
    lines = text.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 11/30  loss 2.5000  lr 1.00e-03  12,346 tokens/s")
    assert "ETA" in lines[0]
    assert lines[1] == "a [bold]note[/bold]"
    assert lines[2].startswith("step 30/30  loss 1.2500")
    assert "\x1b" not in text and "\r" not in text


def test_progress_on_a_terminal_is_a_bar():
    out = console(terminal=True)
    progress = metrics.Progress(out, start_step=0, num_steps=30)
    progress.advance(3)
    progress.show(shown(3))
    progress.print("above")
    progress.close()
    text = out.file.getvalue()
    assert "step 3/30" in text and "loss 2.5000" in text and "12,346 tokens/s" in text
    assert "above" in text


def test_progress_survives_a_loss_that_is_no_number():
    out = console(terminal=False)
    progress = metrics.Progress(out, start_step=0, num_steps=2)
    progress.show(shown(2, loss=math.nan))
    progress.close()
    assert "nan" in out.file.getvalue()
