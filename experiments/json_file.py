"""The flag --json, with which a program also writes its figures to a file."""

import argparse
import errno
import json
import os
import pathlib
from typing import Any

from sct_jax import errors, files, paths


def add_flag(
    parser: argparse.ArgumentParser,
    description: str = "also write the figures to this file",
) -> None:
    """Adds --json, a path that can be written, or None if it is not given.

    The file is tried when the flags are parsed, before any work. A bad one ends the
    program with code 2.

    Args:
      parser: of the program.
      description: shown by --help.
    """
    parser.add_argument("--json", metavar="FILE", type=_path, help=description)


def write(path: pathlib.Path, values: Any) -> None:
    """Writes values as JSON; the file appears whole or not at all.

    Raises:
      UserError: it can no longer be written.
    """
    try:
        files.replace_text(path, json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise errors.UserError(
            f"--json: cannot write {path}: {error.strerror}; name another file"
        ) from error


def _path(given: str) -> pathlib.Path:
    """The file that a flag names. Leaves its content, and creates nothing."""
    try:
        # Of a link, the target is replaced.
        path = pathlib.Path(os.path.realpath(paths.expand("--json", given)))
        _check_writable(path)
    except errors.UserError as error:  # argparse names the flag too
        raise argparse.ArgumentTypeError(str(error).removeprefix("--json: ")) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(
            f"cannot write {given!r}: {reason}; name another file"
        ) from error
    return path


def _check_writable(path: pathlib.Path) -> None:
    """Raises OSError where `write` would."""
    if not path.parent.is_dir():
        raise OSError(errno.ENOTDIR, f"{path.parent} is not a folder")
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file")
    partial = pathlib.Path(files.partial_path(path))
    partial.touch(exist_ok=False)
    partial.unlink()
