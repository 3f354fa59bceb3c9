"""Text to train on in tests."""

import random


def write_corpus(folder, *, files=100):
    """ASCII, so that bytes are characters."""
    folder.mkdir()
    for number in range(files):
        rng = random.Random(number)
        syllables = ["ka", "to", "mi", "ren", "lu", "\n", "sha"]
        words = ["".join(rng.choices(syllables, k=3)) for _ in range(100)]
        (folder / f"{number}.txt").write_text(" ".join(words))
    return str(folder / "*.txt")
