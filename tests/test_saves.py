"""Saves that fail, are killed, or go to a folder that is no longer there."""

import contextlib
import errno
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings

import pytest
from test_checkpoint import assert_equal, draw_state, names, restore, save

from sct_jax import errors, files
from sct_jax.training import array_files, checkpoint, records


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of step 3; not to be changed."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(directory, 3)
    return directory


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run" / "checkpoints")
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def writer(folder):
    writer = checkpoint.Checkpointer(folder, keep=5)
    yield writer
    with contextlib.suppress(checkpoint.SaveError):
        writer.close()


def start(writer, step):
    writer.save(step, draw_state(step), record={})


def assert_one_line(error, folder, reason):
    """What happened, where, why; bytes needed and free."""
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(f"checkpoint 6 was not saved in {folder}: {reason} (")
    numbers = re.search(r"\(([\d,]+) bytes needed, ([\d,]+) free\)", text)
    needed, free = (int(number.replace(",", "")) for number in numbers.groups())
    assert needed > 1 << 20
    assert free > 0


def assert_intact(folder):
    """Step 3 is as it was, and step 6 can be saved once the cause is gone."""
    assert names(folder) == {"3"}
    assert_equal(restore(folder)[0], draw_state(3))
    save(folder, 6)
    assert_equal(restore(folder)[0], draw_state(6))


def test_a_full_disk_is_seen_before_a_byte_is_written(folder, writer, monkeypatch):
    sizes = {"f_bavail": 1, "f_frsize": 4096, "f_files": 0, "f_favail": 0}
    space = type("Space", (), sizes)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "statvfs", lambda path: space)
        with pytest.raises(checkpoint.SaveError) as error:
            start(writer, 6)
    assert_one_line(error, folder, "No space left on device")
    writer.close()
    assert_intact(folder)


def test_a_disk_without_room_for_more_files_is_seen_too(folder, writer, monkeypatch):
    sizes = {"f_bavail": 1 << 40, "f_frsize": 4096, "f_files": 1000, "f_favail": 3}
    space = type("Space", (), sizes)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "statvfs", lambda path: space)
        with pytest.raises(checkpoint.SaveError) as error:
            start(writer, 6)
    assert_one_line(error, folder, "no room for 100 files")
    writer.close()
    assert_intact(folder)


def fail_in_orbax(patch, error):
    """As if the disk filled up, or went away, while orbax writes."""
    write = array_files.write

    def fail(path, arrays):
        write(path, arrays)
        raise error

    patch.setattr(array_files, "write", fail)


def fail_at(patch, module, name, error):
    def fail(*_, **__):
        raise error

    patch.setattr(module, name, fail)


FULL = OSError(errno.ENOSPC, "No space left on device")
FAILURES = {
    "disk full": (
        lambda patch: fail_in_orbax(
            patch, ValueError("Failed to write: No space [os_error_code='28']")
        ),
        "No space left on device",
    ),
    "quota": (
        lambda patch: fail_in_orbax(patch, ValueError("x [os_error_code='122']")),
        "Disk quota exceeded",
    ),
    "read-only": (
        lambda patch: fail_in_orbax(patch, OSError(errno.EROFS, "Read-only")),
        "Read-only",
    ),
    "unknown": (
        lambda patch: fail_in_orbax(patch, KeyError("a\nb")),
        r"KeyError: 'a\nb'",
    ),
    "no manifest": (
        lambda patch: patch.setattr(
            "orbax.checkpoint.PyTreeCheckpointHandler.finalize", lambda *_: None
        ),
        "RuntimeError: orbax wrote no manifest",
    ),
    "cannot start": (
        lambda patch: fail_at(patch, array_files, "write", FULL),
        "No space left on device",
    ),
    "cannot make a folder": (
        lambda patch: fail_at(
            patch, pathlib.Path, "mkdir", OSError(errno.EACCES, "Permission denied")
        ),
        "Permission denied",
    ),
    "full before the record": (
        lambda patch: fail_at(patch, files, "replace_text", FULL),
        "No space left on device",
    ),
    "full when synced": (
        lambda patch: fail_at(patch, files, "sync", FULL),
        "No space left on device",
    ),
    "rename": (
        lambda patch: fail_at(
            patch, pathlib.Path, "rename", OSError(errno.EPERM, "Not permitted")
        ),
        "Not permitted",
    ),
}


