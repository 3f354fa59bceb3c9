"""Every method that the papers propose or compare with, all tuned alike.

  python -m experiments.studies.compare \
    --config=configs/studies/compare_methods.py:small
  python -m experiments.studies.report experiments/studies/results/compare_methods-small

Papers: SCT, arXiv 2604.00733; Spectron, arXiv 2602.12429; TSVD, arXiv 2605.28573; CoLA,
arXiv 2502.10940; self-guided training, arXiv 2406.16450. Text: the Python standard
library. R = d/4 in all seven matrices.

Variants, with the CPU core-hours that their rows took. Several processes share them.
Losses are held out, in nats per token, of dense Muon and Stiefel Muon at equal tokens.
  short         d 256, 4 layers, 4.2 M dense parameters, 0.4 tokens per parameter. Six
                methods; the default. 10 hours. Losses 3.77 and 3.66.
  small         d 128, 4 layers, 0.9 M dense parameters, 0.4 tokens per parameter. All
                methods, both learning rates searched. 12 hours. Losses 4.06 and 4.16.
  long          d 64, 4 layers, 0.2 M dense parameters, 0.4, 2 and 10 tokens per
                parameter. Six methods. 4 hours. Losses 2.77 and 3.00 at 10.
  long_decay    the methods of `long` with a decay over nine tenths of the run. 3 hours.
                Losses 2.79 and 2.95 at 10.
  recipe        the model of `small`. Variations of two chains. 1 hour.
  recipe_long   the model of `long`. Variations of Stiefel Muon. 1 hour.
  triple        the model of `small` at three times the learning rates. 1 hour.
  width         d 64, 128 and 256. Two chains, tuned at each. 1 hour.
  large         d 384, 6 layers, 12.2 M dense parameters, 0.35 tokens per parameter. Six
                methods, for accelerators, one process each. It has not been run:
                for i in 0 1 2 3 4 5 6 7; do CUDA_VISIBLE_DEVICES=$i python -m \
                  experiments.studies.compare \
                  --config=configs/studies/compare_methods.py:large & done; wait
"""

import dataclasses

from experiments.studies import grid, methods
from sct_jax import data, model
from sct_jax.training import config, optimizer_config

NON_MATRIX_LR_FACTORS = (1 / 3, 1.0, 3.0)  # where that learning rate is searched

SHORT = (0.4,)  # tokens per parameter

# The methods of larger models and longer runs, with the best learning rates of `small`
# at equal FLOPs: of the matrices, and of all other parameters.
LEADING = {
    "dense AdamW": (3e-3, 0.027),
    "dense Muon": (0.01, 0.081),
    "SCT (s = 1)": (6e-3, 0.054),
    "Spectron (code)": (0.0125, 0.027),
    "Stiefel Muon": (0.01, 0.027),
}


def best_of_long() -> dict[str, grid.Method]:
    """Returns the methods of `long` at their best rates at 10 tokens per parameter."""
    return {
        "Stiefel Muon": methods.at_setting("Stiefel Muon", 0.01, 0.081),
        "dense AdamW": methods.at_setting("dense AdamW", 6e-3, 0.027),
        "dense Muon": methods.at_setting("dense Muon", 0.02, 0.081),
        "narrow": methods.narrow(methods.at_setting("dense Muon", 0.04, 0.027)),
        "Spectron (code)": methods.at_setting("Spectron (code)", 0.0125, 0.027),
        "SCT (s = 1)": methods.at_setting("SCT (s = 1)", 3e-3, 0.018),
    }


def leading(*, short_run: bool) -> tuple[grid.Method, ...]:
    """Returns the methods of `LEADING`, searched, and a narrow dense model."""
    found = {
        name: methods.searched(methods.at_setting(name, *best))
        for name, best in LEADING.items()
    }
    if short_run:
        found = {name: methods.with_short_momentum(m) for name, m in found.items()}
    return *found.values(), methods.narrow(found["dense Muon"])


