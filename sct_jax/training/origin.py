"""A run whose first parameters are those of another run, trained or imported."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from sct_jax import compression, data, errors, model, paths
from sct_jax.training import (
    arrays,
    checkpoint,
    console,
    switching,
    trainer,
    workdir,
)
from sct_jax.training import config as config_lib
from sct_jax.training import state as state_lib

# Fields that change what parameters of the same shapes compute, and often change when
# training goes on with a longer context.
_ROPE = ("rope_theta", "rope_scaling")

# Fields that say how a run computes, and not what its parameters mean.
_OWN = ("rescale_init", "compute_dtype", "scan_layers", "remat", "attention")


class Origin(NamedTuple):
    """The other run.

    Attributes:
      path: its workdir.
      record: of its newest checkpoint.
      config: of that checkpoint, with the ranks that its parameters have now.
      tokenizer: the one it was trained with.
    """

    path: pathlib.Path
    record: checkpoint.Record
    config: config_lib.ExperimentConfig
    tokenizer: data.Tokenizer

    def describe(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of it, see `workdir.record`."""
        return {"workdir": str(self.path), "step": self.record["step"]}


def find(path: str) -> Origin:
    """Returns the run in a workdir; reads no parameters yet.

    Raises:
      UserError: where it holds no run with a checkpoint, or its tokenizer.json is not
        the one of that checkpoint.
    """
    folder = pathlib.Path(paths.expand("--init-from", path)).absolute()
    try:
        record = workdir.newest_record(folder)
        config = _with_ranks(workdir.config_at(record), record)
        tokenizer = workdir.read_tokenizer(folder, record)
    except errors.UserError as error:
        raise errors.UserError(f"--init-from: {error}") from error
    return Origin(folder, record, config, tokenizer)


def _with_ranks(
    config: config_lib.ExperimentConfig, record: checkpoint.Record
) -> config_lib.ExperimentConfig:
    """The configuration with the ranks of a checkpoint, where all layers share them."""
    if config.adaptive_rank.energy is None:
        return config
    found = {name: config.model.matrix_rank(name) for name in config.model.spectral}
    stored: dict[str, set[int]] = {}
    for name, value in record.get("ranks", {}).items():
        stored.setdefault(name.rpartition("/")[2], set()).add(value)
    found |= {name: min(values) for name, values in stored.items() if len(values) == 1}
    shape = dataclasses.replace(
        config.model,
        ranks=model.MatrixRanks(**found),
        rank_ratios=model.MatrixRankRatios(),
    )
    return dataclasses.replace(config, model=shape)


def inherit(
    config: config_lib.ExperimentConfig,
    path: pathlib.Path,
    init_from: str | None,
    *,
    log: Callable[[str], None],
) -> config_lib.ExperimentConfig:
    """Returns a configuration with the model of the run that it starts from.

    All fields of the model are taken that say what its parameters are and compute. The
    new run keeps its own dtype, layout, remat and attention. `data.tokenizer` is left
    open, for `adopt` or `workdir.resolve` to fill in. A run that once started so and
    has a checkpoint keeps its model. Otherwise nothing changes without `init_from`.

    Args:
      config: as its file says, before flags change it.
      path: workdir of the new run.
      init_from: workdir of the other run, if any.
      log: receives a line that lists the fields of the file that change.

    Raises:
      UserError: see `find`.
    """
    if earlier := workdir.started_elsewhere(path):
        return _with_model(config, earlier.model)
    if init_from is None or workdir.steps_done(path):
        return config
    origin = find(init_from)
    inherited = _with_model(config, origin.config.model)
    if changed := _changed(config, inherited):
        log(
            f"note: the model and the tokenizer are those of {origin.path}; without "
            f"effect in the configuration file: {', '.join(changed)}"
        )
    return inherited


def _with_model(
    config: config_lib.ExperimentConfig, other: model.ModelConfig
) -> config_lib.ExperimentConfig:
    own = {name: getattr(config.model, name) for name in _OWN}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(other, **own),
        data=dataclasses.replace(config.data, tokenizer=None),
    )


def _changed(
    config: config_lib.ExperimentConfig, inherited: config_lib.ExperimentConfig
) -> list[str]:
    before, after = (
        config_lib.flatten(config_lib.to_dict(c)) for c in (config, inherited)
    )
    return [name for name in before if before[name] != after[name]]


def adopt(
    config: config_lib.ExperimentConfig,
    origin: Origin,
    *,
    log: Callable[[str], None],
) -> config_lib.ExperimentConfig:
    """Returns the configuration of a run that can start from these parameters.

    It encodes with the tokenizer of the other run. Matrices may have less rank than
    there; `start` truncates them.

    Args:
      config: the new run.
      origin: the other run.
      log: receives a line for each field that changes what the parameters compute.

    Raises:
      UserError: listing the fields of the model that do not fit, or naming both
        tokenizers.
    """
    own = config_lib.phases_of(config)[0].config.model
    before, after = _facts(origin.config.model), _facts(own)
    found = [
        f"{name}: {before[name]!r} in {origin.path}, {after[name]!r} now"
        for name in before
        if before[name] != after[name]
    ]
    errors.check(
        "--init-from",
        not found,
        f"the model is not that of {origin.path}; choose another run, or set these "
        "fields as there:\n  " + "\n  ".join(found),
    )
    try:
        compression.check(origin.config.model, own)
    except errors.UserError as error:
        raise errors.UserError(f"--init-from: {origin.path}: {error}") from error
    for name in _ROPE:
        then, now = (getattr(c.model, name) for c in (origin.config, config))
        if then != now:
            log(f"note: model.{name} was {then} in {origin.path}, and is {now} now")
    return _with_tokenizer(config, origin)


