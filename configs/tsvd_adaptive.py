"""Ranks chosen during training by spectral energy (TSVD, arXiv 2605.28573).

  python -m experiments.pretrain --config=configs/tsvd_adaptive.py

Variants, both the `tiny` model of configs/smollm_r128.py on the Python standard
library's source text, for 2 CPU cores:
  energy   each weight shrinks to the rank that holds 95 % of its energy (the default).
  budget   rank moves between weights; all of them together stay at their first size.
The run prints every decision, and metrics.jsonl has the stored rank and the mean rank
in use of every weight at each change.
"""

import dataclasses

from configs import smollm_r128
from sct_jax import optimizers, rank
from sct_jax.training import config

VARIANTS = {
    "energy": rank.AdaptiveRankConfig(
        energy=0.95, every=100, warmup_steps=100, floor=16
    ),
    "budget": rank.AdaptiveRankConfig(
        energy=0.95, every=100, warmup_steps=100, floor=16, budget_neutral=True
    ),
}


def get_config(variant: str = "energy") -> config.ExperimentConfig:
    tiny = smollm_r128.get_config("tiny")
    optimizer = dataclasses.replace(
        tiny.optimizer,
        name="tsvd",
        peak_learning_rate=6e-3,
        max_update_norm=0.5,
        momentum=optimizers.OptimizerConfig.momentum,  # this chain has none
        singular_value_lr_multiplier=4.0,
        dense_lr_multiplier=4.0,
    )
    return dataclasses.replace(tiny, optimizer=optimizer, rank=VARIANTS[variant])
