"""Text in, batches of tokens out."""

from sct_jax.data.pipeline import (
    Corpus,
    DataConfig,
    eval_batches,
    prepare,
    train_batches,
)
from sct_jax.data.tokenizer import Tokenizer

__all__ = [
    "Corpus",
    "DataConfig",
    "Tokenizer",
    "eval_batches",
    "prepare",
    "train_batches",
]
