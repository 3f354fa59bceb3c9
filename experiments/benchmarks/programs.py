"""Runs programs beside each other, every one in a process of its own.

Seconds come from inside the programs, so that start and compilation do not count.
"""

import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.benchmarks import machine

ROOT = pathlib.Path(__file__).parents[2]

Program = Callable[[], dict[str, Any]]  # runs it and returns its figures


class ProgramError(RuntimeError):
    """A program failed; the message is the last line that it wrote."""


def medians(programs: Mapping[str, Program], *, rounds: int) -> dict[str, Any]:
    """Returns the median of every numeric figure, by program and figure.

    The programs take turns (A B A B), so that noise of the machine hits all alike.

    Args:
      programs: run in this order within a round.
      rounds: runs of each program.

    Raises:
      ProgramError: if one fails.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, run in programs.items():
            found[name].append(run())
    return {
        name: {
            key: statistics.median(run[key] for run in runs)
            for key, value in runs[0].items()
            if isinstance(value, int | float)
        }
        for name, runs in found.items()
    }


def step70b(*flags: str) -> Program:
    """Returns `experiments.step70b` with these flags."""

    def run():
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "figures.json"
            _run(["-m", "experiments.step70b", f"--json={path}", *flags])
            return json.loads(path.read_text())

    return run


def published(*flags: str) -> Program:
    """Returns the authors' program in PyTorch with these flags."""
    command = ["-m", "experiments.benchmarks.published", *flags]
    return lambda: json.loads(_run(command).splitlines()[-1])


_IMPORT = """
import json, sys
from experiments.benchmarks import decode, machine
from sct_jax.interop import importing, source
rules = decode.import_rules(int(sys.argv[2]))
model = importing.load(source.open_folder(sys.argv[1]), rules)
print(json.dumps({"peak_rss_bytes": machine.peak_rss_bytes()}))
"""


def imported(folder: str | os.PathLike[str], *, rank: int) -> Program:
    """Returns an import of a checkpoint, with all matrices of a layer at this rank."""
    command = ["-c", _IMPORT, str(folder), str(rank)]
    return lambda: json.loads(_run(command).splitlines()[-1])


def tokens_per_second(folder: str | os.PathLike[str], *, steps: int) -> Program:
    """Returns the measurement of `tokens_per_second` on a checkout.

    Args:
      folder: the checkout; its `sct_jax` and its `configs` are measured.
      steps: number of timed steps.
    """
    folder = str(pathlib.Path(folder).resolve())
    script = str(ROOT / "experiments/benchmarks/tokens_per_second.py")
    # -P: the folder of the script is no place to import from.
    command = ["-P", script, folder, str(steps)]
    run = functools.partial(_run, command, folder=folder)
    return lambda: json.loads(run().splitlines()[-1])


def _run(command: Sequence[str], *, folder: str | os.PathLike[str] = ROOT) -> str:
    """Runs Python in a folder and returns what it printed."""
    machine.release_memory()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = (done.stderr.strip() or "no message").splitlines()
        raise ProgramError(f"exit code {done.returncode}: {lines[-1]}")
    return done.stdout
