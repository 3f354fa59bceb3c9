"""What a person and a program see of a run: start table, progress, metrics.jsonl."""

import json
import math
import os
import pathlib
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import rich.console
import rich.progress
import rich.table

from sct_jax import errors

Row = Mapping[str, int | float]


@runtime_checkable
class Sink(Protocol):
    """Where rows go."""

    def write(self, row: Row) -> None:
        """Takes one row; may buffer."""

    def flush(self) -> None:
        """Returns once all rows taken are stored."""

    def close(self) -> None:
        """Flushes and frees the sink."""


def replace_text(path: pathlib.Path, text: str) -> None:
    """Writes a file that holds the old text or the new one, whenever it is cut off."""
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    aside.replace(path)


class JsonLines:
    """One JSON object per row, appended to a file.

    Opening drops a torn last line and every row beyond `resume_step`, so that a step
    that is computed again after a resume stands once.
    """

    def __init__(self, path: pathlib.Path, *, resume_step: int):
        rows = [row for row in read_rows(path) if row["step"] <= resume_step]
        replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a", buffering=1)  # a line at a time, for `tail -f`

    def write(self, row: Row) -> None:
        """Appends one row, to be read at once; `flush` makes it survive the machine."""
        self._file.write(json.dumps(row) + "\n")

    def flush(self) -> None:
        """Returns once all rows are on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes and closes the file."""
        self.flush()
        self._file.close()


class TensorBoard:
    """Event files beside metrics.jsonl, where tensorboardX is installed."""

    def __init__(self, directory: pathlib.Path, *, resume_step: int):
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(
            str(directory), purge_step=resume_step + 1
        )

    def write(self, row: Row) -> None:
        """Adds a scalar per key."""
        for key, value in row.items():
            if key != "step":
                self._writer.add_scalar(key, value, int(row["step"]))

    def flush(self) -> None:
        """Writes pending events."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class Sinks:
    """Several sinks as one. One that fails is dropped with a warning, not the run.

    The first is the record of the run and may not fail.
    """

    def __init__(self, record: Sink, *others: Sink):
        self._record = record
        self._others = list(others)

    def write(self, row: Row) -> None:
        """Hands a row to every sink."""
        self._record.write(row)
        self._each(lambda sink: sink.write(row))

    def flush(self) -> None:
        """Flushes every sink."""
        self._record.flush()
        self._each(lambda sink: sink.flush())

    def close(self) -> None:
        """Closes every sink."""
        self._record.close()
        self._each(lambda sink: sink.close())

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self._others):
            try:
                call(sink)
            except Exception as error:
                warnings.warn(
                    f"{type(sink).__name__} failed and is dropped: {error}",
                    stacklevel=3,
                )
                self._others.remove(sink)


def open_sinks(workdir: pathlib.Path, *, resume_step: int) -> Sinks:
    """Returns metrics.jsonl, and TensorBoard events where that extra is installed."""
    others: list[Sink] = []
    try:
        others.append(TensorBoard(workdir / "tensorboard", resume_step=resume_step))
    except ImportError:
        pass
    return Sinks(JsonLines(workdir / "metrics.jsonl", resume_step=resume_step), *others)


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of a file of JSON lines, without a torn last one.

    Raises:
      UserError: for any other line that is no JSON, naming it.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise errors.UserError(f"{path}:{number}: {error}") from error
    return rows


def start_table(
    summary: Mapping[str, Any],
    *,
    devices: str,
    mesh: Mapping[str, int],
    tokens_per_step: int,
    num_steps: int,
) -> rich.table.Table:
    """Returns the table printed before a run, from `accounting.summary`."""
    stored = summary["parameters"]
    dense = summary["dense_equivalent_parameters"]
    sizes = summary["bytes"]
    table = rich.table.Table(show_header=False, title="sct_jax", title_justify="left")
    rows = {
        "parameters (stored)": f"{stored:,}",
        "parameters (dense equivalent)": f"{dense:,}",
        "compression": f"{dense / stored:.2f}x",
        **{
            f"bytes, {name}": f"{size:,} ({_human(size)})"
            for name, size in sizes.items()
        },
        "bytes, activations": "not counted",
        "FLOPs per token": f"{summary['flops_per_token']:,}",
        "tokens per step": f"{tokens_per_step:,}",
        "tokens in all": f"{tokens_per_step * num_steps:,}",
        "devices": devices,
        "mesh": ", ".join(f"{name} {size}" for name, size in mesh.items()),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _human(size: int) -> str:
    units = ("B", "KB", "MB", "GB", "TB")
    power = min(int(math.log(max(size, 1), 1000)), len(units) - 1)
    return f"{size / 1000**power:.3g} {units[power]}"


def say(console: rich.console.Console, text: str) -> None:
    """Prints a line as it is: no markup, no wrapping at the console's width."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class Progress:
    """A live bar on a terminal, plain lines elsewhere: loss, rate, tokens/s, ETA."""

    def __init__(
        self, console: rich.console.Console, *, start_step: int, num_steps: int
    ):
        self._console = console
        self._num_steps = num_steps
        self._start_step = start_step
        self._began = time.monotonic()
        self._printed = -math.inf
        self._bar: rich.progress.Progress | None = None
        if console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.completed}/{task.total}"),
                rich.progress.BarColumn(),
                rich.progress.TextColumn("{task.description}"),
                rich.progress.TimeRemainingColumn(),
                console=console,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                "compiling", total=num_steps, completed=start_step
            )

    def begin(self) -> None:
        """Starts the clock of the ETA: compilation is over."""
        self._began = time.monotonic()

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def show(self, row: Row) -> None:
        """Shows a logged row: in the bar, or as a line at most every two seconds."""
        text = (
            f"loss {row['train/loss']:.4f}  lr {row['learning_rate']:.2e}  "
            f"{row['tokens_per_second']:,.0f} tokens/s"
        )
        step = int(row["step"])
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
            return
        now = time.monotonic()
        if now - self._printed >= 2 or step == self._num_steps:
            self._printed = now
            rate = (now - self._began) / max(step - self._start_step, 1)
            eta = round(rate * (self._num_steps - step))
            self.print(
                f"step {step}/{self._num_steps}  {text}  ETA {eta // 60}:{eta % 60:02d}"
            )

    def print(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        say(self._console, text)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar:
            self._bar.stop()
