"""Checkpoints of a run: orbax behind one door.

A checkpoint is a step folder with the state (its arrays by name, those of every layer
apart, so that either layout opens it) and a JSON record: the step, the position in the
data, the configuration, and shape, dtype and checksum of every array: orbax keeps no
checksums.
"""

import logging
import pathlib
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

# From an abstract state and a checkpoint's record to the abstract state it holds.
Adapt = Callable[[state_lib.TrainState, dict[str, Any]], state_lib.TrainState]


class Checkpointer:
    """Saves asynchronously, and restores the newest checkpoint that is whole.

    Step N means N applied updates. One process writes at a time; with `read_only`
    nothing in the folder is touched, so that a run in progress can be looked at.
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
        logger.setLevel(logging.ERROR)  # orbax warns that what is read-only is so
        try:
            return ocp.CheckpointManager(self._directory, options=options)
        finally:
            logger.setLevel(level)

    def latest_step(self) -> int | None:
        """Returns the newest step with a readable record, None without any."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                self._read_record(step)
            except Exception:
                continue
            return step
        return None

    def save(
        self, step: int, state: state_lib.TrainState, *, record: dict[str, Any]
    ) -> None:
        """Starts saving; returns once the state may be donated to the next step.

        Does nothing where the step is saved already. An error of an earlier save is
        raised here.

        Args:
          step: number of applied updates.
          state: in either layout.
          record: what belongs beside it, as JSON: configuration, data position.
        """
        if step in self._manager.all_steps():
            return
        self._manager.wait_until_finished()
        # Views: a second copy of a large state may not fit in memory. Orbax takes its
        # own copy of host arrays.
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
        abstract: state_lib.TrainState,
        mesh: Mesh,
        *,
        adapt: Adapt | None = None,
    ) -> tuple[state_lib.TrainState, dict[str, Any]] | None:
        """Returns the newest whole checkpoint and its record; None where there is none.

        A damaged one is reported and the next older one is tried; once one is found,
        the damaged ones are set aside as `damaged-<step>`, unless `read_only`.

        Args:
          abstract: shapes and dtypes of the state, in the layout to return.
          mesh: where it goes.
          adapt: what the record of a checkpoint changes about `abstract`, where shapes
            change during a run.

        Raises:
          UserError: where there are checkpoints and none can be read, so that nothing
            starts from scratch over them; and where the newest readable one holds other
            shapes. Then the folder stays as it is.
        """
        stacked = not isinstance(abstract.params["layers"], tuple)
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                record = self._read_record(step)
                wanted = adapt(abstract, record) if adapt else abstract
                state = self._restore_step(step, record, wanted, mesh)
            except (
                errors.UserError,
                MemoryError,
                PermissionError,
                jax.errors.JaxRuntimeError,  # the memory of a device, for one
            ):
                raise  # says nothing about the checkpoint
            except Exception as error:
                damaged.append(step)
                reason = str(error).strip().split("\n")[0]
                warnings.warn(
                    f"checkpoint {step} cannot be used, trying an older one: "
                    f"{type(error).__name__}: {reason}",
                    stacklevel=2,
                )
                continue
            self._set_aside(damaged)
            if stacked:
                state = model.stack_layers(state, stack_arrays=_stack_and_free)
                state = jax.device_put(state, sharding.shardings(wanted, mesh))
            return state, record
        errors.check(
            "workdir",
            not damaged,
            f"no checkpoint in {self._directory} can be read; choose another workdir "
            "to start afresh",
        )
        return None

    def _read_record(self, step: int) -> dict[str, Any]:
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
                raise ValueError(f"{name} is not as it was saved: {leaf}, not {saved}")
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
        """Returns once every started save is committed; raises what went wrong."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and frees the background threads."""
        self._manager.wait_until_finished()
        self._manager.close()


def _by_name(state: state_lib.TrainState) -> dict[str, Any]:
    """The arrays alone, in order: what is masked differs between the layouts."""
    return {
        sharding.path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _stack_and_free(arrays: Sequence[jax.Array]) -> jax.Array:
    """One array of those of all layers, which go: a state may not fit twice."""
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
    """Raises UserError, listing what differs, where the run is of another shape."""
    wanted = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in target.items()}
    saved = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in leaves.items()}
    found = [
        f"{name}: {saved.get(name, 'absent')} saved, {wanted.get(name, 'absent')} asked"
        for name in sorted(wanted.keys() | saved.keys())
        if wanted.get(name) != saved.get(name)
    ]
    errors.check(
        "workdir",
        not found,
        f"checkpoint {step} is of another shape:\n  " + "\n  ".join(found[:20]),
    )
