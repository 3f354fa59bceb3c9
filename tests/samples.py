"""A small corpus, and two small models."""

import random

from sct_jax import model

# Two kinds of spectral matrices cover stacked factors beside dense matrices.
SHAPE = model.ModelConfig(
    d_model=16,
    d_ff=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    vocab_size=300,
    rank=4,
    spectral=("q", "down"),
)

# Grouped queries, and every matrix of the layers spectral.
SMALL = model.ModelConfig(
    d_model=32,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=64,
    rank=4,
    spectral=model.BLOCK_MATRICES,
)


def write_corpus(folder, *, files=100):
    """Writes files of random ASCII words and returns their glob."""
    folder.mkdir()
    for number in range(files):
        rng = random.Random(number)
        syllables = ["ka", "to", "mi", "ren", "lu", "\n", "sha"]
        words = ["".join(rng.choices(syllables, k=3)) for _ in range(100)]
        (folder / f"{number}.txt").write_text(" ".join(words))
    return str(folder / "*.txt")
