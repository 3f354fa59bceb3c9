"""Byte-level byte-pair encoding: lossless text to token ids and back."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from sct_jax import errors, files

DOCUMENT_MARK = "<|endoftext|>"

# Names in tokenizer.json files of other projects, in order of preference.
_DOCUMENT_MARKS = (DOCUMENT_MARK, "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>")
# A combining accent, a ligature, spaces: normalizers and strippers change them.
_PROBE = "cafe\u0301 \ufb01ne\n  A  \t b "
# 256 bytes and the document mark
_MIN_VOCAB_SIZE = 257
# Longer documents are encoded in chunks: one document of 50 MB took 9 GB of memory. No
# token spans two chunks, which adds at most one token in about 16,000.
_CHUNK_CHARACTERS = 1 << 16
# Hidden from the trainer: merging inside one endless word is quadratic, and useless.
# (`\b` makes the search start once per word: 3 times faster.)
_ENDLESS_WORDS = re.compile(r"\b\w{256,}")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Encodes text as token ids and decodes it.

    A literal document mark in text becomes ordinary tokens, never the mark.

    Attributes:
      backend: tokenizer of the `tokenizers` library.
      document_mark: id of the special token before each document.
      vocab_size: largest id plus one.
    """

    backend: tokenizers.Tokenizer
    document_mark: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without special tokens."""
        return [id_ for ids in self.encode_batch(list(chunks(text))) for id_ in ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, on all cores; cut long texts by `chunks`."""
        encodings = self.backend.encode_batch_fast(
            list(texts), add_special_tokens=False
        )
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Returns the text of `ids`, with special tokens by name.

        Tokens are bytes: a character cut at either end becomes U+FFFD.
        """
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def byte_lengths(self) -> np.ndarray:
        """Returns the bytes of text per id, (vocab_size,) int32.

        0 for special tokens and unused ids. The sum over the ids of a text is the
        length of its UTF-8, which turns nats per token into bits per byte.
        """
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, id_ in self.backend.get_vocab(with_added_tokens=False).items():
            lengths[id_] = len(token)  # byte-level: one character per byte
        for id_, added in self.backend.get_added_tokens_decoder().items():
            lengths[id_] = 0 if added.special else len(added.content.encode())
        return lengths

    @property
    def hash(self) -> str:
        """Returns the SHA-256 of all that determines the encoding."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def save(self, path: str) -> None:
        """Writes a tokenizer.json atomically; other programs read it too."""
        files.replace_text(path, self.backend.to_str())

    @classmethod
    def load(cls, path: str) -> "Tokenizer":
        """Returns the tokenizer of a tokenizer.json file.

        Drops truncation and padding, which are for single inputs. Drops normalizers and
        a prefix space, which would change the bytes of the text.

        Raises:
          UserError: names `data.tokenizer`. The file is missing, corrupt or not
            byte-level, changes text, or has no usual document mark.
        """
        try:
            with open(path, encoding="utf-8") as file:
                found = json.loads(file.read())
            split = _without_prefix_space(found["pre_tokenizer"])
            backend = tokenizers.Tokenizer.from_str(
                json.dumps(found | {"normalizer": None, "pre_tokenizer": split})
            )
        except Exception as error:  # the library raises nothing narrower
            raise errors.UserError(
                f"data.tokenizer: {path!r} is not a readable tokenizer.json ({error}); "
                "name another, or leave the field empty to train one"
            ) from error
        if '"ByteLevel"' not in json.dumps(json.loads(backend.to_str())["decoder"]):
            raise errors.UserError(
                f"data.tokenizer: {path!r} is not byte-level, so losses per byte are "
                "undefined; use one like GPT-2's, Llama 3's or SmolLM2's"
            )
        loaded = cls._of(backend, path=path)
        back = loaded.decode(loaded.encode(_PROBE))
        errors.check(
            "data.tokenizer",
            back == _PROBE,
            f"{path!r} changes text: {_PROBE!r} is decoded as {back!r}, so losses per "
            "byte are undefined; use a lossless one",
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
                f"data.tokenizer: {path!r} has no token that can mark documents; add "
                f"one of {', '.join(_DOCUMENT_MARKS)}"
            )
        # Some files list the mark as an ordinary token, which text could spell.
        backend.add_special_tokens([mark])
        # The file does not store this. It keeps literal marks in text ordinary.
        backend.encode_special_tokens = True
        return cls(
            backend, document_mark=known[mark], vocab_size=max(known.values()) + 1
        )

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int) -> "Tokenizer":
        """Returns a byte-pair encoding with `vocab_size` tokens, trained on `texts`.

        Deterministic. Texts with too few distinct pairs give fewer tokens. 31 MB take
        about 6 seconds on 2 cores, for any `vocab_size`.

        Raises:
          UserError: `vocab_size` is less than 257: 256 bytes and the document mark.
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
            (_ENDLESS_WORDS.sub(" ", p) for text in texts for p in chunks(text)),
            trainer,
        )
        return cls._of(backend, path="")


def _without_prefix_space(split: Any) -> Any:
    """Returns a pre-tokenizer, possibly nested, that adds no space before the text."""
    if isinstance(split, list):
        return [_without_prefix_space(part) for part in split]
    if not isinstance(split, dict):
        return split
    return {
        key: False if key == "add_prefix_space" else _without_prefix_space(value)
        for key, value in split.items()
    }


def chunks(text: str) -> Iterator[str]:
    """Yields consecutive parts of `text`, short enough to be encoded at once."""
    for start in range(0, len(text), _CHUNK_CHARACTERS):
        yield text[start : start + _CHUNK_CHARACTERS]
