"""Pre-training of language models with permanently low-rank weights, in JAX.

This package imports the light layers: factors, manifold geometry, gradient
transformations, optimizers and the model. Import `sct_jax.data` and `sct_jax.training`
explicitly; they load the data and checkpoint libraries.
"""

from sct_jax import (
    errors,
    linalg,
    losses,
    model,
    optimizers,
    rank,
    sharding,
    spectral,
    stiefel,
    transforms,
)
from sct_jax.spectral import LowRankFactors, SpectralFactors

__all__ = [
    "LowRankFactors",
    "SpectralFactors",
    "errors",
    "linalg",
    "losses",
    "model",
    "optimizers",
    "rank",
    "sharding",
    "spectral",
    "stiefel",
    "transforms",
]
