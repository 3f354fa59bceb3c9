"""Does the Stiefel constraint change the loss that can be reached?

  python -m experiments.ablation_retraction

Adam on u, s and v of full rank and of rank d/4, with the retraction after each step and
without it, from the same start, on the same data, for the same steps; dense AdamW
beside it.
"""

import dataclasses

from configs.studies import compare_methods
from experiments.studies import grid, methods

RATES = (1.5e-3, 3e-3, 6e-3)
ADAM_RATE = 0.027  # of the embedding and norms
# A retraction that never comes.
WITHOUT = (("optimizer.name", "tsvd"), ("optimizer.retraction_every", "1000000000"))


def get_config() -> grid.Comparison:
    experiment = compare_methods.base_of_small()
    width = experiment.model.d_model
    dense = methods.arm_named("dense AdamW")
    arms = [dataclasses.replace(dense, adam_rate=ADAM_RATE)]
    for title, rank in (("full rank", width), ("R = d/4", width // 4)):
        arms += [
            grid.Arm(
                name=f"{title} {kind}",
                rates=RATES,
                overrides=(("model.rank", str(rank)), *fields),
                adam_rate=ADAM_RATE,
                always=True,
            )
            for kind, fields in (("retracted", ()), ("free", WITHOUT))
        ]
    return grid.Comparison(
        base=experiment,
        arms=tuple(arms),
        tokens_per_parameter=(1.0, 0.4),
        protocols=("tokens",),
    )
