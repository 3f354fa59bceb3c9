"""Flat, memory-mapped files of tokens, one per split, and windows into them.

A document mark precedes every document. The first token of a document is predicted
from its mark, and the end of a document by predicting the next mark.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from sct_jax import errors, files
from sct_jax.data import cache, sources, splits
from sct_jax.data import tokenizer as tokenizer_lib

# Part of every cache key. Raise it if the same text would give different files.
FORMAT = "1"

# Encoded at once: keeps the cores busy, in about 200 MB of memory.
_BATCH_CHARACTERS = 1 << 20
_METADATA = "metadata.json"
_TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Window i is tokens[i seq_len : (i + 1) seq_len + 1].

    Inputs are its first seq_len tokens, targets its last seq_len tokens. Every token
    but the first is a target once; an incomplete last window is dropped. Implements
    grain's `RandomAccessDataSource`.
    """

    tokens: np.ndarray
    seq_len: int

    def __len__(self) -> int:
        return max(len(self.tokens) - 1, 0) // self.seq_len

    def __getitem__(self, index: int) -> np.ndarray:
        start = int(index) * self.seq_len
        return np.array(self.tokens[start : start + self.seq_len + 1])


class Written(NamedTuple):
    """What a file of tokens has.

    Attributes:
      tokens: their number.
      largest_id: the largest of them.
      bytes: of UTF-8 text that they stand for.
    """

    tokens: int
    largest_id: int
    bytes: int


def build(
    folder: str,
    source: sources.Source,
    *,
    summary: sources.Summary,
    tokenizer: tokenizer_lib.Tokenizer,
    key: str = "",
) -> None:
    """Writes the tokenizer, the tokens of both splits, and metadata into `folder`.

    Documents stream: memory grows with the longest document, not with the corpus. The
    metadata have checksums of the other files, and one of their own.

    Args:
      folder: an empty folder.
      source: the text.
      summary: of the text.
      tokenizer: encodes it.
      key: identifies text and tokenizer; kept in the metadata.

    Raises:
      UserError: the tokenizer changes the text, or the text is not that of `summary`.
    """
    tokenizer.save(os.path.join(folder, _TOKENIZER))
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    written = {
        split: write(
            os.path.join(folder, _file_name(split)),
            sources.documents(source, split),
            tokenizer=tokenizer,
            dtype=dtype,
            where=f"of the {split} split of {source.name!r}",
        )
        for split in splits.SPLITS
    }
    found = {split: file.bytes for split, file in written.items()}
    if found != summary.bytes:
        raise errors.UserError(
            f"data.source: the text of {source.name!r} changed while it was read, from "
            f"{summary.bytes} bytes to {found}; run again once it stops changing"
        )
    metadata = dataclasses.asdict(summary) | {
        "key": key,
        "tokens": {split: file.tokens for split, file in written.items()},
        "largest_id": {split: file.largest_id for split, file in written.items()},
        "dtype": dtype.name,
        "tokenizer_hash": _file_hash(os.path.join(folder, _TOKENIZER)),
        "checksums": cache.checksums(
            folder, [_TOKENIZER, *map(_file_name, splits.SPLITS)]
        ),
    }
    cache.write_record(os.path.join(folder, _METADATA), metadata)


def write(
    path: str,
    documents: Iterable[str],
    *,
    tokenizer: tokenizer_lib.Tokenizer,
    dtype: np.dtype,
    where: str,
) -> Written:
    """Writes a mark and the ids of each document to `path`; returns what it has.

    Raises:
      UserError: the tokens of a document do not stand for its text. Names the document
        by its number, followed by `where`.
    """
    count = largest = size = 0
    with open(path, "wb") as file:
        for batch in _batches(documents):
            encoded = tokenizer.encode_batch([chunk.text for chunk in batch])
            ids: list[int] = []
            for chunk, chunk_ids in zip(batch, encoded, strict=True):
                size += tokenizer.count_bytes(
                    chunk.text, chunk_ids, where=f"document {chunk.document:,} {where}"
                )
                if chunk.is_first:
                    ids.append(tokenizer.document_mark)
                ids += chunk_ids
            np.asarray(ids, dtype).tofile(file)
            count += len(ids)
            largest = max(largest, *ids)
    return Written(count, largest, size)


