"""Pre-training of language models whose weights are low rank for good, in JAX.

The light layers: factors, geometry, transformations, chains and the model. They load
neither data nor checkpoint libraries.
"""

from sct_jax import (
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
