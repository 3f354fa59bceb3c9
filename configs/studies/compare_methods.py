"""Every method that the papers propose or compare with, each tuned alike.

  python -m experiments.compare --config=configs/compare_methods.py

Variants, on the Python standard library's source text, R = d/4 in all seven matrices:
  short   d 256, 4 layers, 4.2 M parameters dense, .4 tokens for each: five methods and
          a narrow dense model, with the rates of the embedding that `small` found (the
          default); about six hours on two cores.
  small   d 128, 4 layers, .9 M parameters dense, .4 tokens for each: all methods, with
          the rate of the embedding searched as well; eight hours.
  recipe  the model of `small`, two chains with other ranks, rates, bounds, retractions
          and moments, one by one.
  recipe_long
          the model of `long`, one chain with other ranks, rates and retractions.
  long_decay
          the arms of `long` with a rate that falls over nine tenths, which is searched
          around its best there.
  triple  the model of `small`, three times the rates, for loss spikes.
  width   the model of `small` at d 64, 128 and 256: where do rates have their best?
  large   d 384, 6 layers, 10.7 M parameters dense in the layers: the same, .35 tokens
          for each of all 12.2 M; for accelerators, a process for each:
          for i in 0 1 2 3 4 5 6 7; do CUDA_VISIBLE_DEVICES=$i python -m \
            experiments.compare --config=configs/compare_methods.py:large & done; wait
  long    d 64, 4 layers, .2 M parameters dense: the same, .4 to 10 tokens for each.
"""

import dataclasses
from collections.abc import Sequence

from experiments.studies import grid, methods
from sct_jax import data, model, optimizers
from sct_jax.training import config

ADAM_RATE_FACTORS = (1 / 3, 1.0, 3.0)  # where it is searched

SHORT = (0.4,)  # tokens per parameter

# Those of larger models and longer runs, with the best rates of `small` at equal FLOPs:
# of the matrices, and of the embedding and norms.
LEADING = {
    "dense AdamW": (3e-3, 0.027),
    "dense Muon": (0.01, 0.081),
    "SCT (s = 1)": (6e-3, 0.054),
    "Spectron (code)": (0.0125, 0.027),
    "Stiefel Muon": (0.01, 0.027),
}

# The best rates of `long` at 10 tokens per parameter: of the matrices, and of the rest.
BEST_OF_LONG = {
    "Stiefel Muon": (0.01, 0.081),
    "dense AdamW": (6e-3, 0.027),
    "dense Muon": (0.02, 0.081),
    "dense Muon (narrow)": (0.04, 0.027),
    "Spectron (code)": (0.0125, 0.027),
    "SCT (s = 1)": (3e-3, 0.018),
}


def leading(*, short_run: bool) -> tuple[grid.Arm, ...]:
    """The arms of `LEADING` at three rates of the matrices each, and a narrow one."""
    arms = {
        name: methods.searched(methods.at_setting(name, *best))
        for name, best in LEADING.items()
    }
    if short_run:
        arms = {name: methods.of_short_run(arm) for name, arm in arms.items()}
    return *arms.values(), methods.narrow(arms["dense Muon"])


def base(
    *, d_model: int, d_ff: int, vocab_size: int, seq_len: int, num_layers: int = 4
) -> config.ExperimentConfig:
    """The experiment that the arms override: SCT from a dense start's spectrum."""
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
        data=data.DataConfig(batch_size=16, seq_len=seq_len),
        optimizer=optimizers.OptimizerConfig(
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
    """The model of `small`, on which most studies are."""
    return base(d_model=128, d_ff=344, vocab_size=1024, seq_len=128)


def with_qk_norm(experiment: config.ExperimentConfig) -> config.ExperimentConfig:
    """With queries and keys normalised, which `recipe` found to help."""
    return dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, qk_norm=True)
    )


def _small() -> grid.Comparison:
    experiment = base_of_small()
    return grid.Comparison(
        base=experiment,
        arms=(*methods.ARMS, methods.narrow(methods.arm_named("dense Muon"))),
        tokens_per_parameter=SHORT,
        adam_rate_factors=ADAM_RATE_FACTORS,
        max_rates=7,
    )


def _leading(experiment: config.ExperimentConfig) -> grid.Comparison:
    experiment = with_qk_norm(experiment)
    return grid.Comparison(
        base=experiment,
        arms=leading(short_run=True),
        tokens_per_parameter=SHORT,
    )


def _short() -> grid.Comparison:
    return dataclasses.replace(
        _leading(base(d_model=256, d_ff=688, vocab_size=4096, seq_len=256)),
        protocols=("tokens", "flops", "seconds"),
        reference="dense AdamW",
    )


def _large() -> grid.Comparison:
    experiment = base(
        d_model=384, d_ff=1032, num_layers=6, vocab_size=4096, seq_len=256
    )
    # As many as the text has for the longest trials.
    return dataclasses.replace(_leading(experiment), tokens_per_parameter=(0.35,))


def _long() -> grid.Comparison:
    # A small vocabulary, as the head has a small share of the FLOPs of a large model;
    # the best rate of the embedding falls with the length, so it is searched again.
    shape = base(d_model=64, d_ff=176, vocab_size=512, seq_len=128)
    batches = dataclasses.replace(shape.data, batch_size=8)
    experiment = with_qk_norm(dataclasses.replace(shape, data=batches))
    return grid.Comparison(
        base=experiment,
        arms=leading(short_run=False),
        tokens_per_parameter=(10.0, *SHORT, 2.0),
        adam_rate_factors=ADAM_RATE_FACTORS,
    )


