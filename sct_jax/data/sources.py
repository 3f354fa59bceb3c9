"""What `data.source` names, as two splits of documents.

What happens to a document on its way in:
- a UTF-8 byte order mark at its start is dropped; nothing else is changed: CRLF, NUL
  and the text of special tokens stay as they are;
- one that is empty, is not valid UTF-8, or cannot be opened is skipped and counted;
- JSON that does not parse, or lacks the text field, is a UserError that gives file,
  line and byte offset.
"""

import codecs
import contextlib
import dataclasses
import glob
import hashlib
import io
import itertools
import json
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from typing import Any

from sct_jax import errors
from sct_jax.data import cache

SPLITS = ("train", "validation")

_VALIDATION_PERCENT = 4
_JSON_LINES = (".jsonl", ".json-lines", ".jsonlines", ".ndjson")
_NO_TEXT = (".gz", ".zst", ".bz2", ".xz", ".zip", ".parquet", ".arrow", ".json")
_TFDS_PREFIX = "tfds:"
_TFDS_READ_AHEAD = 256  # examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Raw documents, and a fingerprint that is cheap and changes when they do.

    Attributes:
        name: `data.source`.
        fingerprint: of what is checked without reading the text: for files the path,
            size and time of change of each; for the standard library the Python
            version too; for TFDS the version, size and time of its metadata.
        files: how many files there are; 0 where documents do not come from files.
        read: gives (identity, raw bytes) of a split's documents in a fixed order;
            None for bytes that cannot be read.
        cut: the splits share every document, the end of it being validation.
    """

    name: str
    fingerprint: str
    files: int
    read: Callable[[str], Iterator[tuple[str, bytes | None]]]
    cut: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What a source holds.

    Attributes:
        hash: SHA-256 of all documents of both splits, in order.
        files: how many files there are; 0 where documents do not come from files.
        documents: how many, by split.
        bytes: of their UTF-8 text, by split.
        skipped: reason -> "count", and "first", the identity of the first one.
    """

    hash: str
    files: int
    documents: dict[str, int]
    bytes: dict[str, int]
    skipped: dict[str, dict[str, Any]]


def open_source(name: str, *, text_field: str, cache_dir: str) -> Source:
    """The source `name` is found, and nothing of it is read yet.

    Args:
        name: "stdlib"; "tfds:" and the name of a prepared dataset; or a path or glob
            of text or JSON-lines files, "**" standing for any folders.
        text_field: the key of the text in TFDS examples and JSON lines.
        cache_dir: where the standard library's ArrayRecord files are kept.

    Raises:
        UserError: there is no such source, or it has no such field.
    """
    if name == "stdlib":
        return _open_stdlib(cache_dir)
    if name.startswith(_TFDS_PREFIX):
        return _open_tfds(name, text_field=text_field)
    return _open_files(name, text_field=text_field)


def split_of(identity: str) -> str:
    """The split of a document, from a hash of its identity alone (4 % validation)."""
    digest = hashlib.sha256(os.fsencode(identity)).digest()
    share = int.from_bytes(digest[:8], "big") * 100 >> 64
    return "validation" if share < _VALIDATION_PERCENT else "train"


def documents(
    source: Source, split: str, *, skipped: dict[str, dict[str, Any]] | None = None
) -> Iterator[str]:
    """The documents of a split, in a fixed order; `skipped` counts what is left out."""
    if source.cut:
        for text in itertools.chain.from_iterable(
            _texts(source, each, {}) for each in SPLITS
        ):
            cut = len(text) * (100 - _VALIDATION_PERCENT) // 100
            part = text[:cut] if split == "train" else text[cut:]
            if part:
                yield part
    else:
        yield from _texts(source, split, {} if skipped is None else skipped)


def _texts(
    source: Source, split: str, skipped: dict[str, dict[str, Any]]
) -> Iterator[str]:
    for identity, raw in source.read(split):
        text, reason = "", "empty"
        if raw is None:
            reason = "unreadable"
        else:
            try:
                text = raw.removeprefix(codecs.BOM_UTF8).decode()
            except UnicodeDecodeError:
                reason = "not UTF-8"
        if text:
            yield text
        else:
            entry = skipped.setdefault(reason, {"count": 0, "first": identity})
            entry["count"] += 1


