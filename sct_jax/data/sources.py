"""Sources of text: named by `data.source`, read as two splits of documents.

Documents are read byte for byte, with three rules:
- A UTF-8 byte order mark at the start is dropped. CRLF, NUL and the text of special
  tokens are kept.
- Empty documents, invalid UTF-8 and unreadable files are skipped and counted.
- JSON that does not parse, or lacks the text field, raises a UserError with file, line
  and byte offset.
"""

import codecs
import contextlib
import dataclasses
import glob
import hashlib
import io
import json
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sct_jax import errors
from sct_jax.data import cache, splits

_JSON_LINES = (".jsonl", ".json-lines", ".jsonlines", ".ndjson")
_NO_TEXT = (".gz", ".zst", ".bz2", ".xz", ".zip", ".parquet", ".arrow", ".json")
_TFDS_PREFIX = "tfds:"
_TFDS_READ_AHEAD = 256  # examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Documents, with a fingerprint that is cheap and changes when they do.

    Attributes:
      name: `data.source`.
      fingerprint: hash of all that is known without reading text. Files: path, size
        and modification time of each. Standard library: also the Python version and
        the kind of split. TFDS: version, size and time of the metadata.
      files: number of files; 0 if documents do not come from files.
      read: yields (identity, raw bytes) of a split's documents in a fixed order; None
        for unreadable bytes.
      cut: yields the parts of a document, given its text, that are in a split. None
        if each document is in one split as a whole.
    """

    name: str
    fingerprint: str
    files: int
    read: Callable[[str], Iterator[tuple[str, bytes | None]]]
    cut: Callable[[str, str], Iterator[str]] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts and hash of a source's documents.

    Attributes:
      hash: SHA-256 of all documents of both splits, in order.
      files: number of files; 0 if documents do not come from files.
      documents: number per split.
      bytes: of UTF-8 text, per split.
      skipped: reason -> {"count": number, "first": identity of the first one}.
    """

    hash: str
    files: int
    documents: dict[str, int]
    bytes: dict[str, int]
    skipped: dict[str, dict[str, Any]]


def open_source(name: str, *, text_field: str, cache_dir: str, split: str) -> Source:
    """Returns the source `name`, without reading its text.

    Args:
      name: "stdlib"; "tfds:" and the name of a prepared dataset; or a path or glob of
        text or JSON-lines files, where "**" matches any folders.
      text_field: key of the text in TFDS examples and JSON lines.
      cache_dir: folder of the standard library's ArrayRecord files.
      split: "pieces" or "files": how the standard library is divided.

    Raises:
      UserError: no such source, or no such field in it.
    """
    if name == "stdlib":
        return _open_stdlib(cache_dir, split=split)
    if name.startswith(_TFDS_PREFIX):
        return _open_tfds(name, text_field=text_field)
    return _open_files(name, text_field=text_field)


def documents(
    source: Source, split: str, *, skipped: dict[str, dict[str, Any]] | None = None
) -> Iterator[str]:
    """Yields the documents of a split in a fixed order.

    Args:
      source: where they come from.
      split: "train" or "validation".
      skipped: counts documents left out; the two splits together count each once.
    """
    skipped = {} if skipped is None else skipped
    if source.cut is None:
        yield from _texts(source, split, skipped)
        return
    for part in splits.SPLITS:
        for text in _texts(source, part, skipped if part == split else {}):
            yield from source.cut(text, split)


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
    """Returns the source to read from here on, and its summary.

    Reads every document once. A source with few documents (one large file, say) can
    leave a split empty. The returned source then cuts every document: its last 4 % are
    validation.

    Raises:
      UserError: the text is too short for two splits.
    """
    digest = hashlib.sha256()
    skipped: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {split: 0 for split in splits.SPLITS}
    sizes: dict[str, int] = {split: 0 for split in splits.SPLITS}
    for split in splits.SPLITS:
        digest.update(split.encode())
        for text in documents(source, split, skipped=skipped):
            raw = text.encode()
            digest.update(len(raw).to_bytes(8, "big"))
            digest.update(raw)
            counts[split] += 1
            sizes[split] += len(raw)
    if not all(counts.values()):
        if any(counts.values()) and source.cut is not splits.cut_end:
            return scan(dataclasses.replace(source, cut=splits.cut_end))
        left_out = describe_skipped(skipped)
        raise errors.UserError(
            f"data.source: {source.name!r} has too little text for a training and a "
            f"validation split{f' (skipped: {left_out})' if left_out else ''}; name "
            "more text"
        )
    return source, Summary(
        hash=digest.hexdigest(),
        files=source.files,
        documents=counts,
        bytes=sizes,
        skipped=skipped,
    )


