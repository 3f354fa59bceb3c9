"""The cache of compiled programs that the command line keeps."""

import os
import pathlib
import shutil
import stat
import subprocess
import sys
import time
import warnings
import zlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from sct_jax.training import cli, compilation, loop

CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "smollm_r128.py"


@pytest.fixture
def user_cache(monkeypatch, tmp_path):
    """A user's cache folder, and a JAX that has no cache of its own."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield tmp_path / "user" / "sct_jax" / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_program(length=1):
    """A program compiled in memory anew; its result."""

    def twice_and_one(x):
        return 2 * x + 1

    jax.clear_caches()
    return float(jax.jit(twice_and_one)(jnp.full(length, 3.0))[0])


def entries(folder):
    return sorted(folder.glob("jit_twice_and_one-*-cache"))


def test_programs_are_kept_within_the_block_alone(user_cache):
    said = []
    with compilation.cached(said.append):
        assert compile_program() == 7
    (entry,) = entries(user_cache)
    assert jax.config.values["jax_compilation_cache_dir"] is None
    entry.unlink()
    assert compile_program() == 7
    assert entries(user_cache) == [] and said == []


def test_the_folder_is_the_users_own(user_cache):
    with compilation.cached(print):
        assert jax.config.values["jax_compilation_cache_dir"] == str(user_cache)
    assert stat.S_IMODE(user_cache.stat().st_mode) == 0o700  # its files are code
    assert list(user_cache.iterdir()) == []


def test_a_kept_program_is_not_compiled_again(user_cache):
    hits = []
    listen = lambda event, **_: hits.append(event)
    with compilation.cached(print):
        compile_program()
        jax.monitoring.register_event_listener(listen)
        try:
            assert compile_program() == 7
        finally:
            jax.monitoring.unregister_event_listener(listen)
    assert "/jax/compilation_cache/cache_hits" in hits


@pytest.mark.parametrize("value", ["", "elsewhere"])
def test_a_folder_set_for_jax_wins(user_cache, monkeypatch, value):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", value)
    with compilation.cached(print):
        assert jax.config.values["jax_compilation_cache_dir"] is None
    assert not user_cache.exists()


def test_a_cache_that_jax_has_is_left_alone(user_cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    with compilation.cached(print):
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "own")
    assert not user_cache.exists()


def test_a_cache_turned_off_stays_off(user_cache):
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with compilation.cached(print):
            compile_program()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert not user_cache.exists()


@pytest.mark.parametrize("variable", ["0.5", None])
def test_the_least_time_of_jax_wins(user_cache, monkeypatch, variable):
    name = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    jax.config.update(name.lower(), 0.5)
    if variable is None:
        monkeypatch.delenv(name)
    with compilation.cached(print):
        found = jax.config.values[name.lower()]
    assert found == (0.5 if variable else 0.1)
    assert jax.config.values[name.lower()] == 0.5


def test_a_folder_in_the_way_costs_one_note(user_cache):
    user_cache.parent.mkdir(parents=True)
    user_cache.write_text("a file")
    said = []
    with compilation.cached(said.append):
        assert compile_program() == 7
    (note,) = said
    assert note.startswith("note: ") and str(user_cache) in note
    assert "JAX_COMPILATION_CACHE_DIR" in note


def test_no_home_folder_costs_one_note(user_cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name/x")
    said = []
    with compilation.cached(said.append):
        assert compile_program() == 7
    (note,) = said
    assert "XDG_CACHE_HOME" in note and "home" in note


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: b"",
        lambda whole: whole[:100] + bytes([whole[100] ^ 1]) + whole[101:],
        lambda whole: zlib.compress(b"\0\0\0\0 not a program"),
    ],
    ids=["half", "empty", "one bit", "another content"],
)
def test_a_damaged_program_is_compiled_again_and_replaced(user_cache, damage):
    with compilation.cached(print):
        compile_program()
    (entry,) = entries(user_cache)
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    said = []
    with compilation.cached(said.append):
        assert compile_program() == 7
    (note,) = said
    assert note.startswith("note: ") and "jit_twice_and_one" in note
    with compilation.cached(said.append):
        assert compile_program() == 7
    assert len(said) == 1  # the entry is whole again


def test_a_folder_that_goes_during_a_run_costs_one_note(user_cache):
    said = []
    with compilation.cached(said.append):
        assert compile_program(1) == 7
        shutil.rmtree(user_cache)
        assert compile_program(2) == 7
        assert compile_program(3) == 7
    (note,) = said
    assert note.startswith("note: compiled programs are not kept in ")
    assert str(user_cache) in note


def test_other_warnings_pass(user_cache):
    with pytest.warns(UserWarning, match="something else"), compilation.cached(print):
        warnings.warn("something else", stacklevel=1)


def test_programs_long_unused_are_removed(user_cache):
    user_cache.mkdir(parents=True)
    now, day = time.time(), 24 * 3600
    for name, days in (("jit_old-1-cache", 31), ("jit_new-1-cache", 29), ("other", 99)):
        (user_cache / name).touch()
        os.utime(user_cache / name, (now - days * day, now - 99 * day))
    with compilation.cached(print):
        pass
    assert {path.name for path in user_cache.iterdir()} == {"jit_new-1-cache", "other"}


def test_the_command_line_keeps_programs(user_cache, monkeypatch, tmp_path):
    seen = []

    def train(*arguments, **options):
        seen.append(jax.config.values["jax_compilation_cache_dir"])
        return loop.Result("finished")

    monkeypatch.setattr(loop, "train", train)
    assert cli.main([f"--config={CONFIG}:tiny", f"--workdir={tmp_path / 'run'}"]) == 0
    assert seen == [str(user_cache)]


def test_imports_change_no_setting_of_jax():
    program = (
        "import jax; before = dict(jax.config.values)\n"
        "import sct_jax.training.cli\n"
        "assert before == dict(jax.config.values)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=CONFIG.parents[1])
