import dataclasses
import importlib.util

import pytest
import samples

from experiments.benchmarks import decode, tables
from sct_jax import model
from sct_jax.training import accounting

SHAPE = dataclasses.replace(samples.SMALL, spectral=model.BLOCK_MATRICES)


def test_speed_is_compared_with_the_bytes_that_are_read(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    figures = decode.speed_figures(1, shape=SHAPE, prompt=2, count=3)
    found = {figure.name.strip(): figure for figure in figures}
    share = found["speed, spectral / dense, over bytes read, dense / spectral"].value
    faster, fewer = (
        found[name].value
        for name in ("speed, spectral / dense", "bytes read, dense / spectral")
    )
    assert share == pytest.approx(faster / fewer)
    dense = model.ModelConfig(**{**vars(SHAPE), "spectral": ()})
    assert fewer == pytest.approx(_bytes(dense) / _bytes(SHAPE))
    assert found["dense: speed, ours / transformers"].text == tables.NO_TORCH


def test_the_latent_cache_is_measured_beside_the_ordinary_one():
    figures = decode.latent_figures(1, shape=SHAPE, lengths=(8,))
    plain, latent, *rates = (figure.value for figure in figures)
    width = 2 * SHAPE.num_kv_heads * SHAPE.head_size
    assert plain == 4 * SHAPE.num_layers * width
    assert latent == 4 * SHAPE.num_layers * 2 * SHAPE.rank
    assert all(rate > 0 for rate in rates)


def test_an_import_is_measured_beside_its_decompositions():
    dense = dataclasses.replace(SHAPE, spectral=(), num_layers=1)
    figures = decode.import_figures(1, shape=dense, rank=2)
    found = {figure.name.strip(): figure.value for figure in figures}
    assert found["dense model, GB"] == _bytes(dense) / 1e9
    assert found["seconds, import / its SVDs alone"] > 0
    # A process with JAX alone has more.
    assert found["peak memory less the dense model in float32, GB"] > 0.05


def _bytes(config):
    return 4 * accounting.parameters(config)