def _triple() -> grid.Comparison:
    """The leading methods at three times the rates of the other studies: who spikes?"""
    arms = (
        methods.at_setting(name, round(3 * rate, 6), round(3 * adam_rate, 6))
        for name, (rate, adam_rate) in LEADING.items()
    )
    return grid.Comparison(
        base=with_qk_norm(base_of_small()),
        arms=tuple(map(methods.of_short_run, arms)),
        tokens_per_parameter=SHORT,
    )


def _recipe() -> grid.Comparison:
    """Variations of two chains, and of dense Muon, each at a good rate of `small`."""
    experiment = base_of_small()
    within_mlp = "ranks from gate to up and down"
    variations = {
        **methods.VARIATIONS,
        **methods.moved_ranks(experiment.model.rank, gate=43, up=43, down=43),
        within_mlp: methods.fields("model.ranks", gate=16, up=40, down=40),
    }

    def of(name: str, rate: float, *titles: str, always: Sequence[str] = ()):
        plain = methods.at_setting(name, rate, 0.027)
        return methods.varied(plain, variations, *titles, always=always)

    of_both = (
        "clip at .05",
        "normalised q and k",
        "init of the dense norm",
        "lossless",
        "tangent gradient",
        "R = d/2",
    )
    best = "momentum .9 + normalised q and k"
    arms = (
        *of(
            "Stiefel Muon",
            0.01,
            *of_both,
            "rate of s as of u and v",
            "momentum .9",
            "momentum .8",
            best,
            f"{best} + lossless",
            "ranks from q and k to v and o",
            "ranks from attention to MLP",
            within_mlp,
            always=(best, "R = d/2"),
        ),
        *of(
            "SCT (dense spectrum)",
            3e-3,
            *of_both,
            "clip at .1",
            "rate of s x 5",
            "polar retraction",
            "transported moments",
            "bfloat16 moments",
            always=("bfloat16 moments",),  # how much do they cost?
        ),
        # What helps the one chain may help the other.
        *of(
            "dense Muon",
            0.01,
            "momentum .9",
            "normalised q and k",
            best,
            always=(best,),
        ),
    )
    arms = (*arms, methods.narrow(arms[-1]))
    return grid.Comparison(base=experiment, arms=arms, tokens_per_parameter=SHORT)


def _best_of_long(name: str) -> grid.Arm:
    """This arm, which may be the narrow one, at its setting of `BEST_OF_LONG`."""
    plain = name.removesuffix(" (narrow)")
    arm = methods.at_setting(plain, *BEST_OF_LONG[name])
    return arm if plain == name else methods.narrow(arm)


def _recipe_long() -> grid.Comparison:
    """What may bring the low-rank arms of `long` nearer to the dense ones there."""
    study = _long()
    moved = methods.moved_ranks(study.base.model.rank, gate=22, up=22, down=21)
    variations = methods.VARIATIONS | moved
    arms = (
        *methods.varied(
            _best_of_long("Stiefel Muon"),
            variations,
            "lossless",
            "momentum .9",
            "rate of s as of u and v",
            "tangent gradient",
            "weight decay .01",
            "decay .9",
            *moved,
        ),
        methods.at_setting("Stiefel Muon (svd coordinates)", 0.0125, 0.081),
        # What helps the low-rank chain may help the dense one.
        *methods.varied(_best_of_long("dense Muon"), variations, "decay .9"),
        *methods.varied(_best_of_long("dense Muon (narrow)"), variations, "decay .9"),
    )
    return dataclasses.replace(
        study,
        arms=tuple(dataclasses.replace(arm, always=True) for arm in arms),
        protocols=("tokens",),
        adam_rate_factors=(),
    )


def _long_decay() -> grid.Comparison:
    """The arms of `long` with a rate that long decays, searched around their best."""
    study = _long()
    arms = (methods.searched(_best_of_long(name)) for name in BEST_OF_LONG)
    return dataclasses.replace(
        study,
        arms=tuple(
            methods.with_fields(
                arm, *methods.VARIATIONS["decay .9"], name=f"{arm.name}: decay .9"
            )
            for arm in arms
        ),
        adam_rate_factors=(),
    )


def _width() -> grid.Comparison:
    """Two chains at three widths, the same tokens for each, tuned alike."""
    experiment = with_qk_norm(base_of_small())
    shape = experiment.model

    def at_width(arm: grid.Arm, width: int) -> grid.Arm:
        d_ff = 8 * round(width * shape.d_ff / shape.d_model / 8)
        return methods.with_fields(
            arm,
            *methods.fields("model", d_model=width, d_ff=d_ff, rank=width // 4),
            name=f"{arm.name} at d {width}",
        )

    muon = methods.of_short_run(methods.arm_named("Stiefel Muon"))
    muon = dataclasses.replace(muon, adam_rate=0.027)
    adam = dataclasses.replace(
        methods.arm_named("SCT (dense spectrum)"), name="SCT", adam_rate=0.027
    )
    by_width = methods.with_fields(
        adam,
        *methods.fields("optimizer", base_width=shape.d_model),
        name="SCT with base_width",
    )
    return grid.Comparison(
        base=experiment,
        arms=tuple(
            at_width(arm, width)
            for arm in (muon, adam, by_width)
            for width in (shape.d_model // 2, shape.d_model, 2 * shape.d_model)
        ),
        seeds=(0,),
        tokens_per_parameter=SHORT,
        protocols=("tokens",),
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