@pytest.mark.parametrize(("fail", "reason"), FAILURES.values(), ids=FAILURES)
def test_a_failed_save_is_one_line_and_leaves_nothing(
    folder, writer, monkeypatch, capfd, fail, reason
):
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(checkpoint.SaveError) as error:
            start(writer, 6)
            writer.wait()
    assert_one_line(error, folder, reason)
    # It is told once, and a run that can may go on.
    writer.wait()
    start(writer, 6)
    writer.close()
    assert names(folder) == {"3", "6"}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("told", ["poll", "wait", "close", "save"])
def test_a_failed_save_is_told_at_the_next_occasion(writer, monkeypatch, told):
    with monkeypatch.context() as patch:
        fail_in_orbax(patch, FULL)
        start(writer, 6)
        writer._thread.join()
    ask = {"save": lambda: start(writer, 9)}.get(told) or getattr(writer, told)
    with pytest.raises(checkpoint.SaveError, match=r"^checkpoint 6 was not saved"):
        ask()
    writer.poll()
    writer.close()


def test_writes_that_outlive_a_failed_save_come_to_nothing(folder, writer, monkeypatch):
    """Orbax raises the first error, and makes folders for what is still on its way."""
    partial = []

    def fail(path, arrays):
        partial.append(path)
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(array_files, "write", fail)
        start(writer, 6)
        writer._thread.join()
    with pytest.raises(OSError):
        (partial[0] / "d").mkdir(parents=True)
    with pytest.raises(checkpoint.SaveError):
        writer.close()
    assert names(folder) == {"3"}


def test_a_save_that_goes_well_is_no_occasion(writer):
    start(writer, 6)
    writer.poll()
    writer.wait()
    writer.poll()
    writer.close()
    assert threading.active_count() < 50


def test_old_checkpoints_that_stay_are_told_and_harmless(folder, monkeypatch):
    with contextlib.closing(checkpoint.Checkpointer(folder, keep=1)) as writer:
        with monkeypatch.context() as patch:
            fail_at(patch, files, "remove", OSError(errno.EACCES, "Permission denied"))
            start(writer, 6)
            with pytest.warns(UserWarning, match="cannot be removed: Permission"):
                writer.wait()
    assert_equal(restore(folder)[0], draw_state(6))


# --- The folder goes away.


def remove(folder):
    shutil.rmtree(folder.parent)


def rename(folder):
    folder.parent.rename(folder.parent.with_name("renamed"))


def replace(folder):
    rename(folder)
    folder.mkdir(parents=True)


def replace_checkpoints(folder):
    folder.rename(folder.with_name("other"))
    folder.mkdir()


def link_elsewhere(folder):
    replace(folder)
    folder.rmdir()
    folder.symlink_to("/tmp")


@pytest.mark.parametrize(
    "move", [remove, rename, replace, replace_checkpoints, link_elsewhere]
)
@pytest.mark.parametrize("when", ["before a save", "in a save", "at the end"])
def test_a_folder_that_is_no_longer_there_is_an_error(
    folder, writer, monkeypatch, move, when
):
    if when == "in a save":
        write = array_files.write
        monkeypatch.setattr(
            array_files, "write", lambda *args: (write(*args), move(folder))
        )
    else:
        start(writer, 6)
        writer.wait()
        move(folder)
    with pytest.raises(checkpoint.SaveError, match="was removed, renamed or replaced"):
        if when != "at the end":
            start(writer, 9)
        writer.wait()
    with contextlib.suppress(checkpoint.SaveError):
        writer.close()
    # Nothing went to a folder of the same name, and no half a save stays behind.
    if move in (replace, replace_checkpoints):
        assert not names(folder)
    if move in (remove, rename):
        assert not folder.exists()
    for left in folder.parent.parent.rglob("*"):
        assert ".partial" not in left.name
        assert left.name != "9"


# --- Names of folders.

NAMES = {
    "every character": " a[b]*?\\ \n#%41%2F&=;:'\"`$(x){a,b}~ ü漢字"
    + os.fsdecode(b"\xff"),
    "like an address": "gs:/bucket//x",
    "like a flag": "-rf",
    "long": "/".join(["x" * 250] * 14),
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_folder_of_any_name_works(tmp_path, name):
    folder = tmp_path / name / "checkpoints"
    folder.parent.mkdir(parents=True)
    save(folder, 3, 6, keep=1)
    assert names(folder) == {"6"}
    assert_equal(restore(folder)[0], draw_state(6))


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(
        checkpoint.Checkpointer(pathlib.Path("checkpoints"), keep=1)
    ) as writer:
        (tmp_path / "other").mkdir()
        monkeypatch.chdir(tmp_path / "other")
        start(writer, 6)
    assert names(tmp_path / "checkpoints") == {"6"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text("x"),
        lambda path: path.symlink_to("nowhere/at/all"),
        lambda path: path.symlink_to(path.name),
    ],
    ids=["file", "link to nothing", "link to itself"],
)
def test_what_cannot_be_a_folder_of_checkpoints_is_refused(tmp_path, spoil):
    spoil(tmp_path / "checkpoints")
    with pytest.raises(errors.UserError, match=r"^workdir: cannot write to "):
        checkpoint.Checkpointer(tmp_path / "checkpoints", keep=1)


