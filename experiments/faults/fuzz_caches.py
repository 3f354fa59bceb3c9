"""Damaged caches of tokens: repaired, without effect, or refused."""

import json
import os
import pathlib
import random
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.faults import fuzz_json
from sct_jax import data, errors


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
    fuzz_json.change_value(rng, found)
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
