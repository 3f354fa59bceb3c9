"""What a checkpoint says about itself, and whether its files agree.

The folder of a step holds `state/`, with the arrays, and `record.json`, written last.
The record has a checksum of its own, and the size and CRC-32 of every file in `state/`.
That of every array is missing where several processes wrote it.
All of it is data: nothing is executed, and no path leads out of the folder. Earlier
versions wrote `record/metadata`, without checksums of files.
"""

import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from sct_jax import errors, files

Record = dict[str, Any]
T = TypeVar("T")

STATE = "state"
FORMAT = 3
_FORMAT_WITH_SUMS = 2  # of arrays, each of which has a CRC-32

_FILE = "record.json"
_EARLIER_FILE = "record/metadata"
_CHUNK = 1 << 20
_PIECE = 1 << 24
_MAX_THREADS = 8
# Errors of the process or its rights, which say nothing about the checkpoint.
_NO_DAMAGE = (
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
)


class DamagedError(Exception):
    """A checkpoint is not what was saved. The message names the file or the array."""


def write(folder: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Seals a step folder: lists the files of `state/` in a record beside them.

    Returns once all of it has reached the disk.

    Args:
      folder: with the arrays in `state/`.
      record: JSON, see `read`.

    Raises:
      OSError: the folder cannot be read or written.
    """
    sizes = {f"{STATE}/{name}": size for name, size in _sizes(folder / STATE).items()}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        # While the disk is at work, the processor is not.
        found = pool.submit(_crc32s, folder, sizes)
        for name in sizes:
            with files.open_regular(folder / name) as file:
                files.sync(file.fileno())
        sums = found.result()
    listed = {name: {"bytes": sizes[name], "crc32": sums[name]} for name in sizes}
    summed = all("crc32" in leaf for leaf in record["leaves"].values())
    format_ = _FORMAT_WITH_SUMS if summed else FORMAT
    sealed = {**record, "format": format_, "files": listed}
    sealed["checksum"] = _checksum(sealed)
    files.replace_text(folder / _FILE, json.dumps(sealed, indent=1) + "\n")
    for parent, _, _ in os.walk(folder):
        files.sync_folder(parent)


def read(folder: pathlib.Path, step: int) -> Record:
    """Returns the record of a step folder, whose fields have the right types.

    It holds `step` and `leaves`. Fields that may be missing: `config`, `data_position`,
    `phase_start`, `ranks`, `corpus`, `tokenizer`, `init_from`, `parameters_alone`, and
    from earlier versions `files` and `finite`.

    Args:
      folder: of the step.
      step: that the folder belongs to.

    Raises:
      DamagedError: the record is missing, was changed, or is of another step.
      UserError: it may not be read, or a later version wrote it.
    """
    earlier = not (folder / _FILE).exists() and (folder / _EARLIER_FILE).exists()
    name = _EARLIER_FILE if earlier else _FILE
    with as_damage(folder, name):
        for part in (name.partition("/")[0], name):
            _check(not (folder / part).is_symlink(), f"{part}: is a link")
        with files.open_regular(folder / name) as file:
            record = _parse(file.read(), name)
    if not earlier:
        checksum = record.pop("checksum", "")
        _check(checksum == _checksum(record), f"{name}: its checksum is wrong")
    required = _REQUIRED if earlier else _REQUIRED_NOW
    for field, (holds, kind) in _FIELDS.items():
        known = holds(record[field]) if field in record else field not in required
        _check(known, f"{name}: {field!r} is not {kind}")
    _check(record["step"] == step, f"{name}: it is of step {record['step']}")
    errors.check(
        "workdir",
        record.get("format", 0) <= FORMAT,
        f"a later version of sct_jax wrote checkpoint {step}; upgrade sct_jax",
    )
    return record


def check_files(folder: pathlib.Path, record: Record, *, content: bool = True) -> None:
    """Returns if the files of a step folder are those of its record.

    A file in `state/` that the record does not list is damage, unless its name starts
    with a dot: a reader of the folder might take it for its own. Elsewhere it has no
    effect.

    Args:
      folder: of the step.
      record: from `read`. One without `files` passes unless the folder has links.
      content: also read all files.

    Raises:
      DamagedError: naming the first file that differs.
      UserError: a file may not be read.
    """
    state = folder / STATE
    with as_damage(folder, STATE):
        found = {f"{STATE}/{name}": size for name, size in _sizes(state).items()}
    if "files" not in record:
        return
    listed = record["files"]
    for name, wanted in listed.items():
        _check(name in found, f"{name}: is missing")
        size = wanted["bytes"]
        _check(found[name] == size, f"{name}: has {found[name]} bytes, not {size}")
    for name in found.keys() - listed.keys():
        hidden = name.rpartition("/")[2].startswith(".")
        _check(hidden, f"{name}: is not in the record")
    if not content:
        return

    with as_damage(folder, STATE):
        sums = _crc32s(folder, {name: found[name] for name in listed})
    for name, wanted in listed.items():
        same = sums[name] == wanted["crc32"]
        _check(same, f"{name}: its content differs from the record")


def in_parallel(
    function: Callable[[T], Any], items: Iterable[T], *, share: float = 1.0
) -> dict[T, Any]:
    """Returns the result for every item, computed on several cores.

    Args:
      function: releases the lock of the interpreter.
      items: its arguments.
      share: of the cores to use, at least one.
    """
    items = list(items)
    threads = min(_MAX_THREADS, max(1, int(share * (os.cpu_count() or 1))))
    try:
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            return dict(zip(items, pool.map(function, items), strict=True))
    except RuntimeError:  # no further thread can be started
        return {item: function(item) for item in items}


def _sizes(folder: pathlib.Path) -> dict[str, int]:
    """Size of every file below a folder, by path. A link is damage."""

    def refuse(error: OSError) -> None:
        raise error

    found = {}
    links = [folder] if folder.is_symlink() else []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        paths = [pathlib.Path(parent, name) for name in folders + names]
        links += [path for path in paths if path.is_symlink()]
        for path in paths[len(folders) :]:
            found[path.relative_to(folder).as_posix()] = path.lstat().st_size
    for path in links:
        raise DamagedError(f"{path.relative_to(folder.parent)}: is a link")
    return found


def _crc32s(folder: pathlib.Path, sizes: Mapping[str, int]) -> dict[str, int]:
    """CRC-32 of files by path. Large ones are read in pieces, on several cores."""

    def crc32(piece: tuple[str, int]) -> int:
        (name, start), crc = piece, 0
        left, buffer = min(_PIECE, sizes[name] - start), memoryview(bytearray(_CHUNK))
        with files.open_regular(folder / name) as file:
            file.seek(start)
            while left and (count := file.readinto(buffer[:left])):
                left -= count
                crc = zlib.crc32(buffer[:count], crc)
        return crc

    pieces = [(name, at) for name in sizes for at in range(0, sizes[name], _PIECE)]
    whole = dict.fromkeys(sizes, 0)
    for (name, start), crc in in_parallel(crc32, pieces).items():
        length = min(_PIECE, sizes[name] - start)
        whole[name] = _times(_power(8 * length), whole[name]) ^ crc
    return whole


# The CRC-32 of two texts in a row is x^n a + b, of the CRC-32 a of the first, b of the
# second, and its length n in bits: polynomials over two elements, modulo the one of
# CRC-32. Their highest coefficient is the lowest bit.


def _times(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
    return product


@functools.cache
def _power(n: int) -> int:
    """Returns x^n."""
    power, square = 1 << 31, 1 << 30
    while n:
        if n & 1:
            power = _times(power, square)
        n, square = n >> 1, _times(square, square)
    return power


@contextlib.contextmanager
def as_damage(folder: pathlib.Path, name: str) -> Iterator[None]:
    """Turns an error of the file system into what it says about the checkpoint."""
    try:
        yield
    except OSError as error:
        found = str(error.filename).removeprefix(f"{folder}/")
        name = name if found == str(error.filename) else found
        if error.errno in _NO_DAMAGE:
            raise errors.UserError(
                f"workdir: {name} of checkpoint {folder.name} cannot be read: "
                f"{error.strerror}; this says nothing about its content"
            ) from error
        raise DamagedError(f"{name}: {error.strerror or error}") from error


def _parse(content: bytes, name: str) -> Record:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{name}: is not JSON") from error
    _check(isinstance(record, dict), f"{name}: is not a record")
    return record


def _checksum(record: Mapping[str, Any]) -> str | None:
    """Of the values, however they are written; None for values that JSON has not."""
    try:
        text = json.dumps(
            record, sort_keys=True, separators=(",", ":"), allow_nan=False
        )
    except (ValueError, RecursionError):
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise DamagedError(message)


# --- The types of the fields: a record may hold anything that JSON can.


def _is_count(x: Any) -> bool:
    return type(x) is int and x >= 0  # True is an int too


def _is_map(x: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(x, dict) and all(map(holds, x.values()))


def _is_array(x: Any) -> bool:
    return (
        isinstance(x, dict)
        and x.keys() - {"crc32"} == {"shape", "dtype"}
        and isinstance(x["shape"], list)
        and all(map(_is_count, x["shape"]))
        and isinstance(x["dtype"], str)
        and _is_count(x.get("crc32", 0))
    )


def _is_listing(x: Any) -> bool:
    sums = _is_map(
        x, lambda y: _is_map(y, _is_count) and y.keys() == {"bytes", "crc32"}
    )
    return sums and all(map(_is_inside, x))


def _is_inside(name: str) -> bool:
    """Whether a path stays in `state/`."""
    parts = name.split("/")
    return (
        len(parts) > 1
        and parts[0] == STATE
        and not {"", ".", ".."} & set(parts)
        and "\0" not in name
    )


_is_text = lambda x: isinstance(x, str)
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (_is_count, "a number of steps"),
    "leaves": (lambda x: _is_map(x, _is_array), "a list of arrays"),
    "format": (_is_count, "a number"),
    "files": (_is_listing, "a list of files in state/"),
    "finite": (lambda x: isinstance(x, bool), "true or false"),
    "config": (lambda x: isinstance(x, dict), "a configuration"),
    "data_position": (_is_count, "a position"),
    "ranks": (lambda x: _is_map(x, _is_count), "a rank per weight"),
    "corpus": (_is_text, "a hash"),
    "tokenizer": (_is_text, "a hash"),
    "phase_start": (_is_count, "a number of steps"),
    "init_from": (lambda x: isinstance(x, dict), "a description of a run"),
    "parameters_alone": (lambda x: isinstance(x, bool), "true or false"),
}
_REQUIRED = ("step", "leaves")
_REQUIRED_NOW = (*_REQUIRED, "format", "files", "finite")
