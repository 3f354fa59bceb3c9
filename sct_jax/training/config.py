"""The typed configuration of a run, and the one door through which flags come in.

A config file is a Python module with `get_config(variant=...)` that returns an
`ExperimentConfig` stating only what differs from the defaults.
"""

import ast
import contextlib
import dataclasses
import importlib.util
import inspect
import json
import math
import os
import pathlib
import traceback
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import optax

from sct_jax import data as data_lib
from sct_jax import errors, optimizers, sharding
from sct_jax import model as model_lib
from sct_jax import rank as rank_lib
from sct_jax.training import layerwise

T = TypeVar("T")

STEPS = ("whole", "layerwise")

# The rules that leave factors free. The others keep u and v on the Stiefel manifold.
LOW_RANK_OPTIMIZERS = ("spectron", "adamw", "muon")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of a run is saved.

    Attributes:
      every: steps between checkpoints; there is one at the end too.
      keep: how many stay, the newest ones.
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
      every: steps between evaluations; there is one at the end too.
      num_batches: batches of each, spread over the validation split; fewer if it is
        short.
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
      num_steps: optimizer updates in all.
      seed: of the parameters and of the data order.
      step: how a step is computed; "whole": forward, backward, then update;
        "layerwise": backward and update together, layer by layer, for the least memory.
      log_every: steps between logged rows (the first and last are always logged).
      model: shape of the model.
      data: text, tokenizer and batches.
      optimizer: update rule, rates and schedule.
      rank: whether ranks change during training, and how.
      mesh: devices along each axis.
      checkpoint: cadence of checkpoints.
      eval: cadence of evaluations.
    """

    num_steps: int = 1000
    seed: int = 0
    step: str = "whole"
    log_every: int = 10
    model: model_lib.ModelConfig = model_lib.ModelConfig()
    data: data_lib.DataConfig = data_lib.DataConfig()
    optimizer: optimizers.OptimizerConfig = optimizers.OptimizerConfig()
    rank: rank_lib.AdaptiveRankConfig = rank_lib.AdaptiveRankConfig()
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
        """Raises UserError, naming the field, for what cannot be run anywhere."""
        errors.check_bounds("", self, "num_steps", "log_every", least=1)
        errors.check_bounds("", self, "seed", least=0, below=2**32)
        errors.check_choice("step", self.step, STEPS)
        groups = (
            self.model,
            self.data,
            self.optimizer,
            self.rank,
            self.mesh,
            self.checkpoint,
            self.eval,
        )
        for name, value in flatten(dataclasses.asdict(self)).items():
            finite = not isinstance(value, float) or math.isfinite(value)
            errors.check(name, finite, f"{value} is not finite")
        for group in groups:
            group.validate()
        errors.check(
            "rank.energy",
            self.rank.energy is None or self.optimizer.name == "tsvd",
            f"ranks change with optimizer.name = 'tsvd' alone, not with "
            f"{self.optimizer.name!r}",
        )
        if self.step == "layerwise":
            self._validate_layerwise()
        self._validate_factors()

    def _validate_layerwise(self) -> None:
        """Raises UserError for what needs the gradients of all layers at once."""
        errors.check(
            "model.scan_layers",
            not self.model.scan_layers,
            'step = "layerwise" handles layers one by one: set it to false',
        )
        errors.check(
            "data.num_microbatches",
            self.data.num_microbatches == 1,
            'step = "layerwise" keeps no gradients to average: set it to 1',
        )
        layerwise.check_local(self.optimizer)

    def _validate_factors(self) -> None:
        """Raises UserError where the update rule does not fit the factors."""
        if not self.model.spectral:
            return
        name, factors = self.optimizer.name, self.model.factors
        wanted = "low_rank" if name in LOW_RANK_OPTIMIZERS else "spectral"
        errors.check(
            "model.factors",
            factors == wanted,
            f"{factors!r} does not go with optimizer.name = {name!r}: set it to "
            f"{wanted!r}, or model.spectral to () for dense matrices",
        )


# Fields that change no result: cadences, and where what can be made again is kept.
WITHOUT_EFFECT = (
    "data.cache_dir",
    "log_every",
    "checkpoint.every",
    "checkpoint.keep",
    "eval.every",
)

# Fields that a resumed run may change beside a larger number of steps: those, and how a
# step is laid out over devices and memory, which changes its result by rounding alone.
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


@typing.runtime_checkable
class Validated(Protocol):
    """A configuration that can tell whether it fits together."""

    def validate(self) -> None:
        """Raises UserError, naming the field."""


V = TypeVar("V", bound=Validated)


def load(spec: str, overrides: Iterable[tuple[str, str]] = ()) -> ExperimentConfig:
    """Returns the validated configuration of "path.py" or "path.py:variant".

    Args:
      spec: config file, with the variant after a colon.
      overrides: pairs of a dotted field and its value as text, as on a command line.

    Raises:
      UserError: for a file, variant, field or value that does not exist or fit.
    """
    return load_as(ExperimentConfig, spec, overrides)


def load_as(kind: type[V], spec: str, overrides: Iterable[tuple[str, str]] = ()) -> V:
    """Returns what `load` does, for a file whose `get_config` returns a `kind`."""
    path, _, variant = spec.partition(":")
    config = _call_get_config(pathlib.Path(path), variant)
    errors.check(
        "--config",
        isinstance(config, kind),
        f"get_config of {path} returned {type(config).__name__}, no {kind.__name__}",
    )
    for field, text in overrides:
        config = override(config, field, text)
    config.validate()
    return config


def override(config: T, field: str, text: str) -> T:
    """Returns the configuration with one dotted field replaced by parsed text.

    Raises:
      UserError: for an unknown field (names the nearest) or a value of another type.
    """
    return _override(config, field.split("."), text, prefix="")


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the configuration as nested dictionaries that JSON can hold."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: Mapping[str, Any], kind: type[T] = ExperimentConfig) -> T:
    """Returns the configuration from what `to_dict` gave.

    Raises:
      UserError: for a field that this version does not know.
    """
    hints = typing.get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        errors.check_choice("config.json", name, tuple(hints))
        if dataclasses.is_dataclass(hints[name]):
            errors.check(f"config.json {name}", isinstance(value, dict), "not a group")
            value = from_dict(value, typing.cast(type, hints[name]))
        arguments[name] = _as_tuples(value)
    return kind(**arguments)


def _as_tuples(value: Any) -> Any:
    """The value with tuples for the lists that JSON makes of them."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def differences(old: ExperimentConfig, new: ExperimentConfig) -> list[str]:
    """Returns a sentence for every difference that forbids resuming old as new."""
    flat_old, flat_new = flatten(to_dict(old)), flatten(to_dict(new))
    found = []
    allowed: set[str] = set(RESUMABLE)
    if new.num_steps >= old.num_steps:
        allowed.add("num_steps")
    if new.rank.energy is None:  # ranks that change are those of a layout
        allowed.add("model.scan_layers")
    for name in sorted(flat_old.keys() | flat_new.keys()):
        before, after = flat_old.get(name), flat_new.get(name)
        if before != after and name not in allowed:
            found.append(f"{name}: {before!r} in the workdir, {after!r} asked for")
    return found


