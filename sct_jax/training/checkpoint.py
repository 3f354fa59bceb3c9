"""Checkpoints of a run: a folder per step, which is whole or not there.

A step folder holds the state and a JSON record, see `records`. Orbax writes and reads
the arrays, by name and with separate layers, so that either layout can open them, see
`array_files`. All else is done here: a save fills `.partial-<step>-<uuid>`, adds the
checksums of its files, and renames it to `<step>`. Where several processes train, each
writes its own part of the arrays, and process 0 does the rest.

The CheckpointManager of orbax could not serve: it tells of a failed save at the next
one (https://github.com/google/orbax/issues/605), leaves threads that a process waits
for at its end, and reads paths as patterns. Folders that it wrote, in earlier versions,
are read too.
"""

import concurrent.futures
import contextlib
import errno
import gc
import glob
import json
import os
import pathlib
import re
import threading
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from sct_jax import errors, files, model, sharding
from sct_jax.training import array_files, processes, records
from sct_jax.training import arrays as arrays_lib
from sct_jax.training import state as state_lib

Record = records.Record

_STEP = re.compile(r"0|[1-9][0-9]{0,9}")
_LIKE_A_STEP = re.compile(r"[-+]?[0-9][0-9_]*")
_DAMAGED = re.compile(r"damaged-[0-9]+(-[0-9]+)?")
# Half a save of a process that was killed; the second kind is of earlier versions.
_PARTIAL = re.compile(r"\.partial-[0-9]+-[0-9a-f]{32}|[0-9]+\.orbax-checkpoint-tmp.*")
_FILES_PER_SAVE = 100
_GONE = "gone"


PHASE_START = "phase_start"
"""Field of a record: the steps before its phase, which its optimizer does not count."""


class SaveError(Exception):
    """A checkpoint could not be saved; the earlier ones are intact.

    The message is one line: the folder, the reason, the bytes needed and free.
    """


