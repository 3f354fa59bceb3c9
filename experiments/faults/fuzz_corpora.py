"""Random nasty corpora: each is read to the last byte that is text, or refused.

    python -m experiments.faults.fuzz_corpora --seed=0 --count=200

Ends with an error at the first corpus that shows anything but a `UserError`, takes
longer than a minute, whose counts do not add up, or whose tokens are not those of the
text on the disk.
"""

import collections
import dataclasses
import faulthandler
import json
import os
import pathlib
import random
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence

import numpy as np

from sct_jax import data, errors
from sct_jax.data import patterns, sources, splits
from sct_jax.training import overrides

SECONDS = 60
VOCAB_SIZE = 300

_WORDS = ("sea", "ship", "été", "漢字", "🙂", "\u200d", "<|endoftext|>", "\0", "\r\n")
_NAMES = (
    *("a", "b c", "[x]", "[!a]*", "?", "**", "~", "-rf", "x.y", ".hidden", "漢", "é"),
    *(os.fsdecode(name) for name in (b"\xff\xfe", b"new\nline", b"\x1b[31m", b" ")),
)
_SUFFIXES = (".txt", ".txt", ".txt", ".jsonl", ".json", ".TXT", "", ".ndjson")
_PATTERNS = (
    *("**/*.txt", "**/*", "**", "**/[!.]*", "**/*.*"),
    *("*.txt", "*", "**/*.json*", "[a-z]*"),
)


def write_corpus(rng: random.Random, folder: str | os.PathLike[str]) -> str:
    """Fills a folder with files, links and other things; returns what was made.

    Args:
      rng: draws the corpus.
      folder: an empty folder. Nothing outside it is written or linked to, but "/dev".
    """
    root = pathlib.Path(folder)
    made: list[str] = []
    folders = [root]
    for _ in range(rng.randrange(4)):
        inner = rng.choice(folders) / rng.choice(_NAMES)
        if not inner.exists():
            inner.mkdir()
            folders.append(inner)
    plain = rng.random() < 0.6  # others are refused as a whole for one bad line
    for _ in range(rng.choice((0, 1, 2, 5, 20, 20, 60, 200))):
        suffix = ".txt" if plain else rng.choice(_SUFFIXES)
        path = rng.choice(folders) / f"{rng.choice(_NAMES)}{rng.randrange(99)}{suffix}"
        if not path.exists():
            is_json = suffix[1:].lower() in ("json", "jsonl", "ndjson")
            kind, content = (_json if is_json else _text)(rng, plain)
            path.write_bytes(content)
            made.append(kind)
    for _ in range(rng.choice((0, 0, 1, 3, 6))):
        path = rng.choice(folders) / f"{rng.choice(_NAMES)}{rng.randrange(99)}.txt"
        if not os.path.lexists(path):
            made.append(_special(rng, path, root))
    counts = collections.Counter(made)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def _words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(_WORDS, k=count))


def _text(rng: random.Random, plain: bool) -> tuple[str, bytes]:
    """What a file of text is called, and its bytes."""
    size = rng.choice((1, 3, 30, 300, 3000))
    text = _words(rng, size)
    kinds: dict[str, Callable[[], bytes]] = {
        "text": text.encode,
        "the same text": b"every one of these files is the same\n".__mul__(20).strip,
        "one byte": lambda: b"x",
        "empty": bytes,
        "marked": lambda: b"\xef\xbb\xbf" + text.encode(),
        "Latin-1": lambda: "café olé".encode("latin-1") * size,
        "UTF-16": lambda: text.encode("utf-16"),
        "cut short": lambda: text.encode() + "é".encode()[:1],
        "one long line": lambda: b"word " * 10 * size,
        "noise": lambda: rng.randbytes(size),
        "large": lambda: (text + "\n").encode() * 20,
    }
    kind = rng.choice(list(kinds)[:5] if plain else list(kinds))
    return kind, kinds[kind]()


