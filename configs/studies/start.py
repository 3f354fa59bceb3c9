"""Where low-rank weights come from: from scratch, or from dense ones.

  python -m experiments.studies.compare --config=configs/studies/start.py:d64
  python -m experiments.studies.report experiments/studies/results/start-d64

Every served model but the wide dense one has the FLOPs per token of rank d/4 in all
seven matrices, and every training as many FLOPs as the wide one takes for its tokens,
dense phases included. Tokens are bytes and windows have 64 of them, so that the layers
are 85 % of the FLOPs or more. All methods are tuned alike, with the first seed; then
all get three.

Papers: SVD-LLM, arXiv 2403.07378 (whitened truncation); Li et al., Train large, then
compress, arXiv 2002.11794. Text: the Python standard library.

Variants, with the CPU core-hours that their rows took, and losses in nats per byte of
narrow dense Muon, blocks without a retraction, and low rank.
  d64          d 64, 4 layers, 0.2 M dense parameters, 0.4, 2 and 10 tokens per
               parameter. 7 hours. Losses 1.31, 1.33 and 1.35 at 10.
  d128         d 128, 4 layers, 0.8 M dense parameters, 0.4 tokens per parameter; the
               methods that lead at d 64. Half an hour. Losses 1.44, 1.45 and 1.47.
  d128_longer  the methods of d128 at 2 tokens per parameter, around the rates found
               there, and a longer decay for the narrow dense model. 2 hours. Losses
               1.20, 1.23 and 1.24.
  d256         d 256, 4 layers, 3.2 M dense parameters, 0.4 tokens per parameter; the
               leading methods of d128_longer. 4 hours. Losses 1.15, 1.17 and 1.19.
  healing      d 64. A dense model of 10 tokens per parameter, truncated and trained on
               5, 10 and 20 % more. Half an hour. Losses 1.64 whitened, 1.72 plain at
               10 %.
  extra        d 64. Narrow dense models trained from scratch on the FLOPs of each
               healing. Loss 1.91 for 10 %.
"""

import dataclasses

from configs.studies import compare_methods
from experiments.studies import grid, methods
from sct_jax.training import config
from sct_jax.training import phases as phases_lib

TRAINED = 10.0  # tokens per parameter of a dense model that is then compressed
HEALING = (0.1, 0.05, 0.2)  # of those tokens

# Learning rates of dense phases, for the matrices and for all other parameters. Nobody
# searched those of "adamw".
DENSE_RATES = {"muon": (0.02, 0.027), "adamw": (3e-3, 3e-3)}


def base(d_model: int, d_ff: int) -> config.ExperimentConfig:
    """Returns the experiment that methods change: SCT from scratch."""
    plain = compare_methods.with_qk_norm(
        compare_methods.base(d_model=d_model, d_ff=d_ff, vocab_size=257, seq_len=64)
    )
    return dataclasses.replace(
        plain,
        model=dataclasses.replace(plain.model, remat="none"),
        data=dataclasses.replace(plain.data, tokenizer="bytes", split="pieces"),
        eval=config.EvalConfig(num_batches=64),
    )


# --- Methods, each at its middle learning rate.

LOW_RANK = dataclasses.replace(
    methods.method_named("Stiefel Muon"),
    name="low rank",
    learning_rates=(0.01, 0.02, 0.04),
    non_matrix_lr=0.027,
)
MUON = dataclasses.replace(
    methods.method_named("dense Muon"),
    learning_rates=(0.01, 0.02, 0.04),
    non_matrix_lr=0.027,
)
BLOCKS, TWO_BLOCKS = (
    methods.changed(LOW_RANK, methods.model(num_blocks=blocks), name=f"{blocks} blocks")
    for blocks in (4, 2)
)
# Square blocks with orthonormal columns are rotations. What if they need not be?
FREE_BLOCKS = methods.changed(
    BLOCKS, methods.optimizer(retraction="none"), name="4 blocks without retraction"
)


NARROW = methods.narrow(MUON)


