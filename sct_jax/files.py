"""Files that appear whole or not at all, and locks between processes."""

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from typing import Literal


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` to `path` atomically.

    Readers see the old content or the new one, never a part. The text goes to
    `<path>.partial-<uuid>` first, which is removed on failure. Only a killed process
    leaves it behind.

    Raises:
      OSError: the folder cannot be written.
    """
    partial = partial_path(path)
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
        raise


def partial_path(path: str | os.PathLike[str]) -> str:
    """Returns a unique name beside `path`, for content that is not complete yet."""
    return f"{os.fspath(path)}.partial-{uuid.uuid4().hex}"


@contextlib.contextmanager
def lock(
    path: str | os.PathLike[str], *, wait: bool
) -> Iterator[Literal["held", "busy", "unsupported"]]:
    """Holds an exclusive lock on the file `path` inside the block.

    The file is created if missing and keeps its content. The kernel drops the lock
    when the process dies, so a killed process blocks nobody. Nothing is locked after
    "busy" and "unsupported".

    Args:
      path: the lock file, in an existing folder.
      wait: wait for the holder; otherwise yield "busy" at once.

    Yields:
      "held", "busy", or "unsupported" on a file system without locks.

    Raises:
      OSError: the file cannot be opened.
    """
    state: Literal["held", "busy", "unsupported"] = "held"
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            state = "busy"
        except OSError:
            state = "unsupported"
        yield state
