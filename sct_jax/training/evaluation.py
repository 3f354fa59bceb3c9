"""The held-out loss of a model, on the same text every time."""

import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sct_jax import data, model, sharding, spectral
from sct_jax.training import config as config_lib
from sct_jax.training import metrics
from sct_jax.training import step as step_lib


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> step_lib.Batch:
    """Returns a batch on the devices, its rows shared among them."""
    return jax.device_put(batch, NamedSharding(mesh, sharding.BATCH))


def make_evaluation(
    config: config_lib.ExperimentConfig,
    corpus: data.Corpus,
    mesh: Mesh,
    *,
    linear: model.Linear = spectral.linear,
) -> Callable[[model.Params], metrics.Row]:
    """Returns a function from parameters to the figures of the held-out text.

    These are `eval/loss` in nats per token, `eval/perplexity`, and `eval/bits_per_byte`
    of the text's UTF-8, which does not depend on the tokenizer.

    Args:
      config: its model, data and eval fields count.
      corpus: holds the text.
      mesh: where the batches go.
      linear: what multiplies by the matrices of a layer, see `model.block`.
    """
    batches = data.eval_batches(
        corpus,
        config.data,
        num_batches=config.eval.num_batches,
    )
    lengths = corpus.tokenizer.byte_lengths()
    num_bytes = sum(int(lengths[batch["targets"]].sum()) for batch in batches)
    num_tokens = sum(batch["targets"].size for batch in batches)
    eval_step = jax.jit(
        step_lib.make_eval_step(
            config.model, num_microbatches=config.data.num_microbatches, linear=linear
        )
    )
    placed = [to_devices(batch, mesh) for batch in batches]

    def evaluate(params: model.Params) -> metrics.Row:
        losses = [eval_step(params, batch) for batch in placed]
        loss = float(np.mean([float(value) for value in losses]))
        return {
            "eval/loss": loss,
            # A diverged run is a row too, not an overflow.
            "eval/perplexity": math.exp(min(loss, 700.0)),
            "eval/bits_per_byte": loss * num_tokens / num_bytes / math.log(2),
        }

    return evaluate
