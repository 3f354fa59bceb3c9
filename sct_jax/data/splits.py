"""Training and validation text: which documents, or parts of them, are held out."""

import hashlib
import itertools
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "validation")
VALIDATION_PERCENT = 4

# Where the hashes of documents give validation another share, see `border`.
LEAST_PERCENT, MOST_PERCENT = 2, 8

PIECE_BYTES = 8192
# Two pieces are 1.5 % of the validation text of "stdlib": no file dominates the loss.
MAX_HELD_OUT_PIECES = 2


def split_of(identity: str) -> str:
    """Returns the split of a document, from a hash of its identity alone."""
    return _split(content_hash(os.fsencode(identity)))


def by_content(text: str, split: str) -> Iterator[str]:
    """Yields a document if a hash of its text puts it into the split.

    Equal documents are in the same split, whatever their names.
    """
    if _split(content_hash(text.encode())) == split:
        yield text


def content_hash(raw: bytes) -> int:
    """Returns a hash of a document that is uniform in [0, 2^64)."""
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big")


def is_far(validation: int, total: int) -> bool:
    """Returns whether validation has less than 2 % or more than 8 % of the bytes."""
    return not LEAST_PERCENT * total <= 100 * validation <= MOST_PERCENT * total


class Border(NamedTuple):
    """A place in the order of documents: validation comes before it.

    Documents are ordered by the hashes of their contents, so equal ones stay together.
    Those too large to be held out come last.

    Attributes:
      hash: of the content at the border.
      size: bytes of all documents with this content.
      held_out: bytes at their ends that are validation, too.
      is_large: whether they are larger than `most`.
      most: bytes of a document that can be held out.
    """

    hash: int
    size: int
    held_out: int
    is_large: bool
    most: int

    def cut(self, text: str, split: str) -> Iterator[str]:
        """Yields the part of a document in a split."""
        raw = text.encode()
        place, border = self._place(raw), (self.is_large, self.hash)
        cut = len(raw) if place > border else 0
        if place == border:
            cut = len(raw) - -(-len(raw) * self.held_out // self.size)
            while cut < len(raw) and raw[cut] & 0xC0 == 0x80:  # inside of a character
                cut -= 1
        part = raw[:cut] if split == "train" else raw[cut:]
        if part:
            yield part.decode()

    def _place(self, raw: bytes) -> tuple[bool, int]:
        return len(raw) > self.most, content_hash(raw)


def border(hashes: np.ndarray, sizes: np.ndarray) -> Border:
    """Returns the border that makes about 4 % of the bytes validation text.

    If none between two contents leaves 2 to 8 %, it cuts a content at 4 %, at the same
    place in each of its copies.

    Args:
      hashes: of the content of each document.
      sizes: bytes of each document.
    """
    sizes = sizes.astype(np.int64)
    total = int(sizes.sum())
    most = total * MOST_PERCENT // 100
    is_large = sizes > most
    order = np.lexsort((hashes, is_large))
    wanted = -(-total * VALIDATION_PERCENT // 100)
    at = order[np.searchsorted(np.cumsum(sizes[order]), wanted)]
    before = is_large < is_large[at]
    before |= (is_large == is_large[at]) & (hashes < hashes[at])
    start, size = int(sizes[before].sum()), int(sizes[hashes == hashes[at]].sum())
    held_out = min((0, size), key=lambda own: abs(start + own - wanted))
    if is_far(start + held_out, total):
        held_out = wanted - start
    return Border(int(hashes[at]), size, held_out, bool(is_large[at]), most)


def cut_end(text: str, split: str) -> Iterator[str]:
    """Yields the part of a document in a split: validation is its last 4 %."""
    cut = len(text) * (100 - VALIDATION_PERCENT) // 100
    part = text[:cut] if split == "train" else text[cut:]
    if part:
        yield part


def cut_pieces(text: str, split: str) -> Iterator[str]:
    """Yields the parts of a document in a split; neighbouring pieces are joined.

    A hash of each piece decides, so repeated text (licenses, copied files) lands in one
    split. About 4 % of the pieces are held out, at most `MAX_HELD_OUT_PIECES` per
    document: those with the smallest hashes. A document with more candidates trains on
    the others, whatever split their text is in elsewhere.
    """
    pieces = _pieces(text.encode())
    hashes = [content_hash(piece) for piece in pieces]
    candidates = [i for i, hash_ in enumerate(hashes) if _is_held_out(hash_)]
    held_out = sorted(candidates, key=hashes.__getitem__)[:MAX_HELD_OUT_PIECES]
    for is_held_out, run in itertools.groupby(
        enumerate(pieces), key=lambda numbered: numbered[0] in held_out
    ):
        if is_held_out == (split == "validation"):
            yield b"".join(piece for _, piece in run).decode()


def _pieces(raw: bytes) -> list[bytes]:
    """Cuts at the first line end after every `PIECE_BYTES`.

    The last piece joins the one before if it is shorter than half a piece.
    """
    pieces = []
    start = 0
    while start < len(raw):
        end = raw.find(b"\n", start + PIECE_BYTES - 1) + 1 or len(raw)
        pieces.append(raw[start:end])
        start = end
    if len(pieces) > 1 and len(pieces[-1]) < PIECE_BYTES // 2:
        last = pieces.pop()
        pieces[-1] += last
    return pieces


def _split(hash_: int) -> str:
    return "validation" if _is_held_out(hash_) else "train"


def _is_held_out(hash_: int) -> bool:
    return hash_ * 100 >> 64 < VALIDATION_PERCENT
