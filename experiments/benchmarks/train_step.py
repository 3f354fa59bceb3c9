"""Measures training steps and their parts, against PyTorch and against floors.

python -m experiments.benchmarks.train_step
python -m experiments.benchmarks.train_step --rows=step,head --rounds=3 \
    --json=bench.json
python -m experiments.benchmarks.train_step --rows=tiny --before=../older_checkout

Seconds are medians, and what is compared takes turns: functions in one process, or
whole programs. `step` and `layerwise` need PyTorch and transformers, from the extra
`dev`. A figure ends with "pass", "short", or "-" if it has no target. The exit code is
0, or 2 for bad input.
"""

from sct_jax.training import process

if __name__ == "__main__":
    process.start("experiments.benchmarks.train_step")

import dataclasses
import functools
import gc
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import smollm_r128
from experiments.benchmarks import machine, programs, tables, timing
from sct_jax import attention, data, errors, model, sharding, spectral
from sct_jax.training import config as config_lib
from sct_jax.training import optimizer_config, overrides
from sct_jax.training import trainer as trainer_lib

LEARNING_RATE = 1e-4
SHAPE = model.ModelConfig(rank=64)  # SmolLM2-135M's
VARIANTS: dict[str, tuple[tuple[str, ...], float]] = {
    "MLP spectral": (model.MLP, 1.6),
    "all seven spectral": (model.BLOCK_MATRICES, 1.6),
    "dense": ((), 1.3),
}
"""Name -> spectral matrices, and target for the seconds of PyTorch over ours."""

REMAT = ("none", "dots")
MAX_PROGRAM_ROUNDS = 2  # of programs that take minutes
PUBLISHED_BYTES = 12e9  # free memory that the authors' program wants


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    parser = tables.parser_of(__doc__ or "", ROWS, rounds=7)
    parser.add_argument(
        "--before", help="another checkout of this repository, to compare `tiny` with"
    )
    flags = parser.parse_flags(sys.argv[1:] if argv is None else argv)
    try:
        names = tables.selected(flags, ROWS)
        if flags.before is not None:
            errors.check("--before", "tiny" in names, "has no effect without row tiny")
            errors.check(
                "--before",
                (pathlib.Path(flags.before) / "sct_jax").is_dir(),
                f"{flags.before!r} has no folder sct_jax",
            )
        rows = ROWS
        if flags.before is not None:
            tiny = functools.partial(tiny_figures, before=flags.before)
            rows = ROWS | {"tiny": dataclasses.replace(ROWS["tiny"], measure=tiny)}
        tables.measure(names, rows, flags)
    except errors.UserError as error:
        overrides.fail(str(error))
    return 0


# --- The whole step, beside PyTorch.


def step_figures(
    rounds: int,
    *,
    shape: model.ModelConfig = SHAPE,
    rows: int = 4,
    length: int = 256,
) -> tables.Figures:
    """Returns the figures of `step`: PyTorch's seconds over ours, per variant.

    Both sides compute the loss, its gradient and the update of every parameter, on the
    same tokens, from weights of their own.
    """
    found: tables.Figures = []
    for name, (matrices, target) in VARIANTS.items():
        if not tables.has_torch():
            ratio = f"{name}: PyTorch / ours"
            found.append(
                tables.Figure(
                    name=ratio, value=None, at_least=target, note=tables.NO_TORCH
                )
            )
            continue
        variant = dataclasses.replace(shape, spectral=matrices)
        found += _step_variant(name, variant, target, rounds, rows, length)
        gc.collect()
    return found


def _step_variant(name, shape, target, rounds, rows, length) -> tables.Figures:
    text = np.random.default_rng(0).integers(
        shape.vocab_size, size=(rows, length + 1), dtype=np.int32
    )
    calls = {
        remat: _own_step(dataclasses.replace(shape, remat=remat), text)
        for remat in REMAT
    }
    calls["PyTorch"] = _torch_step(shape, text)
    seconds = timing.medians(timing.interleaved(calls, rounds=rounds))
    best = min(REMAT, key=lambda remat: seconds[remat])
    label = lambda remat: f"remat {remat}" + " (the default on CPU)" * (remat == "dots")
    return [
        *(
            tables.Figure(
                name=f"{name}: PyTorch / ours, {label(remat)}",
                value=seconds["PyTorch"] / seconds[remat],
                at_least=target if remat == best else None,
            )
            for remat in REMAT
        ),
        *(
            tables.Figure(name=f"  ours, {label(remat)}, seconds", value=seconds[remat])
            for remat in REMAT
        ),
        tables.Figure(name="  PyTorch, seconds", value=seconds["PyTorch"]),
    ]


