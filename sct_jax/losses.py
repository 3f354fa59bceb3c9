"""Training losses, in nats per token."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real, Scalar

from sct_jax import remat

Head = Callable[[Any, Array], Array]  # parameters, x (..., D) -> logits (..., V)

TOKENS_PER_CHUNK = 1024


def next_token_cross_entropy(
    logits: Float[Array, "*B L V"],
    targets: Int[Array, "*B L"],
    *,
    mask: Real[Array, "*B L"] | Bool[Array, "*B L"] | None = None,
    z_loss: float = 0.0,
) -> Scalar:
    """Returns the mean negative log-likelihood of the targets, in nats per token.

    The mean is over the positions that count: those with a weight above 0 and a target
    of at least 0. Other positions change neither the loss nor its gradient, even if
    their logits are NaN. If none counts, the loss is 0. The loss is computed in
    float32.

    At a position that counts, a target of V or more makes the loss and the gradient
    NaN, and so does a weight that is negative or NaN.

    Args:
      logits: unnormalised scores.
      targets: token after each position. Any negative target, such as -100, marks a
        position to ignore.
      mask: weight of each position, of any real dtype or boolean. Defaults to 1
        everywhere.
      z_loss: weight of the mean of log(Z)^2, which keeps logits from drifting.

    Raises:
      ValueError: for a z_loss that is negative or not finite.

    References:
      Chowdhery et al., PaLM, arXiv 2204.02311, 2022, section 5 (z-loss)
    """
    _check_z_loss(z_loss)
    weights = _weights(targets, mask)
    return _summed_nats(logits, targets, weights, z_loss) / _total(weights)


def head_cross_entropy(
    head: Head,
    params: Any,
    x: Float[Array, "B L D"],
    targets: Int[Array, "B L"],
    *,
    mask: Real[Array, "B L"] | Bool[Array, "B L"] | None = None,
    z_loss: float = 0.0,
    tokens_per_chunk: int = TOKENS_PER_CHUNK,
    row_shards: int = 1,
) -> Scalar:
    """Returns `next_token_cross_entropy(head(params, x), targets)` without its logits.

    The logits exist for `tokens_per_chunk` tokens at a time. Under differentiation each
    chunk's gradient is computed beside its loss, so nothing is computed twice, and what
    is kept for the backward pass is the gradient of `params` and of `x`.

    Only the loss is differentiable, once, and only in `params` and `x`: derivatives do
    not reach what `head` closes over.

    Args:
      head: (params, x) -> logits (..., V), independent for every position.
      params: all parameters of the head; on a mesh, a copy for each shard along a first
        axis, see `sharding.Placement.copies`.
      x: what the head reads.
      targets: as in `next_token_cross_entropy`.
      mask: likewise.
      z_loss: likewise.
      tokens_per_chunk: rounded up to a whole number of positions of every sequence; on
        a mesh, of each shard.
      row_shards: number of parts of the batch that lie on different devices; divides B.
        Each sums the gradient of its copy of `params` over its own tokens.

    Raises:
      ValueError: for a z_loss that is negative or not finite, for a size below 1, or
        for shards that do not divide the batch.
    """
    _check_z_loss(z_loss)
    if tokens_per_chunk < 1:
        raise ValueError(f"tokens_per_chunk must be at least 1, got {tokens_per_chunk}")
    batch, length = targets.shape
    size = min(length, remat.chunk_size(tokens_per_chunk, batch, row_shards))
    weights = _weights(targets, mask)

    def of_rows(params: Any, *arrays: Array) -> Array:
        chunks = [remat.in_chunks(array, size) for array in arrays]
        return _chunked_nats(head, z_loss, params, *chunks)  # pyright: ignore

    arrays = [remat.in_parts(array, row_shards) for array in (x, targets, weights)]
    nats = remat.map_parts(of_rows, params, *arrays, parts=row_shards, join=jnp.sum)
    return nats / _total(weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked_nats(
    head: Head,
    z_loss: float,
    params: Any,
    x: Float[Array, "N B C D"],
    targets: Int[Array, "N B C"],
    weights: Float[Array, "N B C"],
) -> Scalar:
    """The weighted sum of the loss over all chunks."""

    def add(total, chunk):
        x, targets, weights = chunk
        return total + _summed_nats(head(params, x), targets, weights, z_loss), None

    return jax.lax.scan(add, jnp.zeros([]), (x, targets, weights))[0]


def _chunked_nats_fwd(head, z_loss, params, x, targets, weights):
    def add(carry, chunk):
        total, d_params = carry
        x, targets, weights = chunk

        def nats(params, x):
            return _summed_nats(head(params, x), targets, weights, z_loss)

        value, (of_params, of_x) = jax.value_and_grad(nats, (0, 1))(params, x)
        d_params = jax.tree.map(jnp.add, d_params, of_params)
        return (total + value, d_params), of_x

    zeros = remat.zeros_to_add_to(params)
    (total, d_params), d_x = jax.lax.scan(
        add, (jnp.zeros([]), zeros), (x, targets, weights)
    )
    d_params = jax.tree.map(lambda g, p: g.astype(p.dtype), d_params, params)
    return total, (d_params, d_x)


def _chunked_nats_bwd(head, z_loss, gradients, d_total):
    del head, z_loss
    scale = lambda g: (g * d_total).astype(g.dtype)
    d_params, d_x = jax.tree.map(scale, gradients)
    return d_params, d_x, None, None


_chunked_nats.defvjp(_chunked_nats_fwd, _chunked_nats_bwd)


def _check_z_loss(z_loss: float) -> None:
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be finite and at least 0, got {z_loss}")


def _weights(targets: Int[Array, "*B L"], mask: Array | None) -> Float[Array, "*B L"]:
    """The weight of each position, 0 where it does not count."""
    counts = targets >= 0
    if mask is None:
        return counts.astype(jnp.float32)
    mask = mask.astype(jnp.float32)
    return jnp.where(counts, jnp.where(mask < 0, jnp.nan, mask), 0)


def _total(weights: Float[Array, "*B L"]) -> Scalar:
    """What the weighted sum is divided by."""
    total = jnp.sum(weights)
    return jnp.where(total == 0, 1, total)


def _summed_nats(
    logits: Float[Array, "*B L V"],
    targets: Int[Array, "*B L"],
    weights: Float[Array, "*B L"],
    z_loss: float,
) -> Scalar:
    counts = weights != 0
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(_without_gradient_elsewhere(logits, counts), axis=-1)
    known = jnp.where(counts, targets, 0)
    chosen = jnp.take_along_axis(logits, known[..., None], axis=-1)[..., 0]
    nats = (log_z - chosen) * jnp.where(known < logits.shape[-1], 1, jnp.nan)
    if z_loss:
        nats = nats + z_loss * jnp.square(log_z)
    return jnp.sum(jnp.where(counts, nats, 0) * weights)


@jax.custom_jvp
def _without_gradient_elsewhere(
    logits: Float[Array, "*B L V"], counts: Bool[Array, "*B L"]
) -> Float[Array, "*B L V"]:
    """The logits, whose gradient is zero where a position does not count.

    A `where` on the logits has the same gradient, but costs a pass over them.
    """
    del counts
    return logits


@_without_gradient_elsewhere.defjvp
def _without_gradient_elsewhere_jvp(primals, tangents):
    logits, counts = primals
    return logits, jnp.where(counts[..., None], tangents[0], 0)
