"""What a run carries from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from sct_jax import model


class TrainState(flax.struct.PyTreeNode):
    """Parameters and optimizer state after `step` applied updates.

    Leaves are arrays, or what a tree map puts in their place: shapes, shardings.
    """

    step: Any
    params: Any
    opt_state: Any


def init(
    key: PRNGKeyArray,
    model_config: model.ModelConfig,
    tx: optax.GradientTransformation,
) -> TrainState:
    """Returns the state before the first update. Meant for jit with out_shardings."""
    params = model.init(key, model_config)
    return TrainState(
        step=jnp.zeros([], jnp.int32), params=params, opt_state=tx.init(params)
    )


def abstract(
    model_config: model.ModelConfig, tx: optax.GradientTransformation
) -> TrainState:
    """Returns shapes and dtypes of the state; allocates nothing."""
    return jax.eval_shape(lambda key: init(key, model_config, tx), jax.random.key(0))