class Checkpointer:
    """Saves in the background, and restores the newest whole checkpoint.

    Step N means N batches taken from the data. One process may write at a time. With
    `read_only` nothing in the folder changes, so that others can read a run in
    progress.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        keep: int,
        read_only: bool = False,
        check: Callable[[Record], None] = lambda record: None,
    ):
        """Opens the folder. A writer creates it, and removes halves of killed saves.

        Args:
          directory: of the checkpoints.
          keep: number of checkpoints to keep, the newest ones.
          read_only: change nothing; a missing folder has no checkpoints.
          check: raises `records.DamagedError` for a record that contradicts itself.

        Raises:
          UserError: the folder cannot be opened, or a writer cannot write to it.
        """
        self._directory = directory.absolute()
        self._keep = keep
        self._read_only = read_only
        self._check = check
        self._thread: threading.Thread | None = None
        self._failure: SaveError | None = None
        self._barred: list[pathlib.Path] = []
        self._notes: list[str] = []
        self._folder: files.HeldFolder | None = None
        if read_only and not self._directory.is_dir():
            return
        try:
            if not read_only:
                self._directory.mkdir(exist_ok=True)
            self._folder = files.HeldFolder(self._directory)
            if not read_only and processes.is_first():
                for name in filter(_PARTIAL.fullmatch, os.listdir(self._base)):
                    files.remove(self._base / name)
        except OSError as error:
            access = "read" if read_only else "write to"
            raise errors.UserError(
                f"workdir: cannot {access} {_one_line(self._directory)}: "
                f"{error.strerror}; choose another --workdir"
            ) from error
        name = str(self._base)
        errors.check(
            "workdir",
            not glob.has_magic(name) and "\\" not in name,
            f"{_one_line(self._directory)} has a character that has a meaning in "
            "patterns, one of *?[\\; choose another --workdir",
        )

    @property
    def _base(self) -> pathlib.Path:
        """The folder by a name that orbax cannot misread."""
        assert self._folder is not None
        return self._folder.alias

    # --- What is there.

    def steps(self) -> list[int]:
        """Returns the steps that have a folder, oldest first, without opening it."""
        if self._folder is None:
            return []
        with os.scandir(self._base) as entries:
            return sorted(int(entry.name) for entry in entries if _is_step(entry))

    def latest_step(self) -> int | None:
        """Returns the newest step with a readable record; None if there is none."""
        self._join()
        for step in reversed(self.steps()):
            try:
                self.read_record(step)
            except records.DamagedError:
                continue
            return step
        return None

    def read_record(self, step: int) -> Record:
        """Returns what was saved beside the state of a step.

        Raises:
          DamagedError: saying what is wrong with it.
        """
        record = records.read(self._base / str(step), step)
        self._check(record)
        return record

    # --- Saving.

    def save(
        self,
        step: int,
        state: state_lib.TrainState,
        *,
        record: dict[str, Any],
        donated: bool = True,
    ) -> None:
        """Starts a save and returns once the state may be donated.

        Waits for an earlier save. Returns at once if the same checkpoint is there.

        Args:
          step: number of batches that the state has seen.
          state: in either layout.
          record: JSON to save beside it: configuration, position in the data.
          donated: False if the state stays as it is until `wait`, so that no copy of it
            is needed.

        Raises:
          SaveError: an earlier save failed, this one cannot start, or the step is there
            with another content.
          ValueError: the state is not of this step.
        """
        self.wait()
        if processes.count() > 1:
            return self._save_together(step, state, record)
        # Views where there are any, as a second copy of a large state may not fit.
        views = arrays_lib.by_name(model.unstack_layers(jax.device_get(state)))
        try:
            arrays_lib.check_step(views, step, first=record.get(PHASE_START, 0))
        except records.DamagedError as error:
            raise ValueError(f"a state saved as step {step}: {error}") from None
        save = self._new_save(step, record, views)
        if step in self.steps() and self._holds(
            step, save.record | arrays_lib.summarise(views)
        ):
            return
        try:
            self._begin(save)
            kept = np.array if donated and _is_on_host(state) else np.asarray
            arrays = records.in_parallel(lambda name: kept(views[name]), views)
        except Exception as error:
            failure = self._error(save, error)
            self._discard(save)
            raise failure from error
        self._start(lambda: self._finish(save, arrays), step)

    def _save_together(
        self, step: int, state: state_lib.TrainState, record: dict[str, Any]
    ) -> None:
        """`save`, where each process holds a part of the state."""
        arrays = arrays_lib.by_name(model.unstack_layers(state))
        arrays_lib.check_step(arrays, step, first=record.get(PHASE_START, 0))
        about = arrays_lib.summarise_parts(arrays)
        save = self._new_save(step, record | about, arrays)

        def begin() -> str | None:
            if step in self.steps() and self._holds(step, save.record):
                return None
            try:
                self._begin(save)
            except Exception as error:
                failure = self._error(save, error)
                self._discard(save)
                raise failure from error
            return save.partial.name

        name = processes.from_first("save", begin)
        if name is None:
            return
        folder = self._base / name / records.STATE
        try:
            writing, failure = array_files.begin_part(folder, arrays), None
        except Exception as error:
            writing, failure = None, _reason(error)
            _release(error)
        self._start(lambda: self._finish_together(save, writing, failure), step)

    def _new_save(
        self, step: int, record: dict[str, Any], arrays: Mapping[str, Any]
    ) -> "_Save":
        size = sum(array.nbytes for array in arrays.values())
        # Beside the arrays: their names, an index of chunks, the record.
        needed = size + size // 100 + 1024 * len(arrays) + (1 << 20)
        record = json.loads(json.dumps(record, allow_nan=False)) | {"step": step}
        return _Save(step, record, self._partial(step), needed)

    def _begin(self, save: "_Save") -> None:
        self._check_space(save.needed)
        (save.partial / records.STATE).mkdir(parents=True)

    def _start(self, finish: Callable[[], None], step: int) -> None:
        self._thread = threading.Thread(target=finish, name=f"checkpoint {step}")
        self._thread.start()

    def poll(self) -> None:
        """Raises the SaveError of a save that has failed since; takes no time."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Returns once every started save is committed.

        Raises:
          SaveError: one failed, or the folder is no longer the one of the start.
        """
        self._join()
        self.poll()
        while self._notes:
            warnings.warn(self._notes.pop(), stacklevel=2)
        if not self._read_only:
            self._check_place()

    def close(self) -> None:
        """Waits for saves and lets go of the folder; raises like `poll`."""
        self._join()
        if self._folder is not None:
            for path in self._barred:
                with contextlib.suppress(OSError):
                    files.remove(path)
            self._folder.close()
            self._folder = None
        self.poll()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _finish(self, save: "_Save", arrays: dict[str, np.ndarray]) -> None:
        """Completes a save in its thread: commits it, or leaves nothing of it."""
        try:
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                summary = pool.submit(arrays_lib.summarise, arrays)
                array_files.write(save.partial / records.STATE, arrays)
            self._commit(save, save.record | summary.result())
        except BaseException as error:
            self._failure = self._error(save, error)
            _release(error)
            self._discard(save)
            return
        self._tidy()

    def _finish_together(
        self, save: "_Save", writing: Any, failure: str | None
    ) -> None:
        """`_finish` where each process has begun to write its part."""
        try:
            if failure is None:
                writing.wait()
        except BaseException as error:
            failure = _reason(error)
            _release(error)
        failures = [f for f in processes.exchange("written", failure) if f]

        def commit() -> str | None:
            try:
                if failures:
                    raise OSError(failures[0])
                array_files.join_parts(save.partial / records.STATE)
                self._commit(save, save.record)
            except BaseException as error:
                text = str(self._error(save, error))
                _release(error)
                self._discard(save)
                return text
            self._tidy()
            return None

        if text := processes.from_first("committed", commit):
            self._failure = SaveError(text)

    def _commit(self, save: "_Save", record: Record) -> None:
        records.write(save.partial, record)
        self._check_place()
        self._set_aside(save.step)
        save.partial.rename(self._base / str(save.step))
        files.sync_folder(self._base)

    def _tidy(self) -> None:
        try:
            self._prune()
        except Exception as error:
            self._notes.append(
                f"old checkpoints in {_one_line(self._directory)} cannot be removed: "
                f"{_reason(error)}"
            )

    def _holds(self, step: int, record: Record) -> bool:
        """Whether a step folder holds this very checkpoint; a damaged one does not."""
        try:
            found = self.read_record(step)
            records.check_files(self._base / str(step), found)
        except records.DamagedError:
            return False
        if any(found.get(key, value) != value for key, value in record.items()):
            raise SaveError(
                f"checkpoint {step} was not saved: another one of this step is in "
                f"{_one_line(self._directory)}; remove it, or choose another --workdir"
            )
        return True

    def _check_place(self) -> None:
        if self._folder is None or not self._folder.is_there():
            raise SaveError(
                f"the folder {_one_line(self._directory)} was removed, renamed or "
                "replaced during the run, so nothing more is saved; put it back, and "
                "the same command resumes"
            )

    def _check_space(self, needed: int) -> None:
        space = os.statvfs(self._base)
        if space.f_bavail * space.f_frsize < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # Zero of zero: the file system has no limit, or does not tell.
        if space.f_files and space.f_favail < _FILES_PER_SAVE:
            raise OSError(errno.ENOSPC, f"no room for {_FILES_PER_SAVE} files")

    def _error(self, save: "_Save", error: BaseException) -> SaveError:
        try:
            self._check_place()  # if it is gone, that is the cause
            space = os.statvfs(self._base)
            free = f"{space.f_bavail * space.f_frsize:,}"
        except SaveError as cause:
            return cause
        except OSError:
            free = "unknown"
        return SaveError(
            f"checkpoint {save.step} was not saved in {_one_line(self._directory)}: "
            f"{_reason(error)} ({save.needed:,} bytes needed, {free} free)"
        )

    def _discard(self, save: "_Save") -> None:
        """Removes half a save, to which orbax may still write what it had begun.

        A file in its place keeps the folder from coming back.
        """
        for _ in range(1000):
            with contextlib.suppress(OSError):
                files.remove(save.partial)
            with contextlib.suppress(OSError):
                save.partial.touch(exist_ok=False)
                self._barred.append(save.partial)
                return

    def _partial(self, step: int) -> pathlib.Path:
        return self._base / f".partial-{step}-{uuid.uuid4().hex}"

    def _prune(self) -> None:
        """Removes all but the newest whole checkpoints, and the newest finite one."""
        finite = {}
        for step in self.steps():
            try:
                record = self.read_record(step)
                records.check_files(self._base / str(step), record, content=False)
            except records.DamagedError:
                continue
            finite[step] = record.get("finite", True)
        whole = sorted(finite)
        kept = whole[-self._keep :] + [step for step in whole if finite[step]][-1:]
        for step in set(whole) - set(kept):
            # Not in one go: a process killed meanwhile leaves no half a checkpoint.
            removed = self._partial(step)
            (self._base / str(step)).rename(removed)
            files.remove(removed)

    # --- Restoring.

    def restore(
        self,
        abstract_at: Callable[[Record], state_lib.TrainState],
        mesh: Mesh,
        *,
        layout: str = sharding.UNAIDED,
        opt_state: bool = True,
    ) -> tuple[state_lib.TrainState, Record] | None:
        """Returns the newest whole checkpoint and its record; None if there is none.

        Warns about a damaged checkpoint and tries the next older one. Once one is
        found, renames the damaged ones to `damaged-<step>`, unless `read_only`. Arrays
        of the guard that an earlier version did not save are zero.

        Args:
          abstract_at: from the record of a checkpoint to shapes and dtypes of its
            state, in the layout to return.
          mesh: the devices to restore to.
          layout: of tensor parallelism on them, see `sharding.LAYOUTS`.
          opt_state: False leaves out the state of the optimizer, which is then ().
            Its files are checked all the same.

        Raises:
          UserError: where checkpoints exist but none can be read, so that no run
            restarts over them, and where the newest readable one has other shapes. The
            folder stays unchanged.
        """
        self._join()
        self._warn_of_junk()
        tried: list[int] = []
        damaged: list[int] = []
        # Anew each time: a run in progress removes and adds checkpoints.
        untried = lambda: [step for step in self.steps() if step not in tried]
        while left := processes.from_first("restore", untried):
            step = left[-1]
            tried.append(step)
            state, record, wanted, failure = None, {}, None, None
            try:
                record = self.read_record(step)
                wanted = abstract_at(record)
                if not opt_state:
                    wanted = wanted.replace(opt_state=())
                state = self._restore_step(
                    step, record, wanted, mesh, layout, opt_state=opt_state
                )
            except (errors.UserError, MemoryError, jax.errors.JaxRuntimeError):
                raise  # not the fault of the checkpoint
            except Exception as error:
                gone = not (self._base / str(step)).exists()
                failure = _GONE if gone else _reason(error)
                _release(error)
            failures = [f for f in processes.exchange("restored", failure) if f]
            if _GONE in failures:
                continue
            if failures or state is None or wanted is None:
                damaged.append(step)
                warnings.warn(
                    f"checkpoint {step} is damaged, trying an older one: {failures[0]}",
                    stacklevel=2,
                )
                continue
            for other in damaged:
                try:
                    self._set_aside(other)
                except OSError as error:
                    warnings.warn(
                        f"checkpoint {other} cannot be renamed: {_reason(error)}",
                        stacklevel=2,
                    )
            if not isinstance(wanted.params["layers"], tuple):
                state = model.stack_layers(
                    state, stack_arrays=arrays_lib.stack_and_free
                )
                state = jax.device_put(state, sharding.shardings(wanted, mesh, layout))
            return state, record
        errors.check(
            "workdir",
            not damaged and not self._has_damaged(),
            f"no checkpoint in {_one_line(self._directory)} can be read; choose "
            "another --workdir to start from scratch",
        )
        return None

    def _restore_step(
        self,
        step: int,
        record: dict[str, Any],
        abstract: state_lib.TrainState,
        mesh: Mesh,
        layout: str,
        *,
        opt_state: bool,
    ) -> state_lib.TrainState:
        apart = jax.eval_shape(model.unstack_layers, abstract)
        target = arrays_lib.by_name(
            sharding.abstract(apart, sharding.shardings(apart, mesh, layout))
        )
        saved = record["leaves"]
        if not opt_state:
            saved = {n: x for n, x in saved.items() if not n.startswith("opt_state")}
        later = set(filter(arrays_lib.is_of_guard, target.keys() - saved.keys()))
        stored = {name: leaf for name, leaf in target.items() if name not in later}
        arrays_lib.check_shapes(stored, saved, step)
        folder = self._base / str(step)
        if processes.is_first():  # reads all of them
            records.check_files(folder, record)
        with records.as_damage(folder, records.STATE), _not_damage(record):
            restored = array_files.read(folder / records.STATE, stored)
        summed = {
            name: array
            for name, array in restored.items()
            if "crc32" in saved[name] and array.is_fully_addressable
        }
        for name, leaf in arrays_lib.describe(summed).items():
            if leaf != saved[name]:
                raise records.DamagedError(
                    f"{name} differs from its record: {leaf}, not {saved[name]}"
                )
        arrays_lib.check_step(restored, step, first=record.get(PHASE_START, 0))
        for name in later:
            zeros = np.zeros(target[name].shape, target[name].dtype)
            restored[name] = jax.device_put(zeros, target[name].sharding)
        return jax.tree.unflatten(
            jax.tree.structure(apart), [restored[name] for name in target]
        )

    def _set_aside(self, step: int) -> None:
        """Renames what is at the place of a step, if anything, to `damaged-<step>`."""
        absent = not os.path.lexists(self._base / str(step))
        if self._read_only or not processes.is_first() or absent:
            return
        name, copies = f"damaged-{step}", 0
        while os.path.lexists(self._base / name):
            copies += 1
            name = f"damaged-{step}-{copies}"
        (self._base / str(step)).rename(self._base / name)

    def _has_damaged(self) -> bool:
        return self._folder is not None and any(
            map(_DAMAGED.fullmatch, os.listdir(self._base))
        )

    def _warn_of_junk(self) -> None:
        if self._folder is None:
            return
        with os.scandir(self._base) as entries:
            for entry in entries:
                if _LIKE_A_STEP.fullmatch(entry.name) and not _is_step(entry):
                    warnings.warn(
                        f"{_one_line(self._directory / entry.name)} is no checkpoint "
                        "and is ignored",
                        stacklevel=3,
                    )


class _Save(NamedTuple):
    """A save in progress; `needed` bounds its bytes on the disk."""

    step: int
    record: Record
    partial: pathlib.Path
    needed: int


def _is_on_host(state: state_lib.TrainState) -> bool:
    """Whether arrays of the host may be views, which a donation would overwrite."""
    devices = (x.devices() for x in jax.tree.leaves(state))
    return any(device.platform == "cpu" for group in devices for device in group)


@contextlib.contextmanager
def _not_damage(record: Record) -> Iterator[None]:
    """Turns any error into that of a process, if all files are known to be right."""
    try:
        yield
    except (errors.UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        if "files" not in record:
            raise
        reason = _reason(error)
        _release(error)
        raise errors.UserError(
            f"workdir: checkpoint {record['step']} is whole but cannot be read: "
            f"{reason}; mend that, and the same command resumes"
        ) from None


def _release(error: BaseException) -> None:
    """Frees the frames of a failed read or write.

    If one part fails, orbax never awaits the others, and Python warns about each of
    them when it is freed. Freeing them here silences those redundant warnings.
    """
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = error.__context__ = error.__cause__ = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited")
        gc.collect()


# --- Names and words.


def _is_step(entry: os.DirEntry[str]) -> bool:
    if not _STEP.fullmatch(entry.name) or int(entry.name) >= 2**31:  # 32 bits count
        return False
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _reason(error: BaseException) -> str:
    """One line; tensorstore hides the number of an error in its text."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip().split("\n")[0]
    if isinstance(error, records.DamagedError | errors.UserError):
        return text
    return f"{type(error).__name__}: {text}"


def _one_line(path: pathlib.Path) -> str:
    return str(path) if str(path).isprintable() else repr(str(path))
