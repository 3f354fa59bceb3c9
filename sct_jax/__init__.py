"""Pre-training of language models with permanently low-rank weights, in JAX.

`import sct_jax` gives the light layers: factors, manifold geometry, gradient
transformations, optimizers and the model, each loaded with its first use. Import
`sct_jax.data` and `sct_jax.training` explicitly; they load the data and checkpoint
libraries.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sct_jax import (
        blocks,
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
    from sct_jax.spectral import BlockSpectralFactors, LowRankFactors, SpectralFactors

__all__ = [
    "BlockSpectralFactors",
    "LowRankFactors",
    "SpectralFactors",
    "blocks",
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


def __getattr__(name: str) -> Any:
    """Loads a module with its first use, so that programs start without JAX."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.endswith("Factors"):
        return getattr(importlib.import_module("sct_jax.spectral"), name)
    return importlib.import_module(f"sct_jax.{name}")
