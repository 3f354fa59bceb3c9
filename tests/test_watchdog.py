"""The watchdog in processes of their own, which load no array library."""

import subprocess
import sys
import threading
import time
import types

import pytest

from sct_jax.training import watchdog


def run(*lines):
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def watching(folder, *lines, timeout=0.2):
    return run(
        "import pathlib, threading, time",
        "from sct_jax.training import watchdog",
        "def step_that_hangs(): threading.Event().wait()",
        f"with watchdog.Watchdog({timeout}, pathlib.Path({str(folder)!r})) as watch:",
        *(f"  {line}" for line in lines),
    )


def test_a_step_that_hangs_ends_the_process_with_all_stacks(tmp_path):
    ended = watching(tmp_path, "watch.kick()", "step_that_hangs()")
    assert ended.returncode == 5
    (stacks,) = tmp_path.glob("stacks-*Z.txt")
    assert "step_that_hangs" in stacks.read_text()
    assert len(ended.stderr.splitlines()) == 1
    assert "stalled" in ended.stderr and str(stacks) in ended.stderr


def test_stacks_that_cannot_be_written_are_no_reason_to_stay(tmp_path):
    ended = watching(tmp_path / "gone", "watch.kick()", "step_that_hangs()")
    assert ended.returncode == 5
    assert "No such file" in ended.stderr


def test_a_native_call_that_keeps_the_lock_ends_too(tmp_path):
    # PyDLL calls a function without releasing the interpreter's lock.
    ended = watching(
        tmp_path,
        "import ctypes",
        "watch.kick()",
        "time.sleep(.5)",  # until the thread has seen the kick
        "ctypes.PyDLL(None).sleep(60)",
        timeout=1,
    )
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr and "<string>" in ended.stderr


def test_a_run_is_stalled_once_no_kick_comes(tmp_path, monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    fake = types.SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr(watchdog, "time", fake)
    watch = watchdog.Watchdog(10.0, tmp_path)
    clock.now += 1000  # compiles
    assert not watch.is_stalled()
    for _ in range(3):
        watch.kick()
        clock.now += 9
        assert not watch.is_stalled()
    clock.now += 1
    assert watch.is_stalled()


@pytest.mark.parametrize("timeout", [None, 1000.0])
def test_the_thread_ends_with_the_run(tmp_path, timeout):
    before = threading.active_count()
    with watchdog.Watchdog(timeout, tmp_path) as watch:
        watch.kick()
        assert threading.active_count() == before + (timeout is not None)
    while threading.active_count() > before:
        time.sleep(0.01)
    assert not list(tmp_path.iterdir())


def test_nothing_watches_after_the_end(tmp_path):
    """A thread could still arm the native timer."""
    before = set(threading.enumerate())
    with watchdog.Watchdog(0.008, tmp_path) as watch:
        (thread,) = set(threading.enumerate()) - before
        watch.pause()
    assert not thread.is_alive()


def test_a_pause_takes_any_time(tmp_path):
    ended = watching(
        tmp_path, "watch.kick()", "watch.pause()", "time.sleep(1)", "print('past')"
    )
    assert (ended.returncode, ended.stdout) == (0, "past\n")