def base(
    *, d_model: int, d_ff: int, vocab_size: int, seq_len: int, num_layers: int = 4
) -> config.ExperimentConfig:
    """Returns the experiment that methods change: SCT from a dense initialisation."""
    return config.ExperimentConfig(
        model=model.ModelConfig(
            d_model=d_model,
            d_ff=d_ff,
            num_layers=num_layers,
            num_heads=4,
            num_kv_heads=4,
            vocab_size=vocab_size,
            rank=d_model // 4,
            spectral=model.BLOCK_MATRICES,
            remat="dots",
        ),
        # The committed rows were evaluated on this split.
        data=data.DataConfig(batch_size=16, seq_len=seq_len, split="files"),
        optimizer=optimizer_config.Sct(
            schedule="wsd",
            warmup_steps=20,
            decay_ratio=0.2,
            final_rate_ratio=0.0,
            grad_clip=1.0,
            b2=0.95,
            eps=1e-8,
        ),
        eval=config.EvalConfig(num_batches=16),
    )


def base_of_small() -> config.ExperimentConfig:
    """Returns the base of `small`, which most studies share."""
    return base(d_model=128, d_ff=344, vocab_size=1024, seq_len=128)


def with_qk_norm(experiment: config.ExperimentConfig) -> config.ExperimentConfig:
    """Returns the experiment with normalised queries and keys, as `recipe` advises."""
    return methods.model(qk_norm=True)(experiment)


def _small() -> grid.Comparison:
    return grid.Comparison(
        base=base_of_small(),
        methods=(*methods.METHODS, methods.narrow(methods.method_named("dense Muon"))),
        tokens_per_parameter=SHORT,
        non_matrix_lr_factors=NON_MATRIX_LR_FACTORS,
        max_learning_rates=7,
    )


def _leading(experiment: config.ExperimentConfig) -> grid.Comparison:
    return grid.Comparison(
        base=with_qk_norm(experiment),
        methods=leading(short_run=True),
        tokens_per_parameter=SHORT,
    )


def _short() -> grid.Comparison:
    return dataclasses.replace(
        _leading(base(d_model=256, d_ff=688, vocab_size=4096, seq_len=256)),
        budgets=("tokens", "flops", "seconds"),
        reference="dense AdamW",
    )


def _large() -> grid.Comparison:
    experiment = base(
        d_model=384, d_ff=1032, num_layers=6, vocab_size=4096, seq_len=256
    )
    # As many tokens as the text has for the longest trials.
    return dataclasses.replace(_leading(experiment), tokens_per_parameter=(0.35,))


def _long() -> grid.Comparison:
    # A small vocabulary gives the head the small share of FLOPs that it has in a large
    # model. The best non-matrix learning rate falls with the length: search it again.
    experiment = base(d_model=64, d_ff=176, vocab_size=512, seq_len=128)
    batches = dataclasses.replace(experiment.data, batch_size=8)
    return grid.Comparison(
        base=with_qk_norm(dataclasses.replace(experiment, data=batches)),
        methods=leading(short_run=False),
        tokens_per_parameter=(10.0, *SHORT, 2.0),
        non_matrix_lr_factors=NON_MATRIX_LR_FACTORS,
    )


def _triple() -> grid.Comparison:
    """Which methods have loss spikes at three times the learning rates?"""
    tripled = (
        methods.at_setting(name, round(3 * rate, 6), round(3 * non_matrix_lr, 6))
        for name, (rate, non_matrix_lr) in LEADING.items()
    )
    return grid.Comparison(
        base=with_qk_norm(base_of_small()),
        methods=tuple(map(methods.with_short_momentum, tripled)),
        tokens_per_parameter=SHORT,
    )


