"""What this machine has and does: free memory, peak memory, FLOP/s and bytes/s."""

import ctypes
import gc
import pathlib
import resource
import sys

import jax
import jax.numpy as jnp

from experiments.benchmarks import timing


def available_memory() -> int | None:
    """Returns the bytes that a process can still allocate, or None if unknown."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = {line.split(":")[0]: line.split()[1] for line in lines}
    return int(values["MemAvailable"]) * 1024 if "MemAvailable" in values else None


def peak_rss_bytes() -> int:
    """Returns the peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def release_memory() -> None:
    """Returns freed memory to the system, so that it does not count in later peaks."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def rates(*, size: int = 2048, copied: int = 64 * 2**20) -> dict[str, float]:
    """Returns FLOP/s of a large float32 product, and bytes/s of a large copy.

    Args:
      size: rows of the square matrices.
      copied: numbers in the copy. The default has 256 MB, more than any cache.
    """
    square = jnp.ones((size, size))
    multiply = jax.jit(lambda x: x @ x)
    vector = jnp.ones(copied)
    # In place: the first write to new pages costs more than the copy.
    increment = jax.jit(lambda x: x + 1, donate_argnums=0)

    def copy():
        nonlocal vector
        vector = increment(vector)
        return vector

    calls = {"product": lambda: multiply(square), "copy": copy}
    seconds = timing.medians(timing.interleaved(calls, rounds=5))
    return {
        "flops_per_second": 2 * size**3 / seconds["product"],
        "bytes_per_second": 2 * vector.nbytes / seconds["copy"],
    }
