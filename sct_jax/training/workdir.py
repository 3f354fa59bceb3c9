"""The folder of a run: its configuration, its lock, its checkpoints."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sct_jax import data, errors, files, model, paths, rank, sharding
from sct_jax.training import (
    checkpoint,
    guard,
    processes,
    records,
    resuming,
    trainer,
)
from sct_jax.training import config as config_lib
from sct_jax.training import state as state_lib

_FILES = (
    *(".lock", "config.json", "metrics.jsonl", "summary.json", "tokenizer.json"),
    "wandb.json",
)
_FOLDERS = ("checkpoints", "profile", "tensorboard", "wandb")
_LEFTOVER = re.compile(r".+\.(json|jsonl)\.partial-[0-9a-f]{32}|\.probe-[0-9a-f]+")
# Of a name that a run writes below its folder, with room to spare.
_LONGEST_NAME = 200
_NO_CHECKPOINT = "has no checkpoint yet; wait for one, or name another folder"
# Field of the record of a checkpoint that holds parameters alone, see `create`.
_ALONE = "parameters_alone"
# Field of the record of a run that started from the parameters of another.
_INIT_FROM = "init_from"


class LoadedRun(NamedTuple):
    """A run read back from its workdir."""

    config: config_lib.ExperimentConfig
    params: model.Params
    tokenizer: data.Tokenizer


def load_run(path: str | os.PathLike[str]) -> LoadedRun:
    """Returns configuration, parameters and tokenizer of a run.

    Configuration and parameters come from the newest whole checkpoint; the parameters
    go to the first device. Nothing in the workdir changes, so the run may be in
    progress.

    Raises:
      UserError: where the workdir holds no run with a checkpoint, or its tokenizer.json
        is not the one of that checkpoint, or has ids that the model has not.
    """
    return load_with_record(path)[0]


def load_with_record(
    path: str | os.PathLike[str],
) -> tuple[LoadedRun, checkpoint.Record]:
    """Returns what `load_run` does, and the record of the checkpoint it comes from."""
    path = pathlib.Path(paths.expand("workdir", path))
    params, record = load_params(path)
    config, tokenizer = config_at(record), read_tokenizer(path, record)
    errors.check(
        "workdir",
        tokenizer.vocab_size <= config.model.vocab_size,
        f"{path / 'tokenizer.json'} has token ids up to {tokenizer.vocab_size - 1}, "
        f"beyond the {config.model.vocab_size} of the model; put back the tokenizer "
        "that it was trained with",
    )
    return LoadedRun(config, params, tokenizer), record


def load_params(path: pathlib.Path) -> tuple[model.Params, checkpoint.Record]:
    """Returns the parameters of the newest whole checkpoint of a run, and its record.

    The state of the optimizer stays on the disk.

    Raises:
      UserError: where the workdir holds no run with a checkpoint.
    """
    read_config(path)  # says it where there is no run
    mesh = sharding.MeshConfig().build(1, devices=jax.local_devices())

    def abstract_at(record: checkpoint.Record) -> state_lib.TrainState:
        config = config_at(record)
        # A checkpoint opens on any device, whatever kernel it was trained with, and
        # without the time that it takes to choose how to rematerialise.
        shape = dataclasses.replace(config.model, attention="auto", remat="none")
        config = dataclasses.replace(config, model=shape)
        return trainer.Trainer(config, mesh).abstract_at(record)

    with reading(path) as checkpoints:
        restored = checkpoints.restore(abstract_at, mesh, opt_state=False)
    if restored is None:
        raise errors.UserError(f"workdir: {path} {_NO_CHECKPOINT}")
    state, record = restored
    return state.params, record


def config_of(record: checkpoint.Record) -> config_lib.ExperimentConfig:
    """Returns the configuration of a checkpoint.

    Not that of config.json: a command may have changed it since the last save.

    Raises:
      UserError: see `as_config`.
    """
    return as_config(record["config"], f"checkpoint {record['step']}")


def config_at(record: checkpoint.Record) -> config_lib.ExperimentConfig:
    """Returns the configuration of the phase that a checkpoint belongs to.

    Raises:
      UserError: see `config_of`.
    """
    return config_lib.phase_at(config_of(record), record["step"]).config


def newest_record(path: pathlib.Path) -> checkpoint.Record:
    """Returns the record of the newest checkpoint that has a readable one.

    Raises:
      UserError: where the workdir holds no run with a checkpoint.
    """
    read_config(path)
    newest = _newest_record(path)
    if newest is None:
        raise errors.UserError(f"workdir: {path} {_NO_CHECKPOINT}")
    return newest


def _newest_record(path: pathlib.Path) -> checkpoint.Record | None:
    if not os.path.isdir(path / "checkpoints"):  # False for a path that cannot exist
        return None
    with reading(path) as checkpoints:
        step = checkpoints.latest_step()
        return None if step is None else checkpoints.read_record(step)


def create(
    path: str | os.PathLike[str],
    config: config_lib.ExperimentConfig,
    params: model.Params,
    tokenizer: data.Tokenizer,
) -> None:
    """Writes a run that holds parameters alone, as of step 0; whole or not at all.

    `load_run` reads it. It cannot be resumed, but another run can start from it.

    Args:
      path: the workdir, which must not exist.
      config: the run.
      params: of the model of `config`, in either layout.
      tokenizer: of the parameters.

    Raises:
      UserError: the workdir exists, or cannot be written.
      checkpoint.SaveError: the parameters cannot be written.
    """
    path = pathlib.Path(paths.expand("workdir", path))
    check_new(path)
    path = path.absolute()
    partial = pathlib.Path(files.partial_path(path))
    state = state_lib.TrainState(
        step=np.zeros([], np.int32), params=params, opt_state=(), guard=guard.init()
    )
    values = record(config, 0, state, {"tokenizer": tokenizer.hash}) | {_ALONE: True}
    try:
        make(partial)
        write_json(partial / "config.json", config_lib.to_dict(config))
        tokenizer.save(str(partial / "tokenizer.json"))
        with (
            claim(partial) as claimed,
            contextlib.closing(writing(claimed, keep=1)) as checkpoints,
        ):
            checkpoints.save(0, state, record=values, donated=False)
            checkpoints.wait()
        partial.rename(path)
        files.sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            files.remove(partial)
        raise


def check_new(path: pathlib.Path, *, flag: str = "--workdir") -> None:
    """Raises UserError unless a folder can be made at a path where nothing is yet.

    Args:
      path: as it was written: a relative one shows the address of a store.
      flag: where it was given, for messages.
    """
    _check_local(path, flag)
    errors.check(
        flag, not os.path.lexists(path), f"{path} exists; remove it, or name another"
    )
    parent = next(p for p in path.absolute().parents if os.path.lexists(p))
    try:
        _probe(parent)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise errors.UserError(
            f"{flag}: cannot write to {parent}: {reason}; name another folder"
        ) from error


def _check_local(path: pathlib.Path, flag: str) -> None:
    scheme = path.parts[0] if path.parts else ""
    errors.check(
        flag,
        # "gs://bucket" has become "gs:/bucket".
        not (len(scheme) > 2 and scheme.endswith(":") and len(path.parts) > 1),
        f"{path} looks like the address of a store, but only a folder can be written; "
        "mount the store, or give an absolute path",
    )


def check_resumable(path: pathlib.Path) -> None:
    """Raises UserError where the workdir holds parameters alone, see `create`."""
    newest = _newest_record(path)
    errors.check(
        "workdir",
        newest is None or not newest.get(_ALONE),
        f"{path} holds parameters alone, without the state of an optimizer, so there "
        "is no run to resume; choose another --workdir, and start from these "
        f"parameters with --init-from={path}",
    )


def read_tokenizer(path: pathlib.Path, record: checkpoint.Record) -> data.Tokenizer:
    """Returns the tokenizer of the run.

    Args:
      path: the workdir.
      record: of a checkpoint; one of the first version does not know the tokenizer.

    Raises:
      UserError: it cannot be read, or is not the one of the checkpoint.
    """
    file, remedy = path / "tokenizer.json", "the same training command writes it anew"
    try:
        tokenizer = data.Tokenizer.load(str(file))
    except errors.UserError as error:
        raise errors.UserError(
            f"workdir: {file} cannot be used; {remedy}: {error}"
        ) from error
    found, wanted = tokenizer.hash, record.get("tokenizer", tokenizer.hash)
    errors.check(
        "workdir",
        found == wanted,
        f"{file} has hash {found[:16]}, but the run was trained with a tokenizer with "
        f"hash {wanted[:16]}; {remedy}",
    )
    return tokenizer


def make(path: pathlib.Path) -> None:
    """Creates the folder.

    Raises:
      UserError: where nothing can be written to it, or a file of the run cannot be.
    """
    _check_local(path, "workdir")
    try:
        path.mkdir(parents=True, exist_ok=True)
        _probe(path)
        if (path / "checkpoints").is_dir():
            _probe(path / "checkpoints")
        is_shared = _is_shared(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise errors.UserError(
            f"workdir: cannot write to {path}: {reason}; choose another --workdir"
        ) from error
    errors.check(
        "workdir",
        is_shared,
        f"process {processes.index()} does not see what process 0 wrote to {path}; "
        "choose a folder on a disk that all processes share",
    )
    for kind, holds, names in (
        ("file", os.path.isfile, _FILES),
        ("folder", os.path.isdir, _FOLDERS),
    ):
        for entry in (path / name for name in names):
            errors.check(
                "workdir",
                not os.path.lexists(entry) or holds(entry),
                f"{entry} is in the way, as it is no {kind}; move it, or choose "
                "another --workdir",
            )


def _probe(path: pathlib.Path) -> None:
    """Raises OSError where no folder can be made, or no file in it, or no long name."""
    probe = path / f".probe-{uuid.uuid4().hex[:8]}"
    probe.mkdir(exist_ok=True)
    try:
        (probe / "file").touch()
    finally:
        shutil.rmtree(probe)
    length = len(os.fsencode(path.absolute()))
    if length + _LONGEST_NAME > os.pathconf(path, "PC_PATH_MAX"):
        raise OSError(errno.ENAMETOOLONG, f"a path of {length} bytes is too long")


def _is_shared(path: pathlib.Path) -> bool:
    """Whether this process sees what process 0 writes to a folder."""
    if processes.count() == 1:
        return True
    name = processes.from_first("probe", lambda: uuid.uuid4().hex[:8])
    seen = path / f".probe-{name}"
    if processes.is_first():
        seen.mkdir()
    processes.exchange("probe")
    found = seen.is_dir()
    processes.exchange("probe")
    if processes.is_first():
        seen.rmdir()
    return found


@contextlib.contextmanager
def claim(path: pathlib.Path) -> Iterator[files.HeldFolder]:
    """Holds the workdir for this run; a killed process leaves no lock behind.

    Process 0 locks it for all.

    Yields:
      The folder, for `writing`.

    Raises:
      UserError: where another process trains in it, or it cannot be locked.
    """
    with contextlib.ExitStack() as stack:
        try:
            held = files.HeldFolder(path)
            stack.callback(held.close)
            state = None
            if processes.is_first():
                state = stack.enter_context(files.lock(path / ".lock", wait=False))
        except OSError as error:
            raise errors.UserError(
                f"workdir: {path} cannot be locked: {error.strerror}; choose another "
                "--workdir"
            ) from error
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
        elif state is not None:
            _remove_leftovers(path)
        yield held


def _remove_leftovers(path: pathlib.Path) -> None:
    """Removes what a killed process had begun to write."""
    for name in os.listdir(path):
        if _LEFTOVER.fullmatch(name):
            with contextlib.suppress(OSError):
                files.remove(path / name)


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
        with files.open_regular(file) as opened:
            values = json.loads(opened.read().decode())
    except FileNotFoundError as error:
        raise errors.UserError(
            f"workdir: {path} holds no run (no config.json); train one first, "
            "or name another folder"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise errors.UserError(f"workdir: {file} cannot be read: {error}") from error
    return as_config(values, str(file))


def as_config(values: Any, where: str) -> config_lib.ExperimentConfig:
    """Returns the valid configuration that JSON holds.

    Raises:
      UserError: naming `where` it comes from, and the field.
    """
    try:
        config = config_lib.run_from_dict(values)
        config.validate()
    except errors.UserError as error:
        raise errors.UserError(f"workdir: {where}: {error}") from error
    return config


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
        return config_of(checkpoints.read_record(step))


def started_elsewhere(path: pathlib.Path) -> config_lib.ExperimentConfig | None:
    """Returns what `committed_config` does, for a run that started from another run.

    None where there is no such run.
    """
    newest = _newest_record(path)
    return committed_config(path) if newest and origin_of(newest) else None


def resolve(
    config: config_lib.ExperimentConfig, path: pathlib.Path
) -> config_lib.ExperimentConfig:
    """Returns the configuration with open choices made as the run in the workdir did.

    A run without checkpoints takes the choices of a new run. One that started from
    another run keeps its tokenizer.
    """
    kinds = config.data.kinds_of_split
    split, tokenizer = config.data.split, config.data.tokenizer
    if split in kinds and tokenizer is not None:
        return config
    if split not in kinds:
        earlier = committed_config(path)
        split = earlier.data.split if earlier else None
        split = split if split in kinds else kinds[0]
    if tokenizer is None and (earlier := started_elsewhere(path)):
        tokenizer = earlier.data.tokenizer
        if tokenizer is None or not os.path.isfile(tokenizer):
            tokenizer = str(path / "tokenizer.json")
    chosen = dataclasses.replace(config.data, split=split, tokenizer=tokenizer)
    return dataclasses.replace(config, data=chosen)


def record(
    config: config_lib.ExperimentConfig,
    step: int,
    state: state_lib.TrainState,
    identity: dict[str, str],
    *,
    windows_before: int = 0,
    origin: Mapping[str, Any] | None = None,
) -> checkpoint.Record:
    """Returns what a checkpoint says about its state, see `restore_or_init`.

    Args:
      config: the run, with all of its phases.
      step: number of steps.
      state: after that step.
      identity: hashes of corpus and tokenizer.
      windows_before: windows of text taken beyond those that `step` steps of this
        configuration take, because the batch size changed on the way.
      origin: where the first parameters came from, see `origin_of`; None if drawn.
    """
    first = config_lib.phase_at(config, step).first
    return {
        "config": config_lib.to_dict(config),
        "data_position": step * config.data.batch_size + windows_before,
        **({checkpoint.PHASE_START: first} if first else {}),
        "ranks": rank.stored_ranks(state.params),
        **identity,
        **({} if origin is None else {_INIT_FROM: dict(origin)}),
    }


def origin_of(record: checkpoint.Record) -> Mapping[str, Any] | None:
    """Returns what a checkpoint says of the run that its run started from."""
    return record.get(_INIT_FROM)


def restore_or_init(
    config: config_lib.ExperimentConfig,
    run_at: Callable[[int], trainer.Trainer],
    checkpoints: checkpoint.Checkpointer,
    identity: dict[str, str],
    *,
    log: Callable[[str], None],
    allow_change: Collection[str] = (),
    start: Callable[[], state_lib.TrainState] | None = None,
) -> tuple[state_lib.TrainState, int]:
    """Returns the newest whole checkpoint and its step, or a new state and 0.

    Args:
      config: the run.
      run_at: from a number of steps to the trainer of its phase.
      checkpoints: of the workdir.
      identity: hashes of corpus and tokenizer, which may not change during a run.
      log: receives what was resumed, what changes, and which checkpoints are damaged.
      allow_change: fields that may differ, see `resuming.check_same_run`.
      start: makes the new state; drawn from the seed if None.

    Raises:
      UserError: where the checkpoint belongs to another configuration or text, or none
        can be read.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            restored = _restore(checkpoints, config, run_at)
        finally:
            for warning in caught:
                log(f"warning: {warning.message}")
    if restored is None:
        draw = lambda: run_at(0).init(jax.random.key(config.seed))
        return (start or draw)(), 0
    state, record = restored
    step, before = record["step"], config_of(record)
    resuming.check_same_run(before, config, "the checkpoint", allowed=allow_change)
    for name, now in identity.items():
        then = record.get(name, now)  # the first checkpoints have no tokenizer hash
        errors.check(
            "data",
            then == now,
            f"the run was trained with a {name} with hash {then[:16]}, but "
            f"{config.data.source!r} now has {now[:16]}; restore the text, or "
            "choose another --workdir"
            + "".join(f"\n  {c}" for c in config_lib.text_changes(before, config)),
        )
    log(f"resumed at step {step}")
    skipped = int(state.guard.skipped)
    for line in resuming.describe(record, before, config, skipped=skipped):
        log(line)
    return state, step


