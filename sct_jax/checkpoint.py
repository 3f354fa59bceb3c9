"""Checkpoints of a run: orbax behind one door.

A checkpoint is a step folder with the state (layers by name, unstacked, so that either
layout opens it) and a JSON record: the step, the position in the data, the
configuration, and a checksum of every leaf, which orbax itself does not keep.
"""

import logging
import pathlib
import warnings
import zlib
from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding

from sct_jax import errors, model, sharding, train_state


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
        self._unstack: Callable | None = None

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
        """Returns the step of the newest checkpoint folder, None without any."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: train_state.TrainState, *, record: dict[str, Any]
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
        tree = _as_dict(self._by_name(state))
        record = record | {"step": step, "checksums": _checksums(tree)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(record)
            ),
        )

    def _by_name(self, state: train_state.TrainState) -> train_state.TrainState:
        """The state with layers by name; orbax takes its own copy of host arrays."""
        if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(state)):
            # Views: a second copy of a large state may not fit in memory.
            return model.unstack_layers(jax.tree.map(np.asarray, state))
        if self._unstack is None:
            self._unstack = _jit_unstack(state)
        return self._unstack(state)

    def restore(
        self, abstract: train_state.TrainState, mesh: Mesh
    ) -> tuple[train_state.TrainState, dict[str, Any]] | None:
        """Returns the newest whole checkpoint and its record; None where there is none.

        A damaged one is reported, set aside as `damaged-<step>` unless `read_only`, and
        the next older one is tried.

        Args:
          abstract: shapes and dtypes of the state, in the layout to return.
          mesh: where it goes.

        Raises:
          ConfigError: where there are checkpoints and none can be read: nothing starts
            from scratch over them.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return self._restore_step(step, abstract, mesh)
            except MemoryError:
                raise  # says nothing about the checkpoint
            except Exception as error:
                reason = str(error).strip().split("\n")[0]
                warnings.warn(
                    f"checkpoint {step} cannot be used, trying an older one: "
                    f"{type(error).__name__}: {reason}",
                    stacklevel=2,
                )
                self._set_aside(step)
        errors.check(
            "workdir",
            not steps,
            f"no checkpoint in {self._directory} can be read (what is damaged is set "
            "aside as damaged-<step>). Choose another workdir to start afresh",
        )
        return None

    def _restore_step(self, step, abstract, mesh):
        stacked = not isinstance(abstract.params["layers"], tuple)
        # Also where layers are separate: shapes alone pass through.
        by_name = jax.eval_shape(model.unstack_layers, abstract)
        target = sharding.abstract(by_name, sharding.shardings(by_name, mesh))
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_as_dict(target)),
                record=ocp.args.JsonRestore(),
            ),
        )
        record = restored["record"]
        _verify(restored["state"], _as_dict(target), record)
        state = train_state.TrainState(**restored["state"])
        if stacked:
            state = jax.jit(
                model.stack_layers, out_shardings=sharding.shardings(abstract, mesh)
            )(state)
        return state, record

    def _set_aside(self, step: int) -> None:
        if self._read_only:
            return
        self._manager.close()
        folder = self._directory / str(step)
        if folder.exists() and jax.process_index() == 0:
            target = self._directory / f"damaged-{step}"
            for n in range(1, 1000):
                if not target.exists():
                    break
                target = self._directory / f"damaged-{step}-{n}"
            folder.rename(target)
        self._manager = self._open()

    def wait(self) -> None:
        """Returns once every started save is committed; raises what went wrong."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and frees the background threads."""
        self._manager.wait_until_finished()
        self._manager.close()


def _as_dict(state: train_state.TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "params": state.params,
        "opt_state": state.opt_state,
    }


def _jit_unstack(state: train_state.TrainState) -> Callable:
    by_name = jax.eval_shape(model.unstack_layers, state)
    mesh = cast(NamedSharding, state.step.sharding).mesh
    return jax.jit(
        model.unstack_layers, out_shardings=sharding.shardings(by_name, mesh)
    )


def _checksums(tree: Any) -> dict[str, int]:
    """CRC-32 of every leaf that this process can see whole."""
    sums = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, np.ndarray | np.generic) or leaf.is_fully_addressable:
            array = np.ascontiguousarray(leaf)
            sums[sharding.path_name(path)] = zlib.crc32(array.view(np.uint8).data)
    return sums


def _verify(tree: Any, target: Any, record: dict[str, Any]) -> None:
    """Raises ValueError naming the first leaf that is not as it was saved."""
    wanted = jax.tree_util.tree_leaves_with_path(target)
    found = jax.tree.leaves(tree)
    for (path, spec), leaf in zip(wanted, found, strict=True):
        if (leaf.shape, leaf.dtype) != (spec.shape, spec.dtype):
            raise ValueError(
                f"{sharding.path_name(path)} is {leaf.dtype}{leaf.shape}, not "
                f"{spec.dtype}{spec.shape}"
            )
    sums = _checksums(tree)
    for name, value in record["checksums"].items():
        if sums.get(name, value) != value:
            raise ValueError(f"the bytes of {name} are not those that were saved")
