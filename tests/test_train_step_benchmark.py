"""The benchmark of training steps on tiny shapes. Asserts nothing about seconds."""

import dataclasses
import functools
import importlib.util
import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smollm_r128
from experiments import step70b
from experiments.benchmarks import machine, programs, tables, train_step
from sct_jax import model, spectral
from sct_jax.training import accounting

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # raised inside torch
    has_torch = tables.has_torch()
    if has_torch:
        import torch

        from experiments.benchmarks import published

        torch.set_num_threads(1)  # more would compete with the threads of XLA

needs_torch = pytest.mark.skipif(not has_torch, reason="needs torch and transformers")

TINY = model.ModelConfig(
    d_model=16,
    d_ff=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=64,
    rank=3,
)


def test_rows_are_printed_and_written(monkeypatch, tmp_path, capsys):
    figures = [
        tables.Figure(name="a", value=2.0, at_least=1.6),
        tables.Figure(name="b", value=None, at_most=1.0, note="needs more"),
        tables.Figure(name="c", value=65536.0),
    ]
    row = tables.Row(title="One row", measure=lambda rounds: figures)
    monkeypatch.setattr(train_step, "ROWS", {"one": row})
    path = tmp_path / "bench.json"
    assert train_step.main(["--rows=one", f"--json={path}"]) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("One row", "needs more", "65,536"))
    written = json.loads(path.read_text())["one"]["figures"]
    assert [(f["value"], f["verdict"]) for f in written] == [
        (2.0, "pass"),
        (None, "-"),
        (65536.0, "-"),
    ]
    assert written[1]["note"] == "needs more"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows=steps"], "did you mean 'step'"),
        (["--rounds=0"], "--rounds"),
        (["--round=3"], "did you mean '--rounds'"),
        (["--rows=head", "--before=."], "has no effect without row tiny"),
        (["--rows=tiny", "--before=tests"], "has no folder sct_jax"),
    ],
)
def test_bad_flags_are_refused(capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        train_step.main(flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def seconds(monkeypatch):
    """Known seconds in the place of the measured ones; returns the calls."""
    known = {"none": 2.0, "dots": 1.0, "PyTorch": 3.0}
    known |= {"head": 8.0, "product": 2.0, "chunked": 1.0, "xla": 4.0}
    seen = {}

    def interleaved(calls, *, rounds, warmup=1):
        seen.update(calls)
        return {name: [known[name]] * rounds for name in calls}

    monkeypatch.setattr(train_step.timing, "interleaved", interleaved)
    return seen


@needs_torch
def test_the_target_applies_to_the_faster_remat(seconds, monkeypatch):
    variants = {"MLP": (model.MLP, 1.6)}
    monkeypatch.setattr(train_step, "VARIANTS", variants)
    figures = train_step.step_figures(1, shape=TINY, rows=2, length=8)
    assert [(f.name, f.value, f.verdict) for f in figures] == [
        ("MLP: PyTorch / ours, remat none", 1.5, "-"),
        ("MLP: PyTorch / ours, remat dots (the default on CPU)", 3.0, "pass"),
        ("  ours, remat none, seconds", 2.0, "-"),
        ("  ours, remat dots (the default on CPU), seconds", 1.0, "-"),
        ("  PyTorch, seconds", 3.0, "-"),
    ]
    state, metrics = seconds["dots"]()
    assert math.isfinite(metrics["loss"])
    assert seconds["dots"]()[0].step == 2  # continues from its own result
    del state
    losses = [seconds["PyTorch"]() for _ in range(2)]
    assert losses[1] < losses[0]


def test_without_torch_the_rows_say_what_they_need(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for figures in (train_step.step_figures(1), train_step.layerwise_figures(1)):
        assert {f.text for f in figures} == {tables.NO_TORCH}
        assert {f.verdict for f in figures} == {"-"}


def test_the_floor_of_the_head_is_three_products(seconds):
    figures = train_step.head_figures(1, shape=TINY, rows=2, length=8)
    flops = 3 * 2 * (2 * 8) * 16 * 64
    floor = flops / (2 * 2048**3 / 2.0)
    np.testing.assert_allclose(figures[0].value, 8.0 / floor)
    loss, (of_params, of_x) = seconds["head"]()
    assert math.isfinite(loss)
    assert of_x.shape == (2, 8, 16)
    assert of_params["embedding"].shape == (64, 16)


def test_attention_reports_seconds_and_bytes(seconds):
    figures = train_step.attention_figures(1, shape=TINY, long=(1, 1024), short=(2, 16))
    assert [(f.value, f.verdict) for f in figures[::2]] == [(0.25, "pass"), (0.25, "-")]
    assert 0 < figures[1].value < 0.5
    for found, expected in zip(
        jax.tree.leaves(seconds["chunked"]()),
        jax.tree.leaves(seconds["xla"]()),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_longest_window_is_the_last_within_the_budget(monkeypatch):
    config = smollm_r128.get_config("tiny")
    needed = {(16, 128): (3e9, 2e9)}
    needed |= {(1, 1024 * n): (3e9, 1024e6 * n) for n in range(1, 9)}
    names = ("argument_bytes", "temporary_bytes")
    monkeypatch.setattr(
        train_step,
        "_memory",
        lambda config: dict(
            zip(names, needed[config.data.batch_size, config.data.seq_len], strict=True)
        ),
    )
    found = train_step.memory_figures(config=config, unit=1024, budget=8e9)
    assert [f.value for f in found] == [2.0, 3.0, 4096]
    found = train_step.memory_figures(config=config, unit=1024, budget=8.5e9)
    assert [f.value for f in found] == [2.0, 3.0, 5120]


def test_memory_counts_the_state_and_the_batch():
    config = dataclasses.replace(smollm_r128.get_config("tiny"), model=TINY)
    found = train_step._memory(config)
    tokens = config.data.tokens_per_step
    state = accounting.num_bytes(train_step._trainer(config).abstract_state)
    assert abs(found["argument_bytes"] - (state + 3 * 4 * tokens)) < 256
    assert found["temporary_bytes"] > 1024 * TINY.vocab_size  # logits of a chunk


OURS = {"seconds_per_step": 1.0, "peak_rss_bytes": 5e9, "parameters": 10, "losses": []}
THEIRS = OURS | {"seconds_per_step": 12.0, "peak_rss_bytes": 1e10}


@needs_torch
def test_programs_take_turns_and_their_figures_are_compared():
    order = []

    def program(figures):
        return lambda: order.append(figures) or figures

    found = train_step.layerwise_figures(
        7, ours=program(OURS), theirs=program(THEIRS), needed_bytes=0
    )
    assert order == [OURS, THEIRS] * 2
    assert [f.value for f in found] == [12.0, 0.5, 1.0, 12.0, 5.0, 10.0, 1.0]
    assert [f.verdict for f in found[:2]] == ["pass", "pass"]


@needs_torch
def test_the_authors_program_needs_free_memory():
    found = train_step.layerwise_figures(1, needed_bytes=1e15)
    assert "needs 1e+06 GB of memory" in found[0].text


def test_a_program_that_fails_leaves_its_message():
    def fail():
        raise programs.ProgramError("exit code 2: the step needs 9 GB")

    found = train_step.long_figures(program=fail)
    assert {f.text for f in found} == {"exit code 2: the step needs 9 GB"}
    found = train_step.long_figures(program=lambda: OURS)
    assert [(f.value, f.verdict) for f in found] == [(1.0, "pass"), (5.0, "pass")]


def test_tiny_is_compared_with_a_checkout_before(monkeypatch):
    rates = {str(programs.ROOT): 300.0, "before": 200.0}
    monkeypatch.setattr(
        programs,
        "tokens_per_second",
        lambda folder, steps: lambda: {"tokens_per_second": rates[folder]},
    )
    assert [f.value for f in train_step.tiny_figures(1)] == [300.0]
    found = train_step.tiny_figures(1, before="before")
    assert [f.value for f in found] == [300, 200, 1.5]


def test_a_program_of_another_folder_is_refused(tmp_path):
    with pytest.raises(programs.ProgramError, match="exit code 1"):
        programs.tokens_per_second(tmp_path, steps=1)()


def test_peak_memory_is_that_of_this_process():
    before = machine.peak_rss_bytes()
    np.ones(before // 8 + 2**24)  # 128 MB more than ever before
    assert machine.peak_rss_bytes() >= before + 2**26


# --- The authors' programs beside ours.


@functools.cache
def our_params(matrices):
    config = dataclasses.replace(TINY, spectral=matrices)
    params = model.init(jax.random.key(0), config)
    # Norms other than 1, and singular values other than those at the start.
    return config, jax.tree.map(
        lambda x: (
            x * (1 + 0.1 * jnp.cos(jnp.arange(x.shape[-1])))
            if x.shape[-1:] in ((3,), (16,))
            else x
        ),
        params,
    )


def copy(tensor, array):
    with torch.no_grad():
        tensor.copy_(torch.from_numpy(np.array(array)))


def copy_matrix(linear, w):
    if isinstance(linear, torch.nn.Linear):
        copy(linear.weight, w.T)
    else:
        for tensor, array in zip((linear.U, linear.s, linear.V), w, strict=True):
            copy(tensor, array)


@needs_torch
@pytest.mark.filterwarnings("ignore")  # raised inside torch and transformers
@pytest.mark.parametrize("matrices", [(), model.MLP, model.BLOCK_MATRICES])
def test_llama_has_our_parameters_and_our_loss(matrices):
    config, params = our_params(matrices)
    llama = published.llama(config)
    assert sum(p.numel() for p in llama.parameters()) == accounting.count(params)
    copy(llama.model.embed_tokens.weight, params["embedding"])
    copy(llama.model.norm.weight, params["final_norm"])
    blocks = model.unstack_layers(params)["layers"]
    for layer, block in zip(llama.model.layers, blocks, strict=True):
        copy(layer.input_layernorm.weight, block["attention_norm"])
        copy(layer.post_attention_layernorm.weight, block["mlp_norm"])
        for name, (part, projection) in published.PROJECTIONS.items():
            copy_matrix(getattr(getattr(layer, part), projection), block[name])
    ids = np.random.default_rng(0).integers(64, size=(2, 12))
    theirs = llama(input_ids=torch.from_numpy(ids), labels=torch.from_numpy(ids)).loss
    targets = np.concatenate([ids[:, 1:], np.full((2, 1), -1)], axis=1)
    batch = {"inputs": jnp.asarray(ids), "targets": jnp.asarray(targets)}
    ours = model.loss(params, batch, config)
    np.testing.assert_allclose(theirs.item(), float(ours), rtol=1e-6 * math.log(64))


@needs_torch
@pytest.mark.filterwarnings("ignore")
def test_the_demonstration_has_our_parameters_and_our_loss():
    shape = dataclasses.replace(
        TINY, num_kv_heads=TINY.num_heads, spectral=model.BLOCK_MATRICES
    )
    stack = step70b.reference_stack(shape)
    layers = [stack.init_layer(key) for key in jax.random.split(jax.random.key(0), 2)]
    blocks = published.stack(2, shape.d_model, shape.d_ff, shape.rank)
    assert sum(p.numel() for p in blocks.parameters()) == accounting.count(layers)
    x = jax.random.normal(jax.random.key(1), (1, 8, shape.d_model))
    start = torch.from_numpy(np.array(x))
    for block, layer in zip(blocks, layers, strict=True):
        for name in model.BLOCK_MATRICES:
            copy_matrix(getattr(block, name), layer[name])
        x = stack.block(layer, x, {}, spectral.linear)
    theirs = blocks(start).square().mean()
    ours = stack.head_loss({}, x, {}, spectral.linear)
    np.testing.assert_allclose(theirs.item(), float(ours), rtol=1e-5)


@needs_torch
@pytest.mark.filterwarnings("ignore")
def test_the_authors_program_trains_and_stays_orthonormal(capsys):
    flags = ["--num_layers=2", "--d_model=16", "--d_ff=24", "--rank=3", "--steps=3"]
    threads = torch.get_num_threads()
    assert published.main(flags) == 0
    torch.set_num_threads(threads)
    figures = json.loads(capsys.readouterr().out)
    assert figures["losses"][-1] < figures["losses"][0]
    assert figures["parameters"] == 2 * (4 * (3 * 32 + 3) + 3 * (3 * 40 + 3) + 2 * 16)
    blocks = published.stack(1, 16, 24, 3)
    with torch.no_grad():
        blocks[0].q.U.mul_(1.5)
    before = blocks[0].q.U.detach().numpy() / 1.5
    published.retract(blocks)
    np.testing.assert_allclose(blocks[0].q.U.detach().numpy(), before, atol=1e-6)
