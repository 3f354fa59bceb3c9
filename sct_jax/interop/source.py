"""The folder of a Hugging Face checkpoint: config.json, and tensors in safetensors."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (numpy then knows bfloat16)
import numpy as np
import safetensors
from jaxtyping import Float

from sct_jax import errors, files, model
from sct_jax.interop import config_json, hub, names

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"

_DTYPES = ("BF16", "F16", "F32", "F64")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SHOWN = 5
_MAX_JSON_BYTES = 1 << 28


class Source(NamedTuple):
    """A checkpoint whose tensors are all there, with the shapes of the model.

    Attributes:
      folder: with the files.
      config: the dense model.
      max_length: longest context, in tokens.
      places: name of a tensor -> its file.
      flag: where the folder was given, for messages.
    """

    folder: pathlib.Path
    config: model.ModelConfig
    max_length: int
    places: Mapping[str, pathlib.Path]
    flag: str = "--from"

    def read(self, tensor: names.Tensor) -> Float[np.ndarray, "..."]:
        """Returns a tensor in float32; matrices are (fan_in, fan_out).

        Raises:
          UserError: its file cannot be read, or it holds NaN or infinity.
        """
        raw = _read(self.places[tensor.name], tensor.name)
        if tensor.is_matrix and tensor.key != "embedding":
            raw = raw.T
        with np.errstate(over="ignore"):  # of float64: refused below
            array = raw.astype(np.float32, order="C")
        errors.check(
            f"{self.places[tensor.name]}: {tensor.name}",
            bool(np.isfinite(array).all()),
            "holds NaN or infinity; download it again, or take another checkpoint",
        )
        return array


def open_folder(path: str | os.PathLike[str], *, flag: str = "--from") -> Source:
    """Returns the checkpoint in a folder; reads no tensor yet.

    Args:
      path: the folder, or a name of the hub, see `hub.local_folder`.
      flag: where it was given, for messages.

    Raises:
      UserError: naming file, tensor or field, where something is missing or damaged,
        and for a model that is not computed here.
    """
    folder = hub.local_folder(path, flag=flag)
    file = folder / config_json.CONFIG
    errors.check(
        flag,
        os.path.lexists(file),
        f"{folder} has no {file.name}, so it holds no checkpoint of Hugging Face",
    )
    values = _read_json(file)
    config = config_json.from_config_json(values, str(file))
    max_length = config_json.max_length(values, str(file))
    source = Source(folder, config, max_length, _locate(folder, flag), flag)
    _check_tensors(source)
    return source


# --- Files.


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        with files.open_regular(file) as opened:
            size = os.fstat(opened.fileno()).st_size
            errors.check(
                str(file),
                size <= _MAX_JSON_BYTES,
                f"has {size:,} bytes, too many for a description of a model (at most "
                f"{_MAX_JSON_BYTES:,})",
            )
            values = json.loads(opened.read().decode())
    except errors.UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise errors.UserError(f"{file}: cannot be read: {error}") from error
    errors.check(str(file), isinstance(values, dict), "is not a JSON object")
    return values


def _locate(folder: pathlib.Path, flag: str) -> dict[str, pathlib.Path]:
    """The file of every tensor; as in transformers, a single file comes first."""
    if (folder / SINGLE).exists():
        return dict.fromkeys(_names_in(folder / SINGLE), folder / SINGLE)
    if not (folder / INDEX).exists():
        raise _no_tensors(folder, flag)
    index = folder / INDEX
    shards = _read_json(index).get("weight_map")
    errors.check(
        f"{index}: weight_map",
        isinstance(shards, dict)
        and bool(shards)
        and all(map(_is_file_name, shards.values())),
        "is not a map from tensors to files of this folder",
    )
    assert isinstance(shards, dict)
    places: dict[str, pathlib.Path] = {}
    for shard in sorted(set(shards.values())):
        for name in _names_in(folder / shard):
            errors.check(
                str(index),
                shards.get(name) == shard,
                f"says that {name} is in {shards.get(name)}, but {shard} holds it too",
            )
            places[name] = folder / shard
    for name, shard in shards.items():
        errors.check(str(folder / shard), name in places, f"lacks {name}, see {INDEX}")
    return places


def _is_file_name(x: Any) -> bool:
    plain = isinstance(x, str) and x.isprintable() and os.path.basename(x) == x
    return plain and x not in ("", ".", "..")


def _no_tensors(folder: pathlib.Path, flag: str) -> errors.UserError:
    found = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in found if name.endswith(_PICKLES)]
    if pickles:
        return errors.UserError(
            f"{flag}: {folder} has {pickles[0]}, a pickle, and no {SINGLE}; a pickle "
            "runs code of its author when it is opened, so it is not read: save the "
            "model again with safetensors"
        )
    message = f"{flag}: {folder} has neither {SINGLE} nor {INDEX}"
    if others := [name for name in found if name.endswith(".safetensors")]:
        message += f" (but {others[0]}, whose tensors may have other names)"
    return errors.UserError(f"{message}; download the weights again")


@contextlib.contextmanager
def _opened(file: pathlib.Path) -> Iterator[Any]:
    try:
        files.open_regular(file).close()  # safetensors would wait for a pipe
        # Not held open: pages that were read would count as memory of the process.
        with safetensors.safe_open(file, framework="numpy") as opened:
            yield opened
    except FileNotFoundError as error:
        raise errors.UserError(f"{file}: is missing; download it") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise errors.UserError(
            f"{file}: cannot be read ({error}); download it again"
        ) from error


def _names_in(file: pathlib.Path) -> list[str]:
    with _opened(file) as opened:
        return list(opened.keys())


def _read(file: pathlib.Path, name: str) -> np.ndarray:
    with _opened(file) as opened:
        return opened.get_tensor(name)


# --- Tensors.


def _check_tensors(source: Source) -> None:
    """Raises UserError unless the tensors are those of the model; reads headers."""
    wanted = {tensor.name: tensor for tensor in names.tensors(source.config)}
    places, folder = source.places, source.folder
    missing = wanted.keys() - places.keys()
    errors.check(str(folder), not missing, f"lacks {_some(missing)}")
    unknown = places.keys() - wanted.keys()
    if source.config.tie_embeddings and names.HEAD in unknown:
        _check_tied(places)
        unknown -= {names.HEAD}
    errors.check(
        str(folder),
        not unknown,
        f"holds tensors that the model here has no place for: {_some(unknown)}. Only "
        "plain checkpoints of the Llama family can be read",
    )
    for file in sorted(set(places.values())):
        with _opened(file) as opened:
            for name in opened.keys():
                if name in wanted:
                    _check_header(
                        f"{file}: {name}", opened.get_slice(name), wanted[name]
                    )


def _check_header(where: str, header: Any, tensor: names.Tensor) -> None:
    shape, dtype = tuple(header.get_shape()), header.get_dtype()
    errors.check(
        where,
        shape == tensor.shape,
        f"has shape {shape}, and {config_json.CONFIG} describes {tensor.shape}",
    )
    errors.check(
        where,
        dtype in _DTYPES,
        f"has dtype {dtype}; only {', '.join(_DTYPES)} are read",
    )


def _check_tied(places: Mapping[str, pathlib.Path]) -> None:
    """Raises UserError where a tied model has a head of its own; a copy is fine."""
    head = _read(places[names.HEAD], names.HEAD)
    embedding = _read(places[names.EMBEDDING], names.EMBEDDING)
    errors.check(
        f"{places[names.HEAD]}: {names.HEAD}",
        head.dtype == embedding.dtype and np.array_equal(head, embedding),
        f"differs from {names.EMBEDDING}, but {config_json.CONFIG} says "
        "tie_word_embeddings: true; correct one of them",
    )


def _some(found: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    listed = sorted(found)
    more = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
