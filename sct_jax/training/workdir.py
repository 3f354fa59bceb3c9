"""The folder of a run: its configuration, its lock, its checkpoints."""

import contextlib
import dataclasses
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sct_jax import data, errors, files, model, rank, sharding
from sct_jax.training import checkpoint, trainer
from sct_jax.training import config as config_lib
from sct_jax.training import state as state_lib


class LoadedRun(NamedTuple):
    """A run read back from its workdir."""

    config: config_lib.ExperimentConfig
    params: model.Params
    tokenizer: data.Tokenizer


def load_run(path: str | os.PathLike[str]) -> LoadedRun:
    """Returns configuration, parameters and tokenizer of a run.

    Parameters come from the newest whole checkpoint and go to the first device. Nothing
    in the workdir changes, so the run may be in progress.

    Raises:
      UserError: where the workdir holds no run with a checkpoint.
    """
    path = pathlib.Path(path)
    config = read_config(path)
    one_device = trainer.Trainer(config, sharding.MeshConfig().build(1))
    with reading(path) as checkpoints:
        restored = checkpoints.restore(one_device.abstract_at, one_device.mesh)
    if restored is None:
        raise errors.UserError(f"workdir: {path} has no checkpoint yet")
    state, record = restored
    # config.json keeps the settings of the first call; the run may be longer by now.
    config = config_lib.from_dict(record["config"])
    tokenizer = data.Tokenizer.load(str(path / "tokenizer.json"))
    return LoadedRun(config, state.params, tokenizer)


def make(path: pathlib.Path) -> None:
    """Creates the folder.

    Raises:
      UserError: where nothing can be written to it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise errors.UserError(
            f"workdir: cannot write to {path}: {error.strerror}; choose another "
            "--workdir"
        ) from error


@contextlib.contextmanager
def claim(path: pathlib.Path) -> Iterator[None]:
    """Holds the workdir for this process; a killed process leaves no lock behind.

    Raises:
      UserError: where another process trains in it.
    """
    with files.lock(path / ".lock", wait=False) as state:
        errors.check(
            "workdir",
            state != "busy",
            f"another process is training in {path}; wait for it, or choose another "
            "--workdir",
        )
        if state == "unsupported":
            warnings.warn(
                f"{path} cannot be locked (its file system may have no locks): make "
                "sure that no other process trains there",
                stacklevel=3,
            )
        yield


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    files.replace_text(path, json.dumps(value, indent=2) + "\n")


def read_config(path: pathlib.Path) -> config_lib.ExperimentConfig:
    """Returns the configuration in the workdir.

    Raises:
      UserError: where there is none, or it cannot be read.
    """
    file = path / "config.json"
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise errors.UserError(
            f"workdir: {path} holds no run (no config.json)"
        ) from error
    except (OSError, ValueError) as error:
        raise errors.UserError(f"workdir: {file} cannot be read: {error}") from error
    errors.check("workdir", isinstance(values, dict), f"{file} is not a configuration")
    return config_lib.from_dict(values)


def committed_config(path: pathlib.Path) -> config_lib.ExperimentConfig | None:
    """Returns the configuration that further steps in this workdir must continue.

    None before the first checkpoint: until then a run may change, for example because
    it did not fit into memory.
    """
    step = steps_done(path)
    if not step:
        return None
    if (path / "config.json").exists():
        return read_config(path)
    with reading(path) as checkpoints:
        return config_lib.from_dict(checkpoints.read_record(step)["config"])


def resolve(
    config: config_lib.ExperimentConfig, path: pathlib.Path
) -> config_lib.ExperimentConfig:
    """Returns the configuration with open choices made as the run in the workdir did.

    A run without checkpoints takes the choices of a new run.
    """
    if config.data.split is not None or config.data.source != "stdlib":
        return config
    earlier = committed_config(path)
    split = earlier.data.split if earlier else "pieces"
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, split=split)
    )


def check_same_run(
    old: config_lib.ExperimentConfig, new: config_lib.ExperimentConfig, where: str
) -> None:
    """Raises UserError, listing the fields, where `new` cannot continue `old`."""
    found = config_lib.differences(old, new)
    errors.check(
        "workdir",
        not found,
        f"{where} belongs to a run with another configuration; choose another "
        "--workdir, or undo:\n  " + "\n  ".join(found),
    )


def record(
    config: config_lib.ExperimentConfig,
    step: int,
    state: state_lib.TrainState,
    identity: dict[str, str],
) -> checkpoint.Record:
    """Returns what a checkpoint says about its state, see `restore_or_init`."""
    return {
        "config": config_lib.to_dict(config),
        "data_position": step * config.data.batch_size,
        "ranks": rank.stored_ranks(state.params),
        **identity,
    }


def restore_or_init(
    run: trainer.Trainer,
    checkpoints: checkpoint.Checkpointer,
    identity: dict[str, str],
    *,
    log: Callable[[str], None],
) -> tuple[state_lib.TrainState, int]:
    """Returns the newest whole checkpoint and its step, or a new state and 0.

    Args:
      run: the trainer.
      checkpoints: of the workdir.
      identity: hashes of corpus and tokenizer, which may not change during a run.
      log: receives what was resumed and which checkpoints are damaged.

    Raises:
      UserError: where the checkpoint belongs to another configuration or text, or none
        can be read.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        restored = checkpoints.restore(run.abstract_at, run.mesh)
    for warning in caught:
        log(f"warning: {warning.message}")
    if restored is None:
        return run.init(jax.random.key(run.config.seed)), 0
    state, record = restored
    before, step = config_lib.from_dict(record["config"]), record["step"]
    check_same_run(before, run.config, "the checkpoint")
    for name, now in identity.items():
        then = record.get(name, now)  # the first checkpoints have no tokenizer hash
        errors.check(
            "data",
            then == now,
            f"the run was trained with a {name} with hash {then[:16]}, but "
            f"{run.config.data.source!r} now has {now[:16]}; restore the text, or "
            "choose another --workdir",
        )
    log(f"resumed at step {step}")
    # A schedule covers the whole run, so a longer run has another learning rate.
    was, now = (
        float(jnp.asarray(config.optimizer.learning_rate(config.num_steps)(step)))
        for config in (before, run.config)
    )
    if was != now:
        log(
            f"num_steps changed from {before.num_steps} to {run.config.num_steps}: the "
            f"learning rate at this step changes from {was:.2e} to {now:.2e}"
        )
    return state, step


def steps_done(path: pathlib.Path) -> int:
    """Returns the newest step on disk, 0 for a new run."""
    if not os.path.isdir(path / "checkpoints"):  # False for a path that cannot exist
        return 0
    with reading(path) as checkpoints:
        return checkpoints.latest_step() or 0


def is_finished(path: pathlib.Path, run: trainer.Trainer) -> bool:
    """Returns whether the workdir holds the last step of a run, in a whole checkpoint.

    Reads all of that checkpoint.
    """
    step = steps_done(path)
    if step < run.config.num_steps:
        return False
    with reading(path) as checkpoints, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # repeated when the run resumes
        restored = checkpoints.restore(run.abstract_at, run.mesh)
    return restored is not None and restored[1]["step"] == step


def reading(path: pathlib.Path) -> contextlib.closing[checkpoint.Checkpointer]:
    """Returns the checkpoints of a run, to be read without touching the folder."""
    return contextlib.closing(
        checkpoint.Checkpointer(path / "checkpoints", keep=1, read_only=True)
    )
