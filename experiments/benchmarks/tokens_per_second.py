"""Measures training steps of `configs/smollm_r128.py:tiny` in a checkout.

python experiments/benchmarks/tokens_per_second.py FOLDER STEPS

prints {"tokens_per_second": ...} for the `sct_jax` of FOLDER. Run it as a file, with
FOLDER on PYTHONPATH: it uses nothing that an older checkout lacks.
"""

import json
import pathlib
import statistics
import sys
import time

import jax
import numpy as np

import sct_jax
from configs import smollm_r128
from sct_jax.training import trainer as trainer_lib


def main(folder: str, steps: int) -> None:
    """Prints the tokens per second of the median step, without the first two."""
    loaded = pathlib.Path(sct_jax.__path__[0]).resolve()
    if loaded.parent != pathlib.Path(folder).resolve():
        sys.exit(f"sct_jax was loaded from {loaded}, not from {folder}")
    config = smollm_r128.get_config("tiny")
    trainer = trainer_lib.Trainer(config, config.mesh.build())
    rows, length = config.data.batch_size, config.data.seq_len
    text = np.random.default_rng(0).integers(
        config.model.vocab_size, size=(rows, length + 1), dtype=np.int32
    )
    batch = {
        "inputs": text[:, :-1],
        "targets": text[:, 1:],
        "segment_ids": np.zeros((rows, length), np.int32),
    }
    state = trainer.init(jax.random.key(0))
    seconds = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(trainer.step(state, batch, diagnose=False))
        seconds.append(time.perf_counter() - start)
    rate = rows * length / statistics.median(seconds[2:])
    print(json.dumps({"tokens_per_second": rate}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
