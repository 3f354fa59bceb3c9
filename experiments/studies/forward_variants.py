"""Methods to compare with that change the start, or the forward pass, of a model.

Each is a `Method`: what it makes of freshly drawn parameters, and what multiplies by
the matrices of a layer. `experiments.trial` trains with it; the model itself is that of
`sct_jax`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sct_jax import model, spectral


class Guided(NamedTuple):
    """A weight of self-guided training: a dense matrix beside its factors."""

    dense: Float[Array, "*layers I O"]
    factors: spectral.LowRankFactors


@dataclasses.dataclass(frozen=True)
class Method:
    """How a method differs from training the model as it is.

    Attributes:
      prepare: from drawn parameters to those that are trained.
      linear: what multiplies by the matrices of a layer.
      guided_linear: the same while a dense path is mixed in, from its share in [0, 1];
        None where there is none.
      factors: kind of factors that it needs, None for any.
      is_linear: whether a weight multiplies by its W, so that singular values and
        changes of W mean something.
    """

    prepare: Callable[[model.Params], model.Params] = lambda params: params
    linear: model.Linear = spectral.linear
    guided_linear: Callable[[Float[Array, ""]], model.Linear] | None = None
    factors: str | None = None
    is_linear: bool = True


def unit_spectrum(params: model.Params) -> model.Params:
    """Returns the parameters with s = 1 in every SpectralFactors.

    The start of the reference code of SCT, arXiv 2604.00733.
    """
    return _map_weights(
        spectral.is_spectral, lambda w: w._replace(s=jnp.ones_like(w.s)), params
    )


def guide(params: model.Params) -> model.Params:
    """Returns the parameters with a dense copy of every LowRankFactors beside it."""
    return _map_weights(
        lambda w: isinstance(w, spectral.LowRankFactors),
        lambda w: Guided(spectral.to_dense(w), w),
        params,
    )


def unguided_linear(x: Float[Array, "... I"], w: Any) -> Float[Array, "... O"]:
    """Returns x @ a @ b.T of a guided weight, x @ W of any other."""
    return spectral.linear(x, w.factors if isinstance(w, Guided) else w)


def guided_linear(share: Float[Array, ""]) -> model.Linear:
    """Returns y = share x D + (1 - share) x a b.T as a `linear`, D the dense path.

    References:
      Wei et al., Building on efficient foundations: effectively training LLMs with
      structured feedforward layers, arXiv 2406.16450, 2024 (self-guided training)
    """

    def linear(x, w):
        if not isinstance(w, Guided):
            return spectral.linear(x, w)
        mixed = share.astype(x.dtype)
        return mixed * spectral.linear(x, w.dense) + (1 - mixed) * spectral.linear(
            x, w.factors
        )

    return linear


def guide_share(step: Float[Array, ""], fade_steps: int) -> Float[Array, ""]:
    """Returns the share of the dense path: a cosine from 1 to 0 over `fade_steps`."""
    progress = jnp.clip(step / max(fade_steps, 1), 0.0, 1.0)
    return 0.5 * (1 + jnp.cos(math.pi * progress))


def cola_linear(x: Float[Array, "... I"], w: Any) -> Float[Array, "... O"]:
    """Returns silu(x a) b.T for LowRankFactors: an auto-encoder in the place of W.

    References:
      Liu et al., CoLA: compute-efficient pre-training of LLMs via low-rank activation,
      arXiv 2502.10940, 2025
    """
    if not isinstance(w, spectral.LowRankFactors):
        return spectral.linear(x, w)
    rows = x.reshape(-1, x.shape[-1])
    y = spectral.expand(jax.nn.silu(spectral.contract(rows, w)), w)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _map_weights(is_weight, change, params):
    return jax.tree.map(
        lambda w: change(w) if is_weight(w) else w, params, is_leaf=spectral.is_factors
    )


METHODS = {
    "plain": Method(),
    "unit_spectrum": Method(prepare=unit_spectrum, factors="spectral"),
    "self_guided": Method(
        prepare=guide,
        linear=unguided_linear,
        guided_linear=guided_linear,
        factors="low_rank",
    ),
    "cola": Method(linear=cola_linear, factors="low_rank", is_linear=False),
}