def _json(rng: random.Random, plain: bool) -> tuple[str, bytes]:
    """What a file called as JSON is, and its bytes."""
    del plain
    entries = [{"text": _words(rng, 9), "id": k} for k in range(rng.choice((1, 9, 99)))]
    lines = [json.dumps(entry) for entry in entries]
    odd: tuple[str, ...] = (
        '{"text": null}',
        '{"text": "a", "text": "b"}',
        '{"text": "a",}',
        '{"text": "cut of',
        '{"body": "x"}',
        '{"text": NaN}',
        '{"text": "a", "n": ' + "9" * 5000 + "}",
        '{"text": "a", "n": NaN}',
        '{"text": "\\ud800"}',
        '{"text": ""}',
        "[" * 100_000,
        "  \t",
        "",
        "null",
    )
    kinds: dict[str, Callable[[], bytes]] = {
        "JSON lines": lambda: "\n".join(lines).encode(),
        "marked JSON lines": lambda: "\n".join(lines).encode("utf-8-sig"),
        "JSON lines, CRLF": lambda: "\r\n\r\n".join(lines).encode(),
        "JSON lines, one odd": lambda: "\n".join([*lines, rng.choice(odd)]).encode(),
        "a JSON array": lambda: json.dumps(entries).encode(),
        "a pretty array": lambda: json.dumps(entries, indent=2).encode(),
        "a pretty object": lambda: json.dumps(entries[0], indent=2).encode(),
        "JSON in UTF-16": lambda: "\n".join(lines).encode("utf-16"),
        "no JSON": lambda: _words(rng, 9).encode(),
        "empty JSON": bytes,
    }
    weights = [20, 3, 3, 3, 1, 1, 1, 1, 1, 2]
    (kind,) = rng.choices(list(kinds), weights)
    return kind, kinds[kind]()


def _special(rng: random.Random, path: pathlib.Path, root: pathlib.Path) -> str:
    """Makes something at the path that is not a file of its own; returns what."""
    files = [p for p in root.rglob("*") if p.is_file() and not p.is_symlink()]
    folders = [root, *(p for p in root.rglob("*") if p.is_dir())]
    kind = rng.choice(
        ("FIFO", "socket", "device", "broken link", "loop", "folder", "link to itself")
        + ("hard link", "link") * bool(files)
    )
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.open(path.parent, os.O_RDONLY)  # its own name may be too long
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(f"/proc/self/fd/{here}/{path.name}")
        except OSError:
            return "no socket"
        finally:
            os.close(here)
    elif kind == "device":
        path.symlink_to(rng.choice(("/dev/zero", "/dev/null", "/dev/stdin")))
    elif kind == "broken link":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to(os.path.relpath(rng.choice(folders), path.parent))
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "hard link":
        path.hardlink_to(rng.choice(files))
    else:
        path.symlink_to(os.path.relpath(rng.choice(files), path.parent))
    return kind


def check(folder: pathlib.Path, pattern: str, cache_dir: pathlib.Path) -> str:
    """Prepares a corpus, and returns how it ended.

    Raises:
      AssertionError: its tokens are not its text, its counts do not add up, its splits
        share a document, or a second reading or another place gives another corpus.
    """
    config = data.DataConfig(
        source=os.path.join(folder, pattern),
        cache_dir=str(cache_dir),
        batch_size=1,
        seq_len=8,
    )
    lines: list[str] = []
    try:
        corpus = data.prepare(config, vocab_size=VOCAB_SIZE, log=lines.append)
    except errors.UserError as error:
        message = str(error)
        assert message.startswith(("data.source: ", "data.text_field: ")), message
        assert message.isprintable(), message
        return f"refused: {message.partition(': ')[0]}"
    assert lines[-1].isprintable(), lines[-1]
    source, summary = sources.scan(
        sources.open_source(config.source, text_field="text", cache_dir="", split="")
    )
    _check_counts(config.source, source, summary)
    _check_texts(config.source, corpus, summary)
    assert (corpus.hash, corpus.bytes) == (summary.hash, sum(summary.bytes.values()))
    again: list[str] = []
    data.prepare(config, vocab_size=VOCAB_SIZE, log=again.append)
    assert again[-1] == lines[-1], (again, lines)
    moved = folder.rename(folder.with_name("moved [1]"))
    try:
        there = dataclasses.replace(config, source=os.path.join(moved, pattern))
        assert data.prepare(there, vocab_size=VOCAB_SIZE, log=again.append).hash == (
            corpus.hash
        )
    finally:
        moved.rename(folder)
    return "read"


