"""Exact counts of parameters, bytes and FLOPs, from shapes alone."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax

from sct_jax import model, sharding
from sct_jax.training import layerwise, liveness
from sct_jax.training import state as state_lib
from sct_jax.training import step as step_lib


def count(tree: Any) -> int:
    """Returns the number of entries in all leaves, arrays or abstract arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Any) -> int:
    """Returns the bytes of all leaves, arrays or abstract arrays."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def dense_config(config: model.ModelConfig) -> model.ModelConfig:
    """Returns the configuration with every matrix dense."""
    return dataclasses.replace(
        config,
        spectral=(),
        ranks=model.MatrixRanks(),
        rank_ratios=model.MatrixRankRatios(),
        num_blocks=1,
        blocks=model.MatrixBlocks(),
    )


def at_ranks(config: model.ModelConfig, ranks: Mapping[str, int]) -> model.ModelConfig:
    """Returns the configuration whose matrices have these ranks.

    Args:
      config: the model.
      ranks: by name of a weight, from `rank.stored_ranks`. Layers that are apart may
        differ in a matrix; it then gets their mean, rounded.
    """
    of_matrix: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        of_matrix.setdefault(name.rpartition("/")[2], []).append(rank)
    means = {name: round(np.mean(found)) for name, found in of_matrix.items()}
    return dataclasses.replace(config, ranks=dataclasses.replace(config.ranks, **means))


def block_parameters(config: model.ModelConfig) -> int:
    """Returns the number of parameters of one layer: seven matrices and the norms."""
    return count(
        jax.eval_shape(lambda key: model.init_block(key, config), jax.random.key(0))
    )


def parameters(config: model.ModelConfig) -> int:
    """Returns the number of stored parameters of the model."""
    stacked = dataclasses.replace(config, scan_layers=True)  # faster to trace
    return count(jax.eval_shape(lambda k: model.init(k, stacked), jax.random.key(0)))


def matrix_flops(config: model.ModelConfig, name: str) -> int:
    """Returns the forward FLOPs per token of one matrix, 2 per multiply-add.

    A dense embedding is a lookup, at 0 FLOPs. A factorised one multiplies by v.
    """
    fan_in, fan_out = config.matrix_shapes()[name]
    rank = config.matrix_rank(name)
    if name == "embedding":
        return 0 if rank is None else 2 * rank * fan_out
    return 2 * fan_in * fan_out if rank is None else 2 * rank * (fan_in + fan_out)


def head_flops(config: model.ModelConfig) -> int:
    """Returns the forward FLOPs per token of the head, tied or untied."""
    if not config.tie_embeddings:
        return matrix_flops(config, "head")
    rank = config.matrix_rank("embedding")
    if rank is None:
        return 2 * config.d_model * config.vocab_size
    return 2 * rank * (config.d_model + config.vocab_size)


def block_flops(config: model.ModelConfig, *, seq_len: int) -> int:
    """Returns the forward FLOPs per token of one layer, with causal attention."""
    matrices = sum(matrix_flops(config, name) for name in model.BLOCK_MATRICES)
    # Scores and weighted values: 2 FLOPs each, over half of the keys on average.
    return matrices + 2 * seq_len * config.num_heads * config.head_size


def flops_per_token(config: model.ModelConfig, *, seq_len: int) -> int:
    """Returns the training FLOPs per token: a backward pass costs two forward passes.

    Counts matrix products, head included, at 2 FLOPs per multiply-add. Does not count
    recomputation under rematerialisation, and the optimizer.
    """
    forward = (
        config.num_layers * block_flops(config, seq_len=seq_len)
        + matrix_flops(config, "embedding")
        + head_flops(config)
    )
    return 3 * forward


def step_bytes(
    config: model.ModelConfig,
    tx: optax.GradientTransformation,
    *,
    state: state_lib.TrainState | None = None,
) -> dict[str, int]:
    """Returns the bytes of parameters, gradients and optimizer state, and their total.

    Sums over all devices. Does not count activations, see `activation_bytes`.

    Args:
      config: the model.
      tx: the chain.
      state: abstract state of both, if it is known already.
    """
    state = state_lib.abstract(config, tx) if state is None else state
    sizes = {
        "parameters": num_bytes(state.params),
        "gradients": num_bytes(state.params),
        "optimizer": num_bytes(state.opt_state),
    }
    return sizes | {"total": sum(sizes.values())}


def activation_bytes(
    config: model.ModelConfig,
    tx: optax.GradientTransformation,
    *,
    rows: int,
    seq_len: int,
    num_microbatches: int = 1,
    platform: str = "cpu",
) -> int:
    """Returns the most bytes of one device's step beside its state and gradients.

    These are residuals of the backward pass, temporaries of a block's backward pass or
    of a chunk of the head, and whatever the update needs on top of the gradients. They
    are read off the traced step (see `liveness`), so they follow its code.

    Together with one gradient per parameter this is the compiler's own figure
    (`memory_analysis().temp_size_in_bytes` of the step with a donated state), to 15 %
    on CPU; where gradients outweigh activations it was up to 16 % more. There XLA
    computes products in float32, so bfloat16 takes 4 bytes, and it merges what separate
    layers recompute with what they computed, so `remat` saves nothing unless
    `scan_layers`. Figures for other platforms leave both out, and have not been
    measured.

    Divides nothing but the rows over devices: on a mesh that divides parameters too,
    temporaries of the size of a parameter count as a whole.

    Separate layers cost the same each, so four of them are traced at most.

    Args:
      config: the model; `remat = "auto"` is taken for "none".
      tx: the chain.
      rows: sequences of a batch on this device, all micro-batches together.
      seq_len: tokens per sequence.
      num_microbatches: divides `rows`.
      platform: of the device, as JAX names it.
    """
    on_cpu = platform == "cpu"
    if on_cpu and not config.scan_layers:
        config = dataclasses.replace(config, remat="none")

    def of_depth(num_layers: int) -> int:
        shallow = dataclasses.replace(config, num_layers=num_layers)
        state = state_lib.abstract(shallow, tx)
        tokens = jax.ShapeDtypeStruct((rows, seq_len), jnp.int32)
        batch = dict.fromkeys(("inputs", "targets", "segment_ids"), tokens)
        linear = model.linear_on(sharding.UNPLACED)
        step = step_lib.make_train_step(
            shallow,
            tx,
            num_microbatches=num_microbatches,
            linear_at=lambda _: linear,
        )
        traced = jax.make_jaxpr(step)(state, batch, True)
        peak = liveness.peak_bytes(
            traced, donated=len(jax.tree.leaves(state)), widen=on_cpu
        )
        return peak - num_bytes(state.params)

    depth = config.num_layers
    if config.scan_layers or depth <= 4:
        return max(0, of_depth(depth))
    two, four = of_depth(2), of_depth(4)
    return max(0, four + (four - two) * (depth - 4) // 2)


def matrix_bytes(fan_in: int, fan_out: int, rank: int | None) -> int:
    """Returns the bytes to train one matrix with Adam in float32.

    Weight, gradient and two moments take 16 bytes per parameter. There are I O
    parameters in a dense matrix (rank None), R (I + O + 1) in a spectral one.

    References:
      Kohlberger et al., Spectral Compact Training, arXiv 2604.00733, 2026 (table of
      memory per layer)
    """
    if rank is None:
        return 16 * fan_in * fan_out
    return 16 * rank * (fan_in + fan_out + 1)


def layerwise_bytes(
    stack: layerwise.Stack, tx: optax.GradientTransformation, batch: Any
) -> dict[str, int]:
    """Returns the peak bytes of a step of `layerwise` by kind, and their total.

    The state exists throughout. On top of it come, in turn, the head and loss, a block,
    and the embedding; the largest of the three counts. Each holds gradients (two of a
    tied embedding), what the forward pass saved for the backward pass ("streams"), and
    the residuals of its own forward pass ("activations"), for the head the most that
    exists beside its gradient. Other temporaries of compiled functions are not counted.

    Args:
      stack: the model.
      tx: the chain.
      batch: arrays or abstract arrays.
    """
    step = layerwise.make_train_step(stack, tx)
    state = jax.eval_shape(step.init, jax.random.key(0))
    params, layer = state.params, state.params["layers"][0]
    tape = jax.eval_shape(step.forward, params, batch)
    embedded, head = (
        {key: params[key] for key in keys}
        for keys in (stack.embed_keys, stack.head_keys)
    )
    tied = num_bytes({key: params[key] for key in embedded.keys() & head.keys()})
    stream, streams = tape.streams[0], num_bytes((tape.streams, tape.bottlenecks))
    linear = model.linear_on(sharding.UNPLACED)  # as in the step
    head_loss = lambda ends, x, batch: stack.head_loss(ends, x, batch, linear)
    block = lambda layer, x, batch: stack.block(layer, x, batch, linear)
    head_peak = liveness.peak_bytes(
        jax.make_jaxpr(jax.value_and_grad(head_loss, (0, 1)))(head, stream, batch)
    )
    moments = [
        {
            "gradients": gradients,
            "streams": streams_left,
            "activations": activations,
        }
        for gradients, streams_left, activations in (
            (num_bytes(head), streams, max(0, head_peak - num_bytes(head))),
            (
                tied + num_bytes(layer),
                streams,
                _residual_bytes(block, (layer, stream), batch),
            ),
            (
                tied + num_bytes(embedded),
                0,
                _residual_bytes(stack.embed, (embedded,), batch),
            ),
        )
    ]
    largest = max(moments, key=lambda sizes: sum(sizes.values()))
    sizes = {
        "parameters": num_bytes(params),
        "optimizer": num_bytes(state.opt_state),
    } | largest
    return sizes | {"total": sum(sizes.values())}


def _residual_bytes(
    function: Callable[..., Any], arguments: tuple[Any, ...], batch: Any
) -> int:
    """Bytes that the backward pass keeps, without the arguments and the batch."""

    def pull_back(arguments, batch):
        return jax.vjp(lambda *xs: function(*xs, batch), *arguments)[1]

    jaxpr = jax.make_jaxpr(pull_back)(arguments, batch).jaxpr
    inputs = set(jaxpr.invars)
    for equation in jaxpr.eqns:  # a product reads either order of the axes
        is_view = equation.primitive.name == "transpose"
        if is_view and inputs.issuperset(equation.invars):
            inputs.update(equation.outvars)
    kept = {v for v in jaxpr.outvars if isinstance(v, jax.extend.core.Var)}
    return num_bytes([v.aval for v in kept - inputs])


def summary(
    config: model.ModelConfig,
    tx: optax.GradientTransformation,
    *,
    seq_len: int,
    state: state_lib.TrainState | None = None,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Returns the counts of a model, as integers: the contents of `summary.json`.

    Args:
      config: the model.
      tx: the chain.
      seq_len: tokens per sequence.
      state: see `step_bytes`.
      sizes: bytes by kind, from `memory.Plan`. Defaults to `step_bytes`.
    """
    return {
        "parameters": parameters(config),
        "dense_equivalent_parameters": parameters(dense_config(config)),
        "flops_per_token": flops_per_token(config, seq_len=seq_len),
        "bytes": dict(sizes) if sizes else step_bytes(config, tx, state=state),
    }
