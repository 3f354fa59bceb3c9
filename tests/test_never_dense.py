"""No array of the shape of a weight exists in forward, backward or update."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import pytest
import reference

from sct_jax import decode, model
from sct_jax.training import optimizer_config
from sct_jax.training import state as state_lib
from sct_jax.training import step as step_lib

BATCH, LENGTH = 3, 7
# All sizes of matrices and activations differ.
SPECTRAL = model.ModelConfig(
    d_model=40,
    d_ff=56,
    num_layers=2,
    num_heads=10,
    num_kv_heads=2,
    vocab_size=97,
    rank=5,
    spectral=(*model.BLOCK_MATRICES, "embedding", "head"),
    tie_embeddings=False,
)
CONFIGS = {
    "scanned": SPECTRAL,
    "unrolled": dataclasses.replace(SPECTRAL, scan_layers=False),
    "tied": dataclasses.replace(
        SPECTRAL,
        tie_embeddings=True,
        spectral=(*model.BLOCK_MATRICES, "embedding"),
    ),
    "rematerialised": dataclasses.replace(SPECTRAL, remat="full"),
    "bfloat16": dataclasses.replace(SPECTRAL, compute_dtype="bfloat16"),
}


def batch():
    tokens = jnp.ones((BATCH, LENGTH), jnp.int32)
    return {"inputs": tokens, "targets": tokens, "segment_ids": tokens}


@functools.cache
def abstract_params(config):
    """Shapes as of `model.init`, without the retraction, which takes long to trace."""

    def draw(key):
        block = model.init_block(key, config, layers=(config.num_layers,))
        params = model.init_ends(key, config) | {"layers": block}
        return params if config.scan_layers else model.unstack_layers(params)

    return jax.eval_shape(draw, jax.random.key(0))


def forward(config):
    params = abstract_params(config)
    fn = lambda params: step_lib.loss_fn(params, batch(), config)
    return jax.make_jaxpr(fn)(params)


def backward(config):
    params = abstract_params(config)
    fn = jax.value_and_grad(lambda p: step_lib.loss_fn(p, batch(), config))
    return jax.make_jaxpr(fn)(params)


def step(config, num_microbatches=1, **changes):
    optimizer = {"max_update_norm": 0.1, "weight_decay": 0.1, "grad_clip": 1.0}
    tx = optimizer_config.Sct(**(optimizer | changes)).build(10)
    params = abstract_params(config)
    opt_state = jax.eval_shape(tx.init, params)
    train = step_lib.make_train_step(config, tx, num_microbatches=num_microbatches)

    def fn(params, opt_state):
        state = state_lib.start(params, tx).replace(opt_state=opt_state)
        return train(state, batch(), jnp.array(True))

    return jax.make_jaxpr(fn)(params, opt_state)


def generation(config):
    """Reading prompts, and one more token, with both kinds of cache."""

    def fn(params, tokens):
        params = decode.prepare(params, config)
        found = []
        for latent in (False, True):
            cache = decode.init_cache(
                params, config, batch=BATCH, slots=LENGTH + 1, latent=latent
            )
            lengths = jnp.full(BATCH, LENGTH)
            _, cache = decode.prefill(params, tokens, lengths, cache, config)
            found.append(decode.advance(params, tokens[:, 0], cache, config))
        return found

    return jax.make_jaxpr(fn)(abstract_params(config), batch()["inputs"])


def initialisation(config):
    init = lambda key: model.init(key, config)
    jaxpr, shape = jax.make_jaxpr(init, return_shape=True)(jax.random.key(0))
    assert shape == abstract_params(config)
    return jaxpr


def shapes(jaxpr):
    """Shapes of every intermediate result."""
    found = set()
    for equation in reference.equations(jaxpr):
        for variable in equation.outvars:
            shape = getattr(variable.aval, "shape", ())
            found.add(tuple(shape))
    return found


def dense_shapes(config, jaxpr):
    """Results with the shape of a weight, transposed or stacked."""
    forbidden = set()
    for fan_in, fan_out in config.matrix_shapes().values():
        forbidden |= {(fan_in, fan_out), (fan_out, fan_in)}
    return {shape for shape in shapes(jaxpr) if shape[-2:] in forbidden}


def test_no_activation_has_the_shape_of_a_weight():
    """Otherwise the tests below would prove nothing."""
    d, f = SPECTRAL.d_model, SPECTRAL.d_ff
    g = SPECTRAL.num_kv_heads * SPECTRAL.head_size
    rows = {BATCH * LENGTH, LENGTH, BATCH, SPECTRAL.num_heads, SPECTRAL.num_kv_heads}
    sizes = {d, f, g, SPECTRAL.vocab_size}
    assert len(sizes) == 4
    assert not rows & sizes
    assert not {SPECTRAL.rank, 2 * SPECTRAL.rank} & sizes


@pytest.mark.parametrize(
    ("trace", "name"),
    [
        *itertools.product([forward, backward, generation, initialisation], CONFIGS),
        # The other configs differ from these only in the gradient.
        *itertools.product([step], ["scanned", "unrolled", "tied"]),
    ],
)
def test_no_intermediate_has_the_shape_of_a_weight(trace, name):
    config = CONFIGS[name]
    assert not dense_shapes(config, trace(config))


@pytest.mark.parametrize("retraction", ["qr", "polar", "svd"])
def test_nor_with_another_retraction(retraction):
    jaxpr = step(SPECTRAL, retraction=retraction)
    assert not dense_shapes(SPECTRAL, jaxpr)
    # Only Householder QR calls a library, one matrix at a time to avoid deadlocks.
    assert reference.factorisations(jaxpr) == ({"qr"} if retraction == "qr" else set())


def test_nor_with_micro_batches():
    assert not dense_shapes(SPECTRAL, step(SPECTRAL, num_microbatches=3))


@pytest.mark.parametrize(
    ("trace", "matrix"),
    [*((backward, name) for name in model.MATRICES), (step, "q"), (step, "embedding")],
)
def test_the_walk_finds_the_gradient_of_a_single_dense_matrix(trace, matrix):
    rest = tuple(name for name in SPECTRAL.spectral if name != matrix)
    config = dataclasses.replace(SPECTRAL, spectral=rest)
    fan_in, fan_out = config.matrix_shapes()[matrix]
    found = {shape[-2:] for shape in dense_shapes(config, trace(config))}
    assert (fan_in, fan_out) in found


def test_the_walk_looks_into_scans_and_conditions():
    def fn(x):
        def body(carry, _):
            inner = lambda: jnp.sum(jnp.outer(x, carry))
            return jax.lax.cond(jnp.sum(x) > 0, inner, lambda: 0.0) + carry, None

        return jax.lax.scan(body, jnp.ones(56), None, length=3)[0]

    assert (40, 56) in shapes(jax.make_jaxpr(fn)(jnp.ones(40)))


@pytest.mark.parametrize("name", ["scanned", "unrolled", "tied"])
def test_nor_are_all_logits_or_all_scores_there_at_once(name):
    config, length = dataclasses.replace(CONFIGS[name], vocab_size=20_011), 4096
    ids = jnp.zeros((2, length), jnp.int32)
    tokens = {"inputs": ids, "targets": ids, "segment_ids": ids}
    fn = jax.value_and_grad(lambda p: step_lib.loss_fn(p, tokens, config))
    jaxpr = jax.make_jaxpr(fn)(abstract_params(config))
    found = shapes(jaxpr)
    assert not {shape for shape in found if shape.count(length) > 1}
    logits = ids.size * config.vocab_size
    assert max(math.prod(shape) for shape in found) < logits / 4
