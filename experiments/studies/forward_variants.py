"""Methods that change the initial parameters or the forward pass of a model.

The model code of `sct_jax` stays unchanged. A variant prepares the initialised
parameters and replaces the function that multiplies by a matrix.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sct_jax import model, spectral

# Trials run on one device, where this is the fastest product.
_linear = functools.partial(spectral.linear, flatten_rows=True)


class Guided(NamedTuple):
    """A weight of self-guided training: a dense matrix beside its factors."""

    dense: Float[Array, "*layers I O"]
    factors: spectral.LowRankFactors


@dataclasses.dataclass(frozen=True)
class ForwardVariant:
    """How a method departs from the plain model.

    Attributes:
      prepare: maps initialised parameters to trained ones.
      linear: multiplies by a matrix.
      guided_linear: maps the share of a dense path, in [0, 1], to a `linear` that mixes
        it in; None without such a path.
      factors: the kind of factors that the variant needs, None for any.
      is_linear: whether a weight multiplies by some W. Only then do singular values and
        changes of W mean anything.
    """

    prepare: Callable[[model.Params], model.Params] = lambda params: params
    linear: model.Linear = _linear
    guided_linear: Callable[[Float[Array, ""]], model.Linear] | None = None
    factors: str | None = None
    is_linear: bool = True


def unit_spectrum(params: model.Params) -> model.Params:
    """Returns the parameters with s = 1 in every SpectralFactors.

    The initialisation of the reference code of SCT, arXiv 2604.00733.
    """
    return _map_weights(
        spectral.is_spectral, lambda w: w._replace(s=jnp.ones_like(w.s)), params
    )


def guide(params: model.Params) -> model.Params:
    """Returns the parameters with a dense copy beside every LowRankFactors."""
    return _map_weights(
        lambda w: isinstance(w, spectral.LowRankFactors),
        lambda w: Guided(spectral.to_dense(w), w),
        params,
    )


def unguided_linear(x: Float[Array, "... I"], w: Any) -> Float[Array, "... O"]:
    """Returns x @ a @ b.T for a guided weight, x @ W for any other."""
    return _linear(x, w.factors if isinstance(w, Guided) else w)


def guided_linear(share: Float[Array, ""]) -> model.Linear:
    """Returns the product y = share x D + (1 - share) x a b.T, with the dense path D.

    References:
      Wei et al., Building on efficient foundations: effectively training LLMs with
      structured feedforward layers, arXiv 2406.16450, 2024 (self-guided training)
    """

    def linear(x, w):
        if not isinstance(w, Guided):
            return _linear(x, w)
        mixed = share.astype(x.dtype)
        return mixed * _linear(x, w.dense) + (1 - mixed) * _linear(x, w.factors)

    return linear


def guide_share(step: Float[Array, ""], fade_steps: int) -> Float[Array, ""]:
    """Returns the share of the dense path: a cosine from 1 to 0 over `fade_steps`."""
    progress = jnp.clip(step / max(fade_steps, 1), 0.0, 1.0)
    return 0.5 * (1 + jnp.cos(math.pi * progress))


def cola_linear(x: Float[Array, "... I"], w: Any) -> Float[Array, "... O"]:
    """Returns silu(x a) b.T for LowRankFactors: an auto-encoder instead of a matrix.

    References:
      Liu et al., CoLA: compute-efficient pre-training of LLMs via low-rank activation,
      arXiv 2502.10940, 2025
    """
    if not isinstance(w, spectral.LowRankFactors):
        return _linear(x, w)
    rows = x.reshape(-1, x.shape[-1])
    y = spectral.expand(jax.nn.silu(spectral.contract(rows, w)), w)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _map_weights(is_weight, change, params):
    return jax.tree.map(
        lambda w: change(w) if is_weight(w) else w, params, is_leaf=spectral.is_factors
    )


FORWARD_VARIANTS = {
    "plain": ForwardVariant(),
    "unit_spectrum": ForwardVariant(prepare=unit_spectrum, factors="spectral"),
    "self_guided": ForwardVariant(
        prepare=guide,
        linear=unguided_linear,
        guided_linear=guided_linear,
        factors="low_rank",
    ),
    "cola": ForwardVariant(linear=cola_linear, factors="low_rank", is_linear=False),
}