def default_workdir(spec: str) -> str:
    """Returns runs/<file stem>-<variant>, with the file's default variant."""
    path, _, variant = spec.partition(":")
    if not variant:
        get_config = _load_module(pathlib.Path(path)).get_config
        parameter = inspect.signature(get_config).parameters.get("variant")
        variant = parameter.default if parameter else ""
    stem = pathlib.Path(path).stem
    return os.path.join("runs", f"{stem}-{variant}" if variant else stem)


def _load_module(path: pathlib.Path) -> types.ModuleType:
    if not path.is_file():
        siblings = sorted(str(p) for p in path.parent.glob("*.py"))
        raise errors.UserError(
            f"--config: no file {str(path)!r}{errors.nearest(str(path), siblings)}"
        )
    module_spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise errors.UserError(f"--config: {str(path)!r} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    with _told_with_its_line(path):
        module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise errors.UserError(f"--config: {path} has no get_config(variant=...)")
    return module


def _call_get_config(path: pathlib.Path, variant: str) -> Any:
    module = _load_module(path)
    if variant:
        errors.check_choice("--config variant", variant, tuple(_variants(module)))
    with _told_with_its_line(path):
        return module.get_config(variant=variant) if variant else module.get_config()


@contextlib.contextmanager
def _told_with_its_line(path: pathlib.Path) -> Iterator[None]:
    """Makes a UserError of any other error of a config file's code."""
    try:
        yield
    except errors.UserError:
        raise
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        where = f"{path}:{line}" if line else str(path)
        raise errors.UserError(
            f"--config: {where}: {type(error).__name__}: {error}"
        ) from error


def _variants(module: types.ModuleType) -> Iterable[str]:
    """Names that a config file declares in its VARIANTS; without it, none."""
    return getattr(module, "VARIANTS", ())


def _override(config: Any, keys: list[str], text: str, *, prefix: str) -> Any:
    hints = typing.get_type_hints(type(config))
    key, *rest = keys
    name = prefix + key
    if key not in hints:
        near = (
            _ALIASES.get(key)
            or errors.closest(key, tuple(hints))
            or _closest_anywhere(key)
        )
        raise errors.UserError(
            f"unknown config field {name!r}{errors.suggestion(near)}"
        )
    kind = hints[key]
    if dataclasses.is_dataclass(kind):
        if not rest:
            fields = ", ".join(field.name for field in dataclasses.fields(kind))
            raise errors.UserError(f"{name}: a group; set one of {name}.[{fields}]")
        value = _override(getattr(config, key), rest, text, prefix=f"{name}.")
    elif rest:
        raise errors.UserError(f"unknown config field {'.'.join([name, *rest])!r}")
    else:
        value = _parse(name, kind, text)
    return dataclasses.replace(config, **{key: value})


# What other projects call a field.
_ALIASES = {
    "batch": "data.batch_size",
    "context_length": "data.seq_len",
    "hidden_size": "model.d_model",
    "intermediate_size": "model.d_ff",
    "learning_rate": "optimizer.peak_learning_rate",
    "lr": "optimizer.peak_learning_rate",
    "max_steps": "num_steps",
    "n_layers": "model.num_layers",
    "num_hidden_layers": "model.num_layers",
    "num_train_steps": "num_steps",
    "sequence_length": "data.seq_len",
    "steps": "num_steps",
    "warmup": "optimizer.warmup_steps",
    "wd": "optimizer.weight_decay",
}


def _closest_anywhere(key: str) -> str | None:
    """The closest field of any group, by its full name."""
    names: dict[str, str] = {}
    for name in flatten(to_dict(ExperimentConfig())):
        names.setdefault(name.rpartition(".")[2], name)
    leaf = errors.closest(key, tuple(names), cutoff=0.7)
    return names[leaf] if leaf else None


def _parse(name: str, kind: Any, text: str) -> Any:
    """The value that `text` stands for in a field of type `kind`."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    for option in options:
        try:
            if option is bool:
                return {"true": True, "1": True, "false": False, "0": False}[
                    text.lower()
                ]
            if option is int:
                number = float(text) if "e" in text.lower() else int(text)
                if number == int(number):
                    return int(number)
            if option is float:
                return float(text)
            if option is str:
                return text
            if typing.get_origin(option) is tuple:
                item_kind = typing.get_args(option)[0]
                return tuple(_parse(name, item_kind, x) for x in _split_tuple(text))
        except (KeyError, ValueError, OverflowError):
            continue
    wanted = " or ".join(
        "none" if option is type(None) else getattr(option, "__name__", str(option))
        for option in options
    )
    raise errors.UserError(f"{name}: {text!r} is not a value of type {wanted}")


def _split_tuple(text: str) -> tuple[str, ...]:
    if text.startswith(("(", "[")):
        try:
            return tuple(str(item) for item in ast.literal_eval(text))
        except (SyntaxError, TypeError) as error:
            raise ValueError(text) from error
    return tuple(item.strip() for item in text.split(",") if item.strip())


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dictionaries as one, with dotted keys."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
