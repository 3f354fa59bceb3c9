"""The rank sweep of the SCT paper, scaled to a model that two cores can train.

  python -m experiments.studies.compare --config=configs/studies/rank_sweep.py
  python -m experiments.studies.report experiments/studies/results/rank_sweep

Paper: Spectral Compact Training, arXiv 2604.00733. It has R = 32, 64, 128 and 256 in
the MLP of d 2048; these are the same shares of d 128. "per component" multiplies the
learning rate of everything outside the factors by a fifth.

CPU: 3 core-hours. Loss in nats per token at equal tokens: 4.32 for dense AdamW, 4.64
for R = 16.
"""

from configs.studies import compare_methods
from experiments.studies import grid, methods
from sct_jax import model


def get_config() -> grid.Comparison:
    shared = tuple(
        grid.Method(
            name=f"R {rank}",
            learning_rates=(1.5e-3, 3e-3, 6e-3),
            change=methods.model(spectral=model.MLP, rank=rank),
            always=True,
        )
        for rank in (2, 4, 8, 16)
    )
    per_component = tuple(
        methods.changed(
            method,
            methods.optimizer(dense_lr_multiplier=0.2),
            name=f"{method.name} per component",
        )
        for method in shared
    )
    return grid.Comparison(
        base=compare_methods.base_of_small(),
        methods=(methods.method_named("dense AdamW"), *shared, *per_component),
        tokens_per_parameter=(0.4,),
    )
