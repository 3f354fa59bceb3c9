"""The typed configuration of a run, and what a resumed run may change of it."""

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import optax

from sct_jax import data as data_lib
from sct_jax import errors, sharding
from sct_jax import model as model_lib
from sct_jax import rank as rank_lib
from sct_jax.training import layerwise, optimizer_config

T = TypeVar("T")

STEPS = ("fused", "layerwise")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of a run is saved.

    Attributes:
      every: steps between checkpoints. The last step is always saved.
      keep: number of checkpoints to keep, the newest ones.
    """

    every: int = 1000
    keep: int = 2

    def validate(self) -> None:
        """Raises UserError, naming the field."""
        errors.check_bounds("checkpoint.", self, "every", "keep", least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out text.

    Attributes:
      every: steps between evaluations. The last step is always evaluated.
      num_batches: batches per evaluation, spread over the validation split. A short
        split gives fewer.
    """

    every: int = 1000
    num_batches: int = 16

    def validate(self) -> None:
        """Raises UserError, naming the field."""
        errors.check_bounds("eval.", self, "every", "num_batches", least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything that determines a run.

    Attributes:
      num_steps: total number of optimizer updates.
      seed: of the parameters and of the data order.
      step: how a step is computed. "fused" compiles forward, backward and update into
        one program. "layerwise" updates each layer during the backward pass, for the
        least memory.
      log_every: steps between logged rows. The first and last step are always logged.
      model: shape of the model.
      data: text, tokenizer and batches.
      optimizer: chain, learning rate and schedule.
      adaptive_rank: whether and how ranks change during training.
      mesh: devices along each axis.
      checkpoint: when to save.
      eval: when and how to evaluate.
    """

    num_steps: int = 1000
    seed: int = 0
    step: str = "fused"
    log_every: int = 10
    model: model_lib.ModelConfig = model_lib.ModelConfig()
    data: data_lib.DataConfig = data_lib.DataConfig()
    optimizer: optimizer_config.OptimizerConfig = optimizer_config.Sct()
    adaptive_rank: rank_lib.AdaptiveRankConfig = rank_lib.AdaptiveRankConfig()
    mesh: sharding.MeshConfig = sharding.MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()

    def build_optimizer(self) -> optax.GradientTransformationExtraArgs:
        """Returns the chain of this run, for the parameters of `model`."""
        return self.optimizer.build(
            self.num_steps,
            decay_mask=model_lib.decay_mask,
            matrix_mask=model_lib.hidden_matrices,
        )

    def validate(self) -> None:
        """Raises UserError, naming the field, for an impossible configuration."""
        errors.check_bounds("", self, "num_steps", "log_every", least=1)
        errors.check_bounds("", self, "seed", least=0, below=2**32)
        errors.check_choice("step", self.step, STEPS)
        for name, value in flatten(dataclasses.asdict(self)).items():
            finite = not isinstance(value, float) or math.isfinite(value)
            errors.check(name, finite, f"{value} is not finite")
        for group in (
            self.model,
            self.data,
            self.optimizer,
            self.adaptive_rank,
            self.mesh,
            self.checkpoint,
            self.eval,
        ):
            group.validate()
        errors.check(
            "adaptive_rank.energy",
            self.adaptive_rank.energy is None or self.optimizer.name == "tsvd",
            "ranks change only with optimizer.name = 'tsvd', not with "
            f"{self.optimizer.name!r}",
        )
        if self.step == "layerwise":
            self._validate_layerwise()
        self._validate_factors()

    def unused_fields(self) -> list[str]:
        """Returns a sentence for every field that is set but has no effect."""
        unused = self.optimizer.unused_fields() + self.adaptive_rank.unused_fields()
        if self.data.split is not None and self.data.source != "stdlib":
            unused.append('data.split: has no effect without data.source = "stdlib"')
        warmup = self.optimizer.warmup_steps
        if warmup >= self.num_steps:
            unused.append(
                f"optimizer.warmup_steps: {warmup} of {self.num_steps} steps, so the "
                "learning rate never reaches its peak"
            )
        return unused

    def _validate_layerwise(self) -> None:
        """Raises UserError for settings that need all gradients at once."""
        errors.check(
            "model.scan_layers",
            not self.model.scan_layers,
            'step = "layerwise" updates layers one by one; set it to false',
        )
        errors.check(
            "data.num_microbatches",
            self.data.num_microbatches == 1,
            'step = "layerwise" keeps no gradients to accumulate; set it to 1',
        )
        layerwise.check_local(self.optimizer)

    def _validate_factors(self) -> None:
        """Raises UserError where the chain does not fit the factors."""
        if not self.model.spectral:
            return
        name, factors = self.optimizer.name, self.model.factors
        low_rank = name in optimizer_config.LOW_RANK_CHAINS
        wanted = "low_rank" if low_rank else "spectral"
        errors.check(
            "model.factors",
            factors == wanted,
            f"{factors!r} does not fit optimizer.name = {name!r}; set it to "
            f"{wanted!r}, or set model.spectral to () for dense matrices",
        )


# Fields that do not affect results: intervals, and the cache folder.
WITHOUT_EFFECT = (
    "data.cache_dir",
    "log_every",
    "checkpoint.every",
    "checkpoint.keep",
    "eval.every",
)

# Fields that a resumed run may change, beside a larger `num_steps`. The layout of a
# step over devices and memory changes its result by rounding alone.
RESUMABLE = (
    *WITHOUT_EFFECT,
    "eval.num_batches",
    "step",
    "model.remat",
    "data.num_microbatches",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
)

# Earlier names of fields and values. Files that hold them open for good; flags accept
# them for one release.
RENAMED_FIELDS = {
    "rank": "adaptive_rank",
    "optimizer.gauge": "optimizer.coordinates",
    "optimizer.singular_value_rate": "optimizer.singular_value_lr_multiplier",
    "optimizer.dense_rate": "optimizer.dense_lr_multiplier",
}
RENAMED_VALUES = {
    "step": {"whole": "fused"},
    "optimizer.retraction": {"lossless": "svd"},
}
# Fields that once were None for the default of their chain.
CHAIN_DEFAULTS = ("optimizer.b2", "optimizer.eps", "optimizer.nesterov")


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the configuration as nested dictionaries that JSON can hold."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: Mapping[str, Any], kind: type[T] = ExperimentConfig) -> T:
    """Returns the configuration that `to_dict` was given, now or in an earlier version.

    Raises:
      UserError: for a field that this version does not know.
    """
    if kind is ExperimentConfig:
        values = _upgrade(values)
    hints = typing.get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        errors.check_choice("config.json", name, tuple(hints))
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            errors.check(f"config.json {name}", isinstance(value, dict), "not a group")
            if hint is optimizer_config.OptimizerConfig:
                value = optimizer_config.from_fields(value)
            else:
                value = from_dict(value, typing.cast(type, hint))
        arguments[name] = _as_tuples(value)
    return kind(**arguments)


def _upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """An experiment's dictionary with the fields of this version."""
    upgraded: dict[str, Any] = {}
    for group, value in values.items():
        if isinstance(value, Mapping):
            fields = {}
            for field, leaf in value.items():
                name = f"{group}.{field}"
                if leaf is None and name in CHAIN_DEFAULTS:
                    continue
                field = RENAMED_FIELDS.get(name, name).rpartition(".")[2]
                fields[field] = _renamed_value(f"{group}.{field}", leaf)
            value = fields
        upgraded[RENAMED_FIELDS.get(group, group)] = _renamed_value(group, value)
    data = upgraded.get("data", {})
    if (
        isinstance(data, Mapping) and data.get("source") == "stdlib"
    ):  # once, the one way to divide that corpus
        upgraded["data"] = {"split": "files", **data}
    return upgraded


def _renamed_value(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return RENAMED_VALUES.get(name, {}).get(value, value)
    return value


def _as_tuples(value: Any) -> Any:
    """The value with its lists as tuples: JSON knows no tuples."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def differences(old: ExperimentConfig, new: ExperimentConfig) -> list[str]:
    """Returns a sentence for every difference that forbids resuming old as new."""
    flat_old, flat_new = flatten(to_dict(old)), flatten(to_dict(new))
    allowed: set[str] = set(RESUMABLE)
    if new.num_steps >= old.num_steps:
        allowed.add("num_steps")
    if new.adaptive_rank.energy is None:  # adaptive ranks belong to one layout
        allowed.add("model.scan_layers")
    other_chain = old.optimizer.name != new.optimizer.name
    found = []
    for name in sorted(flat_old.keys() | flat_new.keys()):
        if other_chain and (name in flat_old) != (name in flat_new):
            continue  # a field of one chain alone
        before, after = flat_old.get(name), flat_new.get(name)
        if before != after and name not in allowed:
            found.append(f"{name}: {before!r} in the workdir, {after!r} now")
    return found


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dictionaries as one, with dotted keys."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
