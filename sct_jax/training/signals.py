"""SIGINT, SIGTERM and SIGHUP: answered between two steps, or at once.

Python runs a handler between two instructions of the main thread, so never during a
long call of a library. A thread that reads the signals as they arrive acts then.
"""

import contextlib
import os
import select
import signal
import threading
import time
import types
from typing import Any

from sct_jax.training import exit_codes

HANDLED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)

# One request may arrive several times: `timeout` signals a process and then its group,
# and a terminal that closes hangs up its shell, which hangs up its jobs.
_ECHO = 0.1
_HANGUP_ECHO = 1.0


class Interrupted(KeyboardInterrupt):
    """A signal arrived while there was no state to save.

    Derives from `KeyboardInterrupt`, so that handlers of errors do not catch it.
    """

    def __init__(self, number: int):
        super().__init__(f"signal {number} with nothing to save")
        self.number = number


class Signals:
    """Turns the first signal into a request and lets the second end the process.

    A context manager that installs its handlers in the main thread only, and leaves a
    signal ignored that was ignored before, as `nohup` does. Before `defer` a signal
    raises `Interrupted`, for notebooks and for cleanup. Within a `Program` it also ends
    the process half a second later, whatever the main thread is doing, or at once after
    `end_at_once`. The second signal ends any process at once.

    Attributes:
      received: number of the signal that arrived; None before one does.
      raised: the same, if it raised `Interrupted`. A library may turn that into an
        error of its own.
    """

    # What the main thread has for its cleanup before the process ends.
    _grace = 0.5

    def __init__(self):
        self.received: int | None = None
        self.raised: int | None = None
        self._in_program = False
        self._deferred = False
        self._at_once = False
        self._previous: dict[int, Any] = {}
        self._wakeup: int | None = None

    def __enter__(self) -> "Signals":
        if threading.current_thread() is not threading.main_thread():
            return self
        arrivals, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        watch = threading.Thread(target=self._watch, args=(arrivals,), daemon=True)
        watch.start()
        # Handlers first: until the thread knows them, an outer one reads the signals.
        for number in HANDLED:
            handler = signal.getsignal(number)
            if handler in (signal.SIG_IGN, None):
                continue
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, Signals):
                self._in_program = outer._in_program
            self._previous[number] = handler
            signal.signal(number, self._receive)
        self._previous_wakeup = signal.set_wakeup_fd(
            self._wakeup, warn_on_full_buffer=False
        )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._wakeup is None:
            return
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self._wakeup)  # ends the thread
        self._wakeup = None

    def end_at_once(self) -> None:
        """Within a `Program`, makes a signal end the process without an exception.

        For native code that leaves nothing to clean up. An exception that unwinds a
        compilation frees what its threads still use, and the process crashes.
        """
        self._at_once = self._in_program

    def defer(self) -> None:
        """Makes further signals wait for the end of the step."""
        self._deferred = True

    def stop_deferring(self) -> None:
        """Makes a further signal raise again, once the last state is saved."""
        self._deferred = False

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        if self.received is None:  # else the thread decides
            self.received = number
            if not self._deferred and not self._at_once:
                self.raised = number
                raise Interrupted(number)

    def _watch(self, arrivals: int) -> None:
        """Reads signals until the other end closes."""
        first, since, deadline = 0, 0.0, None
        while True:
            wait = None if deadline is None else max(deadline - time.monotonic(), 0)
            if not select.select([arrivals], [], [], wait)[0]:
                deadline = None
                if not self._deferred:
                    end_process(first)
                continue
            byte = os.read(arrivals, 1)
            if not byte:
                os.close(arrivals)
                return
            number, now = byte[0], time.monotonic()
            if number not in self._previous:
                continue
            if not first:
                first, since = number, now
                if self._in_program and not self._deferred:
                    deadline = now + (0 if self._at_once else self._grace)
            elif now - since > (_HANGUP_ECHO if number == signal.SIGHUP else _ECHO):
                end_process(number)


class Program(Signals):
    """Lets the first signal end the process at once: nothing needs a cleanup.

    For what a program does before and after a run, such as imports. A `Signals` within
    it takes over for the run.
    """

    _grace = 0.0

    def __init__(self):
        super().__init__()
        self._in_program = True

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        pass  # an exception in the middle of an import has no end of consequences


def end_process(number: int) -> None:
    """Ends the process with the code of a signal, from any thread."""
    name = signal.Signals(number).name
    _write(2, f"interrupted by {name}; nothing more is saved\n".encode())
    if os.isatty(1):
        _write(1, b"\x1b[?25h")  # a progress bar hides the cursor
    os._exit(exit_codes.of_signal(number))


def _write(descriptor: int, text: bytes) -> None:
    """Writes without waiting: a terminal may be paused, a pipe full."""
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [descriptor], [], 0)[1]:
            os.write(descriptor, text)
