"""The training step and the evaluation step, as pure functions of the state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from sct_jax import model, sharding, spectral
from sct_jax.training import guard as guard_lib
from sct_jax.training import state as state_lib

Batch = dict[str, Int[Array, "B L"]]
Metrics = dict[str, Float[Array, ""]]
Diagnose = Callable[[Any, Any], Metrics]  # (old params, new params) -> scalars
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
    placement: sharding.Placement = sharding.UNPLACED,
) -> Float[Array, ""]:
    """Returns the mean next-token loss of a batch, in nats per token."""
    return model.loss(params, batch, config, linear=linear, placement=placement)


def diagnose(old: Any, new: Any) -> Metrics:
    """Returns the orthonormality error of the new parameters, and the largest update.

    `orthonormality_error` is max |x.T x - I| over all u and v, `composite_update_norm`
    the largest ||W' - W||_2. Returns an empty dict for parameters without factors.
    """
    leaves = jax.tree.leaves(old, is_leaf=spectral.is_factors)
    if not any(map(spectral.is_factors, leaves)):
        return {}
    return {
        "orthonormality_error": spectral.orthonormality_error(new),
        "composite_update_norm": spectral.max_composite_update_norm(old, new),
    }


def make_train_step(
    config: model.ModelConfig,
    tx: optax.GradientTransformation,
    *,
    num_microbatches: int = 1,
    linear_at: Callable[[Int[Array, ""]], model.Linear] = lambda _: spectral.linear,
    placement: sharding.Placement = sharding.UNPLACED,
    diagnose: Diagnose = diagnose,
    guard: guard_lib.Guard = guard_lib.DEFAULT,
) -> TrainStep:
    """Returns `train_step(state, batch, diagnose) -> (state, metrics)`; jit it.

    A scan averages the gradients of `num_microbatches` equal shares of the batch.
    Replicas of the parameters exchange their averages, once per step.
    Factors are orthonormal after every step, because the retraction is part of `tx`.

    Metrics are `loss`, `grad_norm` (before clipping), those of `guard`, and the results
    of the function `diagnose`. The latter are computed where the step's argument
    `diagnose` is true, and 0 elsewhere.

    Args:
      config: shape of the model.
      tx: the update rule.
      num_microbatches: divides the batch size.
      linear_at: number of steps so far -> function that multiplies by every matrix
        of the layers and the head, for methods that change the forward pass.
      placement: where arrays are on a mesh, as in `model.forward`. Needed for
        any layout but `sharding.UNAIDED`.
      diagnose: (old parameters, new parameters) -> dict of scalars to report.
      guard: decides which steps are applied.
    """
    tx = optax.with_extra_args_support(tx)

    def accumulate(params, batch, linear):
        def value_and_grad(params, batch):
            return jax.value_and_grad(loss_fn)(
                params, batch, config, linear=linear, placement=placement
            )

        if num_microbatches == 1:
            return value_and_grad(params, batch)

        def mean(params, parts):
            shares, weights = parts

            def add(total, part):
                share, weight = part
                found = value_and_grad(params, share)
                return jax.tree.map(lambda t, x: t + weight * x, total, found), None

            zeros = (jnp.zeros([]), jax.tree.map(jnp.zeros_like, params))
            total, _ = jax.lax.scan(add, zeros, (shares, weights[:, 0]))
            return jax.tree.map(lambda x: x / num_microbatches, total)

        parts = shares(batch, num_microbatches)
        weights = share_weights(parts["targets"], replicas=placement.num_replicas)
        return placement.on_each_replica(mean, params, (parts, weights))

    def diagnostics(old, new, wanted):
        shapes = jax.eval_shape(diagnose, old, new)
        skip = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.cond(wanted, lambda: diagnose(old, new), skip)

    def train_step(state, batch, wanted):
        loss, grads = accumulate(state.params, batch, linear_at(state.step))
        grad_norm = optax.tree.norm(grads)
        accepted = guard.accepts(state.guard, loss, grad_norm)

        def update():
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            return optax.apply_updates(state.params, updates), opt_state

        if guard.rejects:
            keep = lambda: (state.params, state.opt_state)
            params, opt_state = jax.lax.cond(accepted, update, keep)
        else:
            params, opt_state = update()
        guard_state, metrics = guard.after(
            state.guard, loss, grad_norm, accepted=accepted, logged=wanted
        )
        metrics |= {"loss": loss, "grad_norm": grad_norm}
        metrics |= diagnostics(state.params, params, wanted)
        new_state = state_lib.TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            guard=guard_state,
        )
        return new_state, metrics

    return train_step


def make_eval_step(
    config: model.ModelConfig,
    *,
    num_microbatches: int = 1,
    linear: model.Linear = spectral.linear,
    placement: sharding.Placement = sharding.UNPLACED,
) -> Callable[[model.Params, Batch], Float[Array, ""]]:
    """Returns `eval_step(params, batch) -> loss` in nats per token; jit it.

    Args:
      config: shape of the model.
      num_microbatches: number of shares of the batch, evaluated in sequence, so that
        evaluation fits into memory wherever training does.
      linear: multiplies by every matrix of the layers and the head.
      placement: where arrays are on a mesh, as in `model.forward`.
    """

    def eval_step(params, batch):
        share_loss = lambda share: loss_fn(
            params, share, config, linear=linear, placement=placement
        )
        if num_microbatches == 1:
            return share_loss(batch)
        parts = shares(batch, num_microbatches)
        weights = share_weights(parts["targets"])[:, 0]
        return jnp.mean(weights * jax.lax.map(share_loss, parts))

    return eval_step


def shares(batch: Batch, num_shares: int) -> dict[str, Int[Array, "N M L"]]:
    """Returns the batch in N shares of M rows, as micro-batches take it.

    Share i holds every N-th row, so that every device keeps its rows.
    """
    return jax.tree.map(
        lambda x: x.reshape(-1, num_shares, *x.shape[1:]).swapaxes(0, 1), batch
    )


def share_weights(
    targets: Int[Array, "N M L"], *, replicas: int = 1
) -> Float[Array, "N replicas"]:
    """Returns the weight of each share in the mean over all tokens; their mean is 1.

    Targets below zero count as no token, as in `model.loss`.

    Args:
      targets: from `shares`.
      replicas: parts of each share's rows, which have weights of their own.
    """
    of_replicas = targets.reshape(len(targets), replicas, -1)
    counts = jnp.sum(of_replicas >= 0, axis=-1, dtype=jnp.float32)
    return counts * counts.size / jnp.maximum(jnp.sum(counts), 1)  # 1 for equal counts