def _own_step(shape: model.ModelConfig, text: np.ndarray) -> Callable[[], Any]:
    """A step of the `Trainer`, with the default guard."""
    kind = optimizer_config.Sct if shape.spectral else optimizer_config.AdamW
    config = config_lib.ExperimentConfig(
        model=shape,
        data=data.DataConfig(batch_size=text.shape[0], seq_len=text.shape[1] - 1),
        optimizer=kind(peak_learning_rate=LEARNING_RATE, schedule="constant"),
    )
    trainer = _trainer(config)
    batch = {
        "inputs": text[:, :-1],
        "targets": text[:, 1:],
        "segment_ids": np.zeros_like(text[:, 1:]),
    }
    state = trainer.init(jax.random.key(0))

    def call():
        nonlocal state
        state, metrics = trainer.step(state, batch, diagnose=False)
        return state, metrics

    return call


def _torch_step(shape: model.ModelConfig, text: np.ndarray) -> Callable[[], Any]:
    import torch

    from experiments.benchmarks import published

    torch.set_num_threads(machine.num_cores())
    torch.manual_seed(0)
    llama = published.llama(shape)
    ids = torch.from_numpy(text[:, :-1]).long()
    loss_fn = lambda: llama(input_ids=ids, labels=ids).loss
    return published.make_step(llama, loss_fn, learning_rate=LEARNING_RATE)


# --- Parts of the step, beside floors.


def head_figures(
    rounds: int,
    *,
    shape: model.ModelConfig = SHAPE,
    rows: int = 4,
    length: int = 256,
) -> tables.Figures:
    """Returns the figures of `head`: its time divided by that of its three products.

    The products compute the logits, and the gradients of embedding and input, at the
    rate of a large square product.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    size, width = shape.vocab_size, shape.d_model
    params = {
        "final_norm": jnp.ones(width),
        "embedding": jax.random.normal(keys[0], (size, width)) / width**0.5,
    }
    x = jax.random.normal(keys[1], (rows, length, width))
    targets = jax.random.randint(keys[2], (rows, length), 0, size)
    linear = functools.partial(spectral.linear, flatten_rows=True)
    loss = functools.partial(model.head_loss, config=shape, linear=linear)
    head = jax.jit(
        jax.value_and_grad(lambda params, x: loss(params, x, targets), (0, 1))
    )
    product, product_flops = machine.large_product()
    calls = {"head": lambda: head(params, x), "product": product}
    seconds = timing.medians(timing.interleaved(calls, rounds=rounds))
    flops = 3 * 2 * rows * length * width * size
    floor = flops * seconds["product"] / product_flops
    return [
        tables.Figure(
            name="head and loss, forward and backward / its three products",
            value=seconds["head"] / floor,
            at_most=1.25,
        ),
        tables.Figure(name="  head and loss, seconds", value=seconds["head"]),
        tables.Figure(
            name="  large square product, GFLOP/s",
            value=product_flops / seconds["product"] / 1e9,
        ),
    ]


def attention_figures(
    rounds: int,
    *,
    shape: model.ModelConfig = SHAPE,
    long: tuple[int, int] = (1, 2048),
    short: tuple[int, int] = (4, 256),
) -> tables.Figures:
    """Returns the figures of `attention`: by blocks over all scores at once."""
    found: tables.Figures = []
    for (rows, length), time_target, memory_target in (
        (long, 1.0, 0.1),
        (short, None, None),
    ):
        compiled = {
            name: _attention(name, shape, rows, length)
            for name in attention.IMPLEMENTATIONS
        }
        calls = {name: call for name, (call, _) in compiled.items()}
        seconds = timing.medians(timing.interleaved(calls, rounds=rounds))
        size = f"{rows} x {length:,} tokens"
        found += [
            tables.Figure(
                name=f"{size}: seconds by blocks / plain",
                value=seconds["chunked"] / seconds["xla"],
                at_most=time_target,
            ),
            tables.Figure(
                name=f"{size}: temporary memory by blocks / plain",
                value=compiled["chunked"][1] / compiled["xla"][1],
                at_most=memory_target,
            ),
        ]
    return found


def _attention(implementation, shape, rows, length) -> tuple[Callable[[], Any], int]:
    """A forward and backward pass, and the bytes of its temporaries."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads, shape.num_heads)
    q, k, v, d_out = (
        jax.random.normal(key, (rows, length, number, shape.head_size))
        for key, number in zip(keys, heads, strict=True)
    )

    def both_passes(q, k, v, d_out):
        attend = functools.partial(attention.attend, implementation=implementation)
        out, backward = jax.vjp(attend, q, k, v)
        return out, backward(d_out)

    compiled = jax.jit(both_passes).lower(q, k, v, d_out).compile()
    analysis: Any = compiled.memory_analysis()
    return lambda: compiled(q, k, v, d_out), analysis.temp_size_in_bytes


