"""Training and validation text: which documents, or parts of them, are held out."""

import hashlib
import itertools
import os
from collections.abc import Iterator

SPLITS = ("train", "validation")
VALIDATION_PERCENT = 4

PIECE_BYTES = 8192
# Two pieces are 1.5 % of the validation text of "stdlib": no file dominates the loss.
MAX_HELD_OUT_PIECES = 2


def split_of(identity: str) -> str:
    """Returns the split of a document, from a hash of its identity alone."""
    return "validation" if _is_held_out(_hash(os.fsencode(identity))) else "train"


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
    document: those with the smallest hashes.
    """
    pieces = _pieces(text.encode())
    hashes = [_hash(piece) for piece in pieces]
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


def _hash(raw: bytes) -> int:
    """Returns a hash that is uniform in [0, 2^64)."""
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big")


def _is_held_out(hash_: int) -> bool:
    return hash_ * 100 >> 64 < VALIDATION_PERCENT
