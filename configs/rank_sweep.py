"""The SCT paper's sweep of the rank, scaled to a model that two cores can train.

  python -m experiments.rank_sweep

The paper has R = 32, 64, 128 and 256 in the MLP of d 2048; these are the same shares of
d 256. "per component" has a rate of its own for all that is no factor, a fifth of that
of the factors.
"""

from configs import compare_methods
from experiments import grid

MLP = ("model.spectral", "gate,up,down")


def get_config() -> grid.Comparison:
    shared = tuple(
        grid.Arm(
            name=f"R {rank}",
            rates=(1.5e-3, 3e-3, 6e-3),
            overrides=(MLP, ("model.rank", str(rank))),
            always=True,
        )
        for rank in (4, 8, 16, 32)
    )
    apart = tuple(
        grid.Arm(
            name=f"{arm.name} per component",
            rates=arm.rates,
            overrides=(*arm.overrides, ("optimizer.dense_rate", "0.2")),
            always=True,
        )
        for arm in shared
    )
    dense = next(arm for arm in compare_methods.ARMS if arm.name == "dense AdamW")
    short = compare_methods.get_config("short")
    return grid.Comparison(
        base=short.base, arms=(dense, *shared, *apart), tokens_per_parameter=(0.4,)
    )
