"""From the parameters of one model to those of another with less rank, in a run."""

import itertools
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sct_jax import compression, data, errors, model, spectral, transforms
from sct_jax.training import state as state_lib
from sct_jax.training import step as step_lib
from sct_jax.training import trainer

T = TypeVar("T")  # an optimizer state


def calibration_text(
    run: trainer.Trainer,
    corpus: data.Corpus,
    *,
    step: int,
    seed: int,
    windows_before: int = 0,
) -> compression.Text | None:
    """Returns the text that `truncated` needs, on the devices; None for "plain".

    It is what the run trains on next, in micro-batches as training takes it.

    Args:
      run: the trainer of the phase that starts.
      corpus: the text.
      step: steps so far.
      seed: of the run.
      windows_before: see `data.train_batches`.
    """
    config = run.config
    if config.truncation.method == "plain":
        return None
    batches = data.train_batches(
        corpus,
        config.data,
        seed=seed,
        start_step=step,
        windows_before=windows_before,
        rows=run.rows,
    )
    divide = jax.jit(step_lib.shares, static_argnums=1)
    number = config.data.num_microbatches
    parts = (
        jax.tree.map(lambda x, i=i: x[i], shares)
        for shares in (divide(run.place(batch), number) for batch in batches)
        for i in range(number)
    )
    fitting = config.truncation.max_tokens * number // config.data.tokens_per_step
    wanted = min(config.truncation.num_batches * number, max(fitting, 1))
    parts = list(itertools.islice(parts, wanted))
    documents = not config.data.cross_document_attention
    return compression.Text(
        tokens=[part["inputs"] for part in parts],
        segment_ids=[part["segment_ids"] for part in parts] if documents else None,
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

    Raises:
      UserError: where a decomposition does not converge.
    """
    smaller = compression.truncate(
        params,
        shape,
        run.config.model,
        text=text,
        sequential=run.config.truncation.sequential,
        linear=run.linear,
        placement=run.placement,
    )
    largest = float(trainer.largest_magnitude(smaller))
    errors.check(
        "truncation.method",
        math.isfinite(largest),
        "a singular value decomposition does not converge for these parameters; try "
        + ("'whitened'" if text is None else "'plain'"),
    )
    return smaller


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
      carry_momentum: see `phases.PhasesConfig`; without effect unless the phase that
        ends has dense weights and Muon.

    Raises:
      UserError: see `truncated`.
    """
    step, means = jnp.copy(state.step), {}
    if carry_momentum and before.config.optimizer.name == "muon":
        means = first_moments(state.opt_state, state.params)
    kept = {id(mean) for mean in means.values()}
    for moment in jax.tree.leaves(state.opt_state):
        if id(moment) not in kept:
            moment.delete()  # the memory serves the decompositions
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
