"""Files that a path or a pattern names: regular ones, each once, in a fixed order."""

import collections
import dataclasses
import fnmatch
import glob
import heapq
import itertools
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sct_jax import errors, paths

# Why a path is not read.
NOT_REGULAR = "not a regular file"
SAME_FILE = "read by another path"
UNLISTED = "not listed"

# Suffixes of text, and of what must be unpacked or converted first.
JSON_LINES = (".jsonl", ".json-lines", ".jsonlines", ".ndjson")
JSON = (*JSON_LINES, ".json")
PACKED = (
    *(".gz", ".tgz", ".zst", ".zstd", ".bz2", ".xz", ".lz4", ".zip", ".7z", ".tar"),
    *(".parquet", ".arrow", ".feather"),
)
_TEXT = (*JSON, ".txt", ".md", ".rst", ".tex", ".html", ".xml", ".py")

_HINT_FILES = 10_000  # looked at to suggest a pattern
_KINDS = {
    stat.S_ISFIFO: "a FIFO",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a pattern names.

    Attributes:
      files: path -> (size, times, inode), in order. A broken link is a file that
        cannot be read.
      left_out: reason -> other paths, in order.
      root: folder before the first wildcard. A moved corpus keeps its names relative
        to it.
    """

    files: dict[str, tuple[int, ...]]
    left_out: dict[str, list[str]]
    root: str


def find(pattern: str, *, each_once: bool = True) -> Found:
    """Returns the files that a path or pattern names, sorted by path.

    An existing path names itself, whatever it contains; so does the longest existing
    part of a pattern. "**" visits each folder once, links included, and real folders
    first.

    Args:
      pattern: a path, or a pattern with "*", "?", "[...]" and "**".
      each_once: leave out further paths of a file, by links of either kind. Otherwise
        every path that `glob` finds is a file of its own.

    Raises:
      UserError: nothing matches, or no regular file does.
    """
    whole = _absolute(pattern)
    unlisted: list[str] = []
    matches = [] if each_once else glob.glob(whole, recursive=True)
    if matches:
        root = os.path.dirname(re.split(r"[*?[]", whole)[0])
    else:
        folder, rest = _existing(whole)
        root = folder if rest else os.path.dirname(folder)
        matches = _expand([folder], rest, unlisted)
    folders, special = [], []
    regular: dict[str, os.stat_result | None] = {}
    for path in sorted(set(matches)):
        status = _status(path)
        if _is_folder(status):
            folders.append(path)
        elif status is not None and not stat.S_ISREG(status.st_mode):
            special.append(path)
        else:
            regular[path] = status
    if not regular:
        raise errors.UserError(_nothing(pattern, folders, special, unlisted))
    again = _repeated(regular) if each_once else []
    for path in again:
        del regular[path]
    left_out = {NOT_REGULAR: special, SAME_FILE: again, UNLISTED: sorted(unlisted)}
    return Found(
        files={path: _identity(status) for path, status in regular.items()},
        left_out={reason: paths_ for reason, paths_ in left_out.items() if paths_},
        root=root,
    )


def shown(path: str) -> str:
    """Returns a path that can be printed on one line, whatever its bytes are."""
    return path if path.isprintable() else repr(path)[1:-1]


def _absolute(pattern: str) -> str:
    try:
        return os.path.abspath(paths.expand("data.source", pattern))
    except OSError as error:  # the current folder is gone
        raise errors.UserError(
            f"data.source: {pattern!r} is relative to a folder that does not exist any "
            "more; write the whole path"
        ) from error


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):
        return None


def _identity(status: os.stat_result | None) -> tuple[int, ...]:
    """Returns what changes when a file does; (-1,) for one that cannot be read."""
    if status is None:
        return (-1,)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _repeated(regular: dict[str, os.stat_result | None]) -> list[str]:
    """Returns all paths of a file but one: a path without links, or the first."""
    by_inode = collections.defaultdict(list)
    for path, status in regular.items():
        if status is not None and status.st_ino:
            by_inode[status.st_dev, status.st_ino].append(path)
    again = []
    for same in by_inode.values():
        if len(same) > 1:
            kept = min(same, key=lambda path: (os.path.realpath(path) != path, path))
            again += [path for path in same if path != kept]
    return sorted(again)


# --- Patterns.


def _existing(whole: str) -> tuple[str, list[str]]:
    """Returns the longest part of an absolute path that exists, and the rest."""
    rest = [part for part in whole.split(os.sep) if part]
    folder = os.sep
    while rest:
        path = os.path.join(folder, rest[0])
        if not (os.path.isdir(path) if rest[1:] else os.path.lexists(path)):
            break
        folder = path
        rest.pop(0)
    return folder, rest


def _expand(
    folders: Iterable[str], parts: Sequence[str], unlisted: list[str]
) -> Iterator[str]:
    if not parts:
        yield from folders
        return
    part, *rest = parts
    if part == "**":
        tree = _tree(folders, unlisted)
        yield from _expand(tree, rest or ["*"], unlisted)
        return
    for folder in folders:
        found = [os.path.join(folder, name) for name in _names(folder, part, unlisted)]
        if rest:
            found = [path for path in found if _is_folder(_look(path, unlisted))]
        yield from _expand(found, rest, unlisted)


def _names(folder: str, part: str, unlisted: list[str]) -> list[str]:
    """Returns the names in a folder that match a part of a pattern."""
    if not glob.has_magic(part):
        return [part] if _look(os.path.join(folder, part), unlisted, link=True) else []
    names = [entry.name for entry in _entries(folder, unlisted)]
    if not part.startswith("."):
        names = [name for name in names if not name.startswith(".")]
    return fnmatch.filter(names, part)


def _tree(folders: Iterable[str], unlisted: list[str]) -> list[str]:
    """Returns the folders and all below that are not hidden, each once.

    Every real folder comes before every link to a folder, so that a link adds only
    what is elsewhere.
    """
    found, seen = [], set()
    waiting, links = sorted(folders), list[str]()
    while waiting or links:
        folder = heapq.heappop(waiting or links)
        status = _look(folder, unlisted)
        if status is None or (key := (status.st_dev, status.st_ino)) in seen:
            continue
        seen.add(key)
        found.append(folder)
        for entry in _entries(folder, unlisted):
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                if _is_folder(_look(entry.path, unlisted)):
                    heapq.heappush(links, entry.path)
            elif entry.is_dir():
                heapq.heappush(waiting, entry.path)
    return found


def _look(
    path: str, unlisted: list[str], *, link: bool = False
) -> os.stat_result | None:
    """The status of a path, or of the link there; notes a folder that hides it."""
    try:
        return os.stat(path, follow_symlinks=not link)
    except PermissionError:
        if (folder := os.path.dirname(path)) not in unlisted:
            unlisted.append(folder)
    except (OSError, ValueError):
        pass
    return None


def _is_folder(status: os.stat_result | None) -> bool:
    return status is not None and stat.S_ISDIR(status.st_mode)


def _entries(folder: str, unlisted: list[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except NotADirectoryError:
        return []
    except OSError:
        if folder not in unlisted:
            unlisted.append(folder)
        return []


# --- What to say where nothing can be read.


def _nothing(
    pattern: str, folders: list[str], special: list[str], unlisted: list[str]
) -> str:
    if special:
        kind = _kind(special[0])
        return (
            f"data.source: {special[0]!r} is {kind}, which cannot be read twice; write "
            "its text to a file and name that"
        )
    hint = "give 'stdlib', 'tfds:<name>', or a path or glob of text files"
    if folders:
        hint = _folder_hint(pattern, folders)
    elif unlisted:
        hint = f"{unlisted[0]!r} cannot be listed; change its permissions"
    return f"data.source: no file matches {pattern!r}; {hint}"


def _kind(path: str) -> str:
    status = _status(path)
    mode = status.st_mode if status else 0
    return next((name for is_kind, name in _KINDS.items() if is_kind(mode)), "special")


def _folder_hint(pattern: str, folders: list[str]) -> str:
    """Returns the pattern of the text in a folder that was named instead of it."""
    names = itertools.chain.from_iterable(map(_file_names, folders))
    suffixes = collections.Counter[Any](
        os.path.splitext(name)[1] for name in itertools.islice(names, _HINT_FILES)
    )
    if not suffixes:
        return "it is a folder without files"
    order = lambda known: [
        suffix for suffix, _ in suffixes.most_common() if known(suffix.lower())
    ]
    text = order(lambda suffix: suffix in _TEXT)
    text = text or order(lambda suffix: suffix not in PACKED)
    if not text:
        return f"it is a folder of {order(bool)[0]!r} files: unpack or convert them"
    return f"it is a folder: write {os.path.join(pattern, '**', f'*{text[0]}')!r}"


def _file_names(folder: str) -> Iterator[str]:
    for _, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from sorted(name for name in names if not name.startswith("."))