def describe_skipped(skipped: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns `skipped` in words; "" if nothing was skipped."""
    return ", ".join(
        f"{entry['count']:,} {reason} (the first: {entry['first']})"
        for reason, entry in skipped.items()
    )


def _fingerprint(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _stat(path: str) -> tuple[int, int]:
    """Returns size and modification time; (-1, -1) for a missing file."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


# --- The Python standard library.


def stdlib_root() -> str:
    """Returns the folder of the running Python's standard library."""
    return sysconfig.get_path("stdlib")


def stdlib_files(root: str) -> list[str]:
    """Returns sorted paths of .py files, relative to `root`, without site packages."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - {"site-packages", "dist-packages", "__pycache__"}
        found += [
            os.path.relpath(os.path.join(folder, name), root)
            for name in names
            if name.endswith(".py")
        ]
    return sorted(found)


def _open_stdlib(cache_dir: str, *, split: str) -> Source:
    root = stdlib_root()
    files = stdlib_files(root)
    if not files:
        raise errors.UserError(
            f"data.source: {root!r}, the folder of this Python's standard library, has "
            "no .py files; name text files instead"
        )
    fingerprint = _fingerprint(
        "stdlib",
        sys.version,
        [(path, *_stat(os.path.join(root, path))) for path in files],
    )
    data_dir = os.path.join(cache_dir, f"stdlib_text-{fingerprint[:16]}")
    paths: dict[str, list[str]] = {part: [] for part in splits.SPLITS}
    for path in files:
        paths[splits.split_of(path)].append(path)

    def prepare(folder: str) -> None:
        import tensorflow_datasets as tfds

        from sct_jax.data import stdlib_text

        tfds.disable_progress_bar()
        builder = stdlib_text.StdlibText(
            root, paths, data_dir=folder, file_format="array_record"
        )
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints a banner
            builder.download_and_prepare()

    def read(part: str) -> Iterator[tuple[str, bytes | None]]:
        from tensorflow_datasets.core import read_only_builder

        cache.folder(
            data_dir,
            build=prepare,
            is_complete=lambda folder: bool(
                glob.glob(f"{glob.escape(folder)}/*/*/dataset_info.json")
            ),
        )
        builder = read_only_builder.builder_from_files("stdlib_text", data_dir=data_dir)
        missing = set(paths[part])
        for row in _rows(builder, part):
            path = os.fsdecode(row["path"])
            missing.discard(path)
            yield path, row["text"]
        yield from ((path, None) for path in sorted(missing))

    source = Source(name="stdlib", fingerprint=fingerprint, files=len(files), read=read)
    if split == "files":
        return source
    return dataclasses.replace(
        source, fingerprint=_fingerprint(fingerprint, split), cut=splits.cut_pieces
    )


# --- TFDS.


def _rows(builder: Any, split: str) -> Iterator[dict[str, Any]]:
    """Yields the examples of a split, read in blocks: one alone costs a seek."""
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
        # Reads the disk alone: `tfds.builder` would run code and use the network.
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
            f"data.text_field: {name!r} has no field {text_field!r} (fields: "
            f"{', '.join(sorted(builder.info.features))})"
        )
    found = builder.info.splits
    if "train" not in found:
        raise errors.UserError(
            f"data.source: {name!r} has no split 'train' (splits: {', '.join(found)})"
        )
    parts = {"train": "train", "validation": "validation"}
    if "validation" not in found:
        border = f"{100 - splits.VALIDATION_PERCENT}%"
        parts = {"train": f"train[:{border}]", "validation": f"train[{border}:]"}
    try:
        builder.as_data_source(split="train")
    except NotImplementedError as error:
        raise errors.UserError(
            f"data.source: {name!r} is prepared in a format without random access "
            f"({builder.info.file_format}); remove {builder.data_path} and {how}"
        ) from error

    def read(split: str) -> Iterator[tuple[str, bytes | None]]:
        for number, row in enumerate(_rows(builder, parts[split])):
            text = row[text_field]
            if not isinstance(text, bytes):
                raise errors.UserError(
                    f"data.text_field: {text_field!r} of {name!r} is "
                    f"{type(text).__name__}, not text; name a field of text"
                )
            yield f"{parts[split]}[{number}]", text

    fingerprint = _fingerprint(
        name,
        text_field,
        str(builder.data_path),
        {key: [part.num_examples, int(part.num_bytes)] for key, part in found.items()},
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
    # A moved corpus keeps its splits: identities are relative to the folder before the
    # first wildcard.
    fixed = re.split(r"[*?[]", os.path.abspath(os.path.expanduser(pattern)))[0]
    root = os.path.dirname(fixed)

    def read(split: str) -> Iterator[tuple[str, bytes | None]]:
        for path in paths:
            identity = os.path.relpath(path, root)
            lines = path.lower().endswith(_JSON_LINES)
            if not lines and splits.split_of(identity) != split:
                continue
            try:
                with open(path, "rb") as file:
                    if not lines:
                        yield identity, file.read()
                    else:
                        for number, offset, line in _lines(file):
                            where = f"{identity}:{number}"
                            if splits.split_of(where) == split:
                                at = f"{path} line {number} (byte {offset})"
                                yield where, _json_text(line, text_field, at=at)
            except OSError:
                if lines and split != "train":
                    continue  # counted in the training split
                yield identity, None

    fingerprint = _fingerprint(
        pattern, text_field, root, [(path, *_stat(path)) for path in paths]
    )
    return Source(name=pattern, fingerprint=fingerprint, files=len(paths), read=read)


def _lines(file: io.BufferedReader) -> Iterator[tuple[int, int, bytes]]:
    """Yields (number from 1, byte offset, line) of every line that is not blank."""
    offset = 0
    for number, line in enumerate(file, start=1):
        start, offset = offset, offset + len(line)
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, start, line


def _json_text(line: bytes, text_field: str, *, at: str) -> bytes:
    """Returns the text of a JSON line; invalid UTF-8 if the line or text is invalid."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return line
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise errors.UserError(
            f"data.source: {at} is not valid JSON ({error}); fix or remove the line"
        ) from error
    value = entry.get(text_field) if isinstance(entry, dict) else None
    if not isinstance(value, str):
        has = ", ".join(map(repr, entry)) if isinstance(entry, dict) else "none"
        raise errors.UserError(
            f"data.text_field: {at} has no text under {text_field!r} (fields: {has})"
        )
    # JSON can escape half of a surrogate pair, which UTF-8 cannot represent.
    return value.encode("utf-8", "surrogatepass")
