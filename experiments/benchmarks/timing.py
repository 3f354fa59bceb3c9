"""Times functions side by side.

The functions take turns (A B A B), so that noise of the machine hits all of them alike.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


def interleaved(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Returns the seconds of every call, `rounds` of them per name.

    A call ends when all arrays that it returns are computed.

    Args:
      calls: functions without arguments, run in this order within a round.
      rounds: timed calls of each function.
      warmup: untimed calls of each function first: the first one compiles.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-warmup, rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            elapsed = time.perf_counter() - start
            if turn >= 0:
                seconds[name].append(elapsed)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Returns the median seconds of every name of `interleaved`."""
    return {name: statistics.median(values) for name, values in seconds.items()}
