"""SIGINT and SIGTERM, answered between two steps."""

import os
import signal
import threading
import types
from typing import Any

HANDLED = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal arrived before there was a state to save.

    Derives from `KeyboardInterrupt`, so that handlers of errors do not catch it.
    """

    def __init__(self, number: int):
        super().__init__(f"signal {number} before the first step")
        self.number = number


class Signals:
    """Turns the first signal into a request and lets the second end the process.

    A context manager that installs its handlers in the main thread only. Before `defer`
    a signal raises `Interrupted`.

    Attributes:
      received: number of the signal that arrived; None before one does.
    """

    def __init__(self):
        self.received: int | None = None
        self._deferred = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """Makes further signals wait for the end of the step."""
        self._deferred = True

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        if self.received is not None:
            os._exit(exit_code(number))
        self.received = number
        if not self._deferred:
            raise Interrupted(number)


def exit_code(number: int) -> int:
    """Returns the exit code of a process that a signal ended: 130 for SIGINT."""
    return 128 + number