def _restore(
    checkpoints: checkpoint.Checkpointer,
    config: config_lib.ExperimentConfig,
    run_at: Callable[[int], trainer.Trainer],
) -> tuple[state_lib.TrainState, checkpoint.Record] | None:
    """The newest whole checkpoint, of whatever phase it is."""
    return checkpoints.restore(
        lambda record: run_at(record["step"]).abstract_at(record),
        run_at(0).mesh,
        layout=config.mesh.tensor_layout,
    )


def steps_done(path: pathlib.Path) -> int:
    """Returns the newest step on disk, 0 for a new run."""
    if not os.path.isdir(path / "checkpoints"):  # False for a path that cannot exist
        return 0
    with reading(path) as checkpoints:
        return checkpoints.latest_step() or 0


def is_finished(
    config: config_lib.ExperimentConfig,
    run_at: Callable[[int], trainer.Trainer],
    path: pathlib.Path,
) -> bool:
    """Returns whether the workdir holds the last step of a run, in a whole checkpoint.

    Reads all of that checkpoint.

    Args:
      config: the run.
      run_at: from a number of steps to the trainer of its phase.
      path: the workdir.
    """
    step = steps_done(path)
    if step < config.num_steps:
        return False
    with reading(path) as checkpoints, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # repeated when the run resumes
        restored = _restore(checkpoints, config, run_at)
    return restored is not None and restored[1]["step"] == step


