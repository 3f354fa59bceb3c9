"""Documents in files: one per file of text, one per line of JSON lines."""

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sct_jax import files
from sct_jax.data import json_lines, patterns, splits


class Document(NamedTuple):
    """A document as it is read.

    Attributes:
      identity: its name within the source.
      raw: its bytes; None if there are none to read.
      reason: why `raw` is None.
    """

    identity: str
    raw: bytes | None
    reason: str = "unreadable"


def read(paths: Iterable[str], *, root: str, text_field: str) -> Iterator[Document]:
    """Yields every document of the files, named relative to the folder `root`."""
    for path in paths:
        name = os.path.relpath(path, root)
        if path.lower().endswith(patterns.JSON):
            yield from _lines(path, text_field, name=name)
        else:
            yield _whole(path, name=name)


def read_by_path(
    paths: Iterable[str], split: str, *, root: str, text_field: str
) -> Iterator[Document]:
    """Yields the documents of a split, which hashes of their names decide.

    Reads as the first versions did, and gives the same text: files called ".json" are
    text, and the last of several values of a field counts.
    """
    for path in paths:
        name = os.path.relpath(path, root)
        if path.lower().endswith(patterns.JSON_LINES):
            for document in _lines(path, text_field, name=name, former=True):
                if splits.split_of(document.identity) == split:
                    yield document
        elif splits.split_of(name) == split:
            yield _whole(path, name=name)


def _whole(path: str, *, name: str) -> Document:
    try:
        with files.open_regular(path) as file:
            return Document(name, file.read())
    except OSError:
        return Document(name, None)


def _lines(
    path: str, text_field: str, *, name: str, former: bool = False
) -> Iterator[Document]:
    """Yields the documents of a file of JSON lines; the file itself if it has none."""
    empty = True
    try:
        with files.open_regular(path) as file:
            for line in json_lines.lines(file, path=path):
                empty = False
                text = json_lines.text_of(line, text_field, repeats=former)
                yield Document(f"{name}:{line.number}", text)
    except OSError:
        yield Document(name, None)
        return
    if empty:
        yield Document(name, b"")
