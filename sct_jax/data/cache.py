"""Folders and files of the cache: whole and unchanged, or built again."""

import contextlib
import glob
import hashlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from sct_jax import errors, files

_CHECKSUM = "checksum"
_BLOCK_BYTES = 1 << 20

T = TypeVar("T")


class Damaged(Exception):
    """Something in the cache cannot be used. The message names it and says why."""


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
    load: Callable[[str], T],
    log: Callable[[str], None] = print,
) -> T:
    """Returns `load(path)`. Builds the folder first, unless it is there and whole.

    One process builds while the others wait. The folder gets its name when it is
    complete. A killed process leaves a partial folder, which the next build removes. A
    damaged folder (truncated, edited, of an earlier format) is reported and replaced.

    Args:
      path: the folder.
      build: fills the empty folder given to it. Its errors propagate.
      load: opens a folder, which may not exist. Raises `Damaged` if it cannot be used.
      log: receives one line if there is a folder that cannot be used.

    Raises:
      UserError: `path` cannot be written, or does not keep what is written.
    """
    with contextlib.suppress(Damaged):
        return load(path)
    root = os.path.dirname(path)
    with writing(root):
        os.makedirs(root, exist_ok=True)
        with files.lock(f"{path}.lock", wait=True) as state:
            try:
                return load(path)
            except Damaged as error:
                if os.path.lexists(path):
                    log(f"data: {error}; it is built again from its source")
            if state == "held":
                for left_over in glob.glob(f"{glob.escape(path)}.partial-*"):
                    _remove(left_over)
            partial = files.partial_path(path)
            os.mkdir(partial)
            try:
                build(partial)
                return _name(partial, path, load=load)
            except Damaged as error:
                raise errors.UserError(
                    f"data.cache_dir: {error}, just after it was written; run again, "
                    "or name a folder on another disk"
                ) from error
            finally:
                _remove(partial)


def _name(partial: str, path: str, *, load: Callable[[str], T]) -> T:
    """Renames `partial` to `path`, unless a faster process has completed `path`."""
    try:
        os.rename(partial, path)
    except OSError:
        with contextlib.suppress(Damaged):
            return load(path)
        damaged = files.partial_path(path)
        os.rename(path, damaged)
        os.rename(partial, path)
        _remove(damaged)
    return load(path)


def _remove(path: str) -> None:
    """Removes a folder, a file or a link, as far as possible."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.remove(path)


def checksums(folder: str, names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Returns size and CRC-32 of files, by their path relative to `folder`."""
    found = {}
    for name in names:
        with files.open_regular(os.path.join(folder, name)) as file:
            size = os.fstat(file.fileno()).st_size
            found[name] = {"bytes": size, "crc32": _crc32(file)}
    return found


def verify(folder: str, record: Mapping[str, Any]) -> None:
    """Checks that files of `folder` are as `checksums` found them.

    Reads them in full, in constant memory: about half a second per GB that the system
    has in memory.

    Args:
      folder: with the files.
      record: has the result of `checksums` under that name.

    Raises:
      Damaged: a file is missing, cannot be read, or has other bytes.
    """
    try:
        wanted = {
            name: (found["bytes"], found["crc32"])
            for name, found in record["checksums"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{folder!r} has another format") from error
    for name, (wanted_size, wanted_crc32) in wanted.items():
        path = os.path.join(folder, name)
        try:
            with files.open_regular(path) as file:
                # The size first: reading a long file only to refuse it takes long.
                size = os.fstat(file.fileno()).st_size
                crc32 = _crc32(file) if size == wanted_size else 0
        except OSError as error:
            raise Damaged(f"{path!r} cannot be read ({error.strerror})") from error
        if size != wanted_size:
            raise Damaged(
                f"{path!r} has {size:,} bytes, not the {wanted_size:,} that were "
                "written"
            )
        if crc32 != wanted_crc32:
            raise Damaged(
                f"{path!r} has other bytes than were written (checksum {crc32:08x}, "
                f"not {wanted_crc32:08x})"
            )


def _crc32(file: io.BufferedReader) -> int:
    crc32 = 0
    block = memoryview(bytearray(_BLOCK_BYTES))
    while count := file.readinto(block):
        crc32 = zlib.crc32(block[:count], crc32)
    return crc32


def write_record(path: str, record: Mapping[str, Any]) -> None:
    """Writes a JSON object, with a checksum of its own; creates its folder.

    Raises:
      UserError: `path` cannot be written.
    """
    root = os.path.dirname(path)
    with writing(root):
        os.makedirs(root, exist_ok=True)
        if os.path.isdir(path):
            _remove(path)
        sealed = {**record, _CHECKSUM: _record_hash(record)}
        files.replace_text(path, json.dumps(sealed, indent=2))


def read_record(path: str) -> dict[str, Any]:
    """Returns the JSON object that `write_record` wrote.

    Raises:
      Damaged: there is none, it cannot be read, or it was changed since.
    """
    try:
        with files.open_regular(path) as file:
            record = json.loads(file.read())
        if not isinstance(record, dict):
            raise Damaged(f"{path!r} is not a JSON object")
        checksum = record.pop(_CHECKSUM, None)
        expected = _record_hash(record)
    except OSError as error:
        raise Damaged(f"{path!r} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path!r} is not valid JSON ({error})") from error
    if checksum is None:
        raise Damaged(f"{path!r} has no checksum (an earlier version wrote it)")
    if checksum != expected:
        raise Damaged(f"{path!r} was changed after it was written")
    return record


def _record_hash(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
