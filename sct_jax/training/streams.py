"""Standard output and error that never stop a run.

A run outlives whoever reads its output: a closed pipe or terminal, a full disk, an
encoding without the letters of a file name. Such text is lost or escaped.
"""

import contextlib
import sys
from typing import Any


class ForgivingStream:
    """A text stream that drops what cannot be written.

    It escapes what its encoding cannot represent.
    Everything else is that of the stream it wraps.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the text if possible; characters beyond the encoding as escapes."""
        with contextlib.suppress(OSError, ValueError):
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                escaped = text.encode(encoding, "backslashreplace")
                self._stream.write(escaped.decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flushes the stream if possible."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def forgiving(stream: Any) -> Any:
    """Returns the stream, wrapped unless it is already; None stays None."""
    if stream is None or isinstance(stream, ForgivingStream):
        return stream
    return ForgivingStream(stream)


def forgive_all() -> None:
    """Wraps standard output and error, for a process of our own."""
    sys.stdout, sys.stderr = forgiving(sys.stdout), forgiving(sys.stderr)


def flush() -> None:
    """Flushes standard output and error, as `os._exit` does not."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