def reading(path: pathlib.Path) -> contextlib.closing[checkpoint.Checkpointer]:
    """Returns the checkpoints of a run, to be read without touching the folder."""
    return contextlib.closing(
        checkpoint.Checkpointer(
            path / "checkpoints", keep=1, read_only=True, check=_check_record
        )
    )


def writing(claimed: files.HeldFolder, *, keep: int) -> checkpoint.Checkpointer:
    """Returns the checkpoints of a run, to read and to add to.

    Args:
      claimed: from `claim`.
      keep: number of checkpoints to keep.

    Raises:
      UserError: where the folder is no longer the one that was claimed, or cannot be
        written.
    """
    errors.check(
        "workdir",
        claimed.is_there(),
        f"{claimed.path} was removed, renamed or replaced since the start; put it "
        "back, or choose another --workdir",
    )
    return checkpoint.Checkpointer(
        claimed.path / "checkpoints", keep=keep, check=_check_record
    )


def _check_record(record: checkpoint.Record) -> None:
    """Raises DamagedError where the record of a run contradicts itself."""
    if "config" not in record:
        raise records.DamagedError("its record has no configuration")
    if "files" in record:
        return  # has a checksum
    # Nothing could change the batch size of a run in earlier versions.
    settings = record["config"].get("data")
    size = settings.get("batch_size") if isinstance(settings, dict) else None
    wanted, found = record["step"], record.get("data_position")
    if isinstance(size, int) and found not in (None, wanted * size):
        raise records.DamagedError(
            f"the data position of its record is {found}, not {wanted * size}"
        )
