"""What a program sees of a run: metrics.jsonl, other sinks, and the clock."""

import contextlib
import importlib
import json
import os
import pathlib
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from sct_jax import errors, files, rank
from sct_jax.training import config as config_lib
from sct_jax.training import hardware, processes

Row = Mapping[str, int | float]

TRUNCATION = "truncation/"  # figures of what a phase begins with


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

    Opening drops a torn last line and what was logged after the checkpoint of
    `resume_step`, so that a resumed run logs everything once.
    """

    def __init__(self, path: pathlib.Path, *, resume_step: int):
        """Opens the file.

        Raises:
          UserError: it is not such a file, or cannot be written.
        """
        self._path = path
        rows = read_rows(path)
        for number, row in enumerate(rows, 1):
            step = row.get("step")
            errors.check(
                f"{path}:{number}",
                isinstance(step, int) and not isinstance(step, bool),
                'no integer "step"; repair the line, or move the file away',
            )
        rows = [row for row in rows if not _is_after(row, resume_step)]
        kept = "".join(json.dumps(row) + "\n" for row in rows)
        try:
            files.replace_text(path, kept)
            self._file = path.open("a", buffering=1)  # a line at a time, for `tail -f`
        except PermissionError as error:
            raise errors.UserError(
                f"{path}: cannot be written: {error.strerror}; change its permissions"
            ) from error

    def write(self, row: Row) -> None:
        """Appends one row, visible to readers at once; durable after `flush`."""
        with self._named_errors():
            self._file.write(json.dumps(row) + "\n")

    def flush(self) -> None:
        """Returns once all rows are on disk."""
        with self._named_errors():
            self._file.flush()
            files.sync(self._file.fileno())

    def close(self) -> None:
        """Flushes and closes the file."""
        try:
            self.flush()
        finally:
            with self._named_errors():
                self._file.close()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # a file that is open does not name itself
            raise OSError(error.errno, error.strerror, str(self._path)) from error


def _is_after(row: Row, step: int) -> bool:
    """Whether a run from the checkpoint of a step writes the row anew."""
    begins_phase = any(key.startswith(TRUNCATION) for key in row)
    return row["step"] > step or (row["step"] == step and begins_phase)


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


class WandB:
    """A run of Weights & Biases, the same one whenever a workdir is resumed.

    Its id is in wandb.json of the workdir. Its files are in the folder `wandb` there,
    or in WANDB_DIR. The mode is that of WANDB_MODE, for example "offline".
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        resume_step: int,
        log: config_lib.LogConfig,
        about: Mapping[str, Mapping[str, Any]],
    ):
        """Begins the run, or continues it; a start from step 0 begins a new one.

        Args:
          workdir: of the run.
          resume_step: number of steps so far.
          log: project and name.
          about: "config" and "summary" of the run, as JSON holds them.
        """
        import wandb

        self._run = wandb.init(
            project=log.project,
            name=log.name or workdir.resolve().name,
            id=_wandb_id(workdir / "wandb.json", new=resume_step == 0),
            resume="allow",
            dir=None if "WANDB_DIR" in os.environ else str(workdir),
            settings=wandb.Settings(console="off"),  # ours has bars, and is guarded
        )
        config = dict(about.get("config", {}))
        self._run.config.update(config, allow_val_change=True)
        self._run.summary.update(config_lib.flatten(about.get("summary", {})))
        # Not its own count of steps: a resumed run repeats rows since the last save.
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Row) -> None:
        """Hands over the values of a row."""
        self._run.log(dict(row))

    def flush(self) -> None:
        """Does nothing: rows are sent, or written, as they come."""

    def close(self) -> None:
        """Ends the run once all rows are sent, or written."""
        self._run.finish()


def _wandb_id(path: pathlib.Path, *, new: bool) -> str:
    """The id in a file, or a new one that is written to it."""
    if not new and path.exists():
        return json.loads(path.read_text())["id"]
    id_ = uuid.uuid4().hex[:12]
    files.replace_text(path, json.dumps({"id": id_}) + "\n")
    return id_


class Nowhere:
    """A sink that drops its rows, for processes beside the one that writes them."""

    def write(self, row: Row) -> None:
        """Drops a row."""

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


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


_DEFAULT_LOG = config_lib.LogConfig()

# The package of each extra sink, a name in it, and the extra of ours that brings it.
_PACKAGES = {
    "tensorboard": ("tensorboardX", "SummaryWriter", "tensorboard"),
    "wandb": ("wandb", "init", "wandb"),
}