def _check_texts(pattern: str, corpus: data.Corpus, summary: sources.Summary) -> None:
    """Compares the tokens with the files on the disk, which are read here."""
    found = patterns.find(pattern)
    if any(path.lower().endswith(patterns.JSON) for path in found.files):
        return
    texts: collections.Counter[str] = collections.Counter()
    for path in found.files:
        try:
            text = pathlib.Path(path).read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError):
            continue
        texts[text] += bool(text)
    mark = corpus.tokenizer.document_mark
    decoded = []
    for split in (corpus.train, corpus.validation):
        parts = np.split(split, np.flatnonzero(split == mark))
        decoded += [corpus.tokenizer.decode(part[part != mark]) for part in parts]
    kept = collections.Counter(filter(None, decoded))
    if summary.cut:
        assert sum(map(len, decoded)) == sum(len(t) * n for t, n in texts.items())
    else:
        assert kept == +texts


def _check_counts(
    pattern: str, source: sources.Source, summary: sources.Summary
) -> None:
    texts = {split: list(sources.documents(source, split)) for split in splits.SPLITS}
    size = {split: sum(len(text.encode()) for text in texts[split]) for split in texts}
    assert size == summary.bytes
    assert {split: len(texts[split]) for split in texts} == summary.documents
    if not summary.cut:
        assert set(texts["train"]).isdisjoint(texts["validation"])
    skipped = {reason: entry["count"] for reason, entry in summary.skipped.items()}
    found = patterns.find(pattern)
    inodes = {
        (status.st_dev, status.st_ino)
        for path in found.files
        if os.path.exists(path) and (status := os.stat(path))
    }
    broken = sum(not os.path.exists(path) for path in found.files)
    assert summary.files == len(inodes) + broken
    whole = sum(summary.documents.values()) - summary.cut
    of_paths = sum(skipped.get(reason, 0) for reason in found.left_out)
    if not any(path.lower().endswith(patterns.JSON) for path in found.files):
        assert whole + sum(skipped.values()) - of_paths == summary.files
    held_out = size["validation"] / sum(size.values())
    assert 0.02 <= held_out <= 0.08 or sum(size.values()) < 1000, held_out


def main(argv: Sequence[str] | None = None) -> int:
    """Checks `count` corpora, from `seed` on, and prints how often each end came."""
    parser = overrides.FlagParser(__doc__ or "")
    parser.add_argument("--seed", type=int, default=0, help="of the first corpus")
    parser.add_argument("--count", type=int, default=200, help="number of corpora")
    flags = parser.parse_flags(sys.argv[1:] if argv is None else argv)
    ends: collections.Counter[str] = collections.Counter()
    for seed in range(flags.seed, flags.seed + flags.count):
        rng = random.Random(seed)
        with tempfile.TemporaryDirectory() as name:
            root = pathlib.Path(name)
            folder = root / "corpus"
            folder.mkdir()
            made = write_corpus(rng, folder)
            pattern = rng.choice(_PATTERNS)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            try:
                ends[check(folder, pattern, root / "cache")] += 1
            except BaseException:
                print(f"seed {seed}: {pattern} of {made}", file=sys.stderr)
                raise
            finally:
                faulthandler.cancel_dump_traceback_later()
    for end, count in ends.most_common():
        print(f"{count:6,} {end}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
