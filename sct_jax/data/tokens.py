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
from typing import Any

import numpy as np

from sct_jax.data import sources, splits
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


def build(
    folder: str,
    source: sources.Source,
    *,
    summary: sources.Summary,
    tokenizer: tokenizer_lib.Tokenizer,
) -> None:
    """Writes the tokenizer, the tokens of both splits, and metadata into `folder`.

    Documents stream: memory grows with the longest document, not with the corpus.
    """
    tokenizer.save(os.path.join(folder, _TOKENIZER))
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    counts = {
        split: write(
            os.path.join(folder, _file_name(split)),
            sources.documents(source, split),
            tokenizer=tokenizer,
            dtype=dtype,
        )
        for split in splits.SPLITS
    }
    metadata = dataclasses.asdict(summary) | {
        "tokens": counts,
        "dtype": dtype.name,
        "tokenizer_hash": _file_hash(os.path.join(folder, _TOKENIZER)),
    }
    with open(os.path.join(folder, _METADATA), "w", encoding="utf-8") as file:
        json.dump(metadata, file, indent=2)


def write(
    path: str,
    documents: Iterable[str],
    *,
    tokenizer: tokenizer_lib.Tokenizer,
    dtype: np.dtype,
) -> int:
    """Writes a mark and the ids of each document to `path`; returns the token count."""
    count = 0
    with open(path, "wb") as file:
        for batch in _batches(documents):
            encoded = tokenizer.encode_batch([chunk for _, chunk in batch])
            ids: list[int] = []
            for (is_first, _), chunk_ids in zip(batch, encoded, strict=True):
                if is_first:
                    ids.append(tokenizer.document_mark)
                ids += chunk_ids
            np.asarray(ids, dtype).tofile(file)
            count += len(ids)
    return count


def _batches(documents: Iterable[str]) -> Iterator[list[tuple[bool, str]]]:
    """Yields lists of (is the first of its document, chunk), in order."""
    batch: list[tuple[bool, str]] = []
    size = 0
    for document in documents:
        for number, chunk in enumerate(tokenizer_lib.chunks(document)):
            batch.append((number == 0, chunk))
            size += len(chunk)
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def read_metadata(folder: str) -> dict[str, Any] | None:
    """Returns the metadata that `build` wrote, or None for an incomplete folder.

    Checks the hash of the tokenizer and the sizes of the token files.
    """
    try:
        with open(os.path.join(folder, _METADATA), encoding="utf-8") as file:
            metadata = json.load(file)
        width = np.dtype(metadata["dtype"]).itemsize
        complete = all(
            os.path.getsize(os.path.join(folder, _file_name(split)))
            == metadata["tokens"][split] * width
            for split in splits.SPLITS
        )
        tokenizer_hash = _file_hash(os.path.join(folder, _TOKENIZER))
        complete = complete and metadata["tokenizer_hash"] == tokenizer_hash
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return metadata if complete else None


def load(
    folder: str, *, metadata: dict[str, Any]
) -> tuple[tokenizer_lib.Tokenizer, dict[str, np.memmap]]:
    """Returns the tokenizer and the tokens of each split, from a complete folder."""
    mapped = {
        split: np.memmap(
            os.path.join(folder, _file_name(split)),
            dtype=np.dtype(metadata["dtype"]),
            mode="r",
        )
        for split in splits.SPLITS
    }
    return tokenizer_lib.Tokenizer.load(os.path.join(folder, _TOKENIZER)), mapped


def sample(source: sources.Source, *, every: int) -> Iterator[str]:
    """Returns every `every`-th chunk of the training documents, from the first."""
    chunks = itertools.chain.from_iterable(
        map(tokenizer_lib.chunks, sources.documents(source, "train"))
    )
    return itertools.islice(chunks, 0, None, every)


def _file_name(split: str) -> str:
    return f"{split}.tokens"


def _file_hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
