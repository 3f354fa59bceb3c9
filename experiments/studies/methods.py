"""The methods of the papers, and the functions that a study varies them with.

A configuration takes methods from `METHODS` by name. A method changes the base
experiment of its study, which has spectral factors and the chain `sct`.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.studies import grid
from sct_jax import model as model_lib
from sct_jax.training import config, optimizer_config

# --- Changes of an experiment.


def compose(*changes: grid.Change) -> grid.Change:
    """Returns one change that applies all of `changes` in order."""
    return lambda experiment: functools.reduce(
        lambda changed, change: change(changed), changes, experiment
    )


def optimizer(
    kind: type[optimizer_config.OptimizerConfig] | None = None, **fields: Any
) -> grid.Change:
    """Returns a change to another chain, or of some fields of the present one."""

    def change(experiment: config.ExperimentConfig) -> config.ExperimentConfig:
        old = experiment.optimizer
        new = old.to(kind, **fields) if kind else dataclasses.replace(old, **fields)
        return dataclasses.replace(experiment, optimizer=new)

    return change


def model(**fields: Any) -> grid.Change:
    """Returns a change of some fields of the model."""
    return lambda experiment: dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, **fields)
    )


def ranks(**by_matrix: int) -> grid.Change:
    """Returns a change of the ranks of single matrices."""
    return model(ranks=model_lib.MatrixRanks(**by_matrix))


def adaptive_rank(**fields: Any) -> grid.Change:
    """Returns a change of the decisions about ranks."""
    return lambda experiment: dataclasses.replace(
        experiment,
        adaptive_rank=dataclasses.replace(experiment.adaptive_rank, **fields),
    )


DENSE = model(spectral=())
LOW_RANK = model(factors="low_rank")
ADAMW = optimizer(optimizer_config.AdamW)
MUON = optimizer(optimizer_config.Muon)
# Studies use the eps of the base, not the chain's own default.
SPECTRON = functools.partial(optimizer, optimizer_config.Spectron, eps=1e-8)
STIEFEL_MUON = functools.partial(optimizer, optimizer_config.StiefelMuon)

# Where matrices have a rule of their own. Studies that search this learning rate start
# here.
NON_MATRIX_LR = 3e-3

# --- Methods.

# The middle learning rate is about the best one of `compare_methods.py:small`.
METHODS = (
    grid.Method(
        name="dense AdamW",
        learning_rates=(1.5e-3, 3e-3, 6e-3),
        change=compose(DENSE, ADAMW),
        always=True,
    ),
    grid.Method(
        name="dense Muon",
        learning_rates=(5e-3, 0.01, 0.02),
        change=compose(DENSE, MUON),
        non_matrix_lr=NON_MATRIX_LR,
        always=True,
    ),
    grid.Method(
        name="low-rank AdamW",
        learning_rates=(1.5e-3, 3e-3, 6e-3),
        change=compose(LOW_RANK, ADAMW),
    ),
    grid.Method(
        name="SCT (s = 1)",
        learning_rates=(3e-3, 6e-3, 1.2e-2),
        forward="unit_spectrum",
        always=True,
    ),
    grid.Method(name="SCT (dense spectrum)", learning_rates=(1.5e-3, 3e-3, 6e-3)),
    grid.Method(
        name="SCT + clip",
        learning_rates=(3e-3, 6e-3, 1.2e-2),
        change=optimizer(max_update_norm=0.1),
        always=True,
    ),
    grid.Method(
        name="SCT (svd retraction)",
        learning_rates=(1.5e-3, 3e-3, 6e-3),
        change=optimizer(retraction="svd"),
    ),
    grid.Method(
        name="Spectron",
        learning_rates=(0.0125, 0.025, 0.05),
        change=compose(LOW_RANK, SPECTRON()),
        non_matrix_lr=NON_MATRIX_LR,
        always=True,
    ),
    grid.Method(
        name="Spectron (code)",
        learning_rates=(0.0125, 0.025, 0.05),
        change=compose(
            LOW_RANK, SPECTRON(nesterov=True, shape_factor=True, weight_decay=0.01)
        ),
        non_matrix_lr=NON_MATRIX_LR,
        always=True,
    ),
    grid.Method(
        name="TSVD (adaptive)",
        learning_rates=(3e-3, 6e-3, 1.2e-2),
        change=compose(
            optimizer(optimizer_config.Tsvd),
            # Starts at R = 5/16 d, shrinks, and is charged the FLOPs of its start. The
            # share of `down` is of d_ff and gives the same rank.
            model(
                rank_ratios=model_lib.MatrixRankRatios(
                    **dict.fromkeys(model_lib.BLOCK_MATRICES, 0.3125) | {"down": 0.1163}
                )
            ),
            adaptive_rank(energy=0.8, every=25, warmup_steps=50, floor=8, multiple=4),
        ),
    ),
    grid.Method(
        name="Stiefel Muon",
        learning_rates=(5e-3, 0.01, 0.02),
        change=STIEFEL_MUON(singular_value_lr_multiplier=0.2),
        non_matrix_lr=NON_MATRIX_LR,
        always=True,
    ),
    grid.Method(
        name="Stiefel Muon (svd coordinates)",
        learning_rates=(0.0125, 0.025, 0.05),
        change=STIEFEL_MUON(
            coordinates="svd", retraction="svd", singular_value_lr_multiplier=0.2
        ),
        non_matrix_lr=NON_MATRIX_LR,
    ),
    grid.Method(
        name="self-guided",
        learning_rates=(1.5e-3, 3e-3, 6e-3),
        change=compose(LOW_RANK, ADAMW),
        forward="self_guided",
    ),
    grid.Method(
        name="CoLA",
        learning_rates=(1.5e-3, 3e-3, 6e-3),
        change=compose(LOW_RANK, ADAMW),
        forward="cola",
    ),
)

# --- Changes of a method.


def method_named(name: str) -> grid.Method:
    """Returns the method of `METHODS` with this name."""
    (method,) = (method for method in METHODS if method.name == name)
    return method


def changed(method: grid.Method, *changes: grid.Change, **fields: Any) -> grid.Method:
    """Returns the method with changes after its own, and with other fields."""
    change = compose(method.change, *changes)
    return dataclasses.replace(method, change=change, **fields)


def at_setting(name: str, learning_rate: float, non_matrix_lr: float) -> grid.Method:
    """Returns a method at one learning rate each, with all seeds."""
    return dataclasses.replace(
        method_named(name),
        learning_rates=(learning_rate,),
        non_matrix_lr=non_matrix_lr,
        always=True,
    )


def searched(method: grid.Method) -> grid.Method:
    """Returns a method of one learning rate with a search around it."""
    (rate,) = method.learning_rates
    return dataclasses.replace(method, learning_rates=(rate / 2, rate, 2 * rate))


def narrow(method: grid.Method) -> grid.Method:
    """Returns a dense method on a model with the FLOPs per token of a low-rank one."""
    return dataclasses.replace(method, name=f"{method.name} (narrow)", narrow=True)


def with_short_momentum(method: grid.Method) -> grid.Method:
    """Returns the method with the best momentum for few steps, below the papers' 0.95.

    Chains without orthogonalised momentum stay as they are.
    """

    def change(experiment: config.ExperimentConfig) -> config.ExperimentConfig:
        if not hasattr(experiment.optimizer, "momentum"):
            return experiment
        return optimizer(momentum=0.9)(experiment)

    return changed(method, change)


DECAY = optimizer(decay_ratio=0.9)


def with_decay(method: grid.Method, ratio: float = 0.9) -> grid.Method:
    """Returns the method with a learning rate that falls over this part of the run."""
    return changed(
        method,
        optimizer(decay_ratio=ratio),
        name=f"{method.name}: decay {ratio:.1g}".replace("0.", "."),
        variation_of=method.name,
    )


# What studies vary, by the name of the variation.
VARIATIONS: Mapping[str, grid.Change] = {
    "normalised q and k": model(qk_norm=True),
    "clip at .1": optimizer(max_update_norm=0.1),
    "clip at .05": optimizer(max_update_norm=0.05),
    "rate of s as of u and v": optimizer(singular_value_lr_multiplier=1.0),
    "rate of s x 5": optimizer(singular_value_lr_multiplier=5.0),
    "svd retraction": optimizer(retraction="svd"),
    "polar retraction": optimizer(retraction="polar"),
    "transported moments": optimizer(transport_moments=True),
    "bfloat16 moments": optimizer(moment_dtype="bfloat16"),
    "momentum .9": optimizer(momentum=0.9),
    "momentum .8": optimizer(momentum=0.8),
    "tangent gradient": optimizer(tangent_projection="gradient"),
    "weight decay .01": optimizer(weight_decay=0.01),
    "decay .9": DECAY,
    "init of the dense norm": model(rescale_init=True),
}


def moved_ranks(rank: int, **mlp: int) -> dict[str, grid.Change]:
    """Returns variations of a uniform rank: two with equal parameters, one with twice.

    Args:
      rank: the uniform rank.
      **mlp: ranks of the MLP matrices when attention has half the rank.
    """
    less, more = rank // 2, rank + rank // 2
    return {
        "ranks from q and k to v and o": ranks(q=less, k=less, v=more, o=more),
        "ranks from attention to MLP": ranks(q=less, k=less, v=less, o=less, **mlp),
        "R = d/2": model(rank=2 * rank),
    }


def varied(
    plain: grid.Method,
    variations: Mapping[str, grid.Change],
    *titles: Sequence[str] | str,
    always: Sequence[Sequence[str] | str] = (),
) -> tuple[grid.Method, ...]:
    """Returns a method and one variation of it per title.

    Args:
      plain: the method.
      variations: by name.
      *titles: a name, or several of variations to combine.
      always: titles that get all seeds.
    """
    found = [plain]
    for title in titles:
        names = [title] if isinstance(title, str) else list(title)
        found.append(
            changed(
                plain,
                *(variations[name] for name in names),
                name=f"{plain.name}: {' + '.join(names)}",
                always=title in always,
                variation_of=plain.name,
            )
        )
    return tuple(found)
