"""Mutated tokenizers and damaged caches: refused, repaired, or without effect.

    python -m experiments.faults.fuzz_data --seed=0 --count=100

Ends with an error at the first case that is accepted and gives other tokens, shows
anything but a `UserError`, or takes longer than a minute.
"""

import collections
import contextlib
import faulthandler
import json
import os
import pathlib
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders

from sct_jax import data, errors
from sct_jax.training import overrides

SECONDS = 60

_JUNK: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1 << 40,
    1.5,
    float("nan"),
    "",
    "x",
    "../..",
    "\ud800",
    [],
    [1],
    {},
    {"x": 1},
)
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


# --- Tokenizers.


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


def _change_leaf(rng: random.Random, content: Any) -> None:
    """Replaces or removes a value at a random place."""
    while True:
        keys = list(content) if isinstance(content, dict) else range(len(content))
        key = rng.choice(keys)
        inner = content[key]
        if not inner or not isinstance(inner, dict | list) or rng.random() < 0.2:
            break
        content = inner
    if rng.random() < 0.3:
        del content[key]
    else:
        content[key] = rng.choice(_JUNK)


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
    _change_leaf,
    _change_leaf,
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


# --- Caches.


def damage_cache(rng: random.Random, folder: str) -> str:
    """Damages one file below a cache folder; returns what was done to which."""
    paths = sorted(
        path
        for path in pathlib.Path(folder).rglob("*")
        if path.is_file() and (path.suffix != ".lock" or rng.random() < 0.1)
    )
    path = rng.choice(paths)
    names = [
        name
        for name, (_, is_json) in _DAMAGES.items()
        if not is_json or path.suffix == ".json"
    ]
    name = rng.choice(names)
    damage, _ = _DAMAGES[name]
    damage(rng, path, paths)
    return f"{os.path.relpath(path, folder)}: {name}"


def _rewrite(
    change: Callable[[random.Random, bytes], bytes],
) -> Callable[[random.Random, pathlib.Path, list[pathlib.Path]], None]:
    def damage(rng, path, paths):
        content = change(rng, path.read_bytes())
        path.unlink()  # a mapped file keeps its content
        path.write_bytes(content)

    return damage


def _flip_bits(rng: random.Random, content: bytes) -> bytes:
    flipped = bytearray(content)
    for _ in range(rng.choice((1, 10, 5000))):
        if flipped:
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _swap_blocks(rng: random.Random, content: bytes) -> bytes:
    middle = len(content) // 4 * 2
    return content[middle:] + content[:middle]


def _change_json(rng: random.Random, content: bytes) -> bytes:
    found = json.loads(content)
    _change_leaf(rng, found)
    return json.dumps(found).encode()


def _odd_text(rng: random.Random, content: bytes) -> bytes:
    odd = (
        b"[]",
        b"{}",
        b"null",
        b"NaN",
        b"[" * 99999,
        b"../..",
        b"/",
        b".",
        b'"',
        b"1",
    )
    return rng.choice(odd)


def _replace(make: Callable[[pathlib.Path], Any]) -> Callable[..., None]:
    def damage(rng, path, paths):
        path.unlink()
        make(path)

    return damage


def _take_the_place(
    rng: random.Random, path: pathlib.Path, paths: list[pathlib.Path]
) -> None:
    other = rng.choice(paths)
    if other != path:
        shutil.copyfile(other, path)


def _remove_the_folder(
    rng: random.Random, path: pathlib.Path, paths: list[pathlib.Path]
) -> None:
    shutil.rmtree(path.parent)


