"""Batches of tokens from text.

Importing this package loads no library that reads data. The first use of any name but
`DataConfig` does.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sct_jax.data.settings import DataConfig

if TYPE_CHECKING:
    from sct_jax.data.pipeline import Corpus, eval_batches, prepare, train_batches
    from sct_jax.data.tokenizer import Tokenizer

__all__ = [
    "Corpus",
    "DataConfig",
    "Tokenizer",
    "eval_batches",
    "prepare",
    "train_batches",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "tokenizer" if name == "Tokenizer" else "pipeline"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