def scan(source: Source) -> tuple[Source, Summary]:
    """Every document has been read once: the summary, and the source to read on with.

    That is `source` itself, unless documents are so few that the hash of identities
    leaves a split empty (a single large file, say): then the last 4 % of every
    document are validation.

    Raises:
        UserError: a split stays empty.
    """
    digest = hashlib.sha256()
    skipped: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {split: 0 for split in SPLITS}
    sizes: dict[str, int] = {split: 0 for split in SPLITS}
    for split in SPLITS:
        digest.update(split.encode())
        for text in documents(source, split, skipped=skipped):
            raw = text.encode()
            digest.update(len(raw).to_bytes(8, "big"))
            digest.update(raw)
            counts[split] += 1
            sizes[split] += len(raw)
    if not all(counts.values()):
        if any(counts.values()) and not source.cut:
            source, summary = scan(dataclasses.replace(source, cut=True))
            return source, dataclasses.replace(summary, skipped=skipped)
        left_out = describe_skipped(skipped)
        raise errors.UserError(
            f"data.source: {source.name!r} holds too little text for a training and a "
            f"validation split{f' (skipped: {left_out})' if left_out else ''}"
        )
    return source, Summary(
        hash=digest.hexdigest(),
        files=source.files,
        documents=counts,
        bytes=sizes,
        skipped=skipped,
    )


def describe_skipped(skipped: dict[str, dict[str, Any]]) -> str:
    """`skipped` in words, "" if there is nothing to say."""
    return ", ".join(
        f"{entry['count']:,} {reason} (the first: {entry['first']})"
        for reason, entry in skipped.items()
    )


def _fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _stat(path: str) -> tuple[int, int]:
    """Size and time of change, which -1 stands for where there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


# --- The Python standard library.


def stdlib_root() -> str:
    """The folder of the running Python's standard library."""
    return sysconfig.get_path("stdlib")


