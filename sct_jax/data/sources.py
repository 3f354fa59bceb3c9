"""Sources of text: named by `data.source`, read as two splits of documents.

Documents are read byte for byte, with three rules:
- A UTF-8 byte order mark at the start is dropped. CRLF, NUL and the text of special
  tokens are kept.
- Empty documents, invalid UTF-8, unreadable files, all that is no regular file, and
  further paths of the same file are skipped and counted.
- JSON that does not parse, or lacks the text field, raises a UserError with file, line
  and byte offset.
"""

import array
import codecs
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from sct_jax import errors
from sct_jax.data import cache, patterns, splits, text_files

_TFDS_PREFIX = "tfds:"
_TFDS_READ_AHEAD = 256  # examples
_CHECKSUMS = "checksums.json"


Skipped = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Documents, with a fingerprint that is cheap and changes when they do.

    Attributes:
      name: `data.source`.
      fingerprint: hash of all that is known without reading text. Files: path, size,
        times and inode of each, and the paths left out. Standard library: path, size
        and modification time, the Python version and the kind of split. TFDS: version,
        size and time of the metadata.
      files: number of files; 0 if documents do not come from files.
      read: yields documents of a split in a fixed order, before `cut`.
      cut: yields the parts of a document, given its text, that are in a split. None
        if each document is in one split as a whole.
      otherwise: the same documents divided by content, to be used if validation has
        less than 2 % or more than 8 % of the bytes.
      left_out: reason -> paths that are not read.
      digests: of the documents of each split. Reading others is an error.
    """

    name: str
    fingerprint: str
    files: int
    read: Callable[[str], Iterator[text_files.Document]]
    cut: Callable[[str, str], Iterator[str]] | None = None
    otherwise: "Source | None" = None
    left_out: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)
    digests: Mapping[str, str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Counts and hash of a source's documents.

    Attributes:
      hash: SHA-256 of all documents of both splits, in order.
      files: number of files; 0 if documents do not come from files.
      documents: number per split.
      bytes: of UTF-8 text, per split.
      skipped: reason -> {"count": number, "first": identity of the first one}.
      repeats: documents equal to an earlier one, where splits go by content.
      cut: documents with a part in each split, where splits go by content.
    """

    hash: str
    files: int
    documents: dict[str, int]
    bytes: dict[str, int]
    skipped: Skipped
    repeats: int = 0
    cut: int = 0


def open_source(
    name: str,
    *,
    text_field: str,
    cache_dir: str,
    split: str,
    log: Callable[[str], None] = print,
) -> Source:
    """Returns the source `name`, without reading its text.

    Args:
      name: "stdlib"; "tfds:" and the name of a prepared dataset; or a path or glob of
        text or JSON-lines files, where "**" matches any folders.
      text_field: key of the text in TFDS examples and JSON lines.
      cache_dir: folder of the standard library's ArrayRecord files.
      split: how the source is divided, see `settings.DataConfig`. A value for other
        sources has no effect.
      log: receives one line if ArrayRecord files are damaged, and written again.

    Raises:
      UserError: no such source, or no such field in it.
    """
    if name == "stdlib":
        return _open_stdlib(cache_dir, split=split, log=log)
    by_path = split == "paths"
    if name.startswith(_TFDS_PREFIX):
        return _open_tfds(name, text_field=text_field, by_path=by_path)
    return _open_files(name, text_field=text_field, by_path=by_path)


def documents(
    source: Source, split: str, *, skipped: Skipped | None = None
) -> Iterator[str]:
    """Yields the documents of a split in a fixed order.

    Args:
      source: where they come from.
      split: "train" or "validation".
      skipped: counts documents left out; the two splits together count each once.

    Raises:
      UserError: after the last one, if they are not those that `scan` saw.
    """
    skipped = {} if skipped is None else skipped
    digest = hashlib.sha256()
    for text in _parts(source, split, skipped):
        if source.digests is not None:
            _add(digest, text.encode())
        yield text
    if source.digests is not None and digest.hexdigest() != source.digests[split]:
        raise errors.UserError(
            f"data.source: the text of {source.name!r} changed while it was read; run "
            "again once it stops changing"
        )


def _parts(source: Source, split: str, skipped: Skipped) -> Iterator[str]:
    if source.cut is None:
        yield from _texts(source, split, skipped)
        return
    for part in splits.SPLITS:
        for text in _texts(source, part, skipped if part == split else {}):
            yield from source.cut(text, split)


def _texts(source: Source, split: str, skipped: Skipped) -> Iterator[str]:
    for identity, raw, reason in source.read(split):
        text = ""
        if raw is not None:
            try:
                text = raw.removeprefix(codecs.BOM_UTF8).decode()
                reason = "empty"
            except UnicodeDecodeError:
                reason = "not UTF-8"
        if text:
            yield text
        else:
            entry = skipped.setdefault(reason, {"count": 0, "first": identity})
            entry["count"] += 1


