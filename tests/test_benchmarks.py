"""The benchmarks run and report. Asserts nothing about seconds."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import smollm_r128
from experiments.benchmarks import accelerator, tables, timing
from experiments.benchmarks import optimizers as bench_optimizers
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


def test_the_table_and_the_file_hold_the_same_figures(
    tiny, tmp_path, capsys, monkeypatch
):
    figures = [
        tables.Figure(name="a", value=1.25, at_most=1.0),
        tables.Figure(name="b", value=0.5),
    ]
    monkeypatch.setattr(bench_optimizers, "measure", lambda *_, rounds: figures)
    path = tmp_path / "bench.json"
    assert bench_optimizers.main([f"--json={path}"]) == 0
    printed = capsys.readouterr().out
    written = json.loads(path.read_text())["tiny"]
    assert written["title"] == "tiny"
    assert [(f["name"], f["verdict"]) for f in written["figures"]] == [
        ("a", "short"),
        ("b", "-"),
    ]
    assert all(f"{figure['value']:.3g}" in printed for figure in written["figures"])


@pytest.mark.slow
def test_every_figure_is_measured(tiny):
    figures = bench_optimizers.measure(TINY, rounds=1)
    assert len(figures) == 14
    assert all(figure.value > 0 for figure in figures)


def test_a_step_continues_from_its_own_results():
    params = {"w": jnp.ones((2, 3))}
    call = bench_optimizers._make_step(optax.sgd(1.0), params)
    first, second = (np.asarray(call()[0]["w"]) for _ in range(2))
    np.testing.assert_allclose(second - first, first - np.ones((2, 3)), rtol=1e-3)
    np.testing.assert_array_equal(params["w"], 1)  # not donated


def test_calls_take_turns():
    order = []

    def call(name):
        order.append(name)
        return jnp.ones(2)

    calls = {name: functools.partial(call, name) for name in "ab"}
    seconds = timing.interleaved(calls, rounds=3, warmup=2)
    assert order == list("ab") * 5
    assert [len(values) for values in seconds.values()] == [3, 3]
    assert all(value > 0 for values in seconds.values() for value in values)
    assert timing.medians({"a": [3.0, 1.0, 2.0], "b": [4.0]}) == {"a": 2.0, "b": 4.0}


def test_every_figure_is_the_ratio_it_is_named_after(monkeypatch):
    seconds = {
        "cholesky_qr": 2.0,
        "qr": 14.0,
        "polar": 3.0,
        "products": 1.5,
        "adamw": 4.0,
        "sct": 6.0,
        "active": 8.0,
        "undecided": 6.6,
        "gradient": 9.0,
        "transport": 12.0,
        "svd": 60.0,
        "stiefel_muon": 15.0,
        "backward": 5.0,
        "spectron": 3.5,
        "muon": 7.0,
    }
    monkeypatch.setattr(
        timing,
        "interleaved",
        lambda calls, rounds: {name: [seconds[name]] * rounds for name in calls},
    )
    found = [
        (figure.name.split(":")[0].split("/")[0].strip(), round(figure.value, 6))
        for figure in bench_optimizers.measure(TINY, rounds=3)
    ]
    tokens, length = 8192, 512
    step = 5.0 * tokens / length
    # q, k, v, o are 16 x 16, and gate, up, down 16 x 24; q and down have rank 3.
    rank, factor_entries = 3, 2 * 3 * (16 + 16 + 16 + 24)
    matrices = 3 * 16 * 16 + 2 * 16 * 24 + factor_entries // 2
    per_token = 2 * 2 * (matrices + length * 16)  # attention: two products over L/2
    flops, retraction = 3 * tokens * per_token, 4 * rank * factor_entries
    assert found == [
        ("retraction", 7.0),
        ("retraction", 0.75),
        ("retraction", 1.5),
        ("SCT chain", round(6 / 5.5, 6)),
        ("SCT chain, clip active", round(8 / 8.5, 6)),
        ("SCT chain, clip inactive by its cheap bound", 1.1),
        ("SCT chain", 1.5),
        ("SCT chain", round(6 / (6 + step), 6)),
        ("the same by FLOPs", round(retraction / (flops + retraction), 6)),
        ("with the gradient's tangent projection", 1.5),
        ("with transported moments", 2.0),
        ("with the SVD retraction", 10.0),
        ("Stiefel Muon", 2.5),
        ("Spectron chain", 0.5),
    ]


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
    figure = tables.Figure(name="x", value=value[0], **value[1])
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


# --- One accelerator.


def test_the_accelerator_benchmark_times_the_default_run():
    config = smollm_r128.get_config()
    # Within a 40 GB device, whatever the one at hand has.
    lean = dataclasses.replace(config.model, remat="full")
    assert accelerator.LARGE.shape == lean
    assert accelerator.LARGE.batch_size == config.data.batch_size
    assert accelerator.LARGE.seq_len == config.data.seq_len
    assert accelerator.OPTIMIZER == config.optimizer


def test_the_accelerator_benchmark_measures_everything_on_cpu(tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert accelerator.main([f"--json={path}"]) == 0
    printed, written = capsys.readouterr().out, json.loads(path.read_text())
    assert written["skipped"] == []
    checked = [*written[accelerator.ATTENTION], *written[accelerator.HEAD]]
    for row in checked:
        bound = {"float32": 1e-5, "bfloat16": 0.02}[row["dtype"]]
        figures = [x for name, x in row.items() if name in ("out", "dq", "dx", "dw")]
        assert len(figures) >= 2
        assert max(figures) < bound, row
    elsewhere = {row["attention"] for row in written[accelerator.ELSEWHERE]}
    assert elsewhere == {"cudnn", "triton", "splash"}
    spectral, dense = written[accelerator.STEPS]
    for row in (spectral, dense):
        assert row["steps"] == accelerator.SMALL.num_steps
        assert row["tokens_per_second"] > 0
        assert 0 <= row["chain_share"] < 1
        assert f"{row['parameters']:,}" in printed
    assert spectral["parameters"] < dense["parameters"]


def test_what_fails_or_does_not_fit_is_a_row(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nlines of detail")

    monkeypatch.setattr(accelerator, "_measure_steps", fail)
    work, device = accelerator.SMALL, jax.devices()[0]
    parts = accelerator.parts_of(work, device, time.monotonic() + 9)
    _, row = parts["steps dense"]()
    assert row["note"].startswith("does not fit: RuntimeError: RESOURCE_EXHAUSTED")
    assert "detail" not in row["note"]
    monkeypatch.setattr(accelerator.attention, "attend", fail)
    _, row = parts["attention xla, float32"]()
    assert row["note"].startswith("RuntimeError")


LIGHT = """
import sys
from experiments.benchmarks import accelerator
heavy = {"tensorflow_datasets", "tensorflow", "orbax", "tokenizers", "grain"}
assert not heavy & {name.partition(".")[0] for name in sys.modules}
sys.exit(accelerator.main(sys.argv[1:]))
"""


def test_the_accelerator_benchmark_is_light_and_ends_in_time(tmp_path):
    path = tmp_path / "figures.json"
    ended = subprocess.run(
        [sys.executable, "-c", LIGHT, "--seconds=0.01", f"--json={path}"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert ended.returncode == 0, ended.stderr
    assert "the time is up" in ended.stdout
    assert isinstance(json.loads(path.read_text())["skipped"], list)


@pytest.mark.parametrize("flag", ["--seconds=0", "--seconds=900", "--batch_size=0"])
def test_bad_flags_of_the_accelerator_benchmark_are_refused(capsys, flag):
    with pytest.raises(SystemExit) as caught:
        accelerator.main([flag])
    assert caught.value.code == 2
    assert flag.partition("=")[0] in capsys.readouterr().err
