import types

import jax
import pytest
import samples

from sct_jax import optimizers, sharding
from sct_jax.training import hardware
from sct_jax.training import state as state_lib


def abstract(mesh):
    """The state of a small model, divided over a mesh."""
    state = state_lib.abstract(samples.SHAPE, optimizers.sct(1e-3))
    return sharding.abstract(state, sharding.shardings(state, mesh))


def own_bytes(state):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("count", [1, 8])
def test_devices_on_cpu_share_the_memory_of_the_host(monkeypatch, count):
    monkeypatch.setattr(hardware, "host_bytes", lambda: 1001)
    assert hardware.memory_bytes(jax.devices()[:count]) == 1001 // count
    monkeypatch.setattr(hardware, "host_bytes", lambda: None)
    assert hardware.memory_bytes(jax.devices()[:count]) is None


def test_a_replica_takes_its_bytes_on_each_device_and_a_shard_its_share():
    one = hardware.shard_bytes(abstract(sharding.MeshConfig().build(1)))
    replica = hardware.shard_bytes(abstract(sharding.MeshConfig(data=8).build(8)))
    shard = hardware.shard_bytes(abstract(sharding.MeshConfig(fsdp=2).build(2)))
    assert replica == one == own_bytes(abstract(sharding.MeshConfig().build(1)))
    assert one < 2 * shard < 1.1 * one  # scales and singular values are replicated


class Device:
    """An accelerator that knows its memory."""

    platform, device_kind, process_index = "gpu", "H9000", 0

    def __init__(self, limit):
        self._limit = limit

    def memory_stats(self):
        return None if self._limit is None else {"bytes_limit": self._limit}


@pytest.mark.parametrize(("limits", "known"), [([7, 5], 5), ([None], None)])
def test_an_accelerator_has_memory_of_its_own(monkeypatch, limits, known):
    monkeypatch.setattr(hardware, "host_bytes", lambda: 1)
    assert hardware.memory_bytes([Device(limit) for limit in limits]) == known


@pytest.mark.parametrize(
    ("kinds", "peak"),
    [
        (["NVIDIA H100 80GB HBM3"], 989.4e12),
        (["NVIDIA A100-SXM4-40GB"] * 8, 8 * 312e12),
        (["NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"], 2 * 312e12),
        (["TPU v5 lite"] * 4, 4 * 197e12),
        (["TPU v3"] * 8, None),  # devices are cores
        (["TPU7x"], None),
        (["cpu"], None),
        (["NVIDIA L4", "H9000"], None),
    ],
    ids=str,
)
def test_the_peak_is_that_of_all_devices(kinds, peak):
    devices = [types.SimpleNamespace(device_kind=kind) for kind in kinds]
    assert hardware.peak_flops(devices) == peak


def test_this_cpu_has_no_known_peak():
    assert hardware.peak_flops(jax.devices()) is None


def test_the_memory_of_this_host_is_known_and_bounds_nothing_real():
    total = hardware.host_bytes()
    assert total is not None and 1 << 28 < total < 1 << 50


JOB = "0::/slurm/job_7/step_0"


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 1024 * 120),
        ({"memory.max": "max"}, 1024 * 120),
        ({"memory.max": "5000"}, 5000 + 1024 * 20),
        ({"memory.max": "5000", "memory.swap.max": "7"}, 5007),
        ({"memory.max": "999999999"}, 1024 * 120),
        # Of a batch job: a group that contains the process's own one has the limit.
        ({"own": JOB, "slurm/job_7/memory.max": "6000"}, 6000 + 1024 * 20),
        ({"own": JOB, "slurm/job_8/memory.max": "6000"}, 1024 * 120),
        # Version 1, and a container that sees its own group at the root.
        ({"own": "4:cpu,memory:/a/b", "memory/a/memory.limit_in_bytes": "8000"}, 28480),
        ({"own": "4:memory:/docker/x", "memory/memory.limit_in_bytes": "9000"}, 29480),
        (
            {
                "own": "4:memory:/\n0::/",
                "memory/memory.limit_in_bytes": "9000",
                "memory/memory.memsw.limit_in_bytes": "9500",
            },
            9500,
        ),
        (
            {"own": "4:memory:/", "memory/memory.limit_in_bytes": f"{2**63 - 4096}"},
            1024 * 120,
        ),
    ],
    ids=str,
)
def test_a_container_may_have_less(monkeypatch, tmp_path, limits, expected):
    info = tmp_path / "meminfo"
    info.write_text("MemTotal: 100 kB\nMemFree: 1 kB\nSwapTotal: 20 kB\nPages: 3\n")
    for name, text in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(hardware, "_MEMORY", info)
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    monkeypatch.setattr(hardware, "_OWN_CGROUP", tmp_path / "own")
    assert hardware.host_bytes() == expected
