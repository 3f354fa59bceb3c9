"""Checkpoints by their name on the Hugging Face hub, where a machine reaches it."""

import os
import pathlib
import re

from sct_jax import errors, paths

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ("*.json", "*.safetensors")
_SECONDS = 10


def local_folder(path: str | os.PathLike[str], *, flag: str) -> pathlib.Path:
    """Returns a folder as it is, and the one that a name of the hub is stored in.

    A folder comes first. Only JSON and safetensors are stored, in the cache of
    `huggingface_hub`; what is there already is not asked for again.

    Args:
      path: a folder, or "owner/name".
      flag: where it was given, for messages.

    Raises:
      UserError: it is neither a folder nor a name that can be reached.
    """
    folder = pathlib.Path(paths.expand(flag, path))
    if folder.is_dir():
        return folder
    name = os.fspath(path)
    errors.check(
        flag,
        bool(_NAME.fullmatch(name)),
        f"{folder} is not a folder; give the folder of a checkpoint, or its name on "
        "the Hugging Face hub, such as HuggingFaceTB/SmolLM2-135M",
    )
    import huggingface_hub  # slow to load, and needed for names alone

    try:
        stored = huggingface_hub.snapshot_download(
            name, allow_patterns=list(_FILES), etag_timeout=_SECONDS
        )
    except Exception as error:  # of the network, of the hub, of the disk
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise errors.UserError(
            f"{flag}: {name!r} is not a folder, and cannot be had from the Hugging "
            f"Face hub ({reason}); give the folder of a checkpoint"
        ) from error
    return pathlib.Path(stored)
