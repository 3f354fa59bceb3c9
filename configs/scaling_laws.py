"""Iso-FLOP sweeps at a scale that two cores can train: dense against low rank.

python -m experiments.scaling_laws
"""

from configs import compare_methods
from experiments import iso_flop


def get_config() -> iso_flop.ScalingLaws:
    return iso_flop.ScalingLaws(
        base=compare_methods.with_qk_norm(compare_methods.base_of_small()),
        kinds=tuple(
            compare_methods.at_setting(name, *compare_methods.LEADING[name])
            for name in ("dense Muon", "Stiefel Muon")
        ),
        sizes=tuple(
            iso_flop.Size(d_model=d, d_ff=d_ff, num_layers=layers, num_heads=heads)
            for d, d_ff, layers, heads in (
                (24, 64, 3, 2),
                (36, 96, 3, 3),
                (56, 152, 4, 4),
                (84, 224, 4, 3),
                (124, 336, 4, 2),
                (184, 496, 4, 4),
            )
        ),
        budgets=(1.5e12, 4.5e12, 1.35e13),
        sizes_per_budget=4,
    )
