"""Iso-FLOP sweeps at a scale that two cores can train: dense against low rank.

python -m experiments.scaling_laws
"""

import dataclasses

from configs import compare_methods
from experiments import grid, iso_flop

RATES = (0.01, 0.02)  # around the best of `compare_methods` at d 64 and 128

SIZES = {
    d: iso_flop.Size(d_model=d, d_ff=d_ff, num_layers=layers, num_heads=heads)
    for d, d_ff, layers, heads in (
        (24, 64, 3, 2),
        (36, 96, 3, 3),
        (56, 152, 4, 4),
        (84, 224, 4, 3),
        (124, 336, 4, 2),
        (184, 496, 4, 4),
        (272, 728, 4, 4),
    )
}


def _arm(name: str) -> grid.Arm:
    rate, adam_rate = compare_methods.LEADING[name]
    arm = compare_methods.at_setting(name, rate, adam_rate)
    return dataclasses.replace(arm, rates=RATES)


def _sizes(*widths: tuple[int, ...]) -> tuple[tuple[iso_flop.Size, ...], ...]:
    return tuple(tuple(SIZES[d] for d in of_budget) for of_budget in widths)


def get_config() -> iso_flop.ScalingLaws:
    return iso_flop.ScalingLaws(
        base=compare_methods.with_qk_norm(compare_methods.base_of_small()),
        kinds=(
            iso_flop.Kind(
                arm=_arm("dense Muon"),
                sizes=_sizes((24, 36, 56, 84), (24, 36, 56, 84), (36, 56, 84, 124)),
            ),
            iso_flop.Kind(
                arm=_arm("Stiefel Muon"),
                sizes=_sizes(
                    (56, 84, 124, 184), (56, 84, 124, 184), (84, 124, 184, 272)
                ),
            ),
        ),
        budgets=(1.5e12, 4.5e12, 1.35e13),
    )
