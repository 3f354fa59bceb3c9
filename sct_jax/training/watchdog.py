"""Ends a run in which nothing happens any more, and says where it stands."""

import contextlib
import faulthandler
import os
import pathlib
import threading
import time
from collections.abc import Callable

from sct_jax.training import exit_codes


class Watchdog:
    """Ends the process once `kick` has not been called for `timeout` seconds.

    Writes the stacks of all threads to `stacks-<UTC time>.txt` in `folder` and exits
    with `ExitCode.STALLED`. A context manager. It waits for the first `kick`, so that
    what comes before may take any time. Time in which the process is stopped counts.

    A thread of Python cannot act while native code holds the interpreter's lock. Once
    twice the timeout has passed, a native thread writes the stacks to standard error
    and exits with code 1, as `faulthandler` knows no other.
    """

    def __init__(
        self,
        timeout: float | None,
        folder: pathlib.Path,
        *,
        before_exit: Callable[[int, str], None] = lambda code, reason: None,
    ):
        """Starts nothing yet.

        Args:
          timeout: seconds; None never ends anything.
          folder: receives the stacks.
          before_exit: called with the exit code and the reason; returns in seconds.
        """
        self._timeout = timeout
        self._before_exit = before_exit
        self._folder = folder
        self._kicked: float | None = None
        self._closed = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._timeout is not None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._timeout is not None:
            self._closed.set()
            self._thread.join()  # before the thread can arm the native timer again
            faulthandler.cancel_dump_traceback_later()

    def kick(self) -> None:
        """Starts the time anew."""
        self._kicked = time.monotonic()

    def pause(self) -> None:
        """Lets the next `kick` start the time: what comes before it may take any."""
        self._kicked = None

    def is_stalled(self) -> bool:
        """Returns whether the last `kick` is as long ago as the timeout."""
        kicked = self._kicked  # another thread may pause in between
        if self._timeout is None or kicked is None:
            return False
        return time.monotonic() - kicked >= self._timeout

    def _watch(self) -> None:
        assert self._timeout is not None
        while not self._closed.wait(self._timeout / 8):
            if self._kicked is None:
                faulthandler.cancel_dump_traceback_later()
                continue
            if self.is_stalled():
                self._end(self._timeout)
            with contextlib.suppress(OSError, ValueError):  # standard error is closed
                faulthandler.dump_traceback_later(2 * self._timeout, exit=True, file=2)

    def _end(self, timeout: float) -> None:
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        path = self._folder / f"stacks-{stamp}.txt"
        where = f"see {path}"
        try:
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            where = f"{path} cannot be written: {error.strerror}"
        with contextlib.suppress(OSError):
            text = (
                f"error: stalled: nothing happened for {timeout:g} seconds; {where}. "
                "The same command resumes from the newest checkpoint\n"
            )
            os.write(2, os.fsencode(text))
        self._before_exit(exit_codes.ExitCode.STALLED, f"stalled, {where}")
        os._exit(exit_codes.ExitCode.STALLED)
