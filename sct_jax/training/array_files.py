"""The arrays of a checkpoint in files: what orbax is used for.

Orbax is slow to import, so it is imported on the first use.
"""

import asyncio
import concurrent.futures
import logging
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def write(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes whole arrays to an empty folder."""
    ocp, path = _orbax(folder)
    kinds = ocp.type_handlers
    # The arrays are copies already. Compression would save 8 % of the bytes, for four
    # times the work of all else.
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False,
        type_handler_registry=kinds.create_type_handler_registry(
            (np.ndarray, kinds.NumpyHandler(deepcopy_host_arrays=False))
        ),
    )
    handler.save(path, args=ocp.args.PyTreeSave(arrays))
    handler.finalize(path)
    handler.close()
    _check_manifest(folder)


def read(
    folder: pathlib.Path, target: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Returns the arrays that `target` names, placed as it says, on every process."""
    ocp, path = _orbax(folder)
    args = ocp.args.PyTreeRestore(
        target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
    )
    return _in_thread(lambda: ocp.PyTreeCheckpointHandler().restore(path, args=args))


class Part:
    """What this process writes of arrays that several processes hold."""

    def __init__(self, handler: Any, pending: list[Any]):
        self._handler = handler
        self._pending = pending

    def wait(self) -> None:
        """Returns once the part is on the disk. Raises what went wrong."""
        try:
            for future in self._pending:
                future.result()
        finally:
            self._handler.close()


def begin_part(folder: pathlib.Path, arrays: dict[str, jax.Array]) -> Part:
    """Begins to write the shards of this process; the arrays may be donated at once.

    Args:
      folder: empty, seen by all processes, which all call this.
      arrays: divided over all processes.
    """
    ocp, path = _orbax(folder)
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    save = lambda: handler.async_save(path, args=ocp.args.PyTreeSave(arrays))
    return Part(handler, _in_thread(lambda: asyncio.run(save())) or [])


def join_parts(folder: pathlib.Path) -> None:
    """Makes one set of arrays of the parts, in one process, once all are written."""
    ocp, path = _orbax(folder)
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    handler.finalize(path)
    handler.close()
    _check_manifest(folder)


def _orbax(folder: pathlib.Path) -> tuple[Any, Any]:
    """The library, silenced, and its kind of path.

    What it prints of an error is a traceback per thread; the error itself is raised.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    logging.getLogger("asyncio").addFilter(_is_not_of_orbax)
    if not getattr(sys.unraisablehook, "ignores_orbax", False):
        sys.unraisablehook = _without_orbax(sys.unraisablehook)
    return ocp, epath.Path(folder)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    if record.levelno < logging.WARNING:  # asked for by whoever debugs
        return True
    text = f"{record.pathname} {record.getMessage()}"
    return "orbax" not in text and "OCDBT" not in text


def _without_orbax(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Drops the complaints of writes and reads that end after one that failed."""

    def filtered(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        ended_late = "orbax" in getattr(code, "co_filename", "")
        if not ended_late and str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    filtered.ignores_orbax = True  # type: ignore[attr-defined]
    return filtered


def _check_manifest(folder: pathlib.Path) -> None:
    if not (folder / "manifest.ocdbt").exists():
        raise RuntimeError("orbax wrote no manifest")


def _in_thread(function: Callable[[], Any]) -> Any:
    """Its result, from a thread without the event loop that a notebook has."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()