def _add(digest: "hashlib._Hash", raw: bytes) -> None:
    digest.update(len(raw).to_bytes(8, "big"))
    digest.update(raw)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tally:
    """What one reading of both splits finds."""

    hash: str
    digests: dict[str, str]
    documents: dict[str, int]
    bytes: dict[str, int]
    skipped: Skipped
    hashes: array.array  # of the content of each document, where splits go by it
    sizes: array.array


def _tally(source: Source) -> _Tally:
    whole = hashlib.sha256()
    skipped: Skipped = {
        reason: {"count": len(paths), "first": paths[0]}
        for reason, paths in source.left_out.items()
    }
    counts = {split: 0 for split in splits.SPLITS}
    total = {split: 0 for split in splits.SPLITS}
    digests = {}
    hashes, sizes = array.array("Q"), array.array("Q")
    for split in splits.SPLITS:
        digest = hashlib.sha256()
        whole.update(split.encode())
        for text in documents(source, split, skipped=skipped):
            raw = text.encode()
            _add(whole, raw)
            _add(digest, raw)
            counts[split] += 1
            total[split] += len(raw)
            if source.cut is splits.by_content:
                hashes.append(splits.content_hash(raw))
                sizes.append(len(raw))
        digests[split] = digest.hexdigest()
    return _Tally(
        hash=whole.hexdigest(),
        digests=digests,
        documents=counts,
        bytes=total,
        skipped=skipped,
        hashes=hashes,
        sizes=sizes,
    )


def scan(source: Source) -> tuple[Source, Summary]:
    """Returns the source to read from here on, and its summary.

    Reads every document, and keeps 16 bytes of each where splits go by content. There,
    validation can get less than 2 % or more than 8 % of the bytes, because documents
    are few or one is large; the returned source then has the border of
    `splits.border`. Where splits do not go by content, one can be empty; the returned
    source then cuts every document: its last 4 % are validation.

    Raises:
      UserError: the text is too short for two splits.
    """
    whole = tally = _tally(source)
    if source.otherwise is not None and _is_far(tally):
        return scan(source.otherwise)
    for cut in _cuts(source, whole) if any(whole.documents.values()) else ():
        source = dataclasses.replace(source, cut=cut)
        tally = _tally(source)
        if not _is_far(tally):
            break
    if not all(tally.documents.values()):
        raise errors.UserError(_too_little(source, tally))
    by_content = len(whole.hashes) > 0
    parts, documents_ = (sum(t.documents.values()) for t in (tally, whole))
    summary = Summary(
        hash=tally.hash,
        files=source.files,
        documents=tally.documents,
        bytes=tally.bytes,
        skipped=tally.skipped,
        repeats=len(whole.hashes) - len(np.unique(np.asarray(whole.hashes))),
        cut=parts - documents_ if by_content else 0,
    )
    return dataclasses.replace(source, digests=tally.digests), summary


def _cuts(source: Source, whole: _Tally) -> Iterator[Callable]:
    """Yields other ways to divide a source, the preferred one first."""
    if source.cut is not splits.by_content:
        if not all(whole.documents.values()):
            yield splits.cut_end
    elif _is_far(whole):
        if len(whole.hashes) == 1:  # one document alone is cut where it always was
            yield splits.cut_end
        yield splits.border(np.asarray(whole.hashes), np.asarray(whole.sizes)).cut


def _is_far(tally: _Tally) -> bool:
    return splits.is_far(tally.bytes["validation"], sum(tally.bytes.values()))


def _too_little(source: Source, tally: _Tally) -> str:
    what = "has too little text for a training and a validation split"
    if not any(tally.documents.values()):
        what = "has no document, neither text nor JSON lines"
    left_out = describe_skipped(tally.skipped)
    return (
        f"data.source: {source.name!r} {what}"
        f"{f' (skipped: {left_out})' if left_out else ''}; name more text"
    )


def describe(summary: Summary) -> str:
    """Returns the counts of a source in words."""
    details = []
    if summary.repeats:
        details.append(f"{summary.repeats:,} equal to an earlier one")
    if summary.cut:
        details.append(
            f"{summary.cut:,} cut in two, because whole ones would not leave "
            f"{splits.LEAST_PERCENT} to {splits.MOST_PERCENT} % to validate"
        )
    parts = [
        *([f"{summary.files:,} files"] if summary.files else []),
        f"{sum(summary.documents.values()):,} documents"
        + (f" ({'; '.join(details)})" if details else ""),
        f"{sum(summary.bytes.values()):,} bytes",
        *([f"skipped {describe_skipped(summary.skipped)}"] if summary.skipped else []),
    ]
    return ", ".join(parts)


