"""The measured 70B-class step on tiny shapes. Asserts nothing about seconds."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
import samples

from experiments import first_tokens, memory_table, step70b
from experiments.benchmarks import machine
from sct_jax import errors, model, spectral
from sct_jax.training import accounting, layerwise, overrides

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
CONFIG = "configs/llama70b_r32.py"
TINY = [
    f"--config.model.{name}={value}"
    for name, value in {
        "d_model": 32,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "vocab_size": 4096,
        "rank": 4,
    }.items()
]


@pytest.fixture(autouse=True)
def tokens(monkeypatch):
    """Token ids without the child process and its corpus."""
    monkeypatch.setattr(
        first_tokens, "read_first_tokens", lambda count: list(range(count))
    )


@pytest.fixture
def rates(monkeypatch):
    """Rates of the machine, without measuring them."""
    found = {"flops_per_second": 1e9, "bytes_per_second": 2e9}
    monkeypatch.setattr(machine, "rates", lambda: found)


REFERENCE_PARAMETERS = 2 * (4 * (64 * 4 + 4) + 3 * (80 * 4 + 4) + 64)


@pytest.mark.parametrize(
    ("flags", "parameters", "shares"),
    [
        # Compiles fast: few factors, and no shares, which need two more steps.
        (["--config.model.spectral=gate"], None, set()),
        slow(["--reference-attention"], REFERENCE_PARAMETERS, {"Adam", "retraction"}),
        slow([], None, {"Adam", "retraction"}),
        slow(["--moment-dtype=bfloat16", "--tokens=20"], None, {"Adam", "retraction"}),
    ],
    ids=["few factors", "reference", "real", "bfloat16"],
)
def test_it_prints_and_writes_the_figures(
    tmp_path, capsys, monkeypatch, rates, flags, parameters, shares
):
    if not shares:
        monkeypatch.setattr(step70b, "parts_of_chain", lambda _: None)
    path = tmp_path / "step.json"
    faster = "--config.optimizer.peak_learning_rate=1e-2"
    assert step70b.main([*TINY, "--steps=4", faster, f"--json={path}", *flags]) == 0
    figures = json.loads(path.read_text())
    printed = capsys.readouterr().out
    assert f"{figures['parameters']:,}" in printed
    if parameters is not None:
        assert figures["parameters"] == parameters
    assert len(figures["losses"]) == 4
    assert figures["losses"][-1] < figures["losses"][0]
    assert 0 < figures["orthonormality_error"] < 4e-6
    assert figures["seconds_per_step"] > 0
    sizes = figures["bytes_by_formula"]
    per_parameter = 4 if "--moment-dtype=bfloat16" in flags else 8
    assert sizes["parameters"] == 4 * figures["parameters"]
    # Counts of the chain are a few bytes more.
    extra = sizes["optimizer"] - per_parameter * figures["parameters"]
    assert 0 <= extra <= 64
    # Bytes of this process, which has loaded JAX.
    assert 1e8 < figures["peak_rss_bytes"] <= machine.peak_rss_bytes() < 1e11
    assert figures["tokens_per_step"] == (20 if "--tokens=20" in flags else 8)
    assert set(figures["shares"]) == shares


def test_steps_alone_measure_nothing_after_them(tmp_path, capsys, monkeypatch):
    for function in (machine, "rates"), (step70b, "shares"), (step70b, "roofline"):
        monkeypatch.setattr(*function, lambda *_, **__: pytest.fail("measured"))
    path = tmp_path / "step.json"
    flags = ["--config.model.spectral=gate", "--steps=2", "--steps_only"]
    assert step70b.main([*TINY, *flags, f"--json={path}"]) == 0
    figures = json.loads(path.read_text())
    assert figures["seconds_per_step"] > 0 and len(figures["losses"]) == 2
    assert "lower bound" not in capsys.readouterr().out


def test_the_job_trains_on_real_tokens():
    pairs = [tuple(flag.removeprefix("--config.").split("=")) for flag in TINY]
    job = step70b.make_job(overrides.load(CONFIG, pairs))
    assert job.batch["inputs"].tolist() == [list(range(8))]
    assert job.batch["targets"].tolist() == [list(range(1, 9))]
    assert job.dense_parameters() == accounting.parameters(
        accounting.dense_config(job.shape)
    )
    assert job.product_flops() == 8 * accounting.flops_per_token(job.shape, seq_len=8)


def test_rates_of_the_machine_are_positive():
    rates = machine.rates(size=8, copied=16)
    assert set(rates) == {"flops_per_second", "bytes_per_second"}
    assert all(rate > 0 for rate in rates.values())


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_the_parts_make_up_the_chain(moment_dtype):
    experiment = overrides.load(CONFIG, [("optimizer.moment_dtype", moment_dtype)])
    parts = step70b.parts_of_chain(experiment)
    assert parts is not None
    params = {"w": spectral.init(jax.random.key(0), 12, 8, 3)}
    grads = jax.tree.map(lambda x: x + 0.1, params)
    ours = _updated(optax.chain(*parts.values()), grads, params)
    chex.assert_trees_all_equal(
        ours, _updated(experiment.build_optimizer(), grads, params)
    )


def _updated(tx, grads, params):
    """Returns parameters and state after two updates."""
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("b2", "0.99"),
        ("max_update_norm", "0.1"),
        ("name", "stiefel_muon"),
        ("retraction", "svd"),
        ("retraction", "none"),
        ("weight_decay", "0.1"),
    ],
)
def test_a_chain_of_other_parts_has_no_shares(field, value):
    experiment = overrides.load(CONFIG, [(f"optimizer.{field}", value)])
    assert step70b.parts_of_chain(experiment) is None


def test_the_parameters_are_those_of_the_papers():
    experiment = overrides.load(CONFIG)
    dense = accounting.dense_config(experiment.model)
    assert accounting.parameters(experiment.model) == 424_257_088
    assert accounting.parameters(dense) == 70_553_706_496  # Llama-3-70B
    job = step70b.make_job(experiment, reference_attention=True)
    step = layerwise.make_train_step(job.stack, job.tx)
    params = jax.eval_shape(step.init, jax.random.key(0)).params
    assert accounting.count(params) == 452_216_320  # SCT paper


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank=64"], "model.rank: rank 64"),
        (["--moment-dtype=float16"], "optimizer.moment_dtype"),
        (["--token=3"], "did you mean '--tokens'"),
        (["--steps=1"], "--steps"),
        (["--config.step=fused"], "step: "),
        (["--config.model.vocab_size=100"], "model.vocab_size"),
        (["--config.optimizer.grad_clip=1"], "optimizer.grad_clip"),
    ],
)
def test_bad_flags_are_refused(capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        step70b.main([*TINY, *flags])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_what_does_not_fit_is_refused_before_it_is_allocated(capsys, monkeypatch):
    # Attention scores of two million tokens.
    monkeypatch.setattr(step70b, "measure", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(SystemExit) as caught:
        step70b.main(["--tokens=2000000", "--config.model.num_layers=2"])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "memory: the step needs" in message
    assert "GB are free" in message


def test_memory_that_is_enough_or_unknown_is_no_error(monkeypatch):
    step70b.check_memory({"total": 10}, available=10)
    with pytest.raises(errors.UserError, match="memory"):
        step70b.check_memory({"total": 11}, available=10)
    monkeypatch.setattr(machine, "available_memory", lambda: None)
    step70b.check_memory({"total": 10**18})


def test_the_formula_counts_the_state_and_one_layer_of_gradients():
    shape = dataclasses.replace(
        overrides.load(CONFIG).model,
        d_model=32,
        d_ff=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=64,
        rank=4,
    )
    tx = overrides.load(CONFIG).optimizer.build(5)
    batch = {
        name: jax.ShapeDtypeStruct((2, 8), "int32") for name in ("inputs", "targets")
    }
    sizes = accounting.layerwise_bytes(layerwise.stack_of(shape), tx, batch)
    params = 4 * accounting.parameters(shape)
    assert sizes["parameters"] == params
    assert 2 * params < sizes["optimizer"] <= 2 * params + 64
    # Embedding and head, with (64 + 32) x 4 + 4 numbers each, are smaller than a layer.
    assert sizes["gradients"] == 4 * accounting.block_parameters(shape)
    # Four streams of 16 rows, and seven bottlenecks of rank 4 in three layers.
    assert sizes["streams"] == 4 * 16 * (4 * 32 + 3 * 7 * 4)
    assert sizes["total"] == sum(sizes.values()) - sizes["total"]
    longer = batch | {
        name: jax.ShapeDtypeStruct((2, 16), "int32") for name in ("inputs", "targets")
    }
    more = accounting.layerwise_bytes(layerwise.stack_of(shape), tx, longer)
    # No attention scores, which would grow with the square of the length.
    assert more["activations"] == pytest.approx(2 * sizes["activations"], rel=0.01)


def test_the_formula_counts_both_gradients_of_a_tied_embedding():
    shape = dataclasses.replace(
        samples.SMALL, vocab_size=512, spectral=model.MLP, scan_layers=False
    )
    embedding = 4 * 512 * 32
    layer = 4 * accounting.block_parameters(shape)

    def sizes_of(length):
        tokens = jax.ShapeDtypeStruct((1, length), "int32")
        batch = {"inputs": tokens, "targets": tokens}
        tx = optax.sgd(1.0)
        return accounting.layerwise_bytes(layerwise.stack_of(shape), tx, batch)

    # With few tokens the embedding's gradients are the peak: two of them at once.
    # With many, a block is: one gradient of the embedding then waits to be added.
    few, many = sizes_of(1), sizes_of(8192)
    passing = few["gradients"] + few["streams"] + few["activations"]
    assert 2 * embedding <= passing < 2.1 * embedding
    assert (many["gradients"], many["streams"] > 0) == (embedding + layer, True)


@pytest.mark.parametrize(("dtype", "cast"), [("float32", 0), ("bfloat16", 2 * 6 * 6)])
def test_the_formula_counts_what_a_block_keeps(dtype, cast):
    def block(layer, x, batch, linear):
        del batch, linear
        return jnp.exp(x @ layer["w"].astype(dtype).T)

    stack = layerwise.Stack(
        num_layers=2,
        init_ends=lambda key: {},
        init_layer=lambda key: {"w": jnp.ones((6, 6))},
        embed=lambda ends, batch: batch.astype(dtype),
        block=block,
        head_loss=lambda ends, x, batch, linear: jnp.sum(x.astype("float32")),
        embed_keys=(),
        head_keys=(),
    )
    sizes = accounting.layerwise_bytes(stack, optax.sgd(1.0), jnp.ones((1, 5, 6)))
    width = jnp.dtype(dtype).itemsize
    # The result of exp, and the cast weight; the other residuals are arguments.
    assert sizes["activations"] == width * 5 * 6 + cast
    assert sizes["streams"] == 3 * width * 5 * 6
    assert sizes["gradients"] == 4 * 6 * 6


def test_a_matrix_takes_the_bytes_of_the_paper():
    assert round(accounting.matrix_bytes(8192, 28672, 32) / 1e6, 1) == 18.9
    assert round(accounting.matrix_bytes(8192, 28672, None) / 1e6) == 3758


def test_the_memory_table_is_printed_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory_table, "MATRICES", {"tiny": (48, 80)})
    llama = overrides.load(CONFIG, [("model.num_layers", "2")])
    monkeypatch.setattr(memory_table, "experiments", lambda: {"llama": llama})
    path = tmp_path / "memory.json"
    assert memory_table.main(["--rank=4", f"--json={path}"]) == 0
    figures = json.loads(path.read_text())
    matrix = figures["matrices"]["tiny, 48 x 80"]
    assert matrix["dense"] == 16 * 48 * 80
    for kind in ("dense", "spectral"):
        # Counts of the chain add a few bytes.
        assert 0 <= matrix[f"{kind}, measured"] - matrix[kind] <= 64
    count = accounting.parameters(llama.model)
    assert figures["models"]["llama"]["parameters"] == count
    assert f"{count:,}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        memory_table.main(["--rank=49"])
    assert caught.value.code == 2
