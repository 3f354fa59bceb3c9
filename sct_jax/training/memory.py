"""What a run needs of its devices' memory, and the settings that follow from it.

`resolve` turns what a configuration leaves to "auto" into a choice, and says why.
`check` refuses a run that cannot fit, before anything is compiled.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sct_jax import attention, errors, model, sharding
from sct_jax.training import accounting, hardware, layerwise
from sct_jax.training import config as config_lib
from sct_jax.training import state as state_lib

# Needs are exact to about 15 %. A run is refused if it needs more than this times the
# memory, and "auto" chooses what takes this much less.
TOLERANCE = 1.15


class Plan(NamedTuple):
    """What a run needs of memory, and has.

    Attributes:
      config: the run, after `resolve`.
      needed: bytes of a step on each device, by kind.
      available: bytes of memory of each device, None if unknown.
      sizes: bytes by kind and their total, of all rows and one copy of the parameters.
      choices: row of the start table -> text.
    """

    config: config_lib.ExperimentConfig
    needed: dict[str, int]
    available: int | None
    sizes: dict[str, int]
    choices: dict[str, str]


def resolve(
    config: config_lib.ExperimentConfig,
    mesh: Mesh,
    state: state_lib.TrainState,
    *,
    available: int | None,
    platform: str | None = None,
    tx: optax.GradientTransformation | None = None,
) -> tuple[config_lib.ExperimentConfig, dict[str, str]]:
    """Returns the configuration without "auto" for what memory decides, and reasons.

    `model.remat` becomes the first of `model.REMAT` whose need fits, the last one if
    none does, and the first where the memory is unknown. On CPU it is never "none" if
    layers are scanned: there memory traffic costs more than recomputation.

    Args:
      config: the run.
      mesh: the devices.
      state: abstract, with shardings.
      available: bytes of memory of each device, from `hardware.memory_bytes`.
      platform: what the choice is for, as JAX names it; that of the mesh by default.
      tx: the chain; that of the configuration by default.

    Returns:
      the configuration, and field -> reason for what was chosen.
    """
    if config.model.remat != "auto":
        return config, {}
    platform = platform or _platform(mesh)
    chosen, reason = _choose_remat(config, mesh, state, available, platform, tx)
    return chosen, {"model.remat": reason}


def plan(
    config: config_lib.ExperimentConfig,
    mesh: Mesh,
    state: state_lib.TrainState,
    *,
    tx: optax.GradientTransformation | None = None,
    reasons: Mapping[str, str],
) -> Plan:
    """Returns what a resolved run needs and has.

    Args:
      config: from `resolve`.
      mesh: the devices.
      state: abstract, with shardings.
      tx: the chain; that of the configuration by default.
      reasons: from `resolve`.
    """
    needed = step_bytes(config, mesh, state, tx=tx)
    if config.step == "layerwise":
        sizes = dict(_layerwise_bytes(config, tx))
    else:
        whole = accounting.step_bytes(
            config.model, tx or config.build_optimizer(), state=state
        )
        sizes = {
            **{name: whole[name] for name in ("parameters", "gradients", "optimizer")},
            "activations": needed["activations"]
            * sharding.row_shards(mesh)
            * mesh.shape["tensor"],
        }
    sizes.pop("total", None)
    sizes["total"] = sum(sizes.values())
    row, reason = config.model.remat, reasons.get("model.remat")
    return Plan(
        config,
        needed,
        hardware.memory_bytes(mesh.devices.flat),
        sizes,
        {"rematerialisation": f"{row} ({reason})" if reason else row},
    )


def check(
    plan: Plan,
    mesh: Mesh,
    state: state_lib.TrainState,
    *,
    tx: optax.GradientTransformation | None = None,
) -> str | None:
    """Raises UserError for a run that cannot fit; returns a note if it may not.

    Parameters and optimizer state are exact, so that they alone decide if they exceed
    the memory. The error names the fields that would lower the need, each with the need
    that it would leave.

    Args:
      plan: of the run.
      mesh: the devices.
      state: abstract, with shardings.
      tx: the chain; that of the configuration by default.
    """
    needed, available = sum(plan.needed.values()), plan.available
    if available is None or needed * TOLERANCE <= available:
        return None
    size = f"{human(needed)} per device, which has {human(available)}"
    state_fits = plan.needed["parameters"] + plan.needed["optimizer"] <= available
    if state_fits and needed <= available * TOLERANCE:
        return f"a step needs about {size}, so it may run out of memory"
    remedies = [
        f"{change} (needs {human(less)})"
        for change, less in _remedies(plan.config, mesh, state, tx)
        if less < 0.95 * needed
    ]
    if _could_divide_more(mesh):
        remedies.append("a larger mesh.fsdp")
    errors.check(
        "model",
        False,
        f"a step needs about {size}; it would need less with "
        f"{', '.join(remedies) or 'a smaller model'}",
    )
    return None


def step_bytes(
    config: config_lib.ExperimentConfig,
    mesh: Mesh,
    state: state_lib.TrainState,
    *,
    platform: str | None = None,
    tx: optax.GradientTransformation | None = None,
) -> dict[str, int]:
    """Returns the bytes that a step takes on each device, by kind.

    On a mesh with a tensor axis, activations count as divided by it. So they are rather
    too few than too many.

    Args:
      config: a run without "auto".
      mesh: the devices.
      state: abstract, with shardings.
      platform: of the devices, as JAX names it; that of the mesh by default.
      tx: the chain; that of the configuration by default.
    """
    platform = platform or _platform(mesh)
    sizes = {
        "parameters": hardware.shard_bytes(state.params),
        "optimizer": hardware.shard_bytes(state.opt_state),
    }
    if config.step == "layerwise":
        whole = _layerwise_bytes(config, tx)
        shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
        passing = whole["streams"] + whole["activations"]
        return sizes | {
            "gradients": whole["gradients"] // shards,
            "activations": passing // sharding.row_shards(mesh),
        }
    activations = _activation_bytes(
        config.model,
        config.optimizer if tx is None else tx,
        rows=config.data.batch_size // sharding.row_shards(mesh),
        seq_len=config.data.seq_len,
        num_microbatches=config.data.num_microbatches,
        platform=platform,
    )
    return sizes | {
        "gradients": sizes["parameters"],
        "gathered": _gathered_bytes(config.model, mesh, state.params, platform),
        "activations": activations // mesh.shape["tensor"],
    }


def _gathered_bytes(
    config: model.ModelConfig, mesh: Mesh, params: model.Params, platform: str
) -> int:
    """What a device holds of matrices that `fsdp` divides, beside its own shards.

    These are one whole layer with its gradient, and embedding and head or the float32
    sums of their gradients. On 8 CPU devices the need of a step was then within 10 % of
    the compiler's figure.
    """
    if mesh.shape["fsdp"] == 1:
        return 0
    # XLA on CPU computes products in float32.
    width = 4 if platform == "cpu" else jnp.dtype(config.compute_dtype).itemsize
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    layers = params[model.LAYERS]
    if isinstance(layers, tuple):
        layer = max(map(count, layers))
    else:
        layer = count(layers) // config.num_layers
    ends = count([w for name, w in params.items() if name != model.LAYERS])
    return (2 * width * layer + 4 * ends) // mesh.shape["tensor"]


def human(size: int) -> str:
    """Returns bytes with three digits and a unit."""
    units = ("B", "KB", "MB", "GB", "TB")
    power = min(int(math.log(max(size, 1), 1000)), len(units) - 1)
    return f"{size / 1000**power:.3g} {units[power]}"


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


def _choose_remat(config, mesh, state, available, platform, tx):
    if config.step == "layerwise":
        return _with(config, "model", remat="none"), "auto"
    if not _can_rematerialise(config, platform):
        reason = "auto: XLA on CPU undoes it where layers are separate"
        return _with(config, "model", remat="none"), reason
    policies = _policies(platform)
    if available is None:
        reason = "auto: the memory of the devices is unknown"
        return _with(config, "model", remat=policies[0]), reason
    chosen, needed = config, 0
    for remat in policies:
        chosen = _with(config, "model", remat=remat)
        sizes = step_bytes(chosen, mesh, state, platform=platform, tx=tx)
        needed = sum(sizes.values())
        if needed * TOLERANCE <= available:
            break
    return chosen, f"auto: needs {human(needed)} of {human(available)}"


def _policies(platform: str) -> tuple[str, ...]:
    """Policies for scanned layers, the fastest first."""
    return model.REMAT[1:] if platform == "cpu" else model.REMAT


def _can_rematerialise(config: config_lib.ExperimentConfig, platform: str) -> bool:
    """Whether recomputation in the backward pass saves memory."""
    return config.step == "fused" and (config.model.scan_layers or platform != "cpu")


def _could_divide_more(mesh: Mesh) -> bool:
    """Whether a larger `mesh.fsdp` would leave less on each device."""
    return mesh.shape["data"] > 1 or (
        _platform(mesh) != "cpu" and len(jax.devices()) > mesh.size
    )


def _remedies(config, mesh, state, tx) -> Iterator[tuple[str, int]]:
    """Changes of one field, and the bytes that a step would then need."""
    data, shards = config.data, sharding.row_shards(mesh)
    changes: list[tuple[str, str, Any]] = []
    rows = data.batch_size // (data.num_microbatches * shards)
    least = next((n for n in range(2, rows + 1) if rows % n == 0), 1)
    if config.step == "fused" and rows > 1:
        changes.append(("data", "num_microbatches", data.num_microbatches * least))
    if _can_rematerialise(config, _platform(mesh)):
        later = model.REMAT[model.REMAT.index(config.model.remat) + 1 :]
        changes.extend(("model", "remat", remat) for remat in later)
    if config.model.attention != "chunked" and data.seq_len > attention.BLOCK:
        changes.append(("model", "attention", "chunked"))
    if rows > 1:
        changes.append(("data", "batch_size", data.batch_size // least))
    if data.seq_len > 1:
        changes.append(("data", "seq_len", data.seq_len // 2))
    for group, field, value in changes:
        changed = _with(config, group, **{field: value})
        needed = step_bytes(changed, mesh, state, tx=tx)
        yield f"{group}.{field}={value}", sum(needed.values())


def _with(config: config_lib.ExperimentConfig, group: str, **fields: Any) -> Any:
    changed = dataclasses.replace(getattr(config, group), **fields)
    return dataclasses.replace(config, **{group: changed})


@functools.lru_cache(maxsize=64)
def _activation_bytes(config: model.ModelConfig, chain: Any, **sizes: Any) -> int:
    """`accounting.activation_bytes` for a chain or its configuration."""
    return accounting.activation_bytes(config, _built(chain), **sizes)


def _layerwise_bytes(
    config: config_lib.ExperimentConfig, tx: optax.GradientTransformation | None
) -> dict[str, int]:
    return _layerwise_bytes_of(
        config.model,
        config.optimizer if tx is None else tx,
        config.data.batch_size,
        config.data.seq_len,
    )


@functools.lru_cache(maxsize=64)
def _layerwise_bytes_of(config, chain, rows, seq_len) -> dict[str, int]:
    tokens = jax.ShapeDtypeStruct((rows, seq_len), jnp.int32)
    batch = dict.fromkeys(("inputs", "targets", "segment_ids"), tokens)
    return accounting.layerwise_bytes(layerwise.stack_of(config), _built(chain), batch)


def _built(chain: Any) -> optax.GradientTransformation:
    """The chain given, or the one a configuration builds; the schedule is no matter."""
    if isinstance(chain, optax.GradientTransformation):
        return chain
    run = config_lib.ExperimentConfig(optimizer=chain)
    return run.build_optimizer()
