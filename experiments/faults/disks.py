"""Disks that are full, read-only or out of names; workdirs that go away or are odd."""

import contextlib
import os
import pathlib
import resource
import shutil
import subprocess
from collections.abc import Iterator

from experiments.faults import cases, runs, workspace
from sct_jax.training import exit_codes

_ExitCode = exit_codes.ExitCode
_LONG, _ENDLESS = workspace.LONG, workspace.ENDLESS
_NEEDS_MOUNT = "the right to mount a file system (root)"


@contextlib.contextmanager
def mounted(folder: pathlib.Path, options: str) -> Iterator[bool]:
    """Mounts a file system of its own at a folder; yields whether that is allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        allowed = _succeeds(*mount)
        yield allowed
    finally:
        while _succeeds("umount", str(folder)):
            pass


def _succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def _fill(folder: pathlib.Path, *, leave: int) -> pathlib.Path:
    """Writes a file that leaves so many bytes free; returns it."""
    filler = folder / "filler"
    space = os.statvfs(folder)
    size = max(space.f_bavail * space.f_frsize - leave, 0)
    with contextlib.suppress(OSError), open(filler, "ab", buffering=0) as file:
        while size > 0:
            size -= file.write(bytes(min(size, 1 << 20)))
    return filler


def _save_failed(seen: cases.Seen, ended: runs.Ended, folder: pathlib.Path) -> None:
    seen.refused(ended, str(folder), "bytes needed", "free", code=_ExitCode.SAVE_FAILED)


def _intact(seen: cases.Seen, folder: pathlib.Path) -> None:
    """Notes whether the newest checkpoint is whole and no half a save is left."""
    try:
        saved = workspace.final_state(folder).step
    except Exception as error:
        seen.that(False, "the previous checkpoint is intact", error)
    else:
        seen.that(saved, "the previous checkpoint is intact")
    seen.that(not workspace.half_saves(folder), "no half a save is left")


def _full_in_a_save(context: cases.Context) -> cases.Outcome:
    """Fills the disk before a save, and in one, with several amounts left free."""
    seen, done = cases.Seen(), []
    for when, leave in (
        ("before a save", 0),
        ("before a save", 300_000),
        ("while a save writes", 0),
    ):
        disk = context.folder / f"disk-{len(done)}"
        folder = disk / "run"
        with mounted(disk, "size=36m") as allowed:
            if not allowed:
                return cases.skip(_NEEDS_MOUNT)
            # Rows would fill the last page first.
            changes = {**_ENDLESS, "log_every": 1_000_000}
            with context.space.start(folder, changes) as process:
                process.until(
                    lambda folder=folder: len(workspace.saved_steps(folder)) >= 2
                )
                if when != "before a save":
                    process.until(lambda folder=folder: workspace.half_saves(folder))
                _fill(disk, leave=leave)
                cases.injected(process.is_running(), "the run was over")
                ended = process.wait(limit=60)
            _save_failed(seen, ended, folder)
            _intact(seen, folder)
        done.append(f"{when}, {leave:,} bytes left")
    return seen.outcome(f"the disk filled up {'; '.join(done)}")


def _full_then_free(context: cases.Context) -> cases.Outcome:
    """A full disk midway, a read-only one at the start; both are mended afterwards."""
    seen, disk = cases.Seen(), context.folder / "disk"
    folder = disk / "run"
    with mounted(disk, "size=64m") as allowed:
        if not allowed:
            return cases.skip(_NEEDS_MOUNT)
        with context.space.start(folder, _LONG) as process:
            process.until(lambda: len(workspace.saved_steps(folder)) >= 2)
            filler = _fill(disk, leave=200_000)
            cases.injected(process.is_running(), "the run was over")
            ended = process.wait(limit=120)
        cases.injected(workspace.last_step(folder) < 400, "the run was over")
        seen.refused(ended, str(folder), code=_ExitCode.SAVE_FAILED)
        _intact(seen, folder)
        filler.unlink()
        cases.injected(
            _succeeds("mount", "-o", "remount,ro", str(disk)), "not read-only"
        )
        ended = context.space.train(folder, _LONG)
        seen.refused(ended, str(folder), "Read-only file system")
        _intact(seen, folder)
        cases.injected(
            _succeeds("mount", "-o", "remount,rw", str(disk)), "still read-only"
        )
        saved = workspace.saved_steps(folder)
        ended = context.space.train(folder, _LONG)
        seen.finished(ended)
        seen.resumed(ended, saved)
        seen.same_end(folder, context.space.clean(_LONG))
    return seen.outcome(
        "the disk filled up in a run; then it was read-only; then neither, and the "
        "same command"
    )


def _cannot_be_created(context: cases.Context) -> cases.Outcome:
    seen, done = cases.Seen(), []
    deep = context.folder
    while len(os.fsencode(deep)) < 4067 - 201:
        deep /= "x" * 200
    deep /= "y" * (4067 - len(os.fsencode(deep)) - 1)
    cases.injected(len(os.fsencode(deep)) == 4067, "the path has another length")
    ended = context.space.train(deep, limit=100)
    seen.refused(ended, "workdir")
    done.append("a path of 4,067 characters")
    for number in (2, 4, 7, 10):
        disk = context.folder / f"disk-{number}"
        with mounted(disk, f"size=64m,nr_inodes={number}") as allowed:
            if not allowed:
                break
            ended = context.space.train(disk / "run", limit=100)
            _one_error(seen, ended)
        done.append(f"a disk with room for {number} names")
    fixed = context.folder / "fixed"
    fixed.mkdir()
    if _succeeds("chattr", "+i", str(fixed)):
        try:
            ended = context.space.train(fixed, limit=100)
            seen.refused(ended, str(fixed))
        finally:
            _succeeds("chattr", "-i", str(fixed))
        done.append("a folder that may not change")
    return seen.outcome(", ".join(done))


def _one_error(seen: cases.Seen, ended: runs.Ended) -> None:
    """Notes one error, for bad input or a failed save; there may be warnings too."""
    codes = (_ExitCode.BAD_INPUT, _ExitCode.SAVE_FAILED)
    seen.all_of(
        "exit code 2 or 4, one error",
        (ended.code in codes, "exit code 2 or 4", f"it is {ended.code}"),
        (len(ended.errors) == 1, "one error", ended.err[-300:]),
        ("Traceback" not in ended.text, "no traceback", ended.err[-300:]),
    )


def _gone_midway(context: cases.Context) -> cases.Outcome:
    seen, space, done = cases.Seen(), context.space, list[str]()
    for what in ("renamed", "removed"):
        folder = context.folder / f"run-{len(done)}"
        moved = folder.with_name("away")
        done.append(what)
        with space.start(folder, _ENDLESS) as process:
            process.until(lambda folder=folder: len(workspace.saved_steps(folder)) >= 2)
            cases.injected(process.is_running(), "the run was over")
            folder.rename(moved)
            if what == "removed":
                while moved.exists():  # the run may add files meanwhile
                    shutil.rmtree(moved, ignore_errors=True)
            ended = process.wait(limit=60)
        words = (str(folder), "was removed, renamed or replaced")
        seen.refused(ended, *words, code=_ExitCode.SAVE_FAILED)
        seen.that(not folder.exists(), "no second folder of checkpoints")
        if what == "renamed":
            _intact(seen, moved)
            shutil.rmtree(moved)
    return seen.outcome("the workdir renamed, and removed, in the middle of a run")


def _odd_names(context: cases.Context) -> cases.Outcome:
    seen, space = cases.Seen(), context.space
    names = ("a[b]", "back\\slash", "a*?", "two\nlines")
    for name in names:
        folder = context.folder / name
        seen.finished(runs.call(*space.flags(folder)))
        seen.same_end(folder, space.clean())
        shutil.rmtree(folder / "checkpoints" / str(workspace.NUM_STEPS))
        again = runs.call(*space.flags(folder))
        seen.finished(again)
        seen.that("resumed at step 30" in again.out, "it resumes", again.text[-300:])
        seen.same_end(folder, space.clean())
    return seen.outcome(
        "a run in each of " + ", ".join(map(repr, names)) + ", resumed there"
    )


def _killed_with_memory(context: cases.Context) -> cases.Outcome:
    seen = cases.Seen()
    command = [
        *context.space.command(context.folder / "run", {"model.d_model": "1e9"}),
        "--dry-run",
    ]
    with runs.Process(
        command,
        folder=context.folder,
        environment=context.space.environment(),
        before=_limit_memory,
    ) as process:
        ended = process.wait(limit=60)
    seen.refused(ended, "model.d_model")
    seen.that(ended.megabytes < 2000, "below 2 GB", f"{ended.megabytes:,} MB")
    return seen.outcome("--config.model.d_model=1e9 in a dry run")


def _limit_memory() -> None:
    limit = 24 << 30  # of addresses: a failure must not take the machine with it
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


CASES = (
    cases.Case(
        7,
        "a full disk and a read-only one",
        "an error naming the path, the previous checkpoint intact, non-zero exit",
        _full_then_free,
    ),
    cases.Case(
        39,
        "a workdir path with brackets, a backslash or other odd characters",
        "it works, and resumes",
        _odd_names,
        group="checkpoints",
    ),
    cases.Case(
        40,
        "a checkpoint folder that cannot be created",
        "one error, a documented exit code, no hang",
        _cannot_be_created,
    ),
    cases.Case(
        41,
        "a disk that is full in a save",
        "exit code 4, one line with path, bytes needed and bytes free",
        _full_in_a_save,
    ),
    cases.Case(
        49,
        "a model of width 1e9 in a dry run",
        "refused, without taking memory",
        _killed_with_memory,
        quick=True,
    ),
    cases.Case(
        50,
        "a workdir renamed or removed midway",
        "exit code 4 at the next save; no second folder",
        _gone_midway,
    ),
)