def describe_skipped(skipped: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns `skipped` in words; "" if nothing was skipped."""
    return ", ".join(
        f"{entry['count']:,} {reason} (the first: {patterns.shown(entry['first'])})"
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


def _open_stdlib(cache_dir: str, *, split: str, log: Callable[[str], None]) -> Source:
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
        written = [
            os.path.relpath(os.path.join(parent, name), folder)
            for parent, _, names in os.walk(folder)
            for name in names
        ]
        record = {"checksums": cache.checksums(folder, written)}
        cache.write_record(os.path.join(folder, _CHECKSUMS), record)

    def load(folder: str) -> Any:
        cache.verify(folder, cache.read_record(os.path.join(folder, _CHECKSUMS)))
        from tensorflow_datasets.core import read_only_builder

        return read_only_builder.builder_from_files("stdlib_text", data_dir=folder)

    @functools.cache  # verified once, then read several times
    def opened() -> Any:
        return cache.folder(data_dir, build=prepare, load=load, log=log)

    def read(part: str) -> Iterator[text_files.Document]:
        builder = opened()
        missing = set(paths[part])
        for row in _rows(builder, part):
            path = os.fsdecode(row["path"])
            missing.discard(path)
            yield text_files.Document(path, row["text"])
        yield from (text_files.Document(path, None) for path in sorted(missing))

    source = Source(name="stdlib", fingerprint=fingerprint, files=len(files), read=read)
    if split == "files":
        return source
    return dataclasses.replace(
        source, fingerprint=_fingerprint(fingerprint, split), cut=splits.cut_pieces
    )


# --- TFDS.


def _rows(builder: Any, split: str) -> Iterator[dict[str, Any]]:
    """Yields the examples of a split, read in blocks: one alone costs a seek."""
    if not builder.info.splits[split].num_examples:
        return  # TFDS cannot open a split without files
    rows = builder.as_data_source(split=split)
    for start in range(0, len(rows), _TFDS_READ_AHEAD):
        stop = min(start + _TFDS_READ_AHEAD, len(rows))
        yield from rows.__getitems__(list(range(start, stop)))


def _open_tfds(name: str, *, text_field: str, by_path: bool) -> Source:
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
            f"data.source: {name!r} has no split 'train' (splits: {', '.join(found)}); "
            "choose a dataset that has one"
        )
    parts = {"train": "train", "validation": "validation"}
    if "validation" not in found:
        border = f"{100 - splits.VALIDATION_PERCENT}%"
        parts = {"train": f"train[:{border}]", "validation": f"train[{border}:]"}
    try:
        if found["train"].num_examples:
            builder.as_data_source(split="train")
    except NotImplementedError as error:
        raise errors.UserError(
            f"data.source: {name!r} is prepared in a format without random access "
            f"({builder.info.file_format}); remove {builder.data_path} and {how}"
        ) from error

    def examples(part: str) -> Iterator[text_files.Document]:
        for number, row in enumerate(_rows(builder, part)):
            text = row[text_field]
            if not isinstance(text, bytes):
                raise errors.UserError(
                    f"data.text_field: {text_field!r} of {name!r} is "
                    f"{type(text).__name__}, not text; name a field of text"
                )
            text = text.removeprefix(codecs.BOM_UTF8)
            yield text_files.Document(f"{part}[{number}]", text)

    def read(split: str) -> Iterator[text_files.Document]:
        held_out = set()
        if split == "train" and not by_path:
            others = (document.raw for document in examples(parts["validation"]))
            held_out = {splits.content_hash(raw) for raw in others if raw}
        for document in examples(parts[split]):
            if document.raw and splits.content_hash(document.raw) in held_out:
                document = document._replace(raw=None, reason="in validation too")
            yield document

    fingerprint = _fingerprint(
        *(["paths"] if by_path else []),
        name,
        text_field,
        str(builder.data_path),
        {key: [part.num_examples, int(part.num_bytes)] for key, part in found.items()},
        (builder.data_path / "dataset_info.json").stat().mtime,
    )
    source = Source(name=name, fingerprint=fingerprint, files=0, read=read)
    if by_path or "validation" in found:
        return source
    otherwise = dataclasses.replace(
        source,
        read=lambda split: examples("train") if split == "train" else iter(()),
        cut=splits.by_content,
    )
    return dataclasses.replace(source, otherwise=otherwise)


# --- Files.


def _open_files(pattern: str, *, text_field: str, by_path: bool) -> Source:
    # Runs that go by path began when each path of a file was a document.
    found = patterns.find(pattern, each_once=not by_path)
    unfit = [path for path in found.files if path.lower().endswith(patterns.PACKED)]
    if unfit and not by_path:
        raise errors.UserError(
            f"data.source: {unfit[0]!r} is neither text nor JSON lines "
            f"({', '.join(patterns.JSON_LINES)}); unpack or convert it, or name a "
            "pattern without it"
        )

    def read(split: str) -> Iterator[text_files.Document]:
        if by_path:
            return text_files.read_by_path(
                found.files, split, root=found.root, text_field=text_field
            )
        every = found.files if split == "train" else ()  # `cut` decides
        return text_files.read(every, root=found.root, text_field=text_field)

    parts = [pattern, text_field, dataclasses.asdict(found)]
    return Source(
        name=pattern,
        fingerprint=_fingerprint(*(["paths"] if by_path else []), *parts),
        files=len(found.files),
        read=read,
        cut=None if by_path else splits.by_content,
        left_out={
            reason: [os.path.relpath(path, found.root) for path in paths]
            for reason, paths in found.left_out.items()
        },
    )
