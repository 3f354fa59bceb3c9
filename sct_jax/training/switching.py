"""From the parameters of one model to those of another with less rank, in a run."""

import itertools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sct_jax import compression, data, model, spectral, transforms
from sct_jax.training import state as state_lib
from sct_jax.training import trainer

T = TypeVar("T")  # an optimizer state


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
    carry_momentum: bool = False,
) -> state_lib.TrainState:
    """Returns the state that a phase starts from, at the same step; consumes `state`.

    Args:
      state: at the end of a phase.
      before: the trainer of that phase.
      after: the trainer of the next one.
      text: from `calibration_text`.
      carry_momentum: see `phases.PhasesConfig`.
    """
    step, means = jnp.copy(state.step), {}
    if carry_momentum:
        means = first_moments(state.opt_state, state.params)
    params = truncated(state.params, before.config.model, after, text=text)
    started = after.start(params)
    started = started.replace(step=jax.device_put(step, started.step.sharding))
    if not means:
        return started
    project = jax.jit(
        project_momentum,
        out_shardings=jax.tree.map(lambda x: x.sharding, started.opt_state),
    )
    opt_state = project(started.opt_state, started.params, means)
    return started.replace(opt_state=opt_state)


Means = dict[tuple[str, ...], Float[Array, "*layers I O"]]  # by the names of a path


def first_moments(opt_state: Any, params: model.Params) -> Means:
    """Returns the means of gradients in an optimizer state, by parameter."""
    found: Means = {}

    def collect(mirror: Any) -> Any:
        for path, leaf in jax.tree_util.tree_leaves_with_path(mirror):
            found[transforms.key_names(path)] = leaf
        return mirror

    transforms.map_first_moments(opt_state, params, collect)
    return found


def project_momentum(opt_state: T, params: model.Params, means: Means) -> T:
    """Returns an optimizer state with the momentum of W as that of u and v.

    The mean of gradients G of W gives that of u by the chain rule, as gradients do: it
    is G v diag(s). That of s stays zero, as Adam corrects it by the number of its
    steps, which starts anew.

    Args:
      opt_state: of a chain with `transforms.scale_by_stiefel_muon`, at its start.
      params: of that chain.
      means: from `first_moments` of dense weights with the same names.
    """
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=spectral.is_spectral)
    weights = {transforms.key_names(path): w for path, w in nodes}

    def project(path, node):
        names = transforms.key_names(path)
        if not spectral.is_spectral(node) or names not in means:
            return node
        (moved,) = jax.vjp(spectral.to_dense, weights[names])[1](means[names])
        return moved._replace(s=node.s)

    return transforms.map_first_moments(
        opt_state,
        params,
        lambda mirror: jax.tree_util.tree_map_with_path(
            project, mirror, is_leaf=spectral.is_spectral
        ),
    )
