"""Files that appear whole or not at all, folders held open, locks between processes."""

import contextlib
import errno
import fcntl
import io
import os
import pathlib
import shutil
import stat
import uuid
from collections.abc import Iterator
from typing import Literal


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` to `path` atomically.

    Readers see the old content or the new one, never a part, even after a crash of the
    machine. The text goes to `<path>.partial-<uuid>` first, which is removed on
    failure. Only a killed process leaves it behind.

    Raises:
      OSError: the folder cannot be written.
    """
    partial = partial_path(path)
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            sync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
        raise


def partial_path(path: str | os.PathLike[str]) -> str:
    """Returns a unique name beside `path`, for content that is not complete yet."""
    return f"{os.fspath(path)}.partial-{uuid.uuid4().hex}"


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Returns the file `path`, opened to read its bytes.

    Never waits, as opening a pipe without a writer does.

    Raises:
      OSError: the file cannot be read, or is a folder, a pipe or a device.
    """
    file = open(path, "rb", opener=_open_at_once)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))
    return file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def sync(descriptor: int) -> None:
    """Returns once the content of an open file or folder has reached the disk.

    Raises:
      OSError: it could not be written. Nothing is raised on a file system that cannot
        tell.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Returns once the names in a folder have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: str | os.PathLike[str]) -> None:
    """Removes a file, a link, or a folder with all that is in it.

    Raises:
      OSError: it is not there, or stays in part.
    """
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.remove(path)


class HeldFolder:
    """A folder that stays the same one, whatever becomes of its name.

    Attributes:
      path: its absolute name at the time.
      alias: a short and plain name of it, valid until `close`. It follows the folder if
        that is renamed, and hides every character that a library may misread. The same
        as `path` on a system without /proc.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens the folder.

        Raises:
          OSError: it does not exist or cannot be read.
        """
        self.path = pathlib.Path(path).absolute()
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        alias = pathlib.Path(f"/proc/self/fd/{self._descriptor}")
        self.alias = alias if alias.is_dir() else self.path

    def is_there(self) -> bool:
        """Returns whether `path` still leads to this folder."""
        try:
            found = os.stat(self.path)
        except OSError:
            return False
        return os.path.samestat(found, os.fstat(self._descriptor))

    def close(self) -> None:
        """Lets go of the folder."""
        os.close(self._descriptor)


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
    with open(path, "ab", opener=_open_at_once) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            state = "busy"
        except OSError:
            state = "unsupported"
        yield state
