"""The temporary folder of a suite: text, caches, and runs that nothing interrupts."""

import json
import os
import pathlib
import random
import shutil
import sys
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.faults import runs
from sct_jax import files
from sct_jax.training import records

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = pathlib.Path(__file__).with_name("tiny.py")
NUM_STEPS = 40
STANDS_AT = 30  # the newest checkpoint of `Workspace.interrupted`

Changes = Mapping[str, Any]  # fields of the configuration and their values
UNCHANGED: Mapping[str, Any] = types.MappingProxyType({})
# Runs that a fault meets in the middle.
LONG: Changes = {"num_steps": 400, "checkpoint.every": 20, "eval.every": 100}
ENDLESS: Changes = {**LONG, "num_steps": 1_000_000, "checkpoint.keep": 5}

_SYLLABLES = ("ka", "to", "mi", "ren", "lu", "\n", "sha", "été", "{7}", " 042 ")


class State(NamedTuple):
    """Step of a checkpoint, and shape, dtype and CRC-32 of each of its arrays."""

    step: int
    leaves: dict[str, Any]


class Workspace:
    """A folder with all that the cases share.

    The processes of a suite open the same one.

    Attributes:
      root: the folder.
      seed: of the suite.
      source: glob of the text.
    """

    def __init__(self, root: pathlib.Path, seed: int, *, quick: bool = False):
        """Opens the folder, and writes the text unless it is there.

        Args:
          root: the folder.
          seed: of the suite.
          quick: whether programs are compiled in a hurry.
        """
        self.root = root
        self.seed = seed
        self._hurry = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if quick else {}
        self.source = str(root / "corpus" / "*.txt")
        self.cache = root / "cache"
        self.temporary = root / "tmp"
        self.temporary.mkdir(exist_ok=True)
        if not (root / "corpus").exists():
            write_corpus(root / "corpus", seed=seed)

    def new_folder(self, name: str) -> pathlib.Path:
        """Returns a new empty folder."""
        folder = self.root / "cases" / name
        folder.mkdir(parents=True)
        return folder

    def remove(self, folder: pathlib.Path) -> None:
        """Removes a folder of this workspace."""
        shutil.rmtree(folder, ignore_errors=True)

    def environment(self, **changes: str) -> dict[str, str]:
        """Returns the variables of a process that trains on one CPU device."""
        dropped = ("XLA_FLAGS", "PYTHONIOENCODING", "PYTHONHASHSEED")
        kept = {k: v for k, v in os.environ.items() if k not in dropped}
        return {
            **kept,
            "GLIBC_TUNABLES": "",  # set: a program does not start itself again
            "JAX_COMPILATION_CACHE_DIR": str(self.root / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(self.temporary),
            "XDG_CACHE_HOME": str(self.cache),
            **self._hurry,
            **changes,
        }

    # --- Runs.

    def flags(
        self, workdir: str | os.PathLike[str], changes: Changes = UNCHANGED
    ) -> list[str]:
        """Returns the flags of a run of the tiny model."""
        fields = {"data.source": self.source, **changes}
        return [
            f"--config={CONFIG}",
            f"--workdir={os.fspath(workdir)}",
            *(f"--config.{name}={value}" for name, value in fields.items()),
        ]

    def command(
        self, workdir: str | os.PathLike[str], changes: Changes = UNCHANGED
    ) -> list[str]:
        """Returns the command that trains the tiny model."""
        program = [sys.executable, "-m", "sct_jax.training"]
        return [*program, *self.flags(workdir, changes)]

    def start(
        self,
        workdir: str | os.PathLike[str],
        changes: Changes = UNCHANGED,
        *,
        environment: Mapping[str, str] = UNCHANGED,
        **options: Any,
    ) -> runs.Process:
        """Returns a new process that trains the tiny model, see `runs.Process`."""
        return runs.Process(
            self.command(workdir, changes),
            folder=self.root,
            environment=self.environment(**environment),
            **options,
        )

    def train(
        self,
        workdir: str | os.PathLike[str],
        changes: Changes = UNCHANGED,
        *,
        environment: Mapping[str, str] = UNCHANGED,
        limit: float = runs.LIMIT,
        **options: Any,
    ) -> runs.Ended:
        """Returns how a process that trains the tiny model ended."""
        with self.start(
            workdir, changes, environment=environment, **options
        ) as process:
            return process.wait(limit=limit)

    def clean(self, changes: Changes = UNCHANGED) -> pathlib.Path:
        """Returns the workdir of a run that nothing interrupted; not to be changed."""
        name = "-".join(["clean", *(f"{k}={v}" for k, v in sorted(changes.items()))])
        folder = self.root / "clean" / name
        folder.parent.mkdir(exist_ok=True)
        with files.lock(folder.with_name(f"{name}.lock"), wait=True):
            if not folder.exists():
                self._train_clean(folder, changes)
        return folder

    def _train_clean(self, folder: pathlib.Path, changes: Changes) -> None:
        partial = folder.with_name(f"partial-{folder.name}")
        ended = self.train(partial, changes)
        if ended.code != 0:
            raise RuntimeError(f"the tiny model does not train: {ended.text[-500:]}")
        (partial / "stdout").write_text(ended.out)
        partial.rename(folder)

    def interrupted(
        self,
        folder: pathlib.Path,
        *,
        step: int = STANDS_AT,
        changes: Changes = UNCHANGED,
    ) -> pathlib.Path:
        """Makes `folder` a run whose process was killed after the save of `step`."""
        shutil.copytree(self.clean(changes), folder)
        (folder / "stdout").unlink()
        for saved in saved_steps(folder):
            if saved > step:
                shutil.rmtree(folder / "checkpoints" / str(saved))
        return folder


def write_corpus(folder: pathlib.Path, *, seed: int, files: int = 120) -> str:
    """Writes files of random words and returns their glob."""
    folder.mkdir(parents=True)
    for number in range(files):
        rng = random.Random(f"{seed} corpus {number}")
        words = ["".join(rng.choices(_SYLLABLES, k=3)) for _ in range(200)]
        (folder / f"{number}.txt").write_text(" ".join(words), encoding="utf-8")
    return str(folder / "*.txt")


# --- What a run has written.


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps that have a checkpoint, oldest first."""
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(int(name) for name in os.listdir(folder) if name.isdigit())


def state_at(workdir: pathlib.Path, step: int) -> State:
    """Returns what a checkpoint holds, once all of its files are verified.

    Raises:
      DamagedError: it is not as it was written.
    """
    folder = workdir / "checkpoints" / str(step)
    record = records.read(folder, step)
    records.check_files(folder, record)
    return State(step, record["leaves"])


def final_state(workdir: pathlib.Path) -> State:
    """Returns what the newest checkpoint holds, see `state_at`."""
    return state_at(workdir, saved_steps(workdir)[-1])


def half_saves(workdir: pathlib.Path) -> list[str]:
    """Returns the names of saves in progress, or of what was left of one."""
    try:
        names = os.listdir(workdir / "checkpoints")
    except OSError:
        return []
    return [name for name in names if name.startswith(".partial-")]


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the logged rows; a line that is still being written is left out."""
    try:
        lines = (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
    except OSError:
        return []
    return [json.loads(line) for line in lines]


def last_step(workdir: pathlib.Path) -> int:
    """Returns the last logged step, from the end of the file alone."""
    try:
        with open(workdir / "metrics.jsonl", "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - 4096, 0))
            lines = file.read().split(b"\n")
    except OSError:
        return 0
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0


def timeless_rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the logged rows without their speed."""
    return [
        {k: v for k, v in row.items() if k not in ("tokens_per_second", "mfu")}
        for row in rows(workdir)
    ]


def bytes_below(folder: pathlib.Path) -> dict[str, bytes]:
    """Returns the content of every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }
