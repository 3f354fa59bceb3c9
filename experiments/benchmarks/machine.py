"""What this machine has and does: free memory, peak memory, FLOP/s and bytes/s.

Only the functions that measure rates load JAX, so that a program in PyTorch can measure
its memory without it.
"""

import ctypes
import gc
import os
import pathlib
import resource
import sys
from collections.abc import Callable
from typing import Any

SIZE = 2048  # rows of the large square product


def available_memory() -> int | None:
    """Returns the bytes that a process can still allocate, or None if unknown."""
    return _kilobytes("/proc/meminfo", "MemAvailable")


def peak_rss_bytes() -> int:
    """Returns the peak resident memory of this process."""
    # Preferred: `getrusage` also counts the process that started this one.
    peak = _kilobytes("/proc/self/status", "VmHWM")
    if peak is not None:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _kilobytes(path: str, name: str) -> int | None:
    """The bytes of a line "name: 12 kB" of a file, or None."""
    try:
        lines = pathlib.Path(path).read_text().splitlines()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines)
    return int(values[name].split()[0]) * 1024 if name in values else None


def release_memory() -> None:
    """Returns freed memory to the system, so that it does not count in later peaks."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def large_product(*, size: int = SIZE) -> tuple[Callable[[], Any], int]:
    """Returns a call that multiplies large float32 squares, and its FLOPs.

    Args:
      size: rows of the matrices.
    """
    import jax
    import jax.numpy as jnp

    square = jnp.ones((size, size))
    multiply = jax.jit(lambda x: x @ x)
    return lambda: multiply(square), 2 * size**3


def rates(*, size: int = SIZE, copied: int = 64 * 2**20) -> dict[str, float]:
    """Returns FLOP/s of a large float32 product, and bytes/s of a large copy.

    Args:
      size: rows of the square matrices.
      copied: numbers in the copy. The default has 256 MB, more than any cache.
    """
    import jax
    import jax.numpy as jnp

    from experiments.benchmarks import timing

    product, flops = large_product(size=size)
    vector = jnp.ones(copied)
    # In place: the first write to new pages costs more than the copy.
    increment = jax.jit(lambda x: x + 1, donate_argnums=0)

    def copy():
        nonlocal vector
        vector = increment(vector)
        return vector

    calls = {"product": product, "copy": copy}
    seconds = timing.medians(timing.interleaved(calls, rounds=5))
    return {
        "flops_per_second": flops / seconds["product"],
        "bytes_per_second": 2 * vector.nbytes / seconds["copy"],
    }
