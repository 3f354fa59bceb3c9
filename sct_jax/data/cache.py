"""Folders and files that appear whole or not at all, whoever else is writing."""

import contextlib
import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Callable, Iterator

from sct_jax import errors


@contextlib.contextmanager
def writing(root: str) -> Iterator[None]:
    """An `OSError` inside the block leaves it as a UserError of `data.cache_dir`."""
    try:
        yield
    except OSError as error:
        raise errors.UserError(
            f"data.cache_dir: cannot write below {root!r} ({error}); "
            "name a folder that is writable and has room"
        ) from error


@contextlib.contextmanager
def _locked(path: str) -> Iterator[bool]:
    """The block runs alone; yields False on file systems that have no locks.

    The kernel drops the lock with its process, so a killed one leaves none behind.
    """
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            held = True
        except OSError:
            held = False
        yield held


def folder(
    path: str,
    *,
    build: Callable[[str], None],
    is_complete: Callable[[str], bool],
) -> None:
    """`path` is a folder that `is_complete`: found, or written by `build` and renamed.

    Of several processes one builds while the others wait for it. A process killed in
    the middle leaves only a folder of another name, which the next build removes. A
    folder that is there but not complete (cut short, edited) is replaced.

    Args:
        path: where the folder shall be.
        build: fills the empty folder that it is given; what it raises, leaves.
        is_complete: whether a folder, which may not exist, can be used.

    Raises:
        UserError: `path` cannot be written.
    """
    if is_complete(path):
        return
    root = os.path.dirname(path)
    with writing(root):
        os.makedirs(root, exist_ok=True)
        with _locked(f"{path}.lock") as held:
            if is_complete(path):
                return
            if held:
                for left_over in glob.glob(f"{glob.escape(path)}.partial-*"):
                    shutil.rmtree(left_over, ignore_errors=True)
            partial = f"{path}.partial-{uuid.uuid4().hex}"
            os.mkdir(partial)
            try:
                build(partial)
                _rename(partial, path, is_complete=is_complete)
            finally:
                shutil.rmtree(partial, ignore_errors=True)


def _rename(partial: str, path: str, *, is_complete: Callable[[str], bool]) -> None:
    """`path` is complete: `partial` renamed, or what a faster process put there."""
    try:
        os.rename(partial, path)
    except OSError:
        if is_complete(path):
            return
        damaged = f"{path}.partial-{uuid.uuid4().hex}"
        os.rename(path, damaged)
        os.rename(partial, path)
        shutil.rmtree(damaged, ignore_errors=True)


def write_text(path: str, text: str) -> None:
    """The file `path` holds `text`, and at no time a part of it."""
    with writing(os.path.dirname(path)):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f"{path}.partial-{uuid.uuid4().hex}"
        try:
            with open(partial, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(partial, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(partial)
