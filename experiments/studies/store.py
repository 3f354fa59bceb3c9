"""The finished trials of a comparison, in a folder that several processes may fill.

`runs.jsonl` holds a row per finished trial and only grows. A trial that is being
trained is claimed by a file lock, which dies with its process, so that a grid which was
killed anywhere is taken up again with nothing lost but the trials under way.
"""

import contextlib
import fcntl
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import jax

from experiments.studies import summary
from experiments.studies import trial as trial_lib
from sct_jax import data, errors
from sct_jax.training import config, metrics

Plan = Callable[[Mapping[str, summary.Row]], Sequence[trial_lib.Trial]]

_POLL_SECONDS = 5.0


class Store:
    """The rows of one folder, by the key of their trial.

    Attributes:
      folder: where they are.
    """

    def __init__(self, folder: str | os.PathLike[str], *, reuse: str | None = None):
        """Opens the folder, and makes it if need be.

        Args:
          folder: where the rows are.
          reuse: another folder, whose rows of the same trials are taken over.

        Raises:
          UserError: for a folder that cannot be written to, or none to reuse.
        """
        self.folder = pathlib.Path(folder)
        self._others = {} if reuse is None else _rows_to_reuse(pathlib.Path(reuse))
        self._cells = self.folder / "runs.jsonl"
        self._compiled = self.folder / ".cache" / "compiled"
        self._claims = self.folder / ".cache" / "claims"
        self._environment = environment()  # now, as the code was loaded now
        try:
            for path in (self._compiled, self._claims):
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise errors.UserError(
                f"--results: cannot write to {self.folder}: {error.strerror}"
            ) from error

    def share_programs(self) -> None:
        """Keeps what this process compiles from here on for all others of the folder.

        Programs do not depend on rates or seeds: one compilation serves many trials.
        """
        jax.config.update("jax_compilation_cache_dir", str(self._compiled))

    def rows(self) -> dict[str, summary.Row]:
        """Returns all rows by the key of their trial; a torn last line is left out.

        Raises:
          UserError: for a line or a trial that cannot be read, naming it.
        """
        return _rows(self._cells)

    def check_text(self, corpus: data.Corpus) -> None:
        """Raises UserError where a row, here or to reuse, is of another text.

        A definition names files; what is in them differs between Pythons and days.
        """
        for flag, rows in (("--results", self.rows()), ("--reuse", self._others)):
            for row in rows.values():
                found = row.get("corpus", corpus.hash)
                errors.check(
                    flag,
                    found == corpus.hash,
                    f"holds trials on another text, hash {found[:16]}, than this one, "
                    f"hash {corpus.hash[:16]}: choose another folder",
                )

    def reused(self, key: str) -> summary.Row | None:
        """Returns the row of a trial in the folder to reuse; None if it has none."""
        return self._others.get(key)

    def add(self, row: summary.Row) -> None:
        """Appends a row, on disk when this returns; one that is reused as it is."""
        stamped = {"environment": self._environment} | row
        line = json.dumps(stamped, allow_nan=False, separators=(",", ":")) + "\n"
        with self._cells.open("ab+") as file:
            _lock(file)
            # What a killed process left of a line goes.
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Yields whether the trial is this process's to train, until the block ends."""
        with (self._claims / key).open("w") as lock:
            mine = _lock(lock, wait=False)
            yield mine and key not in self.rows()

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Waits until no other process holds the name, and holds it in the block."""
        with (self._claims / name).open("w") as lock:
            _lock(lock)
            yield


def _lock(file: IO[Any], *, wait: bool = True) -> bool:
    """Returns whether the file is this process's until it is closed.

    True with a warning on a file system that has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        warnings.warn(
            f"{pathlib.Path(file.name).parent} has no file locks ({error.strerror}): "
            "make sure that no other process fills this folder of results",
            stacklevel=2,
        )
    return True


def _rows_to_reuse(folder: pathlib.Path) -> dict[str, summary.Row]:
    rows = _rows(folder / "runs.jsonl")
    errors.check("--reuse", bool(rows), f"no finished trial in {folder}/runs.jsonl")
    return rows


def _rows(cells: pathlib.Path) -> dict[str, summary.Row]:
    return {_key_of(row, cells): row for row in metrics.read_rows(cells)}


def _key_of(row: summary.Row, cells: pathlib.Path) -> str:
    """Key of the trial of a row; fields added since then are at their defaults."""
    try:
        return _key_of_text(json.dumps(row["definition"]))
    except errors.UserError as error:
        raise errors.UserError(
            f"{cells}: a trial of {row['arm']!r}, of another version: {error}"
        ) from error


@functools.cache
def _key_of_text(definition: str) -> str:
    """Key of a trial; kept, as a folder is read at every look for what is missing."""
    return config.from_dict(json.loads(definition), trial_lib.Trial).key


def fill(
    store: Store,
    plan: Plan,
    train: Callable[[trial_lib.Trial], summary.Row],
    *,
    log: Callable[[str], None] = print,
) -> None:
    """Trains what `plan` asks for until it asks for nothing more.

    Args:
      store: where rows are found and go.
      plan: from the rows so far to the trials that are missing, most wanted first.
      train: from a trial to its row.
      log: receives a line per trial.
    """
    trained = False
    while missing := plan(store.rows()):
        trained = True
        for trial in missing:
            with store.claim(trial.key) as mine:
                if not mine:
                    continue
                row = store.reused(trial.key)
                if row is None:
                    log(f"training {describe(trial)}; {len(missing)} missing")
                    row = train(trial)
                store.add(row)
                log(f"finished {describe(trial)}: {outcome(row)}")
                break
        else:
            # All of them are being trained by other processes.
            time.sleep(_POLL_SECONDS)
    if not trained:
        log(
            f"nothing is missing: {store.folder} has all {len(store.rows())} trials; "
            "--results=DIR trains them anew"
        )


def describe(trial: trial_lib.Trial) -> str:
    """Returns the trial in a few words."""
    return f"{trial.arm}, rate {trial.setting}, seed {trial.experiment.seed}"


def outcome(row: summary.Row) -> str:
    """Returns the held-out losses of a row in a few words."""
    losses = [
        f"{name} " + ("diverged" if result["loss"] is None else f"{result['loss']:.4f}")
        for name, result in row["results"].items()
    ]
    return ", ".join(losses) + f" ({row['wall_seconds']:.0f} s)"


def environment() -> dict[str, Any]:
    """Returns what a figure was made with: command, commit, versions, processors."""
    program = getattr(sys.modules["__main__"], "__spec__", None)
    words = ["-m", program.name] if program else ["-c", "..."]
    return {
        "command": shlex.join(["python", *words, *sys.argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": importlib.metadata.version("optax"),
        "device": jax.devices()[0].device_kind,
        "processors": _processors(),
    }


def _processors() -> int | None:
    """How many this process may run on; all of them where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _commit() -> str:
    """The commit of the code, marked where a Python file differs from it."""
    folder = pathlib.Path(__file__).parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "*.py")
        return git("rev-parse", "--short=12", "HEAD") + (" changed" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
