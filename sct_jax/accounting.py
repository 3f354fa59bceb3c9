"""Exact parameters, bytes and FLOPs of a model and its step, from shapes alone."""

import dataclasses
import math
from typing import Any

import jax
import optax

from sct_jax import layerwise, model, spectral, train_state


def count(tree: Any) -> int:
    """Returns the number of entries of all leaves (arrays or abstract arrays)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Any) -> int:
    """Returns the size in bytes of all leaves (arrays or abstract arrays)."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def dense_config(config: model.ModelConfig) -> model.ModelConfig:
    """Returns the same model with every matrix dense."""
    return dataclasses.replace(
        config,
        spectral=(),
        ranks=model.MatrixRanks(),
        rank_ratios=model.MatrixRankRatios(),
    )


def block_parameters(config: model.ModelConfig) -> int:
    """Returns the number of parameters of one layer: seven matrices and its norms."""
    return count(
        jax.eval_shape(lambda key: model.draw_block(key, config), jax.random.key(0))
    )


def parameters(config: model.ModelConfig) -> int:
    """Returns the number of stored parameters of the whole model."""
    return count(jax.eval_shape(lambda key: model.init(key, config), jax.random.key(0)))


def matrix_flops(config: model.ModelConfig, name: str) -> int:
    """Returns the forward FLOPs per token of one matrix, 2 per multiply-add.

    A dense embedding is a look-up and costs none; a factorised one costs its v.
    """
    fan_in, fan_out = config.matrix_shapes()[name]
    rank = config.matrix_rank(name)
    if name == "embedding":
        return 0 if rank is None else 2 * rank * fan_out
    return 2 * fan_in * fan_out if rank is None else 2 * rank * (fan_in + fan_out)


def head_flops(config: model.ModelConfig) -> int:
    """Returns the forward FLOPs per token of the head, tied or not."""
    if not config.tie_embeddings:
        return matrix_flops(config, "head")
    rank = config.matrix_rank("embedding")
    if rank is None:
        return 2 * config.d_model * config.vocab_size
    return 2 * rank * (config.d_model + config.vocab_size)


def block_flops(config: model.ModelConfig, *, seq_len: int) -> int:
    """Returns the forward FLOPs per token of one layer, causal attention at half."""
    matrices = sum(matrix_flops(config, name) for name in model.BLOCK_MATRICES)
    # Scores and weighted values, 2 FLOPs each, over half of the keys on average.
    return matrices + 2 * seq_len * config.d_model


def flops_per_token(config: model.ModelConfig, *, seq_len: int) -> int:
    """Returns the training FLOPs per token: forward, and backward at twice that.

    Matrix products alone, 2 per multiply-add, head included; recomputation under
    rematerialisation and the optimizer are not counted.
    """
    forward = (
        config.num_layers * block_flops(config, seq_len=seq_len)
        + matrix_flops(config, "embedding")
        + head_flops(config)
    )
    return 3 * forward


def step_bytes(
    config: model.ModelConfig, tx: optax.GradientTransformation
) -> dict[str, int]:
    """Returns bytes of parameters, gradients and optimizer state, and their total.

    Over all devices; activations are not included.
    """
    state = train_state.abstract(config, tx)
    sizes = {
        "parameters": num_bytes(state.params),
        "gradients": num_bytes(state.params),
        "optimizer": num_bytes(state.opt_state),
    }
    return sizes | {"total": sum(sizes.values())}


def matrix_bytes(fan_in: int, fan_out: int, rank: int | None) -> int:
    """Returns bytes to train one matrix by Adam in float32; rank None: a dense one.

    Weight, gradient and two moments, 16 bytes for each of R (I + O + 1) or I O numbers.

    References:
      Kohlberger et al., Spectral Compact Training, arXiv 2604.00733, 2026 (the table of
      memory per layer)
    """
    if rank is None:
        return 16 * fan_in * fan_out
    return 16 * rank * (fan_in + fan_out + 1)


def layerwise_bytes(
    stack: layerwise.Stack, tx: optax.GradientTransformation, batch: Any
) -> dict[str, int]:
    """Returns the bytes of a step of `layerwise`, and their total.

    The state, the gradients of one layer (or of the ends), what the forward pass leaves
    for the backward pass, and what the backward pass of one block holds beside its
    weights. Temporary copies inside of a compiled function are not included.

    Args:
      stack: the model.
      tx: the chain.
      batch: arrays or abstract arrays.
    """
    step = layerwise.make_train_step(stack, tx)
    state = jax.eval_shape(step.init, jax.random.key(0))
    layer, ends = state.params["layers"][0], state.params | {"layers": ()}
    tape = jax.eval_shape(step.forward, state.params, batch)

    def pull_back(layer, x, batch):
        block = lambda layer, x: stack.block(layer, x, batch, spectral.linear)
        return jax.vjp(block, layer, x)[1]

    kept = num_bytes(jax.eval_shape(pull_back, layer, tape.streams[0], batch))
    sizes = {
        "parameters": num_bytes(state.params),
        "optimizer": num_bytes(state.opt_state),
        "gradients": max(num_bytes(layer), num_bytes(ends)),
        "streams": num_bytes(tape.streams) + num_bytes(tape.bottlenecks),
        "block": max(0, kept - num_bytes(layer)),
    }
    return sizes | {"total": sum(sizes.values())}


def summary(
    config: model.ModelConfig, tx: optax.GradientTransformation, *, seq_len: int
) -> dict[str, Any]:
    """Returns what `summary.json` holds: the counts of this model, as integers."""
    return {
        "parameters": parameters(config),
        "dense_equivalent_parameters": parameters(dense_config(config)),
        "flops_per_token": flops_per_token(config, seq_len=seq_len),
        "bytes": step_bytes(config, tx),
    }
