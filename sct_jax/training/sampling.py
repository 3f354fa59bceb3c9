"""A sample of text from a model, for a look at what it has learned."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from sct_jax import data, model
from sct_jax.training import accounting

# A sample has at most this many tokens, and costs at most this many FLOPs.
_MAX_TOKENS = 96
_MAX_FLOPS = 1e12


def generate(
    params: model.Params,
    config: model.ModelConfig,
    prompt: Int[Array, " P"] | Sequence[int],
    *,
    key: PRNGKeyArray,
    num_tokens: int = _MAX_TOKENS,
    temperature: float = 0.8,
) -> Int[Array, " N"]:
    """Returns the prompt continued to `num_tokens` tokens, sampled one by one.

    There is no cache: each token costs a forward pass over the whole buffer. Its
    attention is "auto", since kernels that serve in training do not for any length.

    Args:
      params: the model.
      config: its shape.
      prompt: token ids.
      key: for sampling.
      num_tokens: length of the result, prompt included.
      temperature: divides the logits; 0 takes the likeliest token.

    Raises:
      ValueError: for a prompt that is empty, longer than `num_tokens`, or not one
        sequence.
    """
    prompt = jnp.asarray(prompt, jnp.int32)
    start = prompt.shape[0] if prompt.ndim == 1 else 0
    if not 0 < start <= num_tokens:
        raise ValueError(
            f"the prompt must be one sequence of 1 to num_tokens = {num_tokens} "
            f"tokens, but has shape {prompt.shape}"
        )
    config = dataclasses.replace(config, attention="auto")
    buffer = jnp.zeros(num_tokens, jnp.int32).at[:start].set(prompt)

    def extend(position, buffer):
        scores = model.forward(params, buffer[None], config)[0, position - 1]
        draw = jax.random.fold_in(key, position)
        warm = jax.random.categorical(draw, scores / jnp.maximum(temperature, 1e-6))
        token = jnp.where(temperature > 0, warm, jnp.argmax(scores))
        return buffer.at[position].set(token.astype(jnp.int32))

    return jax.lax.fori_loop(start, num_tokens, extend, buffer)


def sample_document(
    params: model.Params,
    config: model.ModelConfig,
    tokenizer: data.Tokenizer,
    *,
    seed: int,
) -> str:
    """Returns the start of a document, shorter for a model that is slow here."""
    per_token = accounting.flops_per_token(config, seq_len=_MAX_TOKENS) / 3
    length = max(16, min(_MAX_TOKENS, int((_MAX_FLOPS / per_token) ** 0.5)))
    ids = jax.jit(generate, static_argnums=1, static_argnames="num_tokens")(
        params,
        config,
        jnp.array([tokenizer.document_mark], jnp.int32),
        key=jax.random.key(seed),
        num_tokens=length,
    )
    return tokenizer.decode(np.asarray(ids).tolist())