def test_a_folder_is_not_made_where_its_run_is_gone(tmp_path):
    with pytest.raises(errors.UserError, match=r"^workdir: cannot write to "):
        checkpoint.Checkpointer(tmp_path / "run" / "checkpoints", keep=1)
    assert not list(tmp_path.iterdir())


def test_a_system_without_proc_refuses_patterns(tmp_path, monkeypatch):
    """There, orbax would be given the name itself."""
    init = files.HeldFolder.__init__

    def without_alias(self, path):
        init(self, path)
        self.alias = self.path

    monkeypatch.setattr(files.HeldFolder, "__init__", without_alias)
    for name in ("[b]", "a*", "a\\b"):
        with pytest.raises(errors.UserError, match="has a meaning in patterns"):
            checkpoint.Checkpointer(tmp_path / name, keep=1)
    save(tmp_path / "plain", 3)
    assert_equal(restore(tmp_path / "plain")[0], draw_state(3))


# --- Processes that end in the middle.

KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, "tests")
import shutil
from test_checkpoint import draw_state, save
from sct_jax import files
from sct_jax.training import array_files, checkpoint, records

where, directory = sys.argv[1], pathlib.Path(sys.argv[2])
save(directory, 3)

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def kill_after(module, name):
    original = getattr(module, name)
    setattr(module, name, lambda *a, **k: (original(*a, **k), kill()))

if where == "arrays":
    array_files.write = kill
elif where == "record":
    records.write = kill
elif where == "rename":
    kill_after(records, "write")
elif where == "prune":
    files.remove = kill
save(directory, 6, keep=1)
"""


def run(program, *arguments):
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=pathlib.Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "where",
    [
        "rename",
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ("arrays", "record", "prune")
        ),
    ],
)
def test_a_process_killed_in_a_save_leaves_whole_checkpoints(tmp_path, where):
    directory = tmp_path / "checkpoints"
    done = run(KILLED, where, directory)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any(name.startswith(".partial-") for name in names(directory))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        state, record = restore(directory)
    assert record["step"] == (6 if where == "prune" else 3)
    assert_equal(state, draw_state(record["step"]))
    assert names(directory) == {str(record["step"])}


FULL_DISK = """
import pathlib, sys
sys.path.insert(0, "tests")
import jax, jax.numpy as jnp, numpy as np
from test_checkpoint import draw_state, save
from sct_jax.training import checkpoint

directory = pathlib.Path(sys.argv[1])
save(directory, 3)
checkpoint.Checkpointer._check_space = lambda self, needed: None  # it can be wrong
writer = checkpoint.Checkpointer(directory, keep=5)
state = draw_state(6)
rng = np.random.default_rng(0)
large = {f"norm_{i}": jnp.asarray(rng.normal(size=10_000)) for i in range(1500)}
writer.save(6, state.replace(params=state.params | large), record={})
try:
    writer.wait()
except checkpoint.SaveError as error:
    print(error)
writer.close()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.parametrize("size", [4, 18, 36])
def test_a_disk_that_fills_up_is_one_line(tmp_path, size):
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", tmp_path]
    )
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        done = run(FULL_DISK, tmp_path / "checkpoints")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        (line,) = done.stdout.splitlines()
        assert "checkpoint 6 was not saved" in line
        assert "No space left on device" in line
        assert names(tmp_path / "checkpoints") == {"3"}
        assert_equal(restore(tmp_path / "checkpoints")[0], draw_state(3))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_records_are_synced_before_the_rename(folder, writer, monkeypatch):
    """A crash of the machine must not leave a name without its content."""
    events = []
    sync, rename = files.sync, pathlib.Path.rename
    monkeypatch.setattr(
        files,
        "sync",
        lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)),
    )
    monkeypatch.setattr(
        pathlib.Path,
        "rename",
        lambda self, to: (events.append("rename"), rename(self, to)),
    )
    start(writer, 6)
    writer.close()
    before, after = events[: events.index("rename")], events[events.index("rename") :]
    synced = {pathlib.Path(name).name.partition(".partial")[0] for name in before}
    assert {path.name for path in (folder / "6").rglob("*")} <= synced
    assert after == ["rename", str(folder)]
    # What one process writes, the version before several of them can read.
    assert records.read(folder / "6", 6)["format"] == 2
