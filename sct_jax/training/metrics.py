"""What a program sees of a run: metrics.jsonl, event files, and the clock."""

import contextlib
import json
import os
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import optax

from sct_jax import errors, files, rank

Row = Mapping[str, int | float]


@runtime_checkable
class Sink(Protocol):
    """A destination of rows."""

    def write(self, row: Row) -> None:
        """Accepts one row; may buffer it."""

    def flush(self) -> None:
        """Returns once all accepted rows are stored."""

    def close(self) -> None:
        """Flushes and frees the sink."""


class JsonLines:
    """One JSON object per row, appended to a file.

    Opening drops a torn last line and every row beyond `resume_step`, so that a resumed
    run logs each step once.
    """

    def __init__(self, path: pathlib.Path, *, resume_step: int):
        rows = [row for row in read_rows(path) if row["step"] <= resume_step]
        files.replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a", buffering=1)  # a line at a time, for `tail -f`

    def write(self, row: Row) -> None:
        """Appends one row, visible to readers at once; durable after `flush`."""
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
    """TensorBoard event files, written by tensorboardX."""

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
    """Several sinks as one.

    The first is the record of the run: its errors propagate. Any other sink that fails
    is dropped with a warning.
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
                    f"{type(sink).__name__} failed and gets no further rows: {error}",
                    stacklevel=3,
                )
                self._others.remove(sink)


def open_sinks(workdir: pathlib.Path, *, resume_step: int) -> Sinks:
    """Returns metrics.jsonl, and TensorBoard events if tensorboardX is installed."""
    others: list[Sink] = []
    try:
        others.append(TensorBoard(workdir / "tensorboard", resume_step=resume_step))
    except ImportError:
        pass
    return Sinks(JsonLines(workdir / "metrics.jsonl", resume_step=resume_step), *others)


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of a file of JSON lines; skips a torn last line.

    Raises:
      UserError: for any other line that is not JSON, naming it.
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


def rank_row(step: int, change: rank.Change) -> Row:
    """Returns the row of a change of ranks: stored columns, and the mean in use."""
    return (
        {"step": step}
        | {f"rank/{name}": stored for name, stored in change.ranks.items()}
        | {f"active_rank/{n}": float(a.mean()) for n, a in change.active.items()}
    )


class StepLog:
    """The rows of training steps, each written while the next step runs.

    `hold` keeps a step's values on the device. `flush` fetches them, once the next step
    has been dispatched, so that the device never waits for the host.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        learning_rate: optax.Schedule,
        tokens_per_step: int,
        start_step: int,
    ):
        self._sink = sink
        self._learning_rate = learning_rate
        self._tokens_per_step = tokens_per_step
        self._held: tuple[int, Mapping[str, Any]] | None = None
        self._step = start_step
        self._time = time.monotonic()

    def start(self) -> None:
        """Starts the clock of the first row."""
        self._time = time.monotonic()

    def hold(self, step: int, values: Mapping[str, Any]) -> None:
        """Keeps the metrics of a step: scalars on the device, `loss` among them."""
        self._held = (step, values)

    def flush(self) -> Row | None:
        """Writes the held row and returns it; None if there is none.

        Adds the learning rate of the step, the tokens so far, and tokens per second
        since the last row.
        """
        if self._held is None:
            return None
        step, held = self._held
        self._held = None
        values = {name: float(value) for name, value in held.items()}
        now = time.monotonic()
        tokens = self._tokens_per_step * (step - self._step)
        row = {
            "step": step,
            "train/loss": values.pop("loss"),
            "learning_rate": float(jnp.asarray(self._learning_rate(step - 1))),
            "tokens": self._tokens_per_step * step,
            "tokens_per_second": tokens / max(now - self._time, 1e-9),
            **values,
        }
        self._step, self._time = step, now
        self._sink.write(row)
        return row

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the block from the time of the current row."""
        began = time.monotonic()
        yield
        self._time += time.monotonic() - began
