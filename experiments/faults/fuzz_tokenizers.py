"""Mutated tokenizers: refused, or they keep all text."""

import contextlib
import json
import random
from collections.abc import Callable
from typing import Any

import tokenizers
from tokenizers import decoders

from experiments.faults import fuzz_json
from sct_jax import data, errors

_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
_PARTS: tuple[dict[str, Any], ...] = (
    _BYTE_LEVEL | {"add_prefix_space": True},
    _BYTE_LEVEL | {"use_regex": False},
    {"type": "WhitespaceSplit"},
    {"type": "Whitespace"},
    {"type": "BertPreTokenizer"},
    {"type": "CharDelimiterSplit", "delimiter": "e"},
    {"type": "Punctuation", "behavior": "Removed"},
    {"type": "Punctuation", "behavior": "MergedWithNext"},
    {"type": "Digits", "individual_digits": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
    {"type": "UnicodeScripts"},
    {"type": "FixedLength", "length": 3},
    *(
        {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": behavior,
            "invert": invert,
        }
        for pattern in (r"\s+", r"\d", "zq[0-9]", r"\w+| ")
        for behavior in ("Removed", "Isolated", "Contiguous", "MergedWithPrevious")
        for invert in (False, True)
    ),
)
_NORMALIZERS: tuple[dict[str, Any], ...] = (
    {"type": "NFKC"},
    {"type": "Lowercase"},
    {"type": "StripAccents"},
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Replace", "pattern": {"String": "e"}, "content": ""},
    {"type": "Prepend", "prepend": "▁"},
    {"type": "ByteLevel"},
)
_DECODERS: tuple[dict[str, Any], ...] = (
    {"type": "Fuse"},
    {"type": "ByteFallback"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 1},
    {"type": "Replace", "pattern": {"String": "e"}, "content": ""},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
    {"type": "WordPiece", "prefix": "##", "cleanup": True},
)
# A tokenizer may learn none of these from the corpus, and is tried on all.
_TEXTS = (
    "The quick brown fox: 1234567890 {[(<>)]} & zq7!",
    "  leading,   inner\t\tand trailing \n\n \r\n ",
    "cafe\u0301 ﬁne naïve 漢字 👩\u200d👩\u200d👧 \u00a0\u3000\ufeff\x00\u00ad",
    "<|endoftext|></s> ##e ▁e Ġe <0x41> [UNK]e e<mask> e",
    "".join(map(chr, range(0x600))),
    "def f(x):\n\treturn x['key']  # it's 3.14\n" * 20,
)


def mutate_tokenizer(rng: random.Random, text: str) -> str:
    """Returns a tokenizer.json with one to three changes, made at random."""
    for _ in range(rng.randint(1, 3)):
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            break
        if rng.random() < 0.2:
            return _mutate_text(rng, text)
        with contextlib.suppress(AttributeError, LookupError, TypeError, ValueError):
            rng.choice(_TOKENIZER_CHANGES)(rng, content)
        text = json.dumps(content)
    return text


def _mutate_text(rng: random.Random, text: str) -> str:
    start = rng.randrange(len(text))
    stop = min(start + rng.randint(1, 50), len(text))
    return rng.choice(
        (
            text[:start],
            text[:start] + text[stop:],
            text[:stop] + text[start:],
            text[:start] + rng.choice('"{}[]:,\\\x00é0') + text[start + 1 :],
            "\ufeff" + text,
            text[:start] + "[" * 2000 + text[start:],
            f'{{"model": {{}}, "x": {"[" * 900}{"]" * 900}}}',
            text + text,
            "",
        )
    )


def _drop_tokens(rng: random.Random, content: Any) -> None:
    model = content["model"]
    singles = [token for token in model["vocab"] if len(token) == 1]
    lost = set(rng.sample(singles, rng.choice((1, 1, 10, len(singles)))))
    model["vocab"] = {t: i for t, i in model["vocab"].items() if not lost & set(t)}
    model["merges"] = [m for m in model["merges"] if not lost & set("".join(m))]


def _share_an_id(rng: random.Random, content: Any) -> None:
    vocab = content["model"]["vocab"]
    one, other = rng.sample(sorted(vocab), 2)
    vocab[one] = vocab[other]


def _swap_ids(rng: random.Random, content: Any) -> None:
    vocab = content["model"]["vocab"]
    one, other = rng.sample(sorted(vocab), 2)
    vocab[one], vocab[other] = vocab[other], vocab[one]


def _move_an_id(rng: random.Random, content: Any) -> None:
    vocab = content["model"]["vocab"]
    vocab[rng.choice(sorted(vocab))] = rng.choice((-1, 5000, 1 << 31, 1 << 32, 1.0))


def _drop_merges(rng: random.Random, content: Any) -> None:
    merges = content["model"]["merges"]
    del merges[rng.randrange(len(merges)) :: rng.randint(1, 5)]


def _shuffle_merges(rng: random.Random, content: Any) -> None:
    rng.shuffle(content["model"]["merges"])


def _split(rng: random.Random, content: Any) -> None:
    parts = rng.sample(_PARTS, rng.randint(1, 3))
    if rng.random() < 0.8:
        parts.append(_BYTE_LEVEL | {"use_regex": rng.random() < 0.5})
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}


