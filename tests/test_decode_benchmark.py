import dataclasses
import importlib.util

import pytest
import samples

from experiments.benchmarks import decode, tables
from sct_jax import model

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


def _bytes(config):
    from sct_jax.training import accounting

    return 4 * accounting.parameters(config)
