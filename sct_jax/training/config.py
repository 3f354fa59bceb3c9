"""The typed configuration of a run, and what a resumed run may change of it."""

import dataclasses
import functools
import itertools
import json
import reprlib
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import optax
from jax.sharding import AbstractMesh, Mesh

from sct_jax import compression, errors, sharding
from sct_jax import data as data_lib
from sct_jax import model as model_lib
from sct_jax import rank as rank_lib
from sct_jax.training import layerwise, optimizer_config
from sct_jax.training import phases as phases_lib

T = TypeVar("T")

STEPS = ("fused", "layerwise")
SINKS = ("jsonl", "tensorboard", "wandb")


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
class LogConfig:
    """Where rows of metrics go.

    Attributes:
      sinks: from "jsonl" (metrics.jsonl, which a run writes in any case), "tensorboard"
        and "wandb" (Weights & Biases). None is TensorBoard, if that is installed.
      project: project in Weights & Biases.
      name: name of the run in Weights & Biases; None is the name of the workdir.
    """

    sinks: tuple[str, ...] | None = None
    project: str = "sct_jax"
    name: str | None = None

    def validate(self) -> None:
        """Raises UserError, naming the field."""
        for name in self.sinks or ():
            errors.check_choice("log.sinks", name, SINKS)
        for name in ("project", "name"):
            value = getattr(self, name)
            errors.check(f"log.{name}", value != "", "must not be empty")

    def unused_fields(self) -> list[str]:
        """Returns a sentence for every field that is set but has no effect."""
        if "wandb" in (self.sinks or ()):
            return []
        return [
            f'log.{name}: has no effect without "wandb" in log.sinks'
            for name in ("project", "name")
            if getattr(self, name) != getattr(LogConfig(), name)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TruncationConfig:
    """How dense matrices become factors, between phases or with --init-from.

    Attributes:
      method: "whitened" weights the error of each matrix by its inputs, so that its
        outputs change least; "plain" ignores them. Embedding and head are always plain.
      num_batches: batches of training text that "whitened" measures inputs on.
      max_tokens: most tokens of these batches that are used, in whole micro-batches
        and at least one of those.
      sequential: whether with "whitened" every truncated matrix makes up for the error
        of those before it. Otherwise it sees the original inputs.

    "whitened" holds two residual streams of that text in the compute dtype, divided
    over devices as batches are: 2 GB in all for 2**18 tokens of 2,048 numbers in
    bfloat16. It decomposes a moment of I x I numbers per matrix on every device.
    """

    method: str = "whitened"
    num_batches: int = 16
    max_tokens: int = 2**18
    sequential: bool = True

    def validate(self) -> None:
        """Raises UserError, naming the field."""
        errors.check_choice("truncation.method", self.method, ("whitened", "plain"))
        errors.check_bounds("truncation.", self, "num_batches", "max_tokens", least=1)

    def unused_fields(self) -> list[str]:
        """Returns a sentence for every field that is set but has no effect."""
        if self.method == "whitened":
            return []
        return [
            f'truncation.{name}: has no effect without truncation.method = "whitened"'
            for name in ("num_batches", "max_tokens", "sequential")
            if getattr(self, name) != getattr(TruncationConfig(), name)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything that determines a run.

    Attributes:
      num_steps: total number of steps, skipped ones included.
      seed: random seed of the parameters and of the data order.
      step: how a step is computed. "fused" compiles forward, backward and update into
        one program. "layerwise" updates each layer during the backward pass, for the
        least memory.
      log_every: steps between logged rows. The first and last step are always logged.
      model: shape of the model.
      data: text, tokenizer and batches.
      optimizer: chain, learning rate and schedule.
      adaptive_rank: whether and how ranks change during training, in the last phase.
      phases: earlier phases, dense or of larger ranks.
      truncation: how matrices lose rank between phases.
      mesh: devices along each axis.
      checkpoint: when to save.
      eval: when and how to evaluate.
      log: where metrics go.
    """

    num_steps: int = 1000
    seed: int = 0
    step: str = "fused"
    log_every: int = 10
    model: model_lib.ModelConfig = model_lib.ModelConfig()
    data: data_lib.DataConfig = data_lib.DataConfig()
    optimizer: optimizer_config.OptimizerConfig = optimizer_config.Sct()
    adaptive_rank: rank_lib.AdaptiveRankConfig = rank_lib.AdaptiveRankConfig()
    phases: phases_lib.PhasesConfig = phases_lib.PhasesConfig()
    truncation: TruncationConfig = TruncationConfig()
    mesh: sharding.MeshConfig = sharding.MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    def build_optimizer(self) -> optax.GradientTransformationExtraArgs:
        """Returns the chain of this run, for the parameters of `model`."""
        return self.optimizer.build(
            self.num_steps,
            decay_mask=model_lib.decay_mask,
            matrix_mask=model_lib.hidden_matrices,
        )

    def validate(self) -> None:
        """Raises UserError, naming the field, for an impossible configuration."""
        check_types(self)
        for name, value in flatten(dataclasses.asdict(self)).items():
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float):
                    errors.check_float32(name, number)
        errors.check_bounds("", self, "num_steps", least=1, most=errors.MAX_INT32)
        errors.check_bounds("", self, "log_every", least=1)
        errors.check_bounds("", self, "seed", least=0, below=2**32)
        errors.check_choice("step", self.step, STEPS)
        for group in (
            self.model,
            self.data,
            self.optimizer,
            self.adaptive_rank,
            self.truncation,
            self.mesh,
            self.checkpoint,
            self.eval,
            self.log,
        ):
            group.validate()
        errors.check(
            "adaptive_rank.energy",
            self.adaptive_rank.energy is None or self.optimizer.name == "tsvd",
            "ranks change only with optimizer.name = 'tsvd', not with "
            f"{self.optimizer.name!r}",
        )
        if self.adaptive_rank.energy is not None:
            self._validate_plain("adaptive_rank.energy", "ranks of blocks are fixed")
        if self.step == "layerwise":
            self._validate_layerwise()
        self._validate_factors()
        self.phases.validate(num_steps=self.num_steps, shape=self.model)
        errors.check(
            "phases.carry_momentum",
            not self.phases.carry_momentum or self.optimizer.name == "stiefel_muon",
            "only optimizer.name = 'stiefel_muon' can take momentum over, not "
            f"{self.optimizer.name!r}; set it to false",
        )
        errors.check(
            "phases.carry_momentum",
            not self.phases.carry_momentum
            or getattr(self.optimizer, "coordinates", "") != "svd",
            'the momentum of optimizer.coordinates = "svd" is of other directions; set '
            "phases.carry_momentum to false",
        )
        self._validate_truncations()
        for phase in phases_of(self)[:-1]:
            try:
                phase.config.validate()
            except errors.UserError as error:
                raise errors.UserError(
                    f"{error} (in the phase to step {phase.last})"
                ) from error

    def unused_fields(self) -> list[str]:
        """Returns a sentence for every field that is set but has no effect."""
        unused = self.optimizer.unused_fields() + self.adaptive_rank.unused_fields()
        unused += self.phases.unused_fields() + self.truncation.unused_fields()
        unused += self.log.unused_fields()
        split = self.data.split
        if split not in (None, *self.data.kinds_of_split):
            unused.append(
                f'data.split: {split!r} has no effect without data.source = "stdlib"'
            )
        if self.step == "layerwise" and self.model.remat not in ("auto", "none"):
            unused.append(
                f"model.remat: {self.model.remat!r} has no effect with step = "
                '"layerwise", which computes every layer again'
            )
        for phase in phases_of(self):
            warmup, steps = phase.config.optimizer.warmup_steps, phase.config.num_steps
            if warmup >= steps:
                group = "phases" if phase.first else "optimizer"
                unused.append(
                    f"{group}.warmup_steps: {warmup} of {steps} steps, so the learning "
                    "rate never reaches its peak"
                )
        return unused

    def check_blocks(self, mesh: Mesh | AbstractMesh) -> None:
        """Raises UserError for a mesh that divides matrices in blocks by `tensor`."""
        if mesh.shape[sharding.HEADS] > 1:
            self._validate_plain(
                f"mesh.{sharding.HEADS}", "blocks are divided by fsdp alone"
            )

    def _validate_plain(self, field: str, reason: str) -> None:
        """Raises UserError if any matrix is in blocks, which `field` does not allow."""
        split = [n for n in self.model.spectral if self.model.matrix_blocks(n) > 1]
        errors.check(
            field,
            not split,
            f"{reason}, and model.num_blocks or model.blocks split "
            f"{', '.join(split)}: set them to 1, or change this",
        )

    def _validate_truncations(self) -> None:
        """Raises UserError where the model of a phase cannot follow that before it."""
        if any(self.phases.multiples):
            self._validate_plain(
                "phases.rank_multiples",
                "blocks only follow a dense phase, whose multiple is 0",
            )
        for phase, after in itertools.pairwise(phases_of(self)):
            shapes = phase.config.model, after.config.model
            compression.check(*shapes)
            errors.check(
                "phases.rank_multiples",
                bool(compression.changed_matrices(*shapes)),
                f"the phase to step {phase.last} has the ranks of the next one, after "
                "multiples are rounded down and clamped to the matrix; leave it out, "
                "or choose other multiples",
            )

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
        for field in ("retraction", "coordinates"):
            if getattr(self.optimizer, field, None) == "svd":
                self._validate_plain(
                    f"optimizer.{field}", "'svd' mixes columns, which blocks keep apart"
                )
        low_rank = name in optimizer_config.LOW_RANK_CHAINS
        wanted = "low_rank" if low_rank else "spectral"
        errors.check(
            "model.factors",
            factors == wanted,
            f"{factors!r} does not fit optimizer.name = {name!r}; set it to "
            f"{wanted!r}, or set model.spectral to () for dense matrices",
        )


class Phase(NamedTuple):
    """A part of a run, with one model and one optimizer.

    Attributes:
      first: steps before it.
      last: steps at its end.
      config: the phase as a run of its own, of `last - first` steps.
    """

    first: int
    last: int
    config: ExperimentConfig


def phases_of(config: ExperimentConfig) -> tuple[Phase, ...]:
    """Returns the phases of a run. All but the last are dense or have larger ranks.

    Raises:
      UserError: see `phases.PhasesConfig.ends`.
    """
    if not config.phases.switch_at:
        return (Phase(0, config.num_steps, config),)
    settings, found, first = config.phases, [], 0
    ends = settings.ends(
        config.model, num_steps=config.num_steps, seq_len=config.data.seq_len
    )
    for last, shape, optimizer in zip(
        ends,
        settings.models(config.model),
        settings.optimizers(config.optimizer),
        strict=True,
    ):
        own = dataclasses.replace(
            config,
            num_steps=last - first,
            model=shape,
            optimizer=optimizer,
            phases=phases_lib.PhasesConfig(),
        )
        if last != config.num_steps:
            own = dataclasses.replace(own, adaptive_rank=rank_lib.AdaptiveRankConfig())
        found.append(Phase(first, last, own))
        first = last
    return tuple(found)


def phase_number(phases: Sequence[Phase], step: int) -> int:
    """Returns which phase the state after a step is of, the last one beyond the end."""
    inside = (i for i, phase in enumerate(phases) if step <= phase.last)
    return next(inside, len(phases) - 1)


def phase_at(config: ExperimentConfig, step: int) -> Phase:
    """Returns the phase that the state after a step is of."""
    phases = phases_of(config)
    return phases[phase_number(phases, step)]


# Fields that do not affect results: intervals, the cache folder, where rows go.
WITHOUT_EFFECT = (
    "data.cache_dir",
    "log_every",
    "checkpoint.every",
    "checkpoint.keep",
    "eval.every",
    "log.sinks",
    "log.project",
    "log.name",
)

# Where the text comes from. Hashes of text and tokenizer say whether they are the same.
TEXT = ("data.source", "data.tokenizer", "data.text_field", "data.split")

# Fields that a resumed run may change, beside a larger `num_steps`. The layout of a
# step over devices and memory changes its result by rounding alone.
RESUMABLE = (
    *WITHOUT_EFFECT,
    *TEXT,
    "eval.num_batches",
    "step",
    "model.attention",
    "model.remat",
    "data.num_microbatches",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.tensor_layout",
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


def from_dict(values: Any, kind: type[T] = ExperimentConfig) -> T:
    """Returns the configuration that `to_dict` was given, now or in an earlier version.

    Fields have the types of their hints, but are not validated otherwise.

    Raises:
      UserError: naming the field, for one that this version does not know, and for a
        value of another type.
    """
    errors.check("config.json", isinstance(values, Mapping), "not a configuration")
    if kind is ExperimentConfig:
        values = _upgrade(values)
    return _from_dict(values, kind, prefix="")


def run_from_dict(values: Any) -> ExperimentConfig:
    """Returns the configuration of a run, from its config.json or a checkpoint.

    A run that says nothing of how its source is divided began when there was one way.

    Raises:
      UserError: see `from_dict`.
    """
    config = from_dict(values)
    kinds = config.data.kinds_of_split
    if config.data.split in kinds:
        return config
    data = dataclasses.replace(config.data, split=kinds[1])
    return dataclasses.replace(config, data=data)


def _from_dict(values: Mapping[str, Any], kind: type[T], *, prefix: str) -> T:
    hints = field_types(kind)
    arguments = {}
    for name, value in values.items():
        where = f"config.json {prefix}{name}"
        errors.check_choice("config.json", name, tuple(hints))
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            errors.check(where, isinstance(value, Mapping), "not a group")
            value = _from_dict(
                value, typing.cast(type, hint), prefix=f"{prefix}{name}."
            )
        else:
            value = _to_type(where, _as_tuples(value), hint)
        arguments[name] = value
    if kind is optimizer_config.OptimizerConfig:
        return typing.cast(T, optimizer_config.from_fields(arguments))
    return kind(**arguments)


@functools.cache
def field_types(kind: type) -> Mapping[str, Any]:
    """Returns the types of a configuration's fields; of every chain for that group."""
    if kind is not optimizer_config.OptimizerConfig:
        hints = typing.get_type_hints(kind)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return {
        field: typing.get_type_hints(owner)[field]
        for field, owner in optimizer_config.field_kinds().items()
    }


def check_types(config: Any, prefix: str = "") -> None:
    """Raises UserError, naming the field, for a value of another type than its hint."""
    for name, hint in field_types(type(config)).items():
        value, where = getattr(config, name), prefix + name
        if dataclasses.is_dataclass(hint):
            kind = typing.cast(type, hint)
            errors.check(
                where,
                isinstance(value, kind),
                f"{value!r:.60} is not a {kind.__name__}",
            )
            check_types(value, f"{where}.")
        else:
            _to_type(where, value, hint)


def type_name(hint: Any) -> str:
    """Returns the name of the type of a field, as messages say it."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return " or ".join(
        "none" if option is type(None) else getattr(option, "__name__", str(option))
        for option in options
    )


def _to_type(where: str, value: Any, hint: Any) -> Any:
    """The value, if it has the type of a field; an integer may stand for a float.

    True and False are no numbers.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is tuple:
            item = typing.get_args(option)[0]
            if isinstance(value, tuple):
                return tuple(_to_type(where, x, item) for x in value)
        elif isinstance(value, option) and isinstance(value, bool) == (option is bool):
            return value
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        errors.check(where, abs(value) < 1 << 128, "beyond float32")
        return float(value)
    raise errors.UserError(
        f"{where}: {reprlib.repr(value)} is not a value of type {type_name(hint)}"
    )


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


class Difference(NamedTuple):
    """A field that a run has changed, with its values in JSON."""

    field: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.field}: {self.before!r} in the workdir, {self.after!r} now"


def differences(
    old: ExperimentConfig, new: ExperimentConfig, *, allowed: Collection[str] = ()
) -> list[str]:
    """Returns a sentence for every difference that forbids resuming old as new.

    Args:
      old: the run in the workdir.
      new: the run that would continue it.
      allowed: fields that may differ all the same.
    """
    return [str(d) for d in changes(old, new) if d.field not in allowed]


def changes(old: ExperimentConfig, new: ExperimentConfig) -> list[Difference]:
    """Returns every difference that a resumed run may not have without being asked."""
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
            found.append(Difference(name, before, after))
    return found


def text_changes(old: ExperimentConfig, new: ExperimentConfig) -> list[Difference]:
    """Returns the differences in where the text comes from."""
    flat_old, flat_new = flatten(to_dict(old)), flatten(to_dict(new))
    return [
        Difference(name, flat_old[name], flat_new[name])
        for name in TEXT
        if flat_old[name] != flat_new[name]
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dictionaries as one, with dotted keys."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
