import errno
import fcntl
import os
import subprocess
import sys

import pytest

from sct_jax import files


def test_text_replaces_the_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "config.json"
    files.replace_text(path, "old")
    files.replace_text(str(path), "naïve 漢字\n")
    assert path.read_bytes() == "naïve 漢字\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_text(tmp_path):
    path = tmp_path / "config.json"
    files.replace_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.replace_text(path, "half a pair \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_rename_leaves_no_partial_file(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        files.replace_text(tmp_path / "folder", "text")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_writers_at_once_use_different_partial_files(tmp_path):
    assert files.partial_path("a") != files.partial_path("a")
    assert files.partial_path(tmp_path / "a").startswith(f"{tmp_path}/a.partial-")


def test_a_missing_folder_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.replace_text(tmp_path / "nowhere" / "file", "text")
    with pytest.raises(FileNotFoundError), files.lock(tmp_path / "x" / "y", wait=True):
        pass


def test_a_lock_is_exclusive_and_ends_with_its_block(tmp_path):
    path = tmp_path / ".lock"
    path.write_text("kept")
    with files.lock(path, wait=False) as first, files.lock(path, wait=False) as second:
        assert (first, second) == ("held", "busy")
    with files.lock(path, wait=True) as third:
        assert third == "held"
    assert path.read_text() == "kept"


HOLDER = """
import sys
from sct_jax import files
with files.lock(sys.argv[1], wait=True) as state:
    print(state, flush=True)
    sys.stdin.readline()
"""


def test_a_lock_dies_with_its_process(tmp_path):
    path = tmp_path / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with files.lock(path, wait=False) as state:
            assert state == "busy"
        holder.kill()
    with files.lock(path, wait=True) as state:
        assert state == "held"


@pytest.mark.parametrize("wait", [False, True])
def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, wait):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with files.lock(tmp_path / ".lock", wait=wait) as state:
        assert state == "unsupported"


def test_an_error_in_the_block_passes_and_releases(tmp_path):
    with pytest.raises(OSError, match="inside"), files.lock(tmp_path / "a", wait=True):
        raise OSError("inside")
    with files.lock(tmp_path / "a", wait=False) as state:
        assert state == "held"


def test_a_folder_that_is_held_is_told_from_another(tmp_path):
    path = tmp_path / "[a]"
    path.mkdir()
    held = files.HeldFolder(path)
    (held.alias / "x").write_text("x")
    assert (path / "x").read_text() == "x"
    assert held.is_there()
    path.rename(tmp_path / "b")
    assert not held.is_there()
    path.mkdir()
    assert not held.is_there()
    assert [p.name for p in held.alias.iterdir()] == ["x"]
    path.rmdir()
    path.symlink_to(tmp_path / "b")
    assert held.is_there()
    held.close()
    assert not held.alias.exists()


def test_a_held_folder_must_be_one(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "nothing"):
        with pytest.raises(OSError):
            files.HeldFolder(tmp_path / name)


def test_whatever_it_is_can_be_removed(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "file").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").symlink_to("a")
    for name in ("link", "folder"):
        files.remove(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "file"}
    for name in ("a", "file"):
        files.remove(tmp_path / name)
        with pytest.raises(FileNotFoundError):
            files.remove(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_text_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        files,
        "sync",
        lambda fd: seen.append((os.fstat(fd).st_size, os.listdir(tmp_path))),
    )
    files.replace_text(tmp_path / "a", "text")
    ((size, (name,)),) = seen
    assert size == 4
    assert name.startswith("a.partial-")


def test_a_file_system_that_cannot_sync_is_no_error(tmp_path, monkeypatch):
    def refuse(code):
        def fail(_):
            raise OSError(code, "no")

        return fail

    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    files.replace_text(tmp_path / "a", "text")
    files.sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError):
        files.replace_text(tmp_path / "a", "other")
    assert (tmp_path / "a").read_text() == "text"
