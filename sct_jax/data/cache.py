"""Folders and files of the cache. Complete or absent, for any number of writers."""

import contextlib
import glob
import os
import shutil
from collections.abc import Callable, Iterator

from sct_jax import errors, files


@contextlib.contextmanager
def writing(root: str) -> Iterator[None]:
    """Converts an `OSError` in the block into a UserError for `data.cache_dir`."""
    try:
        yield
    except OSError as error:
        raise errors.UserError(
            f"data.cache_dir: cannot write below {root!r} ({error}); "
            "name a writable folder with enough space"
        ) from error


def folder(
    path: str,
    *,
    build: Callable[[str], None],
    is_complete: Callable[[str], bool],
) -> None:
    """Creates the folder `path`, unless it is complete already.

    One process builds while the others wait. The folder gets its name when it is
    complete. A killed process leaves a partial folder, which the next build removes. An
    incomplete folder (truncated, edited) is replaced.

    Args:
      path: the folder.
      build: fills the empty folder given to it. Its errors propagate.
      is_complete: whether a folder, which may not exist, can be used.

    Raises:
      UserError: `path` cannot be written.
    """
    if is_complete(path):
        return
    root = os.path.dirname(path)
    with writing(root):
        os.makedirs(root, exist_ok=True)
        with files.lock(f"{path}.lock", wait=True) as state:
            if is_complete(path):
                return
            if state == "held":
                for left_over in glob.glob(f"{glob.escape(path)}.partial-*"):
                    shutil.rmtree(left_over, ignore_errors=True)
            partial = files.partial_path(path)
            os.mkdir(partial)
            try:
                build(partial)
                _rename(partial, path, is_complete=is_complete)
            finally:
                shutil.rmtree(partial, ignore_errors=True)


def _rename(partial: str, path: str, *, is_complete: Callable[[str], bool]) -> None:
    """Renames `partial` to `path`, unless a faster process has completed `path`."""
    try:
        os.rename(partial, path)
    except OSError:
        if is_complete(path):
            return
        damaged = files.partial_path(path)
        os.rename(path, damaged)
        os.rename(partial, path)
        shutil.rmtree(damaged, ignore_errors=True)


def write_text(path: str, text: str) -> None:
    """Writes `text` to `path` atomically; creates its folder.

    Raises:
      UserError: `path` cannot be written.
    """
    root = os.path.dirname(path)
    with writing(root):
        os.makedirs(root, exist_ok=True)
        files.replace_text(path, text)
