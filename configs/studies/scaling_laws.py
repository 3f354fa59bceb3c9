"""Iso-FLOP sweeps at a scale that two cores can train: dense against low rank.

  python -m experiments.studies.scaling_laws

CPU: 4 core-hours. Result: N ~ C^0.459 for dense Muon and N ~ C^0.444 for Stiefel
Muon, with losses at the best sizes within 0.04 nats per token of each other.
"""

from configs.studies import compare_methods
from experiments.studies import iso_flop, methods

# Around the best of `compare_methods` at d 64 and 128.
LEARNING_RATES, NON_MATRIX_LR = (0.01, 0.02, 0.04), 0.081

# One depth and number of heads, so that sizes differ in their width alone.
SIZES = {
    d: iso_flop.Size(d_model=d, d_ff=d_ff, num_layers=4, num_heads=4)
    for d, d_ff in (
        (24, 64),
        (40, 108),
        (56, 152),
        (80, 216),
        (120, 324),
        (176, 472),
    )
}


def _sizes(*widths: tuple[int, ...]) -> tuple[tuple[iso_flop.Size, ...], ...]:
    return tuple(tuple(SIZES[d] for d in of_budget) for of_budget in widths)


def get_config() -> iso_flop.ScalingLaws:
    dense, low_rank = (
        methods.changed(
            methods.method_named(name),
            methods.DECAY,
            learning_rates=LEARNING_RATES,
            non_matrix_lr=NON_MATRIX_LR,
        )
        for name in ("dense Muon", "Stiefel Muon")
    )
    return iso_flop.ScalingLaws(
        base=compare_methods.with_qk_norm(compare_methods.base_of_small()),
        kinds=(
            iso_flop.Kind(
                method=dense,
                sizes=_sizes((24, 40, 56, 80), (40, 56, 80, 120), (56, 80, 120, 176)),
            ),
            iso_flop.Kind(
                method=low_rank,
                sizes=_sizes((40, 56, 80, 120), (56, 80, 120, 176), (56, 80, 120, 176)),
            ),
        ),
        budgets=(1e12, 3e12, 9e12),
        seeds=(0, 1, 2),
    )
