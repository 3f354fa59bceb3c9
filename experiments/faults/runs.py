"""Commands that faults are injected into: processes of their own, or calls."""

import contextlib
import io
import os
import pathlib
import signal
import subprocess
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sct_jax.training import cli

_alive: set["Process"] = set()

LIMIT = 180.0  # seconds; nothing here takes a fifth of that on two idle cores
_POLL = 0.002


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
      code: exit code, negative for a signal that nothing answered; None for a command
        that was still running at its time limit.
      out: standard output.
      err: standard error.
      seconds: from the start, or from the last signal.
      megabytes: largest resident memory; 0 for a call, and where there is no /proc.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    megabytes: int = 0

    @property
    def text(self) -> str:
        """Returns all that was printed."""
        return self.out + self.err

    @property
    def errors(self) -> list[str]:
        """Returns the lines that say what is wrong."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


class Process:
    """A command in a session of its own.

    A context manager: nothing of that session runs on after the block.
    """

    def __init__(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        folder: pathlib.Path,
        environment: Mapping[str, str],
        stdout: Any = None,
        stderr: Any = None,
        stdin: Any = subprocess.DEVNULL,
        before: Callable[[], Any] | None = None,
    ):
        """Starts the command.

        Args:
          command: program and arguments.
          folder: in which it runs.
          environment: all of its variables.
          stdout: where it prints; kept in `out` if None.
          stderr: likewise, in `err`.
          stdin: what it reads.
          before: called in the new process, before the program.
        """
        # Unnamed files: a pipe that nobody reads would stop the command.
        self._files = [tempfile.TemporaryFile() for _ in range(2)]
        self._code: int | None = None
        self._megabytes = 0
        self._since = time.monotonic()
        self._popen = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=stdin,
            stdout=self._files[0] if stdout is None else stdout,
            stderr=self._files[1] if stderr is None else stderr,
            start_new_session=True,
            preexec_fn=before,
        )
        _alive.add(self)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill_session()
        self._reap(wait=True)
        _alive.discard(self)
        for file in self._files:
            file.close()

    @property
    def pid(self) -> int:
        """Returns the number of the process."""
        return self._popen.pid

    @property
    def out(self) -> str:
        """Returns what it has printed so far."""
        return _content(self._files[0])

    @property
    def err(self) -> str:
        """Returns what it has said on standard error so far."""
        return _content(self._files[1])

    def is_running(self) -> bool:
        """Returns whether the process has not ended yet."""
        return not self._reap(wait=False)

    def until(self, holds: Callable[[], Any], *, limit: float = LIMIT) -> bool:
        """Returns True once `holds()`; False if the process ends before, or at `limit`.

        Args:
          holds: called again and again.
          limit: in seconds.
        """
        end = time.monotonic() + limit
        while time.monotonic() < end:
            if holds():
                return True
            if not self.is_running():
                return False
            time.sleep(_POLL)
        return False

    def signal(self, number: int) -> bool:
        """Sends a signal; returns whether the process was still there to get it."""
        if not self.is_running():
            return False
        self._since = time.monotonic()
        os.kill(self.pid, number)
        return True

    def wait(self, *, limit: float = LIMIT) -> Ended:
        """Returns how the process ended; at the limit it is killed."""
        end = time.monotonic() + limit
        while self.is_running() and time.monotonic() < end:
            time.sleep(_POLL)
        seconds = time.monotonic() - self._since
        in_time = not self.is_running()
        if not in_time:
            self.kill_session()
            self._reap(wait=True)
        code = self._code if in_time else None
        return Ended(code, self.out, self.err, seconds, self._megabytes)

    def _reap(self, *, wait: bool) -> bool:
        """Whether the process has ended; then its code is known."""
        if self._code is None:
            # `ru_maxrss` would do no good: it starts with the size of this process.
            self._megabytes = max(self._megabytes, _peak_megabytes(self.pid))
            pid, status = os.waitpid(self.pid, 0 if wait else os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
                self._popen.returncode = self._code
        return self._code is not None

    def kill_session(self) -> None:
        """Kills the process, and all that it has started in its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def end_all() -> None:
    """Kills all processes that this one has started and not let go of."""
    for process in list(_alive):
        process.kill_session()


def _peak_megabytes(pid: int) -> int:
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return max(peaks, default=0) // 1024


def _content(file: Any) -> str:
    # Not `read`, which would move the position at which the process writes.
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode(errors="backslashreplace")


def call(*arguments: str, folder: pathlib.Path | None = None) -> Ended:
    """Returns how the training command ends in this process.

    Args:
      *arguments: its flags.
      folder: the working directory; this one if None.
    """
    out, err = io.StringIO(), io.StringIO()
    began = time.monotonic()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(folder or "."),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("always")
        try:
            code = int(cli.main(arguments))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return Ended(code, out.getvalue(), err.getvalue(), time.monotonic() - began)


class TooLate(BaseException):
    """A deadline has passed. Not an `Exception`: no handler of errors takes it."""


class Deadline:
    """Raises `TooLate` in the block once it takes longer than `seconds`.

    Only in the main thread. Deadlines nest.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds

    def __enter__(self) -> None:
        self._began = time.monotonic()
        self._handler = signal.signal(signal.SIGALRM, self._end)
        self._outer, _ = signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def __exit__(self, *exception: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._handler)
        if self._outer:
            left = self._outer - (time.monotonic() - self._began)
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.01))

    def _end(self, number: int, frame: types.FrameType | None) -> None:
        raise TooLate(f"took longer than {self._seconds:g} seconds")