def _recipe() -> grid.Comparison:
    """Variations of two chains and of dense Muon, at a good setting of `small`."""
    experiment = base_of_small()
    within_mlp = "ranks from gate to up and down"
    variations = {
        **methods.VARIATIONS,
        **methods.moved_ranks(experiment.model.rank, gate=43, up=43, down=43),
        within_mlp: methods.ranks(gate=16, up=40, down=40),
    }
    of_both = (
        "clip at .05",
        "normalised q and k",
        "init of the dense norm",
        "svd retraction",
        "tangent gradient",
        "R = d/2",
    )
    best = ("momentum .9", "normalised q and k")
    stiefel_muon = methods.varied(
        methods.at_setting("Stiefel Muon", 0.01, 0.027),
        variations,
        *of_both,
        "rate of s as of u and v",
        "momentum .9",
        "momentum .8",
        best,
        (*best, "svd retraction"),
        "ranks from q and k to v and o",
        "ranks from attention to MLP",
        within_mlp,
        always=(best, "R = d/2"),
    )
    sct = methods.varied(
        methods.at_setting("SCT (dense spectrum)", 3e-3, 0.027),
        variations,
        *of_both,
        "clip at .1",
        "rate of s x 5",
        "polar retraction",
        "transported moments",
        "bfloat16 moments",
        always=("bfloat16 moments",),  # what do they cost?
    )
    # What helps the low-rank chains may help the dense one.
    dense_muon = methods.varied(
        methods.at_setting("dense Muon", 0.01, 0.027),
        variations,
        "momentum .9",
        "normalised q and k",
        best,
        always=(best,),
    )
    return grid.Comparison(
        base=experiment,
        methods=(*stiefel_muon, *sct, *dense_muon, methods.narrow(dense_muon[-1])),
        tokens_per_parameter=SHORT,
    )


def _recipe_long() -> grid.Comparison:
    """What brings Stiefel Muon nearer to the dense models of `long`?"""
    study = _long()
    best = best_of_long()
    moved = methods.moved_ranks(study.base.model.rank, gate=22, up=22, down=21)
    variations = {**methods.VARIATIONS, **moved}
    found = (
        *methods.varied(
            best["Stiefel Muon"],
            variations,
            "svd retraction",
            "momentum .9",
            "rate of s as of u and v",
            "tangent gradient",
            "weight decay .01",
            "decay .9",
            *moved,
        ),
        methods.at_setting("Stiefel Muon (svd coordinates)", 0.0125, 0.081),
        # What helps the low-rank chain may help the dense one.
        *methods.varied(best["dense Muon"], variations, "decay .9"),
        *methods.varied(best["narrow"], variations, "decay .9"),
    )
    return dataclasses.replace(
        study,
        methods=tuple(dataclasses.replace(method, always=True) for method in found),
        budgets=("tokens",),
        non_matrix_lr_factors=(),
    )


def _long_decay() -> grid.Comparison:
    """The methods of `long` with a long decay, searched around their best rates."""
    found = map(methods.searched, best_of_long().values())
    return dataclasses.replace(
        _long(),
        methods=tuple(map(methods.with_decay, found)),
        non_matrix_lr_factors=(),
    )


def _width() -> grid.Comparison:
    """Two chains at three widths, on the same number of tokens, tuned alike."""
    experiment = with_qk_norm(base_of_small())
    shape = experiment.model

    def at_width(method: grid.Method, width: int) -> grid.Method:
        d_ff = 8 * round(width * shape.d_ff / shape.d_model / 8)
        return methods.changed(
            method,
            methods.model(d_model=width, d_ff=d_ff, rank=width // 4),
            name=f"{method.name} at d {width}",
        )

    muon = methods.with_short_momentum(methods.method_named("Stiefel Muon"))
    muon = dataclasses.replace(muon, non_matrix_lr=0.027)
    sct = dataclasses.replace(
        methods.method_named("SCT (dense spectrum)"), name="SCT", non_matrix_lr=0.027
    )
    by_width = methods.changed(
        sct,
        methods.optimizer(base_width=shape.d_model),
        name="SCT with base_width",
    )
    return grid.Comparison(
        base=experiment,
        methods=tuple(
            at_width(method, width)
            for method in (muon, sct, by_width)
            for width in (shape.d_model // 2, shape.d_model, 2 * shape.d_model)
        ),
        seeds=(0,),
        tokens_per_parameter=SHORT,
        budgets=("tokens",),
    )


VARIANTS = {
    "short": _short,
    "small": _small,
    "recipe": _recipe,
    "triple": _triple,
    "width": _width,
    "large": _large,
    "long": _long,
    "long_decay": _long_decay,
    "recipe_long": _recipe_long,
}


def get_config(variant: str = "short") -> grid.Comparison:
    return VARIANTS[variant]()