def check_sinks(log: config_lib.LogConfig) -> None:
    """Raises UserError, naming the extra, if a chosen sink is not installed."""
    for sink in log.sinks or ():
        if sink not in _PACKAGES:
            continue
        package, name, extra = _PACKAGES[sink]
        try:
            # A folder of this name, such as Weights & Biases makes, can be imported.
            reason = "" if hasattr(importlib.import_module(package), name) else "absent"
        except ImportError as error:
            reason = str(error)
        errors.check(
            "log.sinks",
            not reason,
            f"{sink!r} needs the package {package}, which cannot be imported "
            f"({reason}); pip install 'sct_jax[{extra}]', or choose other sinks",
        )


def open_sinks(
    workdir: pathlib.Path,
    *,
    resume_step: int,
    log: config_lib.LogConfig = _DEFAULT_LOG,
    about: Mapping[str, Mapping[str, Any]] | None = None,
) -> Sinks:
    """Returns metrics.jsonl, and the other sinks that were chosen.

    One that cannot be opened is left out with a warning, or silently if it was not
    chosen and is not installed. Only process 0 writes.

    Args:
      workdir: of the run.
      resume_step: number of steps so far.
      log: says which sinks.
      about: "config" and "summary" of the run, as JSON holds them.

    Raises:
      UserError: metrics.jsonl cannot be read or written.
    """
    if not processes.is_first():
        return Sinks(Nowhere())
    openers: dict[str, tuple[str, Callable[[], Sink]]] = {
        "tensorboard": (
            "TensorBoard",
            lambda: TensorBoard(workdir / "tensorboard", resume_step=resume_step),
        ),
        "wandb": (
            "Weights & Biases",
            lambda: WandB(workdir, resume_step=resume_step, log=log, about=about or {}),
        ),
    }
    record = JsonLines(workdir / "metrics.jsonl", resume_step=resume_step)
    others: list[Sink] = []
    for name in ("tensorboard",) if log.sinks is None else dict.fromkeys(log.sinks):
        if name not in openers:
            continue
        title, opener = openers[name]
        try:
            others.append(opener())
        except Exception as error:
            if not (isinstance(error, ImportError) and log.sinks is None):
                warnings.warn(f"{title} gets no rows: {error}", stacklevel=2)
    return Sinks(record, *others)


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of a file of JSON lines; skips a torn last line.

    Raises:
      UserError: where the file cannot be read, and for any other line that is not an
        object in JSON, naming it.
    """
    try:
        with files.open_regular(path) as file:
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise errors.UserError(f"{path}: cannot be read: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise errors.UserError(f"{path}:{number}: {error}") from error
        errors.check(f"{path}:{number}", isinstance(row, dict), "not an object")
        rows.append(row)
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

    Attributes:
      skipped: number of steps that were not applied, at the last row.
      peak_tokens_per_second: of devices that do nothing but the model's FLOPs, at their
        peak. Rows say what share of it they reach as `mfu`; None leaves that out.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        learning_rate: optax.Schedule,
        tokens_per_step: int,
        start_step: int,
        tokens_before: int = 0,
        skipped: int = 0,
        peak_tokens_per_second: float | None = None,
    ):
        """Starts the clock.

        Args:
          sink: receives the rows.
          learning_rate: by number of updates.
          tokens_per_step: of a batch.
          start_step: number of steps so far.
          tokens_before: tokens so far, beyond those of `start_step` such batches.
          skipped: number of steps that were not applied so far.
          peak_tokens_per_second: the attribute.
        """
        self.skipped = skipped
        self.peak_tokens_per_second = peak_tokens_per_second
        self._sink = sink
        self._learning_rate = learning_rate
        self._tokens_per_step = tokens_per_step
        self._tokens_before = tokens_before
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
        since the last row, also as the share `mfu` of the peak.
        """
        if self._held is None:
            return None
        step, held = self._held
        self._held = None
        values = {name: float(value) for name, value in held.items()}
        self.skipped = int(values["skipped_steps"])
        now = time.monotonic()
        tokens = self._tokens_per_step * (step - self._step)
        updates = max(step - self.skipped, 1)
        rate = tokens / max(now - self._time, 1e-9)
        row = {
            "step": step,
            "train/loss": values.pop("loss"),
            "train/loss_max": values.pop("loss_max"),
            "learning_rate": self._rate_of(updates - 1),
            "tokens": self._tokens_per_step * step + self._tokens_before,
            "tokens_per_second": rate,
            **values,
        }
        if self.peak_tokens_per_second is not None:
            row["mfu"] = rate / self.peak_tokens_per_second
        self._step, self._time = step, now
        self._sink.write(row)
        return row

    def _rate_of(self, updates: int) -> float:
        """Computed on the host, where no step is waiting to run."""
        with jax.default_device(hardware.host_device()):
            return float(jnp.asarray(self._learning_rate(updates)))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the block from the time of the current row."""
        began = time.monotonic()
        yield
        self._time += time.monotonic() - began
