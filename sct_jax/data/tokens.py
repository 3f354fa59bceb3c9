"""One flat, memory-mapped file of tokens per split, and windows into it.

Every document is preceded by the document mark, so that its first token has something
to be predicted from, and so that its end is the prediction of the next mark.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from sct_jax.data import sources
from sct_jax.data import tokenizer as tokenizer_lib

# Part of every cache key: raise it when the same text would give other files.
FORMAT = "1"

# What is encoded at once: enough to keep the cores busy, about 200 MB of memory.
_BATCH_CHARACTERS = 1 << 20
_METADATA = "metadata.json"
_TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Window i is tokens[i seq_len : i seq_len + seq_len + 1].

    Inputs and targets of a window are its first and last seq_len tokens, so over all
    windows each token but the first is a target once (an incomplete last window is
    left out). A random access source in the sense of grain.
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
    """`folder` holds the tokenizer, the tokens of both splits, and the metadata.

    Streams: memory does not grow with the corpus, only with its longest document.
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
        for split in sources.SPLITS
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
    """`path` holds the ids of each document after a mark; returns how many in all."""
    count = 0
    with open(path, "wb") as file:
        for batch in _batches(documents):
            encoded = tokenizer.encode_batch([piece for _, piece in batch])
            ids: list[int] = []
            for (is_first, _), piece_ids in zip(batch, encoded, strict=True):
                if is_first:
                    ids.append(tokenizer.document_mark)
                ids += piece_ids
            np.asarray(ids, dtype).tofile(file)
            count += len(ids)
    return count


def _batches(documents: Iterable[str]) -> Iterator[list[tuple[bool, str]]]:
    """(is the first of its document, piece) of all pieces, some at a time."""
    batch: list[tuple[bool, str]] = []
    size = 0
    for document in documents:
        for number, piece in enumerate(tokenizer_lib.pieces(document)):
            batch.append((number == 0, piece))
            size += len(piece)
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def read_metadata(folder: str) -> dict[str, Any] | None:
    """What `build` recorded; None unless the folder is whole.

    Checked are the hash of the tokenizer and the sizes of the token files.
    """
    try:
        with open(os.path.join(folder, _METADATA), encoding="utf-8") as file:
            metadata = json.load(file)
        width = np.dtype(metadata["dtype"]).itemsize
        whole = all(
            os.path.getsize(os.path.join(folder, _file_name(split)))
            == metadata["tokens"][split] * width
            for split in sources.SPLITS
        )
        tokenizer_hash = _file_hash(os.path.join(folder, _TOKENIZER))
        whole = whole and metadata["tokenizer_hash"] == tokenizer_hash
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return metadata if whole else None


def load(
    folder: str, *, metadata: dict[str, Any]
) -> tuple[tokenizer_lib.Tokenizer, dict[str, np.memmap]]:
    """The tokenizer and each split's tokens, of a whole folder."""
    splits = {
        split: np.memmap(
            os.path.join(folder, _file_name(split)),
            dtype=np.dtype(metadata["dtype"]),
            mode="r",
        )
        for split in sources.SPLITS
    }
    return tokenizer_lib.Tokenizer.load(os.path.join(folder, _TOKENIZER)), splits


def sample(source: sources.Source, *, every: int) -> Iterator[str]:
    """Each `every`-th piece of the training documents, from the first."""
    pieces = itertools.chain.from_iterable(
        map(tokenizer_lib.pieces, sources.documents(source, "train"))
    )
    return itertools.islice(pieces, 0, None, every)


def _file_name(split: str) -> str:
    return f"{split}.tokens"


def _file_hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
