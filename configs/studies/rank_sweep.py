"""The SCT paper's sweep of the rank, scaled to a model that two cores can train.

  python -m experiments.rank_sweep

The paper has R = 32, 64, 128 and 256 in the MLP of d 2048; these are the same shares of
d 128. "per component" has a rate of its own for all that is no factor, a fifth of that
of the factors.
"""

import dataclasses

from configs.studies import compare_methods
from experiments.studies import grid, methods

MLP = ("model.spectral", "gate,up,down")


def get_config() -> grid.Comparison:
    shared = tuple(
        grid.Arm(
            name=f"R {rank}",
            rates=(1.5e-3, 3e-3, 6e-3),
            overrides=(MLP, ("model.rank", str(rank))),
            always=True,
        )
        for rank in (2, 4, 8, 16)
    )
    apart = tuple(
        dataclasses.replace(
            arm,
            name=f"{arm.name} per component",
            overrides=(*arm.overrides, ("optimizer.dense_lr_multiplier", "0.2")),
        )
        for arm in shared
    )
    return grid.Comparison(
        base=compare_methods.base_of_small(),
        arms=(methods.arm_named("dense AdamW"), *shared, *apart),
        tokens_per_parameter=(0.4,),
    )
