import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
import samples

from sct_jax import model
from sct_jax.training import accounting, optimizer_config
from sct_jax.training import state as state_lib

SMOLLM2 = model.ModelConfig(
    d_model=2048,
    d_ff=8192,
    num_layers=24,
    num_heads=32,
    num_kv_heads=32,
    vocab_size=49152,
    spectral=model.MLP,
)
SMALL = dataclasses.replace(
    samples.SMALL,
    num_layers=3,
)
CONFIGS = {
    "spectral": SMALL,
    "dense": dataclasses.replace(SMALL, spectral=(), tie_embeddings=False),
    "apart": dataclasses.replace(SMALL, scan_layers=False, spectral=model.MLP),
    "spectral embedding": dataclasses.replace(SMALL, spectral=("embedding", "v", "up")),
    "spectral head": dataclasses.replace(
        SMALL,
        spectral=("embedding", "head", "down"),
        tie_embeddings=False,
        ranks=model.MatrixRanks(head=7),
        num_kv_heads=1,
    ),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


# Table of the SCT paper, arXiv 2604.00733: SmolLM2-1.7B with a spectral MLP.
@pytest.mark.parametrize(
    ("rank", "parameters"),
    [
        (256, 692_178_944),
        (128, 597_797_888),
        (64, 550_607_360),
        (32, 527_012_096),
    ],
)
def test_smollm2_has_the_parameters_of_the_paper(rank, parameters):
    config = dataclasses.replace(SMOLLM2, rank=rank)
    assert accounting.parameters(config) == parameters
    dense = accounting.dense_config(config)
    assert accounting.parameters(dense) == 1_711_376_384


def test_the_70b_stack_has_the_parameters_of_the_paper():
    config = model.ModelConfig(
        d_model=8192,
        d_ff=28672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=64,
        rank=32,
        spectral=model.BLOCK_MATRICES,
    )
    assert 80 * accounting.block_parameters(config) == 452_216_320


def test_dense_config_drops_ranks_too():
    config = dataclasses.replace(
        SMALL,
        ranks=model.MatrixRanks(q=2),
        rank_ratios=model.MatrixRankRatios(k=0.5),
    )
    dense = accounting.dense_config(config)
    dense.validate()
    assert all(dense.matrix_rank(name) is None for name in model.MATRICES)


def expected_parameters(config) -> int:
    """Counts the parameters from the published shapes, matrix by matrix."""
    d, f = config.d_model, config.d_ff
    g = config.num_kv_heads * d // config.num_heads
    shapes = {"q": (d, d), "k": (d, g), "v": (d, g), "o": (d, d)}
    shapes |= {"gate": (d, f), "up": (d, f), "down": (f, d)}

    def size(name, rows, columns):
        if name not in config.spectral:
            return rows * columns
        rank = getattr(config.ranks, name) or config.rank
        return rank * (rows + columns + 1)

    block = sum(size(name, *shape) for name, shape in shapes.items()) + 2 * d
    total = config.num_layers * block + d
    total += size("embedding", config.vocab_size, d)
    return total + (0 if config.tie_embeddings else size("head", d, config.vocab_size))


@each_config
def test_parameters_are_the_entries_of_the_published_shapes(config):
    assert accounting.parameters(config) == expected_parameters(config)


def test_counts_of_real_arrays():
    arrays = {"a": jnp.ones((3, 5)), "b": (jnp.ones(2, jnp.bfloat16), jnp.ones([]))}
    assert accounting.count(arrays) == 15 + 2 + 1
    assert accounting.num_bytes(arrays) == 4 * 15 + 2 * 2 + 4


@pytest.mark.parametrize("name", ["dense", "spectral"])
def test_parameters_are_the_entries_of_an_initialised_block(name):
    config = CONFIGS[name]
    block = jax.jit(lambda key: model.init_block(key, config))(jax.random.key(0))
    sizes = [leaf.size for leaf in jax.tree.leaves(block)]
    assert accounting.block_parameters(config) == sum(sizes)


def dot_flops(jaxpr) -> int:
    """2 per multiply-add of every dot_general, scans at their length."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        parts = jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        )
        for part in parts:
            if hasattr(part, "eqns"):
                total += times * dot_flops(getattr(part, "jaxpr", part))
    return total


@each_config
def test_flops_are_the_traced_products(config):
    seq_len, batch = 24, 2
    config = dataclasses.replace(config, attention="xla")  # recomputes nothing
    tokens = jax.ShapeDtypeStruct((batch, seq_len), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), config))

    def loss(params, tokens):
        return model.forward(params, tokens, config).sum()

    forward = dot_flops(jax.make_jaxpr(loss)(params, tokens).jaxpr)
    step = dot_flops(jax.make_jaxpr(jax.value_and_grad(loss))(params, tokens).jaxpr)
    # XLA computes all scores; causal attention needs half of them.
    half_attention = config.num_layers * 2 * seq_len * config.d_model
    counted = accounting.flops_per_token(config, seq_len=seq_len)
    assert forward == batch * seq_len * (counted // 3 + half_attention)
    assert step == batch * seq_len * (counted + 3 * half_attention)
    assert counted % 3 == 0


def test_flops_of_smollm2_by_hand():
    config = dataclasses.replace(SMOLLM2, rank=128)
    per_layer = 4 * 2 * 2048**2 + 3 * 2 * 128 * (2048 + 8192) + 2 * 512 * 2048
    forward = 24 * per_layer + 2 * 2048 * 49152
    assert accounting.flops_per_token(config, seq_len=512) == 3 * forward


def test_ranks_of_a_state_replace_those_of_the_configuration():
    names = {"layers/0/up": 3, "layers/1/up": 6, "layers/0/q": 5, "embedding": 7}
    config = CONFIGS["spectral"]
    ranks = accounting.at_ranks(config, names).ranks
    assert (ranks.up, ranks.q, ranks.embedding) == (4, 5, 7)
    assert ranks.down == config.ranks.down
    assert accounting.at_ranks(config, {}) == config


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_bytes_of_a_step(moment_dtype):
    config = CONFIGS["spectral"]
    optimizer = optimizer_config.Sct(
        max_update_norm=0.5, weight_decay=0.1, moment_dtype=moment_dtype
    )
    tx = optimizer.build(10, decay_mask=model.decay_mask)
    sizes = accounting.step_bytes(config, tx)
    entries = expected_parameters(config)
    moment = 4 if moment_dtype == "float32" else 2
    assert sizes["parameters"] == sizes["gradients"] == 4 * entries
    counters = sizes["optimizer"] - 2 * moment * entries
    assert 0 < counters <= 64  # Adam's and the schedule's step counts
    assert sizes["total"] == 8 * entries + sizes["optimizer"]


def test_bytes_of_the_optimizer_are_the_bytes_of_its_arrays():
    config = CONFIGS["spectral"]
    tx = optimizer_config.Sct(grad_clip=1.0).build(10)
    shapes = state_lib.abstract(config, tx)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.params)
    arrays = jax.tree.leaves(tx.init(params))
    sizes = accounting.step_bytes(config, tx)
    assert sizes["optimizer"] == sum(array.nbytes for array in arrays)


def test_summary_has_the_integers_of_summary_json():
    tx = optimizer_config.Sct().build(10)
    summary = accounting.summary(SMALL, tx, seq_len=16)
    assert set(summary) == {
        "parameters",
        "dense_equivalent_parameters",
        "flops_per_token",
        "bytes",
    }
    assert summary["parameters"] == expected_parameters(SMALL)
    dense = dataclasses.replace(SMALL, spectral=())
    assert summary["dense_equivalent_parameters"] == expected_parameters(dense)
    assert summary["flops_per_token"] == accounting.flops_per_token(SMALL, seq_len=16)
    assert set(summary["bytes"]) == {"parameters", "gradients", "optimizer", "total"}
    counts = [*summary["bytes"].values(), *list(summary.values())[:3]]
    assert {type(count) for count in counts} == {int}
