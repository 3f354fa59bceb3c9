"""The state that a run carries from step to step."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from sct_jax import model
from sct_jax.training import guard as guard_lib


class TrainState(flax.struct.PyTreeNode):
    """Parameters and optimizer state after `step` batches.

    Leaves are arrays, or their shapes or shardings in trees of those. `guard` counts
    the steps that were not applied.
    """

    step: Any
    params: Any
    opt_state: Any
    guard: Any


def start(params: model.Params, tx: optax.GradientTransformation) -> TrainState:
    """Returns the state of these parameters before the first update."""
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        opt_state=tx.init(params),
        guard=guard_lib.init(),
    )


def init(
    key: PRNGKeyArray,
    model_config: model.ModelConfig,
    tx: optax.GradientTransformation,
    *,
    init_params: Callable[[PRNGKeyArray], model.Params] | None = None,
) -> TrainState:
    """Returns the state before the first update. Jit it with `out_shardings`.

    Args:
      key: random key.
      model_config: shape of the model.
      tx: the update rule.
      init_params: key -> parameters; `model.init` if None.
    """
    if init_params is None:
        params = model.init(key, model_config)
    else:
        params = init_params(key)
    return start(params, tx)


def abstract(
    model_config: model.ModelConfig,
    tx: optax.GradientTransformation,
    *,
    init_params: Callable[[PRNGKeyArray], model.Params] | None = None,
) -> TrainState:
    """Returns the shapes and dtypes of `init`; allocates nothing."""
    return jax.eval_shape(
        lambda key: init(key, model_config, tx, init_params=init_params),
        jax.random.key(0),
    )