def memory_figures(
    *,
    config: config_lib.ExperimentConfig | None = None,
    unit: int = 2048,
    budget: float = 16e9,
    most: int = 512,
) -> tables.Figures:
    """Returns the figures of `memory`: what steps need, compiled but never run.

    Args:
      config: the run; by default `configs/smollm_r128.py`. Its remat becomes "full".
      unit: tokens that the length of a sequence is a multiple of.
      budget: bytes for the arguments and temporaries of a step.
      most: the longest window, in units.
    """
    config = smollm_r128.get_config() if config is None else config
    sizes = _memory(config)

    def fits(units: int) -> bool:
        changed = dataclasses.replace(
            config.data, batch_size=1, seq_len=units * unit, num_microbatches=1
        )
        needed = _memory(dataclasses.replace(config, data=changed))
        return needed["argument_bytes"] + needed["temporary_bytes"] <= budget

    units = 1
    while units <= most and fits(units):
        units *= 2
    fit, too_long = units // 2, units
    while too_long - fit > 1:
        middle = (fit + too_long) // 2
        fit, too_long = (middle, too_long) if fits(middle) else (fit, middle)
    shape = f"{config.data.batch_size} x {config.data.seq_len:,} tokens"
    return [
        tables.Figure(
            name=f"temporaries at {shape}, GB",
            value=sizes["temporary_bytes"] / 1e9,
            at_most=10,
        ),
        tables.Figure(
            name=f"arguments at {shape}, GB", value=sizes["argument_bytes"] / 1e9
        ),
        tables.Figure(
            name=f"longest window within {budget / 1e9:g} GB, batch 1, tokens",
            value=fit * unit,
            at_least=32768,
        ),
    ]


def _memory(config: config_lib.ExperimentConfig) -> dict[str, int]:
    """Bytes of the step with the least memory, compiled for this machine."""
    lean = dataclasses.replace(config.model, remat="full")
    trainer = _trainer(dataclasses.replace(config, model=lean))
    trainer.compile(trainer.abstract_state)
    found = trainer.compiled_memory(trainer.abstract_state)
    assert found is not None
    return found


def _trainer(config: config_lib.ExperimentConfig) -> trainer_lib.Trainer:
    """A trainer on one device."""
    return trainer_lib.Trainer(config, sharding.MeshConfig().build(1))


# --- Whole programs.