def _facts(config: model.ModelConfig) -> dict[str, Any]:
    """What the parameters compute, beside the ranks of the matrices."""
    facts = {
        f"model.{name}": getattr(config, name)
        for name in (*model.MAX_SIZES, "tie_embeddings", "qk_norm", "norm_eps")
    }
    facts["model.head_dim"] = config.head_size
    return facts


def _shape(run: trainer.Trainer, origin: Origin) -> model.ModelConfig:
    """The model of a trainer with the ranks that the other run has."""
    given = origin.config.model
    return dataclasses.replace(
        run.config.model,
        spectral=given.spectral,
        factors=given.factors,
        rank=given.rank,
        ranks=given.ranks,
        rank_ratios=given.rank_ratios,
        num_blocks=given.num_blocks,
        blocks=given.blocks,
    )


def truncates(run: trainer.Trainer, origin: Origin) -> bool:
    """Returns whether `start` truncates a matrix of the other run."""
    return bool(compression.changed_matrices(origin.config.model, run.config.model))


def _with_tokenizer(
    config: config_lib.ExperimentConfig, origin: Origin
) -> config_lib.ExperimentConfig:
    own, given = str(origin.path / "tokenizer.json"), config.data.tokenizer
    if given is None:
        chosen = dataclasses.replace(config.data, tokenizer=own)
        return dataclasses.replace(config, data=chosen)
    found = data.Tokenizer.find(given).hash
    errors.check(
        "data.tokenizer",
        found == origin.tokenizer.hash,
        f"{given!r} has hash {found[:16]}, but the parameters belong to {own!r} with "
        f"hash {origin.tokenizer.hash[:16]}; leave the field empty to take that one",
    )
    return config


def check_arrays(run: trainer.Trainer, origin: Origin) -> None:
    """Raises UserError, listing the arrays, where saved shapes are not those of a run.

    Ranks may have changed since the configuration of the other run was written.
    """
    state = run.abstract_state.replace(params=_abstract_params(run, origin))
    apart = jax.eval_shape(model.unstack_layers, state)
    is_param = lambda name: name.startswith("params")
    wanted = {n: leaf for n, leaf in arrays.by_name(apart).items() if is_param(n)}
    saved = {n: leaf for n, leaf in origin.record["leaves"].items() if is_param(n)}
    try:
        arrays.check_shapes(wanted, saved, origin.record["step"])
    except errors.UserError as error:
        raise errors.UserError(f"--init-from: {origin.path}: {error}") from error


def _abstract_params(run: trainer.Trainer, origin: Origin) -> model.Params:
    """The parameters of the other run in the layout of this one."""
    shape = _shape(run, origin)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), shape))


def start(
    run: trainer.Trainer,
    origin: Origin,
    *,
    text: compression.Text | None,
    log: Callable[[str], None],
) -> tuple[state_lib.TrainState, Origin]:
    """Returns the state before the first step of a run that `adopt` has passed.

    Also returns the other run with the record of the checkpoint that was read. It is
    another one than `find` saw if that was damaged, or a newer one came.

    Args:
      run: the trainer of the new run, in its first phase.
      origin: the other run.
      text: see `switching.calibration_text`; not used where no matrix loses rank.
      log: receives a line.

    Raises:
      UserError: see `workdir.load_params`, and `check_arrays`.
    """
    params, record = workdir.load_params(origin.path)
    origin = origin._replace(record=record)
    check_arrays(run, origin)
    log(f"starting from the parameters of step {record['step']} in {origin.path}")
    if run.config.model.scan_layers:
        params = model.stack_layers({**params}, stack_arrays=arrays.stack_and_free)
    else:
        params = model.unstack_layers(params)
    placed = run.shardings(_abstract_params(run, origin))
    params = jax.tree.map(_place, params, placed)
    if truncates(run, origin):
        shape = _shape(run, origin)
        log(
            f"truncating from {console.describe_rank(shape)} to "
            f"{console.describe_rank(run.config.model)}"
        )
        params = switching.truncated(params, shape, run, text=text)
    return run.start(params), origin


def _place(x: jax.Array, placed: jax.sharding.Sharding) -> jax.Array:
    """The array, of which every process has all, with another sharding."""
    if placed.is_fully_addressable:
        return jax.device_put(x, placed)
    return jax.make_array_from_callback(x.shape, placed, np.asarray(x).__getitem__)
