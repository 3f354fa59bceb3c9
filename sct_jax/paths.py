"""Paths as people write them."""

import os

from sct_jax import errors


def expand(field: str, path: str | os.PathLike[str]) -> str:
    """Returns the path with `~` or `~name` replaced by that home folder.

    Raises:
      UserError: naming the field, where no such home folder is known. A folder called
        "~" is not what anyone means.
    """
    written = os.fspath(path)
    own = written.split(os.sep)[0] == "~"
    # Without a name, an empty HOME would make it the root folder.
    unset = own and os.environ.get("HOME") == ""
    expanded = written if unset else os.path.expanduser(written)
    errors.check(
        field,
        not written.startswith("~") or expanded != written or os.path.exists(written),
        f"{written!r}: no home folder is known for it; write the whole path, or "
        f"'./{written}'",
    )
    return expanded


def user_cache(field: str = "XDG_CACHE_HOME") -> str:
    """Returns the absolute path of our folder in the user's cache.

    That is `sct_jax` below XDG_CACHE_HOME, or below ~/.cache. The folder may not exist.

    Raises:
      UserError: see `expand`.
    """
    user = expand(field, os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return os.path.join(os.path.abspath(user), "sct_jax")
