"""Whether the devices can be used, and whether a state fits into their memory."""

import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from sct_jax import errors
from sct_jax.training import state as state_lib

_MEMORY = pathlib.Path("/proc/meminfo")
_CGROUP = pathlib.Path("/sys/fs/cgroup")


def check_backend() -> None:
    """Raises UserError, naming the platform, if JAX finds no devices."""
    try:
        jax.devices()
    except Exception as error:  # of any type: JAX asserts that there is one
        wanted = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        reason = " ".join(str(error).split())
        raise errors.UserError(
            f"JAX_PLATFORMS: no device of {wanted or 'any platform'!r} can be used"
            f"{f' ({reason})' if reason else ''}; install the JAX for it, or set "
            "JAX_PLATFORMS=cpu"
        ) from error


def check_memory(state: state_lib.TrainState, devices: Iterable[Any]) -> None:
    """Raises UserError, with both sizes, if a state cannot fit into memory.

    Counts parameters and optimizer state alone, so what passes may still not fit.

    Args:
      state: abstract, with shardings.
      devices: all that the state is divided over.
    """
    local = [d for d in devices if d.process_index == jax.process_index()]
    needed = sum(map(_shard_bytes, jax.tree.leaves(state)))
    where, available = f"{local[0].device_kind} has", _device_bytes(local)
    if local[0].platform == "cpu":  # all of them share the memory of the host
        needed, where, available = len(local) * needed, "this host has", host_bytes()
    errors.check(
        "model",
        available is None or needed <= available,
        f"parameters and optimizer state take {needed:,} bytes, but {where} "
        f"{available:,} bytes of memory; make the model smaller, or divide it among "
        "more devices with mesh.fsdp and mesh.tensor"
        if available is not None
        else "",
    )


def host_bytes() -> int | None:
    """Returns the memory and swap that this process may use; None if unknown."""
    try:
        lines = _MEMORY.read_text().splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    limits = [sizes["MemTotal"] + sizes["SwapTotal"]]
    memory, swap = _read_limit("memory.max"), _read_limit("memory.swap.max")
    if memory is not None:
        limits.append(memory + (sizes["SwapTotal"] if swap is None else swap))
    return min(limits)


def _read_limit(name: str) -> int | None:
    """A limit of the control group at the root of this container; None for none."""
    try:
        text = (_CGROUP / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _shard_bytes(leaf: Any) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * np.dtype(leaf.dtype).itemsize


def _device_bytes(devices: Sequence[Any]) -> int | None:
    """The memory of the smallest device; None if the backend does not tell."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    known = [limit for limit in limits if limit]
    return min(known) if known else None
