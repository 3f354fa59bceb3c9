"""From the parameters of one model to those of another with less rank, in a run."""

import itertools

import jax
import jax.numpy as jnp

from sct_jax import compression, data, model
from sct_jax.training import state as state_lib
from sct_jax.training import trainer


def calibration_text(
    run: trainer.Trainer, corpus: data.Corpus, step: int, *, windows_before: int = 0
) -> compression.Text | None:
    """Returns the text that `truncated` needs, on the devices; None for "plain".

    It is what the run trains on next.

    Args:
      run: the trainer of the phase that starts.
      corpus: the text.
      step: steps so far.
      windows_before: see `data.train_batches`.
    """
    config = run.config
    if config.truncation.method == "plain":
        return None
    batches = data.train_batches(
        corpus,
        config.data,
        seed=config.seed,
        start_step=step,
        windows_before=windows_before,
        rows=run.rows,
    )
    taken = itertools.islice(batches, config.truncation.num_batches)
    placed = [run.place(batch) for batch in taken]
    documents = not config.data.cross_document_attention
    return compression.Text(
        tokens=[batch["inputs"] for batch in placed],
        segment_ids=[batch["segment_ids"] for batch in placed] if documents else None,
    )


def truncated(
    params: model.Params,
    shape: model.ModelConfig,
    run: trainer.Trainer,
    *,
    text: compression.Text | None,
) -> model.Params:
    """Returns the parameters of a trainer's model, from those of a larger one.

    Args:
      params: on the devices of the trainer.
      shape: of these parameters.
      run: the trainer of the phase that starts.
      text: from `calibration_text`.
    """
    return compression.truncate(
        params,
        shape,
        run.config.model,
        text=text,
        sequential=run.config.truncation.sequential,
        linear=run.linear,
        placement=run.placement,
    )


def switch(
    state: state_lib.TrainState,
    before: trainer.Trainer,
    after: trainer.Trainer,
    *,
    text: compression.Text | None,
) -> state_lib.TrainState:
    """Returns the state that a phase starts from, at the same step; consumes `state`.

    Args:
      state: at the end of a phase.
      before: the trainer of that phase.
      after: the trainer of the next one.
      text: from `calibration_text`.
    """
    step = jnp.copy(state.step)
    params = truncated(state.params, before.config.model, after, text=text)
    started = after.start(params)
    return started.replace(step=jax.device_put(step, started.step.sharding))
