"""Writes a run as a model in the formats of Hugging Face.

"merged" multiplies the factors out: a Llama or Qwen3 that any program loads. "factors"
keeps them: each matrix is two linear layers of the code in `modeling_spectral`, which
is written beside the tensors.
"""

import dataclasses
import importlib.resources
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import tokenizers
from jaxtyping import Shaped
from tokenizers import processors

from sct_jax import data, errors, files, model, spectral
from sct_jax.interop import config_json, names
from sct_jax.training import workdir

FORMATS = ("merged", "factors")
DTYPES = ("float32", "bfloat16")
CODE = "modeling_spectral.py"
"""The file of classes that an export of factors has."""

MAX_SHARD_BYTES = 5 * 10**9


class Stored(NamedTuple):
    """A tensor that will be written.

    Attributes:
      name: in the file.
      shape: of the array.
      make: returns the array, in float32.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Shaped[np.ndarray, "..."]]


def export(
    run: workdir.LoadedRun,
    folder: pathlib.Path,
    *,
    form: str,
    card: str,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a run to a new folder, which appears whole or not at all.

    One shard of the tensors exists in memory at a time.

    Args:
      run: the model.
      folder: where to; it must not exist.
      form: from `FORMATS`.
      card: text of README.md.
      dtype: of the tensors, from `DTYPES`.
      max_shard_bytes: most bytes of a file of tensors, unless one tensor has more.

    Raises:
      UserError: the folder exists or cannot be written, or the model has no
        description in the format.
    """
    workdir.check_new(folder, flag="--to")
    described = _config_json(run, form=form, dtype=dtype)
    partial = pathlib.Path(files.partial_path(folder))
    try:
        partial.mkdir(parents=True)
        write_tensors(
            partial, stored(run, form), dtype=dtype, max_shard_bytes=max_shard_bytes
        )
        _write_tokenizer(partial, run.tokenizer, max_length=run.config.data.seq_len)
        ends = run.tokenizer.stops
        generation = {
            "bos_token_id": run.tokenizer.document_mark,
            "eos_token_id": ends[0] if len(ends) == 1 else list(ends),
            "pad_token_id": ends[0],
        }
        workdir.write_json(partial / "generation_config.json", generation)
        if form == "factors":
            files.replace_text(partial / CODE, _code())
        files.replace_text(partial / "README.md", card)
        workdir.write_json(partial / config_json.CONFIG, described)
        files.sync_folder(partial)
        os.rename(partial, folder)
        files.sync_folder(folder.parent)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise errors.UserError(
            f"--to: cannot write to {folder}: {reason}; make room, or choose another "
            "folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def architecture(config: model.ModelConfig, form: str) -> str:
    """Returns the class of transformers that loads an export."""
    if form == "factors":
        return "SpectralForCausalLM"
    return config_json.architecture(config)


def ranks(run: workdir.LoadedRun) -> dict[str, int | list[int]]:
    """Returns the stored rank of every factorised matrix, by its name in the format.

    One number if all layers have the same, else one per layer. They may differ from the
    configuration's where ranks changed during training.
    """
    found: dict[str, list[int]] = {}
    for tensor in names.tensors(run.config.model):
        owner, _ = _owner(run.params, tensor)
        weight = owner[tensor.key]
        if spectral.is_factors(weight):
            found.setdefault(tensor.name.split(".")[-2], []).append(weight[0].shape[-1])
    return {
        name: values[0] if len(set(values)) == 1 else values
        for name, values in found.items()
    }


def blocks(run: workdir.LoadedRun) -> dict[str, int]:
    """Returns the number of blocks of every matrix that has some, as `ranks`."""
    config = run.config.model
    return {
        names.MODULES[key].split(".")[-1]: config.matrix_blocks(key)
        for key in model.BLOCK_MATRICES
        if config.matrix_blocks(key) > 1
    }


def stored(run: workdir.LoadedRun, form: str) -> Iterator[Stored]:
    """Yields the tensors of a format, in the order of the model.

    Args:
      run: the model.
      form: from `FORMATS`.
    """
    params = jax.tree.map(np.asarray, run.params)  # layers of a stack are views then
    for tensor in names.tensors(run.config.model):
        owner, place = _owner(params, tensor)
        weight = jax.tree.map(lambda x, place=place: x[place], owner[tensor.key])
        if form == "factors" and spectral.is_factors(weight):
            yield from _factors(tensor, weight)
        else:
            yield Stored(tensor.name, tensor.shape, _dense(tensor, weight))


def _owner(
    params: model.Params, tensor: names.Tensor
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """What has the weight of a tensor, and its place on the axis of layers there."""
    if tensor.layer is None:
        return params, ()
    layers = params[model.LAYERS]
    if isinstance(layers, tuple):
        return layers[tensor.layer], ()
    return layers, (tensor.layer,)


def _dense(tensor: names.Tensor, weight: Any) -> Callable[[], Any]:
    # The embedding is (V, D) on both sides, all other matrices are transposed.
    swap = tensor.is_matrix and tensor.key != "embedding"

    def make():
        if not spectral.is_factors(weight):
            return np.asarray(weight.T if swap else weight)
        w = jax.tree.map(jnp.asarray, weight)
        if swap and not spectral.is_blocks(w):  # whose transpose may not be one
            return np.asarray(spectral.to_dense(spectral.transpose(w)))
        dense = spectral.to_dense(w)
        return np.asarray(dense.T if swap else dense)

    return make


def _factors(tensor: names.Tensor, weight: Any) -> Iterator[Stored]:
    """Two layers: `a` is u, `b` is v diag(s), or a and b of low-rank factors.

    With s in `b`, `a` stays orthonormal: what it gives has the scale of its input, and
    u, |s| and v can be read back, as s are the norms of the columns of `b`. Blocks are
    a first axis of both.
    """
    base = tensor.name.removesuffix("weight")
    # A row per token, which a lookup reads; all other layers are (fan_out, fan_in).
    a = weight[0] if tensor.key == "embedding" else weight[0].swapaxes(-1, -2)
    yield Stored(f"{base}a.weight", a.shape, lambda: a)
    v, s = weight[-1], 1.0
    if spectral.is_spectral(weight):
        s = weight.s[..., None, :]
    yield Stored(f"{base}b.weight", v.shape, lambda: np.asarray(v * s))


def write_tensors(
    folder: pathlib.Path,
    tensors: Iterator[Stored],
    *,
    dtype: str,
    max_shard_bytes: int,
) -> None:
    """Writes model.safetensors, or its parts and an index.

    Args:
      folder: exists.
      tensors: what to write.
      dtype: to which arrays are rounded.
      max_shard_bytes: most bytes of a file, unless one tensor has more.
    """
    shards = _shards(tensors, jnp.dtype(dtype).itemsize, max_shard_bytes)
    where, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        arrays = {
            tensor.name: np.ascontiguousarray(tensor.make(), dtype=jnp.dtype(dtype))
            for tensor in shard
        }
        total += sum(array.nbytes for array in arrays.values())
        where |= dict.fromkeys(arrays, file)
        _save(folder / file, arrays)
        del arrays  # before the next ones
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        workdir.write_json(folder / "model.safetensors.index.json", index)


def _save(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a file of tensors, which others may read as they may other files."""
    path.touch()
    mode = path.stat().st_mode  # the library's own is 0o600
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    path.chmod(mode)
    with path.open("rb") as file:
        files.sync(file.fileno())


def _shards(
    tensors: Iterator[Stored], itemsize: int, max_bytes: int
) -> Sequence[Sequence[Stored]]:
    """Consecutive tensors that fit into a file together."""
    shards: list[list[Stored]] = []
    size = max_bytes
    for tensor in tensors:
        needed = int(np.prod(tensor.shape)) * itemsize
        if not shards or size + needed > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += needed
    return shards


def _config_json(run: workdir.LoadedRun, *, form: str, dtype: str) -> Mapping[str, Any]:
    config = run.config.model
    if form == "factors":  # of Qwen3, which our classes extend
        config = dataclasses.replace(config, qk_norm=True)
    described = config_json.to_config_json(
        config,
        max_length=run.config.data.seq_len,
        dtype=dtype,
        bos_token_id=run.tokenizer.document_mark,
        eos_token_id=run.tokenizer.stops[0],
    )
    if form == "merged":
        return described
    module = CODE.removesuffix(".py")
    return described | {
        "architectures": [architecture(config, form)],
        "auto_map": {
            "AutoConfig": f"{module}.SpectralConfig",
            "AutoModel": f"{module}.SpectralModel",
            "AutoModelForCausalLM": f"{module}.SpectralForCausalLM",
        },
        "model_type": "spectral",
        "qk_norm": run.config.model.qk_norm,
        "ranks": ranks(run),
        "blocks": blocks(run),
    }


def _code() -> str:
    return (
        importlib.resources.files("sct_jax.interop").joinpath(CODE).read_text("utf-8")
    )


def _write_tokenizer(
    folder: pathlib.Path, tokenizer: data.Tokenizer, *, max_length: int
) -> None:
    """Writes the tokenizer; it begins a text with the document mark, as in training.

    Without special tokens it gives the ids of `Tokenizer.encode`.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    mark = backend.id_to_token(tokenizer.document_mark)
    backend.post_processor = processors.TemplateProcessing(
        single=[mark, "$A"],
        pair=[mark, "$A", mark, "$B"],
        special_tokens=[(mark, tokenizer.document_mark)],
    )
    files.replace_text(folder / "tokenizer.json", backend.to_str(pretty=True))
    end = backend.id_to_token(tokenizer.stops[0])
    marks = {"bos_token": mark, "eos_token": end, "pad_token": end}
    workdir.write_json(folder / "special_tokens_map.json", marks)
    described = marks | {
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "split_special_tokens": True,  # a literal mark in a text is text
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    workdir.write_json(folder / "tokenizer_config.json", described)
