"""Text and tokenizers that lose, repeat or hide something, and damaged caches."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from experiments.faults import cases, runs, workspace
from sct_jax import data, errors
from sct_jax.data import sources, splits

_MARK = "<|endoftext|>"
_PROSE = "the ship went down the river and over the sea to the far shore " * 60


# --- What a corpus holds.


def _config(context: cases.Context, pattern: object, **changes: Any) -> data.DataConfig:
    cache = str(context.folder / "cache")
    return data.DataConfig(source=str(pattern), cache_dir=cache, **changes)


def _prepare(config: data.DataConfig) -> tuple[data.Corpus, str]:
    """The corpus, and the line that describes it."""
    lines: list[str] = []
    corpus = data.prepare(config, vocab_size=300, log=lines.append)
    return corpus, lines[-1]


def _open(context: cases.Context, pattern: object) -> sources.Source:
    return sources.open_source(
        str(pattern),
        text_field="text",
        cache_dir=str(context.folder / "cache"),
        split="documents",
    )


def _documents(context: cases.Context, pattern: object) -> dict[str, list[str]]:
    source, _ = sources.scan(_open(context, pattern))
    return {part: list(sources.documents(source, part)) for part in splits.SPLITS}


def _decoded(corpus: data.Corpus) -> list[str]:
    """The documents of a corpus, from its tokens, but for very long ones."""
    texts = []
    for tokens in (corpus.train, corpus.validation):
        ids = np.asarray(tokens)
        starts = np.flatnonzero(ids == corpus.tokenizer.document_mark)
        for part in np.split(ids, starts)[1:]:
            if len(part) < 100_000:
                texts.append(corpus.tokenizer.decode(part[1:].tolist()))
    return texts


def _odd_files(context: cases.Context) -> cases.Outcome:
    seen, folder = cases.Seen(), context.folder / "corpus"
    workspace.write_corpus(folder, seed=context.space.seed, files=30)
    kept = {
        "bom.txt": b"\xef\xbb\xbfafter a mark",
        "crlf.txt": b"one\r\ntwo\r\n",
        "nul.txt": b"before\0after",
        "special.txt": f"a {_MARK} b <s> [UNK] ##c".encode(),
    }
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    (folder / "line.txt").write_bytes(b"word " * 10_000_000)
    (folder / "empty.txt").write_bytes(b"")
    (folder / "latin.txt").write_bytes("café olé".encode("latin-1"))
    (folder / "cut.txt").write_bytes("é".encode()[:1])
    (folder / "missing.txt").symlink_to("nowhere.txt")
    tokenizer = context.folder / "tokenizer.json"
    _trained().save(str(tokenizer))
    config = _config(context, folder / "*.txt", tokenizer=str(tokenizer))
    corpus, line = _prepare(config)
    seen.that("39 files" in line, "39 files", line)
    for words in ("1 empty", "2 not UTF-8", "1 unreadable"):
        seen.that(words in line, f"{words} skipped", line)
    sizes = sum(path.stat().st_size for path in folder.iterdir() if path.exists())
    lost = sizes - corpus.bytes
    seen.equal("bytes left out", lost, len("café olé".encode("latin-1")) + 1 + 3)
    texts = _decoded(corpus)
    for name, content in kept.items():
        seen.that(content.decode("utf-8-sig") in texts, "all other text is kept", name)
    return seen.outcome(
        "an empty file, Latin-1, half a character, a missing file, a byte order mark, "
        "CRLF, NUL, special tokens, a line of 50 MB"
    )


def _too_short(context: cases.Context) -> cases.Outcome:
    seen, path = cases.Seen(), context.folder / "short.txt"
    path.write_text("a few words, far too few of them. " * 5)
    flags = context.space.flags(context.folder / "run", {"data.source": path})
    with runs.Deadline(60):
        ended = runs.call(*flags)
    seen.refused(ended, "data.batch_size")
    return seen.outcome("a corpus of 170 bytes")


def _counted_again(context: cases.Context) -> cases.Outcome:
    seen, folder = cases.Seen(), context.folder / "corpus"
    workspace.write_corpus(folder, seed=context.space.seed, files=40)
    config = _config(context, folder / "*.txt")
    first, line = _prepare(config)
    cases.injected("skipped" not in line and "40 files" in line, line)
    added = [folder / f"latin{number}.txt" for number in range(10)]
    for path in added:
        path.write_bytes("café olé".encode("latin-1"))
    again, line = _prepare(config)
    seen.that(
        "50 files" in line and "10 not UTF-8" in line, "the ten are counted", line
    )
    seen.that(again.hash == first.hash, "the tokens stay")
    for path in added:
        path.unlink()
    _, line = _prepare(config)
    seen.that("40 files" in line and "skipped" not in line, "and no longer after", line)
    return seen.outcome("ten Latin-1 files added to a cached corpus, and removed")


def _loop(context: cases.Context) -> cases.Outcome:
    seen, folder = cases.Seen(), context.folder / "corpus"
    workspace.write_corpus(folder, seed=context.space.seed, files=20)
    (folder / "self").symlink_to(folder)
    (folder / "sub").mkdir()
    (folder / "sub" / "up").symlink_to("..")
    inner = folder / "self" / "self" / "sub" / "up" / "0.txt"
    cases.injected(inner.exists(), "the links do not lead back")
    parts = _documents(context, folder / "**" / "*.txt")
    seen.equal("documents", sum(map(len, parts.values())), 20)
    both = set(parts["train"]) & set(parts["validation"])
    seen.equal("documents in both splits", len(both), 0)
    return seen.outcome("20 files, a link to their folder and one to its parent; `**`")


def _one_large_file(context: cases.Context) -> cases.Outcome:
    seen, tries = cases.Seen(), 8
    for number in range(tries):
        folder = context.folder / str(number)
        folder.mkdir()
        words = "".join(context.rng.choices("abcdefgh \n", k=1_200_000))
        (folder / "large.txt").write_text(words)
        (folder / "small.txt").write_text(words[:500])
        summary = sources.scan(_open(context, folder / "*.txt"))[1]
        share = summary.bytes["validation"] / sum(summary.bytes.values())
        held = 0.02 <= share <= 0.08
        seen.that(held, "2 to 8 % of the bytes to validate", f"{share:.3f}")
        seen.equal("bytes", sum(summary.bytes.values()), 1_200_500)
    return seen.outcome(f"files of 1.2 MB and of 500 bytes, {tries} times")


def _json_called_json(context: cases.Context) -> cases.Outcome:
    seen, folder = cases.Seen(), context.folder / "corpus"
    folder.mkdir()
    texts = [f"line number {number} of many" for number in range(50)]
    lines = "\n".join(json.dumps({"text": text, "id": text}) for text in texts)
    (folder / "lines.json").write_text(lines)
    for beside in (True, False):
        if beside:
            (folder / "other.txt").write_text("plain text")
        else:
            (folder / "other.txt").unlink()
        parts = _documents(context, folder / "*")
        found = sorted(parts["train"] + parts["validation"])
        wanted = sorted(texts + ["plain text"] * beside)
        seen.that(found == wanted, "read as JSON lines, both times", found[:2])
    return seen.outcome("JSON lines in a file called .json, beside a .txt and alone")


def _pipe(context: cases.Context) -> cases.Outcome:
    seen, folder = cases.Seen(), context.folder / "corpus"
    workspace.write_corpus(folder, seed=context.space.seed)
    os.mkfifo(folder / "pipe.txt")
    flags = context.space.flags(
        context.folder / "run", {"data.source": folder / "*.txt"}
    )
    with runs.Deadline(60):
        ended = runs.call(*flags)
    seen.finished(ended)
    seen.that("1 not a regular file" in ended.out, "skipped and counted", ended.out)
    seen.same_end(context.folder / "run", context.space.clean())
    return seen.outcome("a FIFO among the files")


def _emoji(context: cases.Context) -> cases.Outcome:
    seen, seconds = cases.Seen(), {}
    for size in (100_000, 1_000_000):
        folder = context.folder / str(size)
        folder.mkdir()
        (folder / "emoji.txt").write_text("🙂" * (size // 4))
        workspace.write_corpus(folder / "more", seed=size, files=20)
        began = time.monotonic()
        _prepare(_config(context, folder / "**" / "*.txt"))
        seconds[size] = time.monotonic() - began
    small, large = seconds.values()
    told = f"{small:.2f} and {large:.2f} s"
    seen.that(large < 20 * small + 1, f"linear time ({told})", told)
    seen.that(large < 20, "1 MB in seconds", told)
    return seen.outcome("100 kB and 1 MB of unbroken emoji")


# --- Tokenizers.


def _trained() -> data.Tokenizer:
    return data.Tokenizer.train([_PROSE, "{(0123456789)} étés"], vocab_size=300)


def _refusal(path: pathlib.Path) -> str:
    try:
        data.Tokenizer.load(str(path))
    except errors.UserError as error:
        return str(error)
    return "accepted"


def _without_digits(context: cases.Context) -> cases.Outcome:
    seen, path = cases.Seen(), context.folder / "tokenizer.json"
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(  # pyright: ignore
        add_prefix_space=False
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[_MARK], show_progress=False
    )
    backend.train_from_iterator([_PROSE], trainer)
    kept = backend.decode(backend.encode("1234567890").ids)
    cases.injected(kept == "", f"the tokenizer keeps {kept!r}")
    backend.save(str(path))
    changes = {"data.tokenizer": path, "model.vocab_size": 400}
    ended = runs.call(*context.space.flags(context.folder / "run", changes))
    seen.refused(ended, "data.tokenizer", "bytes")
    return seen.outcome("byte-level BPE whose vocabulary has no digits or braces")


def _dropout(context: cases.Context) -> cases.Outcome:
    seen, path = cases.Seen(), context.folder / "tokenizer.json"
    own = _trained()
    content = json.loads(own.backend.to_str())
    content["model"]["dropout"] = 0.5
    path.write_text(json.dumps(content))
    raw = tokenizers.Tokenizer.from_file(str(path))
    draws = {tuple(raw.encode(_PROSE).ids) for _ in range(3)}
    cases.injected(len(draws) > 1, "the tokenizer drops nothing")
    loaded = data.Tokenizer.load(str(path))
    again = {tuple(loaded.encode(_PROSE)) for _ in range(5)}
    seen.equal("different encodings of one text", len(again), 1)
    seen.that(loaded.encode(_PROSE) == own.encode(_PROSE), "that of no dropout")
    return seen.outcome("a tokenizer.json with dropout .5")


def _corrupt_tokenizer(context: cases.Context) -> cases.Outcome:
    seen, path = cases.Seen(), context.folder / "tokenizer.json"
    whole = _trained().backend.to_str()
    changes = {"data.tokenizer": path, "model.vocab_size": 300}
    place = context.rng.randrange(len(whole) // 2)
    contents = {
        "cut off": whole[:place],
        "empty": "",
        "an array": "[]",
        "without a model": json.dumps(json.loads(whole) | {"model": {}}),
    }
    for name, content in contents.items():
        path.write_text(content)
        ended = runs.call(*context.space.flags(context.folder / name, changes))
        seen.refused(ended, "data.tokenizer")
    path.write_text(whole)
    few = {**changes, "model.vocab_size": 280}
    ended = runs.call(*context.space.flags(context.folder / "few", few))
    seen.refused(ended, "data.tokenizer", "299", "model.vocab_size")
    return seen.outcome(
        f"a tokenizer.json {', '.join(contents)}; one with ids beyond the vocabulary"
    )


# --- Caches.


def _zeros(path: pathlib.Path, rng: random.Random) -> bytes:
    return bytes(path.stat().st_size)


def _flips(path: pathlib.Path, rng: random.Random) -> bytes:
    content = bytearray(path.read_bytes())
    for _ in range(5000):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def _beyond(path: pathlib.Path, rng: random.Random) -> bytes:
    content = bytearray(path.read_bytes())
    content[:2] = b"\xff\xff"
    return bytes(content)


def _damaged_cache(context: cases.Context) -> cases.Outcome:
    seen, space, clean = cases.Seen(), context.space, context.space.clean()
    damages: dict[str, tuple[str, Callable[[pathlib.Path, random.Random], bytes]]] = {
        "training tokens zeroed": ("train", _zeros),
        "5,000 bits of them flipped": ("train", _flips),
        "one id beyond the vocabulary": ("train", _beyond),
        "validation tokens zeroed": ("validation", _zeros),
    }
    for what, (split, damage) in damages.items():
        cache = context.folder / "cache"
        shutil.copytree(space.cache / "sct_jax", cache)
        paths = list(cache.rglob(f"{split}.tokens"))
        cases.injected(paths, "no tokens are cached")
        for path in paths:
            content = damage(path, context.rng)
            cases.injected(content != path.read_bytes(), "no change")
            path.write_bytes(content)
        folder = context.folder / what
        ended = runs.call(*space.flags(folder, {"data.cache_dir": cache}))
        seen.finished(ended)
        warned = [line for line in ended.out.splitlines() if "built again" in line]
        seen.that(warned, "detected, and built again with a warning", what)
        seen.same_end(folder, clean)
        with contextlib.suppress(OSError):
            shutil.rmtree(cache)
    return seen.outcome("; ".join(damages))


CASES = (
    cases.Case(
        15,
        "empty files, invalid UTF-8, byte order marks, CRLF, NUL, special tokens, "
        "a line of 50 MB, a missing file",
        "skipped and counted, or kept to the byte",
        _odd_files,
        group="input",
    ),
    cases.Case(
        16,
        "a corpus shorter than a batch",
        "an error, no hang",
        _too_short,
        group="input",
        quick=True,
    ),
    cases.Case(
        17,
        "token ids beyond the vocabulary, a corrupt tokenizer",
        "an error when it is loaded",
        _corrupt_tokenizer,
        group="input",
        quick=True,
    ),
    cases.Case(
        21,
        "a tokenizer without tokens for digits",
        "refused when it is loaded",
        _without_digits,
        group="input",
        quick=True,
    ),
    cases.Case(
        22,
        "a tokenizer with BPE dropout",
        "dropout is off: the same text has the same tokens",
        _dropout,
        group="input",
        quick=True,
    ),
    cases.Case(
        24,
        "cached tokens overwritten or with flipped bits",
        "detected, built again with a warning, the same end",
        _damaged_cache,
        group="input",
    ),
    cases.Case(
        25,
        "files that are no UTF-8, added to a cached corpus and removed",
        "each reading reports its own counts",
        _counted_again,
        group="input",
        quick=True,
    ),
    cases.Case(
        26,
        "a folder with a link to itself",
        "each file is read once, and is in one split",
        _loop,
        group="input",
        quick=True,
    ),
    cases.Case(
        27,
        "a corpus of a large and a small file",
        "2 to 8 % of the bytes are held out",
        _one_large_file,
        group="input",
        quick=True,
    ),
    cases.Case(
        28,
        "JSON lines in a file called .json",
        "read as JSON lines, beside text and alone",
        _json_called_json,
        group="input",
        quick=True,
    ),
    cases.Case(
        47,
        "a FIFO in the corpus",
        "skipped and counted, no hang",
        _pipe,
        group="input",
        quick=True,
    ),
    cases.Case(
        52,
        "1 MB of unbroken emoji",
        "prepared in linear time",
        _emoji,
        group="input",
        quick=True,
    ),
)