def layerwise_figures(
    rounds: int,
    *,
    ours: programs.Program | None = None,
    theirs: programs.Program | None = None,
    needed_bytes: float = PUBLISHED_BYTES,
) -> tables.Figures:
    """Returns the figures of `layerwise`: the authors' 70B-class step beside ours."""
    free = machine.available_memory()
    note = ""
    if not tables.has_torch():
        note = tables.NO_TORCH
    elif free is not None and free < needed_bytes:
        note = (
            f"needs {needed_bytes / 1e9:g} GB of memory; {free / 1e9:.1f} GB are free"
        )
    found: dict[str, Any] = {}
    if not note:
        both = {
            "ours": ours or programs.step70b("--reference_attention", "--steps=4"),
            "theirs": theirs or programs.published("--steps=4"),
        }
        found, note = _run(both, min(rounds, MAX_PROGRAM_ROUNDS))

    def figure(name, value, **target):
        value = value(found["ours"], found["theirs"]) if found else None
        return tables.Figure(name=name, value=value, note=note, **target)

    return [
        figure(
            "seconds per step, PyTorch / ours",
            lambda a, b: b["seconds_per_step"] / a["seconds_per_step"],
            at_least=10,
        ),
        figure(
            "peak memory, ours / PyTorch",
            lambda a, b: a["peak_rss_bytes"] / b["peak_rss_bytes"],
            at_most=0.62,
        ),
        figure("  ours, seconds", lambda a, b: a["seconds_per_step"]),
        figure("  PyTorch, seconds", lambda a, b: b["seconds_per_step"]),
        figure("  ours, GB", lambda a, b: a["peak_rss_bytes"] / 1e9),
        figure("  PyTorch, GB", lambda a, b: b["peak_rss_bytes"] / 1e9),
        figure(
            "  parameters, PyTorch / ours",
            lambda a, b: b["parameters"] / a["parameters"],
        ),
    ]


def long_figures(*, program: programs.Program | None = None) -> tables.Figures:
    """Returns the figures of `long`: Llama-3-70B's shape on 512 tokens."""
    program = program or programs.step70b("--tokens=512", "--steps=3", "--steps_only")
    found, note = _run({"ours": program}, 1)
    value = lambda key, unit: found["ours"][key] / unit if found else None
    return [
        tables.Figure(
            name="seconds per step",
            value=value("seconds_per_step", 1),
            at_most=25,
            note=note,
        ),
        tables.Figure(
            name="peak memory, GB",
            value=value("peak_rss_bytes", 1e9),
            at_most=7.6,
            note=note,
        ),
    ]


def tiny_figures(
    rounds: int, *, before: str | None = None, steps: int = 20
) -> tables.Figures:
    """Returns the figures of `tiny`: tokens per second, and the ratio to `before`."""
    folders = {"now": str(programs.ROOT)} | ({"before": before} if before else {})
    found, note = _run(
        {
            name: programs.tokens_per_second(folder, steps=steps)
            for name, folder in folders.items()
        },
        rounds,
    )
    rates = {name: figures["tokens_per_second"] for name, figures in found.items()}
    figures = [
        tables.Figure(
            name=f"tokens per second, {name}", value=rates.get(name), note=note
        )
        for name in folders
    ]
    if before:
        figures.append(
            tables.Figure(
                name="tokens per second, now / before",
                value=rates["now"] / rates["before"] if rates else None,
                at_least=1.3,
                note=note,
            )
        )
    return figures


def _run(both: dict[str, programs.Program], rounds: int) -> tuple[dict[str, Any], str]:
    """The figures of programs, or none and a message."""
    try:
        return programs.medians(both, rounds=rounds), ""
    except programs.ProgramError as error:
        return {}, str(error)


ROWS = {
    "step": tables.Row(
        title="Training step, SmolLM2-135M's shape, R 64, 4 x 256 tokens, float32",
        measure=step_figures,
    ),
    "head": tables.Row(
        title="Head and loss in chunks, 1,024 tokens, 576 x 49,152",
        measure=head_figures,
    ),
    "attention": tables.Row(
        title="Attention, 9 heads on 3 of 64, forward and backward",
        measure=attention_figures,
    ),
    "memory": tables.Row(
        title="Memory of a compiled step, configs/smollm_r128.py",
        measure=lambda _: memory_figures(),
    ),
    "layerwise": tables.Row(
        title="70B-class demonstration of the SCT paper, 8 tokens",
        measure=layerwise_figures,
    ),
    "long": tables.Row(
        title="Llama-3-70B's shape, R 32, 512 tokens",
        measure=lambda _: long_figures(),
    ),
    "tiny": tables.Row(
        title="configs/smollm_r128.py:tiny, synthetic tokens",
        measure=tiny_figures,
    ),
}
