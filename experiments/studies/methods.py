"""The methods of the papers as arms of a comparison, and what studies vary in them.

Who writes a study in `configs/` takes arms from `ARMS` by name and changes them with
the functions below.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.studies import grid
from sct_jax import model

# Of embedding and norms, where the matrices have a rule of their own; of `small`, where
# it is searched for every arm, a first guess.
ADAM_RATE = 3e-3

# Fields of the experiment by arm; the base has spectral factors and the chain sct.
DENSE = (("model.spectral", "()"),)
LOW_RANK = (("model.factors", "low_rank"),)


def chain(name: str, *fields: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """Overrides that choose a chain of `sct_jax.optimizers`, and fields beside it."""
    return (("optimizer.name", name), *fields)


def fields(prefix: str, **values: int) -> tuple[tuple[str, str], ...]:
    """Overrides of some fields of one part of an experiment."""
    return tuple((f"{prefix}.{name}", str(value)) for name, value in values.items())


ADAMW = chain("adamw")

# The middle rate is about the best one of `small`; the search goes on from the ends.
ARMS = (
    grid.Arm(
        name="dense AdamW",
        rates=(1.5e-3, 3e-3, 6e-3),
        overrides=(*DENSE, *ADAMW),
        always=True,
    ),
    grid.Arm(
        name="dense Muon",
        rates=(5e-3, 0.01, 0.02),
        overrides=(*DENSE, *chain("muon")),
        adam_rate=ADAM_RATE,
        always=True,
    ),
    grid.Arm(
        name="low-rank AdamW",
        rates=(1.5e-3, 3e-3, 6e-3),
        overrides=(*LOW_RANK, *ADAMW),
    ),
    grid.Arm(
        name="SCT (s = 1)",
        rates=(3e-3, 6e-3, 1.2e-2),
        method="unit_spectrum",
        always=True,
    ),
    grid.Arm(name="SCT (dense spectrum)", rates=(1.5e-3, 3e-3, 6e-3)),
    grid.Arm(
        name="SCT + clip",
        rates=(3e-3, 6e-3, 1.2e-2),
        overrides=(("optimizer.max_update_norm", "0.1"),),
        always=True,
    ),
    grid.Arm(
        name="SCT (lossless)",
        rates=(1.5e-3, 3e-3, 6e-3),
        overrides=(("optimizer.retraction", "lossless"),),
    ),
    grid.Arm(
        name="Spectron",
        rates=(0.0125, 0.025, 0.05),
        overrides=(*LOW_RANK, *chain("spectron")),
        adam_rate=ADAM_RATE,
        always=True,
    ),
    grid.Arm(
        name="Spectron (code)",
        rates=(0.0125, 0.025, 0.05),
        overrides=(
            *LOW_RANK,
            *chain(
                "spectron",
                ("optimizer.nesterov", "true"),
                ("optimizer.shape_factor", "true"),
                ("optimizer.weight_decay", "0.01"),
            ),
        ),
        adam_rate=ADAM_RATE,
        always=True,
    ),
    grid.Arm(
        name="TSVD (adaptive)",
        rates=(3e-3, 6e-3, 1.2e-2),
        # Starts at R = 5/16 d and shrinks; charged with the FLOPs of its start.
        overrides=(
            *chain("tsvd"),
            *((f"model.rank_ratios.{n}", "0.3125") for n in model.BLOCK_MATRICES[:-1]),
            ("model.rank_ratios.down", "0.1163"),  # of d_ff: the same rank
            ("rank.energy", "0.8"),
            ("rank.every", "25"),
            ("rank.warmup_steps", "50"),
            ("rank.floor", "8"),
            ("rank.multiple", "4"),
        ),
    ),
    grid.Arm(
        name="Stiefel Muon",
        rates=(5e-3, 0.01, 0.02),
        overrides=chain(
            "stiefel_muon", ("optimizer.singular_value_lr_multiplier", "0.2")
        ),
        adam_rate=ADAM_RATE,
        always=True,
    ),
    grid.Arm(
        name="Stiefel Muon (svd coordinates)",
        rates=(0.0125, 0.025, 0.05),
        overrides=chain(
            "stiefel_muon",
            ("optimizer.coordinates", "svd"),
            ("optimizer.retraction", "lossless"),
            ("optimizer.singular_value_lr_multiplier", "0.2"),
        ),
        adam_rate=ADAM_RATE,
    ),
    grid.Arm(
        name="self-guided",
        rates=(1.5e-3, 3e-3, 6e-3),
        overrides=(*LOW_RANK, *ADAMW),
        method="self_guided",
    ),
    grid.Arm(
        name="CoLA",
        rates=(1.5e-3, 3e-3, 6e-3),
        overrides=(*LOW_RANK, *ADAMW),
        method="cola",
    ),
)


def arm_named(name: str) -> grid.Arm:
    """The arm of `ARMS` with this name."""
    (arm,) = (arm for arm in ARMS if arm.name == name)
    return arm


def with_fields(arm: grid.Arm, *overrides: tuple[str, str], **changes: Any) -> grid.Arm:
    """The arm with overrides after its own, of which a later one counts."""
    return dataclasses.replace(arm, overrides=(*arm.overrides, *overrides), **changes)


def at_setting(name: str, rate: float, adam_rate: float) -> grid.Arm:
    """This arm at one rate of the matrices and one of the rest, with all seeds."""
    arm = arm_named(name)
    return dataclasses.replace(arm, rates=(rate,), adam_rate=adam_rate, always=True)


def searched(arm: grid.Arm) -> grid.Arm:
    """This arm of one rate, searched around it."""
    (rate,) = arm.rates
    return dataclasses.replace(arm, rates=(rate / 2, rate, 2 * rate))


def narrow(arm: grid.Arm) -> grid.Arm:
    """A dense arm at the width that has the FLOPs per token of the low-rank ones."""
    return dataclasses.replace(arm, name=f"{arm.name} (narrow)", narrow=True)


def of_short_run(arm: grid.Arm) -> grid.Arm:
    """With the best momentum of few steps, less than the .95 of the papers."""
    if arm_named(arm.name).adam_rate is None:  # a rule without momentum
        return arm
    return with_fields(arm, ("optimizer.momentum", "0.9"))


# Of the chains that studies vary, by the name of what is changed.
VARIATIONS = {
    "normalised q and k": (("model.qk_norm", "true"),),
    "clip at .1": (("optimizer.max_update_norm", "0.1"),),
    "clip at .05": (("optimizer.max_update_norm", "0.05"),),
    "rate of s as of u and v": (("optimizer.singular_value_lr_multiplier", "1.0"),),
    "rate of s x 5": (("optimizer.singular_value_lr_multiplier", "5.0"),),
    "lossless": (("optimizer.retraction", "lossless"),),
    "polar retraction": (("optimizer.retraction", "polar"),),
    "transported moments": (("optimizer.transport_moments", "true"),),
    "bfloat16 moments": (("optimizer.moment_dtype", "bfloat16"),),
    "momentum .9": (("optimizer.momentum", "0.9"),),
    "momentum .8": (("optimizer.momentum", "0.8"),),
    "tangent gradient": (("optimizer.tangent_projection", "gradient"),),
    "weight decay .01": (("optimizer.weight_decay", "0.01"),),
    "decay .9": (("optimizer.decay_ratio", "0.9"),),
    "init of the dense norm": (("model.rescale_init", "true"),),
}


def moved_ranks(rank: int, **mlp: int) -> dict[str, tuple[tuple[str, str], ...]]:
    """Variations of uniform ranks: two of the same parameters, and twice the rank.

    Args:
      rank: the uniform one.
      **mlp: ranks of the MLP when attention has half of it.
    """
    less, more = rank // 2, rank + rank // 2
    return {
        "ranks from q and k to v and o": fields(
            "model.ranks", q=less, k=less, v=more, o=more
        ),
        "ranks from attention to MLP": fields(
            "model.ranks", q=less, k=less, v=less, o=less, **mlp
        ),
        "R = d/2": fields("model", rank=2 * rank),
    }


def varied(
    plain: grid.Arm,
    variations: Mapping[str, tuple[tuple[str, str], ...]],
    *titles: str,
    always: Sequence[str] = (),
) -> tuple[grid.Arm, ...]:
    """An arm, and one more for each title, which may join variations by " + "."""
    return plain, *(
        with_fields(
            plain,
            *(f for part in title.split(" + ") for f in variations[part]),
            name=f"{plain.name}: {title}",
            always=title in always,
        )
        for title in titles
    )
