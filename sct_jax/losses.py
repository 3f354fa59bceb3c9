"""Training losses, in nats per token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Scalar


def next_token_cross_entropy(
    logits: Float[Array, "*B L V"],
    targets: Int[Array, "*B L"],
    *,
    mask: Float[Array, "*B L"] | None = None,
    z_loss: float = 0.0,
) -> Scalar:
    """Returns the mean negative log-likelihood of the targets, in nats per token.

    The loss is computed in float32. An all-zero mask gives 0.

    Args:
      logits: unnormalised scores.
      targets: token after each position.
      mask: weight of each position. Defaults to 1 everywhere.
      z_loss: weight of the mean of log(Z)^2, which keeps logits from drifting.

    References:
      Chowdhery et al., PaLM, arXiv 2204.02311, 2022, section 5 (z-loss)
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = log_z - chosen
    if z_loss:
        nats = nats + z_loss * jnp.square(log_z)
    if mask is None:
        return jnp.mean(nats)
    total = jnp.sum(mask)
    return jnp.sum(nats * mask) / jnp.where(total > 0, total, 1.0)