def _normalize(rng: random.Random, content: Any) -> None:
    content["normalizer"] = rng.choice(_NORMALIZERS)


def _decode(rng: random.Random, content: Any) -> None:
    parts = rng.sample((*_DECODERS, _BYTE_LEVEL), rng.randint(1, 3))
    content["decoder"] = {"type": "Sequence", "decoders": parts}


def _postprocess(rng: random.Random, content: Any) -> None:
    mark = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    whole = {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": rng.choice(([mark], [mark, whole], [whole, mark], [whole, whole])),
        "pair": [whole, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {
                "id": "<|endoftext|>",
                "ids": [0],
                "tokens": ["<|endoftext|>"],
            }
        },
    }


def _add_token(rng: random.Random, content: Any) -> None:
    flags_ = ("single_word", "lstrip", "rstrip", "normalized", "special")
    content["added_tokens"].append(
        {name: rng.random() < 0.3 for name in flags_}
        | {
            "id": rng.choice(
                (len(content["model"]["vocab"]), rng.randrange(300), 9999)
            ),
            "content": rng.choice(("e", " ", "the", "\n", "é", "Ġ", "", "<x>", " a ")),
        }
    )


def _set_option(rng: random.Random, content: Any) -> None:
    name, values = rng.choice(
        (
            ("dropout", (0.1, 0.9, 1.0, 2.0)),
            ("unk_token", ("e", "<unk>", "<|endoftext|>")),
            ("fuse_unk", (True,)),
            ("byte_fallback", (True,)),
            ("ignore_merges", (True,)),
            ("continuing_subword_prefix", ("##", "", "e")),
            ("end_of_word_suffix", ("</w>", "", "e")),
            ("type", ("WordLevel", "WordPiece", "Unigram", "BPF", None)),
        )
    )
    content["model"][name] = rng.choice(values)


def _limit(rng: random.Random, content: Any) -> None:
    content["truncation"] = {
        "direction": "Right",
        "max_length": rng.randint(1, 8),
        "strategy": "LongestFirst",
        "stride": 0,
    }


_TOKENIZER_CHANGES: tuple[Callable[[random.Random, Any], None], ...] = (
    fuzz_json.change_value,
    fuzz_json.change_value,
    _drop_tokens,
    _share_an_id,
    _swap_ids,
    _move_an_id,
    _drop_merges,
    _shuffle_merges,
    _split,
    _split,
    _normalize,
    _decode,
    _postprocess,
    _add_token,
    _add_token,
    _set_option,
    _set_option,
    _limit,
)


def try_tokenizer(path: str) -> str:
    """Returns "refused", or "kept" for a tokenizer that keeps all text tried.

    Raises:
      AssertionError: it is accepted, and changes text or gives other ids each time.
    """
    try:
        loaded, again = (data.Tokenizer.load(path) for _ in range(2))
    except errors.UserError as error:
        assert str(error).startswith("data.tokenizer: "), error
        return "refused"
    assert loaded.hash == again.hash
    special = [loaded.document_mark]
    library = tokenizers.Tokenizer.from_str(loaded.backend.to_str())
    library.decoder = decoders.ByteLevel()  # its own may change text
    added = library.get_added_tokens_decoder().values()
    # The library takes the bytes of others for those of byte-level tokens.
    is_judge = all(token.content.isascii() for token in added)
    lengths = {}
    if loaded.vocab_size < 1 << 24:
        lengths = dict(enumerate(loaded.byte_lengths().tolist()))
    outcome = "kept"
    for text in _TEXTS:
        try:
            ids = loaded.encode(text)
        except errors.UserError:
            outcome = "refused for a text"
            continue
        assert ids == again.encode(text)
        assert loaded.decode(ids) == text, (text, loaded.decode(ids))
        assert not is_judge or library.decode(ids, skip_special_tokens=False) == text
        assert not set(special) & set(ids)
        if lengths:
            assert sum(lengths[id_] for id_ in ids) == len(text.encode())
    return outcome
