"""Random damage to checkpoints: bits that flip, records that someone edits."""

import json
import pathlib
import random
from typing import Any

# Of every type that JSON has, and what hides in them.
_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../etc/passwd",
    "/etc/passwd",
    "\0",
    "\ud800",
    [],
    [1],
    {},
    {"a": 1},
)


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
    node: Any = record
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        below = node[key]
        if not isinstance(below, dict | list) or not below or rng.random() < 0.3:
            break
        node = below
    kind = rng.random()
    if kind < 0.2:
        del node[key]
    elif kind < 0.3 and isinstance(node, dict):
        node[f"{key}{rng.choice(('x', ' ', '/..'))}"] = node.pop(key)
    elif kind < 0.5 and isinstance(below, int):
        node[key] = below + rng.choice((-1, 1, 0.0, 256))
    else:
        node[key] = rng.choice(_VALUES)
    return json.dumps(record, indent=1)
