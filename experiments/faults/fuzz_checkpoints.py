"""Random damage to checkpoints: bits that flip, records that someone edits."""

import json
import pathlib
import random

from experiments.faults import fuzz_json


def flip_bit(rng: random.Random, folder: pathlib.Path) -> str:
    """Flips one bit of one file below a folder, and returns which.

    Each byte of the folder is equally likely, but half of the time each file is, as
    most files are small.
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in found]
    weights = sizes if rng.random() < 0.5 else [min(size, 1) for size in sizes]
    (path,) = rng.choices(found, weights)
    content = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} of {path.relative_to(folder)}"


def mutate_record(rng: random.Random, text: str) -> str:
    """Returns the JSON text of a record with one random change.

    Text is cut, deleted, doubled or overwritten; or a value of the JSON is removed,
    renamed, or replaced by one of another type. The result may be no JSON, and a change
    may have no effect, such as one of a space.
    """
    return rng.choice(
        (_cut, _overwrite, _double, _change_value, _change_value, _change_value)
    )(rng, text)


def _cut(rng: random.Random, text: str) -> str:
    start = rng.randrange(len(text))
    return text[:start] + rng.choice(("", text[start + rng.randrange(1, 50) :]))


def _overwrite(rng: random.Random, text: str) -> str:
    place = rng.randrange(len(text))
    new = rng.choice('0123456789abctrue{}[]",:-.eE \n\t\0é')
    return text[:place] + new + text[place + 1 :]


def _double(rng: random.Random, text: str) -> str:
    start = rng.randrange(len(text))
    end = start + rng.randrange(1, 50)
    return text[:end] + text[start:]


def _change_value(rng: random.Random, text: str) -> str:
    record = json.loads(text)
    fuzz_json.change_value(rng, record)
    return json.dumps(record, indent=1)