def stdlib_files(root: str) -> list[str]:
    """Sorted paths, relative to `root`, of all .py files but installed packages'."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - {"site-packages", "dist-packages", "__pycache__"}
        found += [
            os.path.relpath(os.path.join(folder, name), root)
            for name in names
            if name.endswith(".py")
        ]
    return sorted(found)


def _open_stdlib(cache_dir: str) -> Source:
    root = stdlib_root()
    files = stdlib_files(root)
    if not files:
        raise errors.UserError(
            f"data.source: no .py file below {root!r}; this Python keeps its standard "
            "library elsewhere, so name text files instead"
        )
    fingerprint = _fingerprint(
        "stdlib",
        sys.version,
        [(path, *_stat(os.path.join(root, path))) for path in files],
    )
    data_dir = os.path.join(cache_dir, f"stdlib_text-{fingerprint[:16]}")

    def prepare(folder: str) -> None:
        import tensorflow_datasets as tfds

        from sct_jax.data import stdlib_text

        tfds.disable_progress_bar()
        builder = stdlib_text.StdlibText(data_dir=folder, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself.
            builder.download_and_prepare()

    def read(split: str) -> Iterator[tuple[str, bytes | None]]:
        from tensorflow_datasets.core import read_only_builder

        cache.folder(
            data_dir,
            build=prepare,
            is_complete=lambda folder: bool(
                glob.glob(f"{glob.escape(folder)}/*/*/dataset_info.json")
            ),
        )
        builder = read_only_builder.builder_from_files("stdlib_text", data_dir=data_dir)
        missing = {path for path in files if split_of(path) == split}
        for row in _rows(builder, split):
            path = os.fsdecode(row["path"])
            missing.discard(path)
            yield path, row["text"]
        yield from ((path, None) for path in sorted(missing))

    return Source(name="stdlib", fingerprint=fingerprint, files=len(files), read=read)


# --- TFDS.


def _rows(builder: Any, split: str) -> Iterator[dict[str, Any]]:
    """The examples of a split; read many at a time, since each alone is a seek."""
    rows = builder.as_data_source(split=split)
    for start in range(0, len(rows), _TFDS_READ_AHEAD):
        stop = min(start + _TFDS_READ_AHEAD, len(rows))
        yield from rows.__getitems__(list(range(start, stop)))


def _open_tfds(name: str, *, text_field: str) -> Source:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    dataset = name.removeprefix(_TFDS_PREFIX)
    how = (
        'prepare it once with\n  python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({dataset!r}, file_format='array_record')"
        '.download_and_prepare()"\n'
        "and set TFDS_DATA_DIR if it is not in ~/tensorflow_datasets"
    )
    try:
        # Looks at the disk alone: `tfds.builder` would run code and ask the network.
        builder: Any = read_only_builder.builder_from_files(
            dataset, data_dir=os.environ.get("TFDS_DATA_DIR")
        )
    except tfds.core.DatasetNotFoundError as error:
        raise errors.UserError(
            f"data.source: the TFDS dataset {dataset!r} is not prepared here; {how}"
        ) from error
    except ValueError as error:
        raise errors.UserError(
            f"data.source: {name!r} does not name one TFDS dataset ({error})"
        ) from error
    if text_field not in builder.info.features:
        raise errors.UserError(
            f"data.text_field: {name!r} has no field {text_field!r}, but "
            f"{', '.join(sorted(builder.info.features))}"
        )
    splits = builder.info.splits
    if "train" not in splits:
        raise errors.UserError(
            f"data.source: {name!r} has no split 'train', but {', '.join(splits)}"
        )
    parts = {"train": "train", "validation": "validation"}
    if "validation" not in splits:
        border = f"{100 - _VALIDATION_PERCENT}%"
        parts = {"train": f"train[:{border}]", "validation": f"train[{border}:]"}
    try:
        builder.as_data_source(split="train")
    except NotImplementedError as error:
        raise errors.UserError(
            f"data.source: {name!r} is prepared in a format that cannot be read at "
            f"random ({builder.info.file_format}); remove {builder.data_path} and {how}"
        ) from error

    def read(split: str) -> Iterator[tuple[str, bytes | None]]:
        for number, row in enumerate(_rows(builder, parts[split])):
            text = row[text_field]
            if not isinstance(text, bytes):
                raise errors.UserError(
                    f"data.text_field: {text_field!r} of {name!r} is not text but "
                    f"{type(text).__name__}"
                )
            yield f"{parts[split]}[{number}]", text

    fingerprint = _fingerprint(
        name,
        text_field,
        str(builder.data_path),
        {key: [part.num_examples, int(part.num_bytes)] for key, part in splits.items()},
        (builder.data_path / "dataset_info.json").stat().mtime,
    )
    return Source(name=name, fingerprint=fingerprint, files=0, read=read)


# --- Files.


def _open_files(pattern: str, *, text_field: str) -> Source:
    matches = glob.glob(os.path.abspath(os.path.expanduser(pattern)), recursive=True)
    paths = sorted(path for path in set(matches) if not os.path.isdir(path))
    if not paths:
        hint = (
            f"it is a folder: write '{os.path.join(pattern, '**', '*.txt')}'"
            if matches
            else "give 'stdlib', 'tfds:<name>', or a path or glob of text files"
        )
        raise errors.UserError(f"data.source: no file matches {pattern!r}; {hint}")
    errors.check(
        "data.source",
        not all(path.lower().endswith(_NO_TEXT) for path in paths),
        f"{paths[0]!r} is neither text nor JSON lines ({', '.join(_JSON_LINES)}); "
        "unpack or convert it",
    )
    # Identities are relative to the part of the pattern that is no wildcard, so that a
    # corpus keeps its splits when it is moved.
    fixed = re.split(r"[*?[]", os.path.abspath(os.path.expanduser(pattern)))[0]
    root = os.path.dirname(fixed)

    def read(split: str) -> Iterator[tuple[str, bytes | None]]:
        for path in paths:
            identity = os.path.relpath(path, root)
            lines = path.lower().endswith(_JSON_LINES)
            if not lines and split_of(identity) != split:
                continue
            try:
                with open(path, "rb") as file:
                    if not lines:
                        yield identity, file.read()
                    else:
                        for number, offset, line in _lines(file):
                            where = f"{identity}:{number}"
                            if split_of(where) == split:
                                at = f"{path} line {number} (byte {offset})"
                                yield where, _json_text(line, text_field, at=at)
            except OSError:
                if lines and split != "train":
                    continue  # Has been counted.
                yield identity, None

    fingerprint = _fingerprint(
        pattern, text_field, root, [(path, *_stat(path)) for path in paths]
    )
    return Source(name=pattern, fingerprint=fingerprint, files=len(paths), read=read)


def _lines(file: io.BufferedReader) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, byte offset, line) of every line that is not blank."""
    offset = 0
    for number, line in enumerate(file, start=1):
        start, offset = offset, offset + len(line)
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, start, line


def _json_text(line: bytes, text_field: str, *, at: str) -> bytes:
    """The text of a JSON line; bytes that are not UTF-8 if the line or it is not."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return line
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise errors.UserError(
            f"data.source: {at} is not valid JSON ({error}); mend or remove the line"
        ) from error
    value = entry.get(text_field) if isinstance(entry, dict) else None
    if not isinstance(value, str):
        has = ", ".join(map(repr, entry)) if isinstance(entry, dict) else "no fields"
        raise errors.UserError(
            f"data.text_field: {at} has no text under {text_field!r}; it has {has}"
        )
    # JSON can escape half of a surrogate pair, which is not text: no UTF-8 holds it.
    return value.encode("utf-8", "surrogatepass")
