"""A sample of text from a model, for a look at what it has learned."""

import jax

from sct_jax import data, decode, model, sampling
from sct_jax.training import accounting

# A sample has at most this many tokens, and costs about this many FLOPs at most.
_MAX_TOKENS = 96
_MAX_FLOPS = 1e12

_SAMPLER = sampling.SamplingConfig(temperature=0.8)


def sample_document(
    params: model.Params,
    config: model.ModelConfig,
    tokenizer: data.Tokenizer,
    *,
    seed: int,
) -> str:
    """Returns the start of a document, shorter for a model that is slow here."""
    per_token = accounting.flops_per_token(config, seq_len=_MAX_TOKENS) / 3
    count = max(16, min(_MAX_TOKENS, int(_MAX_FLOPS / per_token)))
    (ids,) = decode.generate(
        params,
        config,
        [[tokenizer.document_mark]],
        num_tokens=count,
        key=jax.random.key(seed),
        sampler=_SAMPLER,
        stop=tokenizer.stops,
    )
    return tokenizer.decode(ids)
