"""One optimizer step and one evaluation step, as pure functions of the state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from sct_jax import losses, model, spectral
from sct_jax.training import state as state_lib

Batch = dict[str, Int[Array, "B L"]]
Metrics = dict[str, Float[Array, ""]]
TrainStep = Callable[
    [state_lib.TrainState, Batch, Bool[Array, ""]],
    tuple[state_lib.TrainState, Metrics],
]


def loss_fn(
    params: model.Params,
    batch: Batch,
    config: model.ModelConfig,
    *,
    linear: model.Linear = spectral.linear,
) -> Float[Array, ""]:
    """Returns the mean next-token loss of a batch, in nats per token."""
    logits = model.forward(
        params,
        batch["inputs"],
        config,
        segment_ids=batch.get("segment_ids"),
        linear=linear,
    )
    return losses.next_token_cross_entropy(logits, batch["targets"])


def make_train_step(
    config: model.ModelConfig,
    tx: optax.GradientTransformation,
    *,
    num_microbatches: int = 1,
    linear_at: Callable[[Int[Array, ""]], model.Linear] = lambda _: spectral.linear,
) -> TrainStep:
    """Returns `train_step(state, batch, diagnose) -> (state, metrics)`, to be jitted.

    Gradients of `num_microbatches` equal shares of the batch are averaged by a scan;
    factors are orthonormal throughout, as the retraction belongs to the update.

    Metrics are `loss` and `grad_norm` (before clipping) and, where there are factors,
    `orthonormality_error` and `composite_update_norm` of the applied update. Those two
    are computed where `diagnose` is true, and 0 elsewhere.

    Args:
      config: shape of the model.
      tx: the update rule.
      num_microbatches: divides the batch size.
      linear_at: what multiplies by the matrices of a layer, from the number of updates
        already applied: for methods that change the forward pass.
    """
    tx = optax.with_extra_args_support(tx)

    def accumulate(params, batch, linear):
        def value_and_grad(params, batch):
            return jax.value_and_grad(loss_fn)(params, batch, config, linear=linear)

        if num_microbatches == 1:
            return value_and_grad(params, batch)
        shares = _shares(batch, num_microbatches)

        def add(total, share):
            return jax.tree.map(jnp.add, total, value_and_grad(params, share)), None

        zeros = (jnp.zeros([]), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, zeros, shares)
        return jax.tree.map(lambda x: x / num_microbatches, total)

    def train_step(state, batch, diagnose):
        loss, grads = accumulate(state.params, batch, linear_at(state.step))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        metrics |= _diagnostics(state.params, params, diagnose)
        new_state = state_lib.TrainState(
            step=state.step + 1, params=params, opt_state=opt_state
        )
        return new_state, metrics

    return train_step


def make_eval_step(
    config: model.ModelConfig,
    *,
    num_microbatches: int = 1,
    linear: model.Linear = spectral.linear,
) -> Callable[[model.Params, Batch], Float[Array, ""]]:
    """Returns `eval_step(params, batch) -> loss` in nats per token, to be jitted.

    Args:
      config: the model.
      num_microbatches: how many shares of the batch go one after the other, so that
        evaluation fits into memory where training does.
      linear: what multiplies by the matrices of a layer, see `model.block`.
    """

    def eval_step(params, batch):
        share_loss = lambda share: loss_fn(params, share, config, linear=linear)
        if num_microbatches == 1:
            return share_loss(batch)
        return jnp.mean(jax.lax.map(share_loss, _shares(batch, num_microbatches)))

    return eval_step


def _shares(batch: Batch, count: int) -> dict[str, Int[Array, "N M L"]]:
    """The batch in N shares of M rows.

    Share i takes every count-th row: each device keeps its rows.
    """
    return jax.tree.map(
        lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch
    )


def _diagnostics(old: Any, new: Any, wanted: Bool[Array, ""]) -> Metrics:
    shapes = jax.eval_shape(diagnose, old, new)
    skip = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.cond(wanted, lambda: diagnose(old, new), skip)


def diagnose(old: Any, new: Any) -> Metrics:
    """Returns how far an update left the manifold, and how far it moved any W.

    `orthonormality_error` and `composite_update_norm` of two trees of parameters;
    nothing where there are no factors.
    """
    leaves = jax.tree.leaves(old, is_leaf=spectral.is_factors)
    if not any(map(spectral.is_factors, leaves)):
        return {}
    return {
        "orthonormality_error": spectral.orthonormality_error(new),
        "composite_update_norm": spectral.max_composite_update_norm(old, new),
    }
