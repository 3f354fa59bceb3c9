"""Exact parameters, bytes and FLOPs of a model and its step, from shapes alone."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import optax

from sct_jax import model, spectral
from sct_jax.training import layerwise
from sct_jax.training import state as state_lib


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
        jax.eval_shape(lambda key: model.init_block(key, config), jax.random.key(0))
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
    state = state_lib.abstract(config, tx)
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
    """Returns the bytes of a step of `layerwise` at its fullest moment, and the total.

    The state; and the most of what its moments hold beside it, which are the head and
    loss, a block, and the embedding: gradients (a tied embedding has two, one from
    either end), what the forward pass leaves for the backward pass ("streams"), and
    what the backward pass of this piece keeps of its own forward pass ("activations").
    Temporary copies inside of a compiled function are not included.

    Args:
      stack: the model.
      tx: the chain.
      batch: arrays or abstract arrays.
    """
    step = layerwise.make_train_step(stack, tx)
    state = jax.eval_shape(step.init, jax.random.key(0))
    params, layer = state.params, state.params["layers"][0]
    tape = jax.eval_shape(step.forward, params, batch)
    entering, leaving = (
        {key: params[key] for key in keys}
        for keys in (stack.enter_keys, stack.leave_keys)
    )
    lent = num_bytes({key: params[key] for key in entering.keys() & leaving.keys()})
    stream, streams = tape.streams[0], num_bytes((tape.streams, tape.bottlenecks))
    block = lambda layer, x, batch: stack.block(layer, x, batch, spectral.linear)
    moments = [
        {
            "gradients": gradients,
            "streams": streams_left,
            "activations": _bytes_for_pull_back(function, arguments, batch),
        }
        for gradients, streams_left, function, arguments in (
            (num_bytes(leaving), streams, stack.leave, (leaving, stream)),
            (lent + num_bytes(layer), streams, block, (layer, stream)),
            (lent + num_bytes(entering), 0, stack.enter, (entering,)),
        )
    ]
    fullest = max(moments, key=lambda sizes: sum(sizes.values()))
    sizes = {
        "parameters": num_bytes(params),
        "optimizer": num_bytes(state.opt_state),
    } | fullest
    return sizes | {"total": sum(sizes.values())}


def _bytes_for_pull_back(
    function: Callable[..., Any], arguments: tuple[Any, ...], batch: Any
) -> int:
    """What the backward pass of a function keeps, beside its arguments and batch."""

    def pull_back(arguments, batch):
        return jax.vjp(lambda *xs: function(*xs, batch), *arguments)[1]

    jaxpr = jax.make_jaxpr(pull_back)(arguments, batch).jaxpr
    there = set(jaxpr.invars)
    for equation in jaxpr.eqns:  # a product reads either order of the axes
        if equation.primitive.name == "transpose" and there.issuperset(equation.invars):
            there.update(equation.outvars)
    kept = {v for v in jaxpr.outvars if isinstance(v, jax.extend.core.Var)}
    return num_bytes([v.aval for v in kept - there])


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
