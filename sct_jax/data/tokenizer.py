"""Byte-level byte-pair encoding: text to token ids and back, without loss."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from sct_jax import errors

DOCUMENT_MARK = "<|endoftext|>"

# What a tokenizer.json from elsewhere may call it, in order of preference.
_DOCUMENT_MARKS = (DOCUMENT_MARK, "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>")
# A combining accent, a ligature, spaces: what normalizers and strippers change.
_PROBE = "cafe\u0301 \ufb01ne\n  A  \t b "
# 256 bytes and the document mark.
_MIN_VOCAB_SIZE = 257
# Longer documents are encoded in pieces. A single 50 MB one took 9 GB; no token spans
# a border between pieces, which costs at most one token in about 16,000.
_PIECE_CHARACTERS = 1 << 16
# Merging inside one endless word is quadratic, and teaches nothing: the trainer does
# not see them. (`\b` only makes the search start once per word: 3 times faster.)
_ENDLESS_WORDS = re.compile(r"\b\w{256,}")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Text is text: a literal document mark in it becomes ordinary tokens, never the mark.

    Attributes:
        backend: the tokenizer of the `tokenizers` library.
        document_mark: id of the special token that precedes each document.
        vocab_size: the largest id plus one.
    """

    backend: tokenizers.Tokenizer
    document_mark: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with no special token among them."""
        return [id_ for ids in self.encode_batch(list(pieces(text))) for id_ in ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode` for each, on all cores; each is best one of `pieces`."""
        encodings = self.backend.encode_batch_fast(
            list(texts), add_special_tokens=False
        )
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of `ids`, special tokens shown by name.

        Tokens are bytes: where `ids` begin or end inside a character, U+FFFD stands.
        """
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int32: how many bytes of text each id stands for.

        0 for special tokens and for ids without a token. Summed over the ids of a text
        it gives the length of its UTF-8, hence a loss in bits per byte.
        """
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, id_ in self.backend.get_vocab(with_added_tokens=False).items():
            lengths[id_] = len(token)  # One character of a byte-level token is a byte.
        for id_, added in self.backend.get_added_tokens_decoder().items():
            lengths[id_] = 0 if added.special else len(added.content.encode())
        return lengths

    @property
    def hash(self) -> str:
        """SHA-256 of everything that decides how text is encoded."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def save(self, path: str) -> None:
        """`path` is a tokenizer.json that `load` and other programs read."""
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.write(self.backend.to_str())
        os.replace(file.name, path)  # a file that is cut off is no tokenizer

    @classmethod
    def load(cls, path: str) -> "Tokenizer":
        """The tokenizer of a tokenizer.json file.

        Its truncation and padding are dropped: they are not for corpora. So are a
        normalizer and a space before the text: bytes per token count what is there.

        Raises:
            UserError: naming `data.tokenizer`, if the file is missing, corrupt, not
                byte-level, changes text, or has none of the usual document marks.
        """
        try:
            with open(path, encoding="utf-8") as file:
                found = json.loads(file.read())
            split = _without_prefix_space(found["pre_tokenizer"])
            backend = tokenizers.Tokenizer.from_str(
                json.dumps(found | {"normalizer": None, "pre_tokenizer": split})
            )
        except Exception as error:  # The library raises nothing narrower.
            raise errors.UserError(
                f"data.tokenizer: {path!r} is not a readable tokenizer.json ({error})"
            ) from error
        if '"ByteLevel"' not in json.dumps(json.loads(backend.to_str())["decoder"]):
            raise errors.UserError(
                f"data.tokenizer: {path!r} is not byte-level, so losses per byte could "
                "not be computed; use one like GPT-2's, Llama 3's or SmolLM2's"
            )
        loaded = cls._of(backend, path=path)
        back = loaded.decode(loaded.encode(_PROBE))
        errors.check(
            "data.tokenizer",
            back == _PROBE,
            f"{path!r} changes text: {_PROBE!r} comes back as {back!r}, so losses per "
            "byte could not be computed",
        )
        return loaded

    @classmethod
    def _of(cls, backend: tokenizers.Tokenizer, *, path: str) -> "Tokenizer":
        backend.no_truncation()
        backend.no_padding()
        known = backend.get_vocab(with_added_tokens=True)
        mark = next((mark for mark in _DOCUMENT_MARKS if mark in known), None)
        if mark is None:
            raise errors.UserError(
                f"data.tokenizer: {path!r} has no token to mark documents by; add one "
                f"of {', '.join(_DOCUMENT_MARKS)}"
            )
        # Some files list the mark as an ordinary token, which text could then spell.
        backend.add_special_tokens([mark])
        # Not saved in the file; without it a literal mark in text becomes the mark.
        backend.encode_special_tokens = True
        return cls(
            backend, document_mark=known[mark], vocab_size=max(known.values()) + 1
        )

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int) -> "Tokenizer":
        """A byte-pair encoding of `vocab_size` tokens, learned from `texts`.

        The same texts give the same tokenizer. Texts with too few distinct pairs give
        fewer tokens. 31 MB take about 6 seconds on 2 cores, whatever the size.

        Raises:
            UserError: `vocab_size` leaves no room for 256 bytes and the mark.
        """
        if vocab_size < _MIN_VOCAB_SIZE:
            raise errors.UserError(
                f"model.vocab_size: must be at least {_MIN_VOCAB_SIZE} (256 bytes and "
                f"a document mark) to train a tokenizer, not {vocab_size}"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[DOCUMENT_MARK],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(
            (_ENDLESS_WORDS.sub(" ", p) for text in texts for p in pieces(text)),
            trainer,
        )
        return cls._of(backend, path="")


def _without_prefix_space(split: Any) -> Any:
    """A pre-tokenizer, which may hold others, that adds no space before the text."""
    if isinstance(split, list):
        return [_without_prefix_space(part) for part in split]
    if not isinstance(split, dict):
        return split
    return {
        key: False if key == "add_prefix_space" else _without_prefix_space(value)
        for key, value in split.items()
    }


def pieces(text: str) -> Iterator[str]:
    """`text` cut into parts short enough to be encoded at once."""
    for start in range(0, len(text), _PIECE_CHARACTERS):
        yield text[start : start + _PIECE_CHARACTERS]
