"""Does the Stiefel constraint change the loss that can be reached?

  python -m experiments.studies.compare --config=configs/studies/ablation_retraction.py
  python -m experiments.studies.report experiments/studies/results/ablation_retraction

Adam on u, s and v at full rank and at rank d/4, with the retraction after each step and
without it. Start, data and steps are the same; dense AdamW is beside them.

CPU: 1 core-hour. Loss in nats per token at one token per parameter, with retraction and
without: 3.67 and 3.66 at full rank, 3.75 and 3.78 at R = d/4.
"""

import dataclasses

from configs.studies import compare_methods
from experiments.studies import grid, methods

LEARNING_RATES = (1.5e-3, 3e-3, 6e-3)
NON_MATRIX_LR = 0.027


def get_config() -> grid.Comparison:
    experiment = compare_methods.base_of_small()
    width = experiment.model.d_model
    dense = dataclasses.replace(
        methods.method_named("dense AdamW"), non_matrix_lr=NON_MATRIX_LR
    )
    factorised = [
        grid.Method(
            name=f"{title} {kind}",
            learning_rates=LEARNING_RATES,
            change=methods.compose(
                methods.model(rank=rank), methods.optimizer(retraction=retraction)
            ),
            non_matrix_lr=NON_MATRIX_LR,
            always=True,
        )
        for title, rank in (("full rank", width), ("R = d/4", width // 4))
        for kind, retraction in (("retracted", "cholesky_qr"), ("free", "none"))
    ]
    return grid.Comparison(
        base=experiment,
        methods=(dense, *factorised),
        tokens_per_parameter=(1.0, 0.4),
        budgets=("tokens",),
    )
