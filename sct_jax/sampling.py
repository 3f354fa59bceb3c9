"""Draws the next token from logits.

Each function maps logits (B, V) to logits (B, V) in which -inf excludes a token.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sct_jax import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn; the defaults draw from the model's own distribution.

    The order is repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: keeps the k likeliest tokens; None keeps all.
      top_p: keeps the fewest likeliest tokens whose probabilities sum to at least this.
      min_p: keeps tokens with at least this share of the largest probability.
      repetition_penalty: divides positive logits of tokens that occurred before, in
        the prompt too, and multiplies negative ones.

    References:
      Holtzman et al., The curious case of neural text degeneration, arXiv 1904.09751,
      2019 (top-p)
      Nguyen et al., Turning up the heat: min-p sampling, arXiv 2407.01082, 2024
      Keskar et al., CTRL, arXiv 1909.05858, 2019, section 4.1 (penalty)
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def validate(self, prefix: str = "") -> None:
        """Raises UserError naming the first invalid field, after `prefix`."""
        errors.check_bounds(prefix, self, "temperature", least=0, below=2**20)
        errors.check_float32(f"{prefix}temperature", self.temperature)
        errors.check_bounds(prefix, self, "top_k", least=1)
        errors.check_bounds(prefix, self, "top_p", above=0, most=1)
        errors.check_bounds(prefix, self, "min_p", least=0, most=1)
        errors.check_bounds(prefix, self, "repetition_penalty", above=0, below=2**20)


PLAIN = SamplingConfig()
"""Draws from the model's own distribution."""


def draw(
    key: PRNGKeyArray,
    logits_BV: Float[Array, "B V"],
    seen_BV: Bool[Array, "B V"],
    config: SamplingConfig,
) -> Int[Array, " B"]:
    """Returns one token per row.

    Args:
      key: random key; rows draw independently.
      logits_BV: unnormalised log-probabilities.
      seen_BV: tokens that the repetition penalty applies to.
      config: how to draw.
    """
    logits_BV = filtered(logits_BV.astype(jnp.float32), seen_BV, config)
    if config.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)


def filtered(
    logits_BV: Float[Array, "B V"],
    seen_BV: Bool[Array, "B V"],
    config: SamplingConfig,
) -> Float[Array, "B V"]:
    """Returns the logits of the distribution that `draw` draws from; the largest is 0.

    At temperature 0 they are only penalised.
    """
    if config.repetition_penalty != 1:
        logits_BV = penalise(logits_BV, seen_BV, config.repetition_penalty)
    if config.temperature == 0:
        return logits_BV
    # At most 0, as a quotient of two of them could be infinite.
    logits_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    logits_BV = logits_BV / config.temperature
    if config.top_k is not None:
        logits_BV = keep_top_k(logits_BV, config.top_k)
    if config.top_p < 1:
        logits_BV = keep_top_p(logits_BV, config.top_p)
    if config.min_p > 0:
        logits_BV = keep_min_p(logits_BV, config.min_p)
    return logits_BV


def penalise(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], penalty: float
) -> Float[Array, "B V"]:
    """Makes tokens that were seen less likely, for a penalty above 1."""
    lower = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, lower, logits_BV)


def keep_top_k(logits_BV: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Excludes all but the k likeliest tokens, and those as likely as the k-th."""
    k = min(k, logits_BV.shape[-1])
    least = jax.lax.top_k(logits_BV, k)[0][:, -1:]
    return jnp.where(logits_BV >= least, logits_BV, -jnp.inf)


def keep_top_p(logits_BV: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Keeps the fewest likeliest tokens with a probability of at least p in all."""
    ordered = -jnp.sort(-logits_BV, axis=-1)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(before < p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= least, logits_BV, -jnp.inf)


def keep_min_p(logits_BV: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """Excludes tokens less likely than p times the likeliest."""
    least = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(p)
    return jnp.where(logits_BV >= least, logits_BV, -jnp.inf)
