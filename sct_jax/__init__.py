"""Pre-training of language models with permanently low-rank weights, in JAX.

`import sct_jax` gives the light layers: factors, manifold geometry, gradient
transformations, optimizers, the model and generation, each loaded on first use. Import
`sct_jax.data` and `sct_jax.training` explicitly; they load the data and checkpoint
libraries.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sct_jax import (
        attention,
        blocks,
        compression,
        decode,
        errors,
        linalg,
        losses,
        model,
        optimizers,
        rank,
        sampling,
        scoring,
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
    "attention",
    "blocks",
    "compression",
    "decode",
    "errors",
    "linalg",
    "losses",
    "model",
    "optimizers",
    "rank",
    "sampling",
    "scoring",
    "sharding",
    "spectral",
    "stiefel",
    "transforms",
]


def __getattr__(name: str) -> Any:
    """Loads a module with its first use, so that programs start without JAX."""
    if name not in __all__:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; a module that it does not "
            f"load by itself has to be imported: from {__name__} import {name}"
        )
    if name.endswith("Factors"):
        return getattr(importlib.import_module("sct_jax.spectral"), name)
    return importlib.import_module(f"sct_jax.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
