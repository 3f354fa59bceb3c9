"""A folder of rows that several processes may fill at once.

Its file of rows has one line per finished trial and only grows. A process that trains a
trial holds a file lock, which dies with it. So a study that is killed anywhere resumes
and loses only the trials in progress.
"""

import contextlib
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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from experiments.studies import rows as rows_lib
from experiments.studies import search
from experiments.studies import trial as trial_lib
from sct_jax import data, errors, files

Plan = Callable[[search.Rows], Sequence[trial_lib.Trial]]

_POLL_SECONDS = 5.0


def _by_path(config: data.DataConfig) -> str:
    """Returns what else to do about rows that may be older than splits by content."""
    if config.split in config.kinds_of_split or config.source == "stdlib":
        return ""
    return ", or set data.split to 'paths' if they began before it could be 'documents'"


class Store:
    """The rows of one folder.

    Attributes:
      folder: its path.
    """

    def __init__(self, folder: str | os.PathLike[str], *, reuse: str | None = None):
        """Opens the folder, creating it if missing.

        Args:
          folder: its path.
          reuse: another folder whose rows of the same trials are copied.

        Raises:
          UserError: the folder cannot be written, or there is nothing to reuse.
        """
        self.folder = pathlib.Path(folder)
        self._others = {} if reuse is None else rows_lib.by_trial(reuse)
        if reuse is not None:
            path = rows_lib.path_in(reuse)
            errors.check("--reuse", bool(self._others), f"no finished trial in {path}")
        self._path = rows_lib.path_in(folder)
        self._compiled = self.folder / ".cache" / "compiled"
        self._locks = self.folder / ".cache" / "claims"
        self._environment = environment()  # now, because the code was loaded now
        try:
            for path in (self._compiled, self._locks):
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise errors.UserError(
                f"--results: cannot write to {self.folder}: {error.strerror}"
            ) from error

    def share_programs(self) -> None:
        """Caches compiled programs in the folder, for all processes that fill it.

        Programs do not depend on learning rates or seeds, so one serves many trials.
        """
        jax.config.update("jax_compilation_cache_dir", str(self._compiled))

    def rows(self) -> dict[trial_lib.Trial, rows_lib.Row]:
        """Returns all rows by the identity of their trial, without a torn last line.

        Raises:
          UserError: a line or a trial cannot be read.
        """
        return rows_lib.by_trial(self.folder)

    def check_text(self, corpus: data.Corpus) -> None:
        """Raises UserError for a row, here or to reuse, on different text.

        A configuration names files. Their content differs between versions of Python.
        """
        for flag, known in (("--results", self.rows()), ("--reuse", self._others)):
            for row in known.values():
                found = row.corpus or corpus.hash
                errors.check(
                    flag,
                    found == corpus.hash,
                    f"contains trials on the text with hash {found[:16]}; the present "
                    f"text has {corpus.hash[:16]}. Choose another folder"
                    f"{_by_path(row.trial.experiment.data)}",
                )

    def reused(self, trial: trial_lib.Trial) -> rows_lib.Row | None:
        """Returns the row of the same trial in the folder to reuse, if any."""
        return self._others.get(trial.identity)

    def add(self, row: rows_lib.Row) -> None:
        """Appends a row durably, and adds the environment if it has none."""
        values = rows_lib.to_dict(row)
        values["environment"] = values["environment"] or self._environment
        line = json.dumps(values, allow_nan=False, separators=(",", ":")) + "\n"
        with self.hold("rows"), self._path.open("ab+") as file:
            # Drops a line that a killed process left unfinished.
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def claim(self, trial: trial_lib.Trial) -> Iterator[bool]:
        """Yields whether this process is to train the trial, within the block."""
        with self._lock(trial.digest, wait=False) as state:
            yield state != "busy" and trial.identity not in self.rows()

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Waits until no other process holds the name, and holds it in the block."""
        with self._lock(name, wait=True):
            yield

    @contextlib.contextmanager
    def _lock(self, name: str, *, wait: bool) -> Iterator[str]:
        with files.lock(self._locks / name, wait=wait) as state:
            if state == "unsupported":
                warnings.warn(
                    f"{self.folder} has no file locks; make sure that no other process "
                    "fills this folder",
                    stacklevel=4,
                )
            yield state


def fill(
    store: Store,
    plan: Plan,
    train: Callable[[trial_lib.Trial], rows_lib.Row],
    *,
    log: Callable[[str], None] = print,
) -> None:
    """Trains what `plan` asks for until it asks for nothing more.

    Args:
      store: where rows are and go.
      plan: from finished trials to the missing ones, most wanted first.
      train: from a trial to its row.
      log: receives a line per trial.
    """
    trained = False
    while missing := plan(store.rows()):
        trained = True
        for trial in missing:
            with store.claim(trial) as claimed:
                if not claimed:
                    continue
                row = store.reused(trial)
                if row is None:
                    log(f"training {describe(trial)}; {len(missing)} missing")
                    row = train(trial)
                store.add(row)
                log(f"finished {describe(trial)}: {outcome(row)}")
                break
        else:
            # Other processes train them all.
            time.sleep(_POLL_SECONDS)
    if not trained:
        log(
            f"nothing is missing: {store.folder} has all {len(store.rows())} trials; "
            "--results=DIR trains them again"
        )


def describe(trial: trial_lib.Trial) -> str:
    """Returns the trial in a few words."""
    experiment = trial.experiment
    return (
        f"{trial.method}, d {experiment.model.d_model}, learning rate {trial.setting}, "
        f"seed {experiment.seed}"
    )


def outcome(row: rows_lib.Row) -> str:
    """Returns the held-out losses of a row in a few words."""
    losses = [f"{budget}: {result.loss:.4f}" for budget, result in row.results.items()]
    return ", ".join(losses) + f" ({row.wall_seconds:.0f} s)"


def environment() -> dict[str, Any]:
    """Returns command, commit, versions and hardware of this process."""
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
    """How many this process may use; all where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _commit() -> str:
    """The commit of the code, marked if a Python file differs from it."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(pathlib.Path(__file__).parent), *words],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/*.py")
        return git("rev-parse", "--short=12", "HEAD") + (" changed" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