class _Chunk(NamedTuple):
    """A part of a document, numbered from 1."""

    document: int
    is_first: bool
    text: str


def _batches(documents: Iterable[str]) -> Iterator[list[_Chunk]]:
    """Yields lists of the chunks of all documents, in order."""
    batch: list[_Chunk] = []
    size = 0
    for document, whole in enumerate(documents, start=1):
        for number, text in enumerate(tokenizer_lib.chunks(whole)):
            batch.append(_Chunk(document, number == 0, text))
            size += len(text)
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def read_metadata(folder: str) -> dict[str, Any]:
    """Returns the metadata that `build` wrote, of a folder that is as it was written.

    Reads every file in full.

    Raises:
      Damaged: a file is missing or was changed, or an earlier version wrote the folder.
    """
    path = os.path.join(folder, _METADATA)
    metadata = cache.read_record(path)
    try:
        width = np.dtype(metadata["dtype"]).itemsize
        sizes = {
            split: metadata["checksums"][_file_name(split)]["bytes"]
            for split in splits.SPLITS
        }
        wanted = {split: width * n for split, n in metadata["tokens"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise cache.Damaged(f"{path!r} has another format ({error!r})") from error
    if sizes != wanted:
        raise cache.Damaged(f"{path!r} does not agree with itself")
    cache.verify(folder, metadata)
    return metadata


def load(
    folder: str, *, metadata: dict[str, Any]
) -> tuple[tokenizer_lib.Tokenizer, dict[str, np.memmap]]:
    """Returns the tokenizer and the tokens of each split.

    Args:
      folder: of `build`.
      metadata: what `read_metadata` returned for it.

    Raises:
      Damaged: an id is beyond the vocabulary, or the folder was changed just now.
    """
    try:
        tokenizer = tokenizer_lib.Tokenizer.load(os.path.join(folder, _TOKENIZER))
        mapped = {
            split: np.memmap(
                os.path.join(folder, _file_name(split)),
                dtype=np.dtype(metadata["dtype"]),
                mode="r",
            )
            for split in splits.SPLITS
        }
        largest = max(metadata["largest_id"].values())
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise cache.Damaged(f"{folder!r} cannot be opened ({error})") from error
    if largest >= tokenizer.vocab_size:
        raise cache.Damaged(
            f"{folder!r} has tokens with id {largest}, beyond the vocabulary of "
            f"{tokenizer.vocab_size}"
        )
    return tokenizer, mapped


def kept_tokenizer(
    folder: str, *, text_hash: str, vocab_size: int
) -> tokenizer_lib.Tokenizer | None:
    """Returns the tokenizer of a damaged folder, if that is whole; None otherwise.

    Text that is encoded again then keeps its ids, whichever version trained on it.

    Args:
      folder: of `build`, by this version or an earlier one; it may not exist.
      text_hash: of the text that the tokenizer was trained on.
      vocab_size: the most tokens that it may have.
    """
    path = os.path.join(folder, _TOKENIZER)
    try:
        with files.open_regular(os.path.join(folder, _METADATA)) as file:
            metadata = json.loads(file.read())
        if metadata["hash"] != text_hash or metadata["tokenizer_hash"] != _file_hash(
            path
        ):
            return None
        if metadata.get("key", os.path.basename(folder)) != os.path.basename(folder):
            return None
        tokenizer = tokenizer_lib.Tokenizer.load(path)
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return tokenizer if tokenizer.vocab_size <= vocab_size else None


def sample(source: sources.Source, *, every: int) -> Iterator[str]:
    """Returns every `every`-th chunk of the training documents, from the first."""
    chunks = itertools.chain.from_iterable(
        map(tokenizer_lib.chunks, sources.documents(source, "train"))
    )
    return itertools.islice(chunks, 0, None, every)


def _file_name(split: str) -> str:
    return f"{split}.tokens"


def _file_hash(path: str) -> str:
    with files.open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
