"""Measures generation and imports, against bytes read, transformers and floors.

python -m experiments.benchmarks.decode
python -m experiments.benchmarks.decode --rows=speed --rounds=5 --json=bench.json

Seconds are medians, and what is compared takes turns in one process. `speed` compares
with `generate` of transformers, from the extra `dev`. `import` runs once. A figure ends
with "pass", "short", or "-" if it has no target. The exit code is 0, or 2 for bad
input.
"""

from sct_jax.training import process

if __name__ == "__main__":
    process.start("experiments.benchmarks.decode")

import dataclasses
import functools
import gc
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from experiments.benchmarks import machine, programs, tables, timing
from sct_jax import decode, model, sampling
from sct_jax.interop import config_json, importing, names
from sct_jax.interop import source as source_lib
from sct_jax.training import accounting

SHAPE = model.ModelConfig(  # SmolLM2-360M's
    d_model=960,
    d_ff=2560,
    num_layers=32,
    num_heads=15,
    num_kv_heads=5,
    rank=64,
    spectral=model.BLOCK_MATRICES,
    rope_theta=100_000.0,
)
LARGE = model.ModelConfig(  # one layer of SmolLM2-1.7B's shape
    d_model=2048,
    d_ff=8192,
    num_layers=1,
    num_heads=32,
    num_kv_heads=32,
    spectral=(),
)
LENGTHS = (2048, 8192)
GREEDY = sampling.SamplingConfig(temperature=0.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    return tables.main(__doc__ or "", ROWS, sys.argv[1:] if argv is None else argv)


def speed_figures(
    rounds: int, *, shape: model.ModelConfig = SHAPE, prompt: int = 16, count: int = 32
) -> tables.Figures:
    """Returns the figures of `speed`: tokens per second at batch 1, float32.

    Args:
      rounds: timed runs of each.
      shape: the spectral model; the dense one has no factors.
      prompt: tokens before those that are timed.
      count: tokens that are timed.
    """
    shapes = {"spectral": shape, "dense": dataclasses.replace(shape, spectral=())}
    params = {name: _params(config) for name, config in shapes.items()}
    calls: dict[str, Callable[[], Any]] = {
        name: functools.partial(_generate, params[name], config, prompt, count)
        for name, config in shapes.items()
    }
    note = "" if tables.has_torch() else tables.NO_TORCH
    if not note:
        calls["transformers"] = _transformers(shapes["dense"], prompt, count)
    seconds = timing.medians(timing.interleaved(calls, rounds=rounds))
    read = {name: accounting.num_bytes(p) for name, p in params.items()}
    faster = seconds["dense"] / seconds["spectral"]
    fewer = read["dense"] / read["spectral"]
    theirs = seconds.get("transformers")
    return [
        tables.Figure(
            name="speed, spectral / dense, over bytes read, dense / spectral",
            value=faster / fewer,
            at_least=0.7,
        ),
        tables.Figure(name="  speed, spectral / dense", value=faster),
        tables.Figure(name="  bytes read, dense / spectral", value=fewer),
        tables.Figure(
            name="dense: speed, ours / transformers",
            value=theirs / seconds["dense"] if theirs else None,
            at_least=1.5,
            note=note,
        ),
        *(
            tables.Figure(name=f"  {name}, tokens per second", value=count / value)
            for name, value in seconds.items()
        ),
    ]


def latent_figures(
    rounds: int, *, shape: model.ModelConfig = SHAPE, lengths: Sequence[int] = LENGTHS
) -> tables.Figures:
    """Returns the figures of `latent`: the latent cache beside the ordinary one.

    Args:
      rounds: timed runs of each.
      shape: a model whose k and v have factors.
      lengths: tokens in the cache.
    """
    params = _params(shape)
    found = [
        tables.Figure(
            name=f"bytes per token, {name}",
            value=decode.bytes_per_token(params, shape, latent=latent),
        )
        for name, latent in (("ordinary", False), ("latent", True))
    ]
    for length in lengths:
        calls = {
            name: _advance(params, shape, length, latent=latent)
            for name, latent in (("ordinary", False), ("latent", True))
        }
        seconds = timing.medians(timing.interleaved(calls, rounds=rounds))
        found += [
            tables.Figure(
                name=f"tokens per second after {length:,}, {name}", value=1 / value
            )
            for name, value in seconds.items()
        ]
        gc.collect()
    return found


def import_figures(
    rounds: int, *, shape: model.ModelConfig = LARGE, rank: int = 128
) -> tables.Figures:
    """Returns the figures of `import`: truncating a checkpoint beside its SVDs alone.

    Args:
      rounds: not used: decompositions take minutes.
      shape: dense model, made of random numbers in bfloat16.
      rank: of all matrices of a layer.
    """
    del rounds
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        dense_bytes = _write_checkpoint(folder, shape)
        source = source_lib.open_folder(folder)
        seconds = timing.interleaved(
            {
                "SVDs": functools.partial(_decompose, source),
                "import": lambda: importing.load(source, import_rules(rank)).params,
            },
            rounds=1,
            warmup=0,
        )
        program = programs.imported(folder, rank=rank)()
    spent = timing.medians(seconds)
    return [
        tables.Figure(
            name="seconds, import / its SVDs alone",
            value=spent["import"] / spent["SVDs"],
            at_most=1.5,
        ),
        tables.Figure(
            name="peak memory less the dense model in float32, GB",
            value=(program["peak_rss_bytes"] - dense_bytes) / 1e9,
            at_most=1,
        ),
        tables.Figure(name="  import, seconds", value=spent["import"]),
        tables.Figure(name="  dense model, GB", value=dense_bytes / 1e9),
    ]


def import_rules(rank: int) -> dict[str, importing.Rule]:
    """Returns the rules for one rank in all matrices of a layer."""
    return dict.fromkeys(model.BLOCK_MATRICES, importing.Rule(rank=rank))


def _write_checkpoint(folder: pathlib.Path, shape: model.ModelConfig) -> int:
    """Writes a random model; returns its bytes in float32."""
    described = config_json.to_config_json(
        shape, max_length=2048, dtype="bfloat16", bos_token_id=None, eos_token_id=None
    )
    (folder / config_json.CONFIG).write_text(json.dumps(described))
    rng = np.random.default_rng(0)
    arrays = {
        tensor.name: rng.standard_normal(tensor.shape, np.float32).astype(jnp.bfloat16)
        for tensor in names.tensors(shape)
    }
    safetensors.numpy.save_file(arrays, folder / source_lib.SINGLE)
    return sum(2 * array.nbytes for array in arrays.values())


def _decompose(source: source_lib.Source) -> list[jax.Array]:
    """The singular values of every matrix of a layer, one matrix at a time."""
    found = []
    for tensor in names.tensors(source.config):
        if tensor.layer is not None and tensor.is_matrix:
            w = jnp.asarray(source.read(tensor))
            found.append(jnp.linalg.svd(w, full_matrices=False)[1])
    return found


def _params(config: model.ModelConfig) -> model.Params:
    drawn = jax.jit(model.init, static_argnums=1)(jax.random.key(0), config)
    return decode.prepare(drawn, config)


def _generate(params, config, prompt: int, count: int) -> list[list[int]]:
    return decode.generate(
        params,
        config,
        [list(range(prompt))],
        num_tokens=count,
        key=jax.random.key(0),
        sampler=GREEDY,
    )


def _transformers(
    shape: model.ModelConfig, prompt: int, count: int
) -> Callable[[], Any]:
    import torch

    from experiments.benchmarks import published

    torch.set_num_threads(machine.num_cores())
    llama = published.llama(shape).eval()
    ids = torch.arange(prompt)[None]
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}

    def call():
        with torch.no_grad():
            return llama.generate(ids, use_cache=True, **options)

    return call


def _advance(params, config, length: int, *, latent: bool) -> Callable[[], Any]:
    """Reads one more token after `length`; the cache has no numbers of interest."""
    cache = decode.init_cache(params, config, batch=1, slots=length + 64, latent=latent)
    cache = cache._replace(lengths=jnp.array([length], jnp.int32))
    advance = jax.jit(decode.advance, static_argnums=3, donate_argnums=2)
    token = jnp.zeros(1, jnp.int32)

    def call():
        nonlocal cache
        logits, cache = advance(params, token, cache, config)
        cache = cache._replace(lengths=jnp.array([length], jnp.int32))
        return logits

    return call


ROWS = {
    "speed": tables.Row(
        title="SmolLM2-360M's shape, R 64, batch 1, float32, 32 tokens after 16",
        measure=speed_figures,
    ),
    "latent": tables.Row(
        title="One more token at SmolLM2-360M's shape, R 64 everywhere, batch 1",
        measure=latent_figures,
    ),
    "import": tables.Row(
        title="Import of one layer and the embedding of SmolLM2-1.7B's shape, R 128",
        measure=import_figures,
    ),
}
