"""Compiled programs that later processes reuse."""

import contextlib
import glob
import os
import pathlib
import re
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from sct_jax import errors, paths

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
# Keep a program that takes this many seconds to compile. JAX's default is 1.0, which
# skips most programs of a small model, and these add up.
_WORTH_KEEPING = 0.1
_DAYS_KEPT = 30
# JAX warns of an entry and goes on. It never replaces the entry.
_WARNING = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '(\S+)': (.*)",
    re.DOTALL,
)


@contextlib.contextmanager
def cached(say: Callable[[str], None]) -> Iterator[None]:
    """Keeps compiled programs in the user's cache folder, and reuses them.

    Applies within the block, to the whole process. Programs unused for 30 days are
    removed, damaged ones replaced. A folder that cannot be used costs a note, not the
    run. Settings of JAX win: nothing happens where JAX_COMPILATION_CACHE_DIR is set,
    even to nothing, or JAX_ENABLE_COMPILATION_CACHE is false.

    Args:
      say: receives notes.
    """
    if not _is_ours():
        yield
        return
    try:
        folder = pathlib.Path(paths.user_cache(), "compiled")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _probe(folder)
    except (OSError, errors.UserError) as error:
        say(
            f"note: compiled programs are not kept: {error}; set XDG_CACHE_HOME or "
            f"{_VARIABLE} to a folder that can be written"
        )
        yield
        return
    _remove_unused(folder)
    with _settings(folder), _repaired(folder, say):
        yield


def _is_ours() -> bool:
    values = jax.config.values
    return (
        _VARIABLE not in os.environ
        and values["jax_compilation_cache_dir"] is None
        and values["jax_enable_compilation_cache"]
    )


def _probe(folder: pathlib.Path) -> None:
    """Raises OSError where no file can be made in the folder."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        probe.write_bytes(b"x")
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _remove_unused(folder: pathlib.Path) -> None:
    oldest = time.time() - _DAYS_KEPT * 24 * 3600
    for entry in folder.glob("*-cache"):
        with contextlib.suppress(OSError):  # another process may remove it
            found = entry.stat()
            if max(found.st_atime, found.st_mtime) < oldest:
                entry.unlink()


@contextlib.contextmanager
def _settings(folder: pathlib.Path) -> Iterator[None]:
    wanted: dict[str, Any] = {"jax_compilation_cache_dir": str(folder)}
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        wanted["jax_persistent_cache_min_compile_time_secs"] = _WORTH_KEEPING
    before = {name: jax.config.values[name] for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # JAX holds on to the folder that it opened


@contextlib.contextmanager
def _repaired(folder: pathlib.Path, say: Callable[[str], None]) -> Iterator[None]:
    """Removes entries that JAX cannot read or write.

    Says so once for each program that cannot be read, and once for all writes.
    """
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        found = _WARNING.fullmatch(str(message))
        if found is None:
            shown(message, category, *where)
            return
        action, name, reason = found.groups()
        for entry in folder.glob(f"{glob.escape(name)}-*-cache"):
            with contextlib.suppress(OSError):  # JAX compiles in any case
                entry.unlink()
        about = name if action == "reading" else ""
        if about in said:
            return
        said.add(about)
        if about:
            say(f"note: {name} in {folder} cannot be read ({reason}); it is compiled")
        else:
            say(f"note: compiled programs are not kept in {folder}: {reason}")

    with warnings.catch_warnings():
        warnings.filterwarnings("always", _WARNING.pattern, UserWarning)
        shown, warnings.showwarning = warnings.showwarning, show
        yield
