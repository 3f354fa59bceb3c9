"""Checkpoints of a run, written and read by orbax.

A checkpoint is a step folder with the state and a JSON record. The state is stored as
arrays by name, with separate layers, so that either layout can open it. The record
holds the step, the position in the data, the configuration, and shape, dtype and
checksum of every array, as orbax keeps no checksums.
"""

import gc
import logging
import pathlib
import traceback
import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from sct_jax import errors, model, sharding
from sct_jax.training import state as state_lib

Record = dict[str, Any]


class Checkpointer:
    """Saves asynchronously and restores the newest whole checkpoint.

    Step N means N applied updates. One process may write at a time. With `read_only`
    nothing in the folder changes, so that others can read a run in progress.
    """

    def __init__(self, directory: pathlib.Path, *, keep: int, read_only: bool = False):
        self._directory = directory.absolute()
        self._keep = keep
        self._read_only = read_only
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, cleanup_tmp_directories=True
        )
        if not self._read_only:
            return ocp.CheckpointManager(self._directory, options=options)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None, save_interval_steps=0, create=False, read_only=True
        )
        logger = logging.getLogger("absl")
        level = logger.level
        logger.setLevel(logging.ERROR)  # orbax warns about every read-only manager
        try:
            return ocp.CheckpointManager(self._directory, options=options)
        finally:
            logger.setLevel(level)

    def latest_step(self) -> int | None:
        """Returns the newest step with a readable record; None if there is none."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                self.read_record(step)
            except Exception:
                continue
            return step
        return None

    def save(
        self, step: int, state: state_lib.TrainState, *, record: dict[str, Any]
    ) -> None:
        """Starts a save and returns once the state may be donated.

        Does nothing if the step is already saved. Raises the error of an earlier save.

        Args:
          step: number of applied updates.
          state: in either layout.
          record: JSON to save beside it: configuration, position in the data.
        """
        if step in self._manager.all_steps():
            return
        self._manager.wait_until_finished()
        # Views, as a second copy of a large state may not fit in memory. Orbax copies
        # host arrays itself.
        arrays = _by_name(model.unstack_layers(jax.tree.map(np.asarray, state)))
        record = record | {"step": step, "leaves": _describe(arrays)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record)
            ),
        )

    def restore(
        self,
        abstract_at: Callable[[Record], state_lib.TrainState],
        mesh: Mesh,
    ) -> tuple[state_lib.TrainState, Record] | None:
        """Returns the newest whole checkpoint and its record; None if there is none.

        Warns about a damaged checkpoint and tries the next older one. Once one is
        found, renames the damaged ones to `damaged-<step>`, unless `read_only`.

        Args:
          abstract_at: from the record of a checkpoint to shapes and dtypes of its
            state, in the layout to return.
          mesh: the devices to restore to.

        Raises:
          UserError: where checkpoints exist but none can be read, so that no run
            restarts over them, and where the newest readable one has other shapes. The
            folder stays unchanged.
        """
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                record = self.read_record(step)
                wanted = abstract_at(record)
                state = self._restore_step(step, record, wanted, mesh)
            except (
                errors.UserError,
                MemoryError,
                PermissionError,
                jax.errors.JaxRuntimeError,  # the memory of a device, for one
            ):
                raise  # not the fault of the checkpoint
            except Exception as error:
                damaged.append(step)
                reason = str(error).strip().split("\n")[0]
                _release(error)
                warnings.warn(
                    f"checkpoint {step} is damaged, trying an older one: "
                    f"{type(error).__name__}: {reason}",
                    stacklevel=2,
                )
                continue
            self._set_aside(damaged)
            if not isinstance(wanted.params["layers"], tuple):
                state = model.stack_layers(state, stack_arrays=_stack_and_free)
                state = jax.device_put(state, sharding.shardings(wanted, mesh))
            return state, record
        errors.check(
            "workdir",
            not damaged,
            f"no checkpoint in {self._directory} can be read; choose another --workdir "
            "to start from scratch",
        )
        return None

    def read_record(self, step: int) -> Record:
        """Returns what was saved beside the state of a step."""
        return self._manager.restore(
            step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
        )["record"]

    def _restore_step(
        self,
        step: int,
        record: dict[str, Any],
        abstract: state_lib.TrainState,
        mesh: Mesh,
    ) -> state_lib.TrainState:
        apart = jax.eval_shape(model.unstack_layers, abstract)
        target = _by_name(sharding.abstract(apart, sharding.shardings(apart, mesh)))
        _check_shapes(target, record["leaves"], step)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(target)),
        )["state"]
        for name, leaf in _describe(restored).items():
            saved = record["leaves"][name]
            if leaf != saved:
                raise ValueError(f"{name} differs from its record: {leaf}, not {saved}")
        return jax.tree.unflatten(
            jax.tree.structure(apart), [restored[name] for name in target]
        )

    def _set_aside(self, steps: list[int]) -> None:
        if self._read_only or not steps:
            return
        self._manager.close()
        for step in steps:
            folder = self._directory / str(step)
            target, copies = self._directory / f"damaged-{step}", 0
            while target.exists():
                copies += 1
                target = self._directory / f"damaged-{step}-{copies}"
            if folder.exists():
                folder.rename(target)
        self._manager = self._open()

    def wait(self) -> None:
        """Returns once every started save is committed; raises if one failed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves and frees the background threads."""
        self._manager.wait_until_finished()
        self._manager.close()


def _release(error: BaseException) -> None:
    """Frees the frames of a failed read.

    If one read fails, orbax never awaits the others, and Python warns about each of
    them when it is freed. Freeing them here silences those redundant warnings.
    """
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = error.__context__ = error.__cause__ = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited")
        gc.collect()


def _by_name(state: state_lib.TrainState) -> dict[str, Any]:
    """The arrays in order, without masked leaves, which differ between the layouts."""
    return {
        sharding.path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _stack_and_free(arrays: Sequence[jax.Array]) -> jax.Array:
    """Stacks the arrays of all layers and frees them: a state may not fit twice."""
    stacked = jax.block_until_ready(jnp.stack(arrays))
    for array in arrays:
        array.delete()
    return stacked


def _describe(arrays: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and CRC-32 of every array."""
    return {
        name: {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "crc32": zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data),
        }
        for name, leaf in arrays.items()
    }


def _check_shapes(
    target: dict[str, Any], leaves: dict[str, dict[str, Any]], step: int
) -> None:
    """Raises UserError, listing the arrays whose shape or dtype differs."""
    wanted = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in target.items()}
    saved = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in leaves.items()}
    found = [
        f"{name}: {saved.get(name, 'absent')} saved, {wanted.get(name, 'absent')} now"
        for name in sorted(wanted.keys() | saved.keys())
        if wanted.get(name) != saved.get(name)
    ]
    errors.check(
        "workdir",
        not found,
        f"checkpoint {step} has other arrays than this configuration; choose another "
        "--workdir, or undo:\n  " + "\n  ".join(found[:20]),
    )