# What is done, and whether to JSON alone.
_DAMAGES: Mapping[str, tuple[Callable[..., None], bool]] = {
    "zeros": (_rewrite(lambda rng, content: bytes(len(content))), False),
    "flipped bits": (_rewrite(_flip_bits), False),
    "swapped halves": (_rewrite(_swap_blocks), False),
    "random bytes": (
        _rewrite(lambda rng, content: rng.randbytes(len(content))),
        False,
    ),
    "cut off": (
        _rewrite(lambda rng, content: content[: rng.randrange(len(content) + 1)]),
        False,
    ),
    "longer": (_rewrite(lambda rng, content: content + content[:8] + b"\0"), False),
    "empty": (_rewrite(lambda rng, content: b""), False),
    "odd text": (_rewrite(_odd_text), True),
    "changed value": (_rewrite(_change_json), True),
    "missing": (_replace(lambda path: None), False),
    "a folder": (_replace(lambda path: path.mkdir()), False),
    "a pipe": (_replace(os.mkfifo), False),
    "a link to nothing": (_replace(lambda path: path.symlink_to("nowhere")), False),
    "a link to itself": (_replace(lambda path: path.symlink_to(path.name)), False),
    "a link to zeros": (_replace(lambda path: path.symlink_to("/dev/zero")), False),
    "another file": (_take_the_place, False),
    "folder missing": (_remove_the_folder, False),
}


def try_cache(
    prepare: Callable[[Callable[[str], None]], data.Corpus],
    expected: Mapping[str, Any],
) -> str:
    """Returns what a damaged cache was: "repaired", "unharmed" or "refused" and why.

    Args:
      prepare: returns the corpus, given a function that receives lines.
      expected: what `corpus_bits` returned before.

    Raises:
      AssertionError: the corpus has other tokens.
    """
    lines: list[str] = []
    try:
        corpus = prepare(lines.append)
    except errors.UserError as error:
        assert str(error).startswith("data.cache_dir: "), error
        return f"refused ({error})"
    assert corpus_bits(corpus) == expected
    return "repaired" if len(lines) > 1 else "unharmed"


def corpus_bits(corpus: data.Corpus) -> dict[str, Any]:
    """Returns all of a corpus that a run depends on."""
    return {
        "train": np.asarray(corpus.train).tobytes(),
        "validation": np.asarray(corpus.validation).tobytes(),
        "tokenizer": corpus.tokenizer.hash,
        "documents": corpus.documents,
        "bytes": corpus.bytes,
        "hash": corpus.hash,
    }


def _write_texts(folder: pathlib.Path) -> str:
    folder.mkdir()
    for number in range(60):
        rng = random.Random(number)
        words = ("ka", "to", "mi", "ren", "\n", "é", "漢", "🙂", "1", "{", " ")
        text = "".join(rng.choices(words, k=400))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return str(folder / "*.txt")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints how many cases had which outcome; returns the exit code 0."""
    parser = overrides.FlagParser(__doc__ or "")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--count", type=int, default=100, help="cases of either kind")
    flags = parser.parse_flags(sys.argv[1:] if argv is None else argv)
    seeds = range(flags.seed, flags.seed + flags.count)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        config = data.DataConfig(
            source=_write_texts(folder / "corpus"), cache_dir=str(folder / "cache")
        )

        def prepare(log: Callable[[str], None]) -> data.Corpus:
            return data.prepare(config, vocab_size=300, log=log)

        corpus = prepare(lambda line: None)
        whole = corpus.tokenizer.backend.to_str()
        expected = corpus_bits(corpus)
        outcomes: collections.Counter = collections.Counter()
        path = folder / "tokenizer.json"
        for seed in seeds:
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            mutated = mutate_tokenizer(random.Random(seed), whole)
            path.write_text(mutated, encoding="utf-8", errors="surrogatepass")
            try:
                outcomes["tokenizer", try_tokenizer(str(path))] += 1
            except BaseException:
                print(f"tokenizer, seed {seed}")
                raise
        for seed in seeds:
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            done = damage_cache(random.Random(seed), str(config.cache_dir))
            try:
                outcome = try_cache(prepare, expected)
            except BaseException:
                print(f"cache, seed {seed}: {done}")
                raise
            outcomes["cache", outcome.split()[0]] += 1
            if outcome.startswith("refused"):  # a lock: the next case starts anew
                print(f"cache, seed {seed}: {done}: {outcome}")
                shutil.rmtree(str(config.cache_dir))
                prepare(lambda line: None)
        faulthandler.cancel_dump_traceback_later()
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"{kind}: {count} {outcome}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
