"""The benchmark runs and reports; no figure of it is asserted."""

import json

import pytest

from experiments import bench_optimizers
from sct_jax import model

TINY = bench_optimizers.FactorSet(
    title="tiny",
    shape=model.ModelConfig(
        d_model=16,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        rank=3,
        spectral=("q", "down"),
    ),
    speedup=5.0,
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench_optimizers, "SETS", {"tiny": TINY})
    monkeypatch.setattr(bench_optimizers, "MEASURED_TOKENS", 8)


def test_the_table_and_the_file_hold_the_same_figures(tiny, tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert bench_optimizers.main(["--rounds=1", f"--json={path}"]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(path.read_text())["tiny"]["figures"]
    assert len(figures) == 14
    for figure in figures:
        assert figure["value"] > 0
        assert figure["verdict"] in ("pass", "short", "-")
        assert f"{figure['value']:.3g}" in printed


@pytest.mark.parametrize(
    ("value", "target", "verdict"),
    [
        ((1.0, {"at_least": 1.0}), ">= 1", "pass"),
        ((0.9, {"at_least": 1.0}), ">= 1", "short"),
        ((1.0, {"at_most": 1.0}), "<= 1", "pass"),
        ((1.1, {"at_most": 1.0}), "<= 1", "short"),
        ((1.1, {}), "", "-"),
    ],
)
def test_a_figure_is_on_one_side_of_its_target(value, target, verdict):
    figure = bench_optimizers.Figure(name="x", value=value[0], **value[1])
    assert (figure.target, figure.verdict) == (target, verdict)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--sets=smollm2-135", "did you mean 'smollm2-135m'"),
        ("--rounds=0", "--rounds"),
        ("--round=3", "did you mean '--rounds'"),
        ("--config.seed=3", "--config"),
    ],
)
def test_bad_flags_are_refused(capsys, flag, message):
    with pytest.raises(SystemExit) as caught:
        bench_optimizers.main([flag])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
