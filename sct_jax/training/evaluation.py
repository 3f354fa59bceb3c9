"""The held-out loss of a model, on the same text every time."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from sct_jax import data
from sct_jax.training import config as config_lib
from sct_jax.training import metrics
from sct_jax.training import step as step_lib


class HeldOut(NamedTuple):
    """Held-out text, ready to be evaluated on.

    Attributes:
      batches: on the devices, each (B, L).
      num_tokens: predicted tokens in all batches.
      num_bytes: bytes of their text in UTF-8.
    """

    batches: Sequence[step_lib.Batch]
    num_tokens: int
    num_bytes: int


def held_out(
    config: config_lib.ExperimentConfig,
    corpus: data.Corpus,
    place: Callable[[dict[str, np.ndarray]], Any],
) -> HeldOut:
    """Returns the text that a run is evaluated on, spread over the validation split.

    Args:
      config: only `data` and `eval.num_batches` are used.
      corpus: holds the text.
      place: puts a batch on the devices.
    """
    batches = data.eval_batches(
        corpus, config.data, num_batches=config.eval.num_batches
    )
    lengths = corpus.tokenizer.byte_lengths()
    return HeldOut(
        batches=[place(batch) for batch in batches],
        num_tokens=sum(batch["targets"].size for batch in batches),
        num_bytes=sum(int(lengths[batch["targets"]].sum()) for batch in batches),
    )


def summarise(losses: Sequence[Float[Array, ""]], text: HeldOut) -> metrics.Row:
    """Returns `eval/loss`, `eval/perplexity` and `eval/bits_per_byte`.

    The loss is in nats per token. Bits per byte of UTF-8 do not depend on the
    tokenizer.

    Args:
      losses: of each batch of `text`, in nats per token.
      text: the text that was evaluated.
    """
    loss = float(np.mean([float(value) for value in losses]))
    return {
        "eval/loss": loss,
        # A diverged run gets a row too, not an overflow.
        "eval/perplexity": math.exp(min(loss, 700.0)),
        "eval/bits_per_byte": loss * text.num_tokens / text.num_bytes / math.log(2),
    }