def dense_first(
    *shares: float,
    chain: str,
    truncation: str = "whitened",
    multiples: tuple[float, ...] = (),
    then: grid.Method = LOW_RANK,
    decay_ratio: float = 0.0,
) -> grid.Method:
    """Returns a method whose weights are dense for a share of the FLOPs."""
    rate, non_matrix = DENSE_RATES[chain]
    settings = phases_lib.PhasesConfig(
        switch_at=shares,
        rank_multiples=multiples,
        dense_optimizer=chain,
        dense_learning_rate=rate,
        dense_lr_multiplier=non_matrix / rate,
        decay_ratio=decay_ratio,
        warmup_steps=20,
    )

    def change(experiment: config.ExperimentConfig) -> config.ExperimentConfig:
        return dataclasses.replace(
            experiment,
            phases=settings,
            truncation=config.TruncationConfig(method=truncation),
        )

    at = " and ".join(f"{share:g}" for share in shares)
    return methods.changed(
        then,
        change,
        methods.DECAY,
        name=f"{chain} to {at} then {then.name} ({truncation})",
        learning_rates=tuple(rate / 2 for rate in then.learning_rates),
    )


def _study(
    experiment: config.ExperimentConfig, *found: grid.Method, **fields
) -> grid.Comparison:
    return grid.Comparison(
        base=experiment,
        methods=tuple(dataclasses.replace(method, always=True) for method in found),
        max_learning_rates=4,
        **{"tokens_per_parameter": (TRAINED, 0.4, 2.0), "budgets": ("flops",)} | fields,
    )


def _d64() -> grid.Comparison:
    return _study(
        base(64, 176),
        NARROW,
        methods.with_decay(LOW_RANK),
        methods.with_decay(FREE_BLOCKS),
        methods.with_decay(BLOCKS),
        dense_first(0.2, chain="muon"),
        MUON,
        methods.with_decay(NARROW),
        methods.with_decay(NARROW, 0.5),
        methods.with_decay(MUON, 0.5),
        dense_first(0.2, chain="muon", then=FREE_BLOCKS),
        dense_first(0.2, chain="muon", truncation="plain"),
        dense_first(0.2, chain="adamw"),
        dense_first(0.4, chain="muon"),
        dense_first(0.6, chain="muon"),
        dense_first(0.2, 0.4, chain="muon", multiples=(phases_lib.DENSE, 2.0)),
        methods.with_decay(TWO_BLOCKS),
        methods.with_decay(LOW_RANK, 0.5),
        methods.with_decay(FREE_BLOCKS, 0.5),
    )


def _d128() -> grid.Comparison:
    """The methods that lead at d 64."""
    return _study(
        base(128, 344),
        NARROW,
        methods.with_decay(LOW_RANK),
        methods.with_decay(FREE_BLOCKS),
        tokens_per_parameter=(0.4,),
    )


def _d128_longer() -> grid.Comparison:
    """The methods of `d128` on more tokens, around the rates found there."""
    found = [
        dataclasses.replace(method, learning_rates=(0.005, 0.01, 0.02))
        for method in (
            NARROW,
            methods.with_decay(LOW_RANK),
            methods.with_decay(FREE_BLOCKS),
            methods.with_decay(NARROW),
        )
    ]
    return _study(base(128, 344), *found, tokens_per_parameter=(2.0,))


def _d256() -> grid.Comparison:
    """The leading methods of `d128_longer` at twice the width."""
    found = [
        dataclasses.replace(method, learning_rates=(0.005, 0.01, 0.02))
        for method in (
            methods.with_decay(NARROW),
            methods.with_decay(FREE_BLOCKS),
            methods.with_decay(LOW_RANK),
        )
    ]
    return _study(base(256, 688), *found, tokens_per_parameter=(0.4,))


def _healing() -> grid.Comparison:
    experiment = base(64, 176)
    trained = TRAINED * grid.dense_parameters(experiment.model)
    switch = round(trained / experiment.data.tokens_per_step)

    def healed(chain: str, truncation: str) -> grid.Method:
        return dataclasses.replace(
            dense_first(
                float(switch), chain=chain, truncation=truncation, decay_ratio=0.5
            ),
            name=f"dense {chain} healed ({truncation})",
        )

    return _study(
        experiment,
        healed("muon", "whitened"),
        healed("muon", "plain"),
        healed("adamw", "whitened"),
        healed("adamw", "plain"),
        budgets=("tokens",),
        tokens_per_parameter=tuple(TRAINED * (1 + share) for share in HEALING),
    )


def _extra() -> grid.Comparison:
    return _study(
        base(64, 176),
        NARROW,
        budgets=("tokens",),
        tokens_per_parameter=tuple(TRAINED * share for share in HEALING),
    )


VARIANTS = {
    "d64": _d64,
    "d128": _d128,
    "d128_longer": _d128_longer,
    "d256": _d256,
    "healing": _healing,
    "extra": _extra,
}


def get_config(variant: str = "d64") -> grid.Comparison:
    return VARIANTS[variant]()
