"""Training losses, in nats per token."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real, Scalar


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
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be finite and at least 0, got {z_loss}")
    counts = targets >= 0
    if mask is not None:
        mask = mask.astype(jnp.float32)
        counts &= mask != 0
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(_without_gradient_elsewhere(logits, counts), axis=-1)
    known = jnp.where(counts, targets, 0)
    chosen = jnp.take_along_axis(logits, known[..., None], axis=-1)[..., 0]
    nats = (log_z - chosen) * jnp.where(known < logits.shape[-1], 1, jnp.nan)
    if z_loss:
        nats = nats + z_loss * jnp.square(log_z)
    nats = jnp.where(counts, nats, 0)
    if mask is None:
        number = jnp.sum(counts, dtype=jnp.int32).astype(jnp.float32)
        return jnp.sum(nats) / jnp.maximum(number, 1)
    weights = jnp.where(counts, jnp.where(mask < 0, jnp.nan, mask), 0)
    total = jnp.sum(weights)
    return jnp.sum(nats * weights) / jnp.where(total == 0, 1, total)


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
