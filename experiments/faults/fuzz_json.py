"""Random changes of what JSON holds."""

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
    1 << 31,
    1 << 40,
    1 << 63,
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


def change_value(rng: random.Random, content: Any) -> None:
    """Removes, renames or replaces a value at a random place of `content`."""
    while True:
        keys = list(content) if isinstance(content, dict) else range(len(content))
        key = rng.choice(keys)
        below = content[key]
        if not isinstance(below, dict | list) or not below or rng.random() < 0.3:
            break
        content = below
    kind = rng.random()
    if kind < 0.2:
        del content[key]
    elif kind < 0.3 and isinstance(content, dict):
        content[f"{key}{rng.choice(('x', ' ', '/..'))}"] = content.pop(key)
    elif kind < 0.5 and isinstance(below, int):
        content[key] = below + rng.choice((-1, 1, 0.0, 256))
    else:
        content[key] = rng.choice(_VALUES)
