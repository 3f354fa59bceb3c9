"""Byte-level byte-pair encoding: lossless text to token ids and back."""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import SupportsIndex

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from sct_jax import errors, files, paths
from sct_jax.data import tokenizer_json

DOCUMENT_MARK = "<|endoftext|>"
BYTES = "bytes"
"""Stands for `Tokenizer.of_bytes` where a path of a tokenizer.json is expected."""

# Names in tokenizer.json files of other projects, in order of preference.
_DOCUMENT_MARKS = (DOCUMENT_MARK, "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>")
# Other special tokens that end a text, or a turn of a conversation.
_ENDS = (
    *_DOCUMENT_MARKS,
    "<|eot_id|>",
    "<|eom_id|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
# 256 bytes and the document mark
_MIN_VOCAB_SIZE = 257
# Longer documents are encoded in chunks: one document of 50 MB took 9 GB of memory. No
# token spans two chunks, which adds at most one token in about 16,000.
_CHUNK_CHARACTERS = 1 << 16
# Hidden from the trainer: merging inside one endless word is quadratic, and useless.
# (`\b` makes the search start once per word: 3 times faster.)
_ENDLESS_WORDS = re.compile(r"\b\w{256,}")
# The trainer sees other endless runs (emoji, dashes, spaces) in parts of this length.
_TRAINER_WORD_BYTES = 4096

# Byte-level tokens are written with one printable character per byte.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHER = tuple(byte for byte in range(0x100) if byte not in _PRINTABLE)
# For `str.translate`. The characters of `_OTHER` themselves stand for no byte: they
# become one that Latin-1 lacks.
_TO_LATIN_1 = (
    dict.fromkeys(_OTHER, 0xFFFF)
    | {byte: byte for byte in _PRINTABLE}
    | {0x100 + place: byte for place, byte in enumerate(_OTHER)}
)
_NOT_IN_UTF_8 = (0xC0, 0xC1, *range(0xF5, 0x100))
# Takes the place of a special token's text: no text has it.
_NO_TEXT = b"\xff"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Encodes text as token ids and decodes it.

    A literal document mark in text becomes ordinary tokens, never the mark.

    Attributes:
      backend: tokenizer of the `tokenizers` library.
      document_mark: id of the special token before each document: the one that the
        file itself puts before a text, else the first of the usual ones.
      vocab_size: largest id plus one.
    """

    backend: tokenizers.Tokenizer
    document_mark: int
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without special tokens.

        Raises:
          UserError: the tokenizer changes this text.
        """
        parts = list(chunks(text))
        encoded = self.encode_batch(parts)
        for part, ids in zip(parts, encoded, strict=True):
            self.count_bytes(part, ids, where="the tokenizer changes text")
        return [id_ for ids in encoded for id_ in ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, on all cores; cut long texts by `chunks`.

        Check them with `count_bytes`.

        Raises:
          UserError: the library fails, by a regular expression that takes too long.
        """
        try:
            return self._encode(texts)
        except RuntimeError as error:
            raise errors.UserError(
                f"data.tokenizer: the tokenizer fails on a text ({error}); name another"
            ) from error

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        encode = functools.partial(
            self.backend.encode_batch_fast, list(texts), add_special_tokens=False
        )
        return [encoding.ids for encoding in tokenizer_json.attempt(encode)]

    def count_bytes(self, text: str, ids: Iterable[int], *, where: str) -> int:
        """Returns the length of the UTF-8 of `text`, which `ids` stand for exactly.

        Args:
          text: a text.
          ids: its tokens.
          where: begins the message of the error.

        Raises:
          UserError: `ids` do not stand for `text`: the tokenizer drops or changes some.
        """
        wanted = text.encode()
        found = b"".join(map(self._texts.__getitem__, ids))
        if found == wanted:
            return len(wanted)
        pairs = enumerate(zip(wanted, found, strict=False))
        same = next((k for k, (a, b) in pairs if a != b), min(len(wanted), len(found)))
        near = slice(max(same - 20, 0), same + 20)
        before, after = (raw[near].decode(errors="replace") for raw in (wanted, found))
        raise errors.UserError(
            f"data.tokenizer: {where}: {before!r} becomes {after!r}, so losses per "
            "byte are undefined; name a tokenizer that keeps text as it is, or leave "
            "the field empty to train one"
        )

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Returns the text of `ids`, with special tokens by name.

        Tokens are bytes: a character cut at either end becomes U+FFFD. Ids without a
        token are left out.
        """
        pieces = (self._names.get(int(id_), b"") for id_ in ids)
        return b"".join(pieces).decode(errors="replace")

    def byte_lengths(self) -> np.ndarray:
        """Returns the bytes of text per id, (vocab_size,) int32.

        0 for special tokens and unused ids. The sum over the ids of a text is the
        length of its UTF-8, which turns nats per token into bits per byte.
        """
        lengths = np.zeros(self.vocab_size, np.int32)
        for id_, text in self._names.items():
            lengths[id_] = len(text)
        lengths[self._special] = 0
        return lengths

    @functools.cached_property
    def _names(self) -> dict[int, bytes]:
        """The bytes of each id; those of a special token spell its name."""
        vocab = self.backend.get_vocab(with_added_tokens=False)
        added = self.backend.get_added_tokens_decoder()
        return {id_: _bytes_of(token) for token, id_ in vocab.items()} | {
            id_: token.content.encode() for id_, token in added.items()
        }

    @functools.cached_property
    def _texts(self) -> dict[int, bytes]:
        """The bytes of text of each id; `_NO_TEXT` for special tokens."""
        return self._names | dict.fromkeys(self._special, _NO_TEXT)

    @functools.cached_property
    def _special(self) -> list[int]:
        added = self.backend.get_added_tokens_decoder()
        return [id_ for id_, token in added.items() if token.special]

    @functools.cached_property
    def stops(self) -> tuple[int, ...]:
        """Returns the ids that end a text, the usual one first.

        The document mark is one of them, as the next document begins there.
        """
        special = set(self._special)
        named = (self.backend.token_to_id(name) for name in _ENDS)
        found = [id_ for id_ in named if id_ in special]
        return tuple(dict.fromkeys([*found, self.document_mark]))

    @property
    def hash(self) -> str:
        """Returns the SHA-256 of all that determines the encoding, and of the mark."""
        text = self.backend.to_str()
        mark = self.backend.id_to_token(self.document_mark)
        if mark != _usual_mark(self.backend):
            text += f"\n{mark}"
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, path: str) -> None:
        """Writes a tokenizer.json atomically; other programs read it too."""
        files.replace_text(path, self.backend.to_str())

    @classmethod
    def of_bytes(cls) -> "Tokenizer":
        """Returns the tokenizer whose tokens are the bytes of UTF-8, and the mark."""
        return cls.train((), vocab_size=_MIN_VOCAB_SIZE)

    @classmethod
    def find(cls, name: str) -> "Tokenizer":
        """Returns the tokenizer of a setting: `BYTES`, or the path of a file.

        Raises:
          UserError: see `load`.
        """
        if name == BYTES:
            return cls.of_bytes()
        return cls.load(paths.expand("data.tokenizer", name))

    @classmethod
    def load(cls, path: str) -> "Tokenizer":
        """Returns the tokenizer of a tokenizer.json file.

        Drops truncation and padding, which are for single inputs. Drops normalizers and
        a prefix space, which would change the bytes of the text, and dropout, which
        would give one text other ids each time.

        Raises:
          UserError: names `data.tokenizer`. The file is missing, corrupt or not
            byte-level, changes text, or has no usual document mark.
        """
        loaded = cls._of(tokenizer_json.read(path), path=path)
        known = set(loaded._texts.values())
        missing = [
            byte
            for byte in range(0x100)
            if byte not in _NOT_IN_UTF_8 and bytes([byte]) not in known
        ]
        if missing:
            raise tokenizer_json.unfit(
                path,
                f"has no token for {len(missing)} of the bytes of text (the first: "
                f"{bytes(missing[:1])!r}), so it drops them",
            )
        texts = tokenizer_json.probes(loaded.backend)
        try:
            encoded = loaded._encode(texts)
        except RuntimeError as error:
            raise tokenizer_json.unreadable(path, str(error)) from error
        for text, ids in zip(texts, encoded, strict=True):
            loaded.count_bytes(text, ids, where=f"{path!r} changes text")
        return loaded

    @classmethod
    def _of(cls, backend: tokenizers.Tokenizer, *, path: str) -> "Tokenizer":
        backend.no_truncation()
        backend.no_padding()
        known = backend.get_vocab(with_added_tokens=True)
        try:
            mark = _first_mark(backend) or _usual_mark(backend)
        except RuntimeError as error:
            raise tokenizer_json.unreadable(path, str(error)) from error
        if mark is None:
            raise errors.UserError(
                f"data.tokenizer: {path!r} puts no token before a text, and has no "
                "other that can mark documents; add one of "
                f"{', '.join(_DOCUMENT_MARKS)}"
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
        split = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.FixedLength(_TRAINER_WORD_BYTES)]
        )
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
        backend.pre_tokenizer = split
        return cls._of(backend, path="")


def _first_mark(backend: tokenizers.Tokenizer) -> str | None:
    """The token that the post-processor of the file puts before a text."""
    encode = lambda special: tokenizer_json.attempt(
        lambda: backend.encode("a", add_special_tokens=special).tokens
    )
    plain, whole = encode(False), encode(True)
    return whole[0] if plain and whole[: len(plain)] != plain else None


def _usual_mark(backend: tokenizers.Tokenizer) -> str | None:
    has = lambda mark: backend.token_to_id(mark) is not None
    return next(filter(has, _DOCUMENT_MARKS), None)


def _bytes_of(token: str) -> bytes:
    """Returns the bytes that an entry of a byte-level vocabulary stands for."""
    try:
        return token.translate(_TO_LATIN_1).encode("latin-1")
    except UnicodeEncodeError:  # no token of bytes: no text has it
        return token.encode()


def chunks(text: str) -> Iterator[str]:
    """Yields consecutive parts of `text`, short enough to be encoded at once."""
    for start in range(0, len(text), _CHUNK_CHARACTERS):
        yield text[start : start + _CHUNK_CHARACTERS]
