"""Measures what the optimizer chains cost, against floors measured beside them.

python -m experiments.bench_optimizers
python -m experiments.bench_optimizers --sets=smollm2-135m --rounds=9 --json=bench.json

Every figure is a ratio of medians of runs that take turns in one process. A row ends
with "pass", "short" or, where there is no target, "-". The exit code is 0 either way.
"""

import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments import huge_pages

if __name__ == "__main__":
    huge_pages.restart_with_huge_pages()

import jax
import jax.numpy as jnp
import optax
import rich.console
import rich.table

from sct_jax import errors, linalg, model, optimizers, spectral, stiefel
from sct_jax.training import accounting, command_line

TOKENS = 8192  # of the training step whose share is asked for
MEASURED_TOKENS = 512  # of the backward pass that is timed in its place


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactorSet:
    """The spectral matrices of some layers of a model.

    Attributes:
      title: what the table calls it.
      shape: of the model; `num_layers` of its layers are measured.
      speedup: target of the retraction against QR, per factor.
    """

    title: str
    shape: model.ModelConfig
    speedup: float


ALL = model.BLOCK_MATRICES
SETS = {
    "smollm2-135m": FactorSet(
        title="SmolLM2-135M R 64, 30 layers",
        shape=model.ModelConfig(rank=64, spectral=ALL),
        speedup=5.0,
    ),
    "smollm2-1.7b": FactorSet(
        title="SmolLM2-1.7B R 128 (MLP), 6 layers",
        shape=model.ModelConfig(
            d_model=2048,
            d_ff=8192,
            num_layers=6,
            num_heads=32,
            num_kv_heads=32,
            rank=128,
        ),
        speedup=4.0,
    ),
    "70b": FactorSet(
        title="70B class R 32, 3 layers",
        shape=model.ModelConfig(
            d_model=8192,
            d_ff=28672,
            num_layers=3,
            num_heads=64,
            num_kv_heads=64,
            rank=32,
            spectral=ALL,
        ),
        speedup=5.0,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One row: a measured ratio, and the side of the target it has to be on."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def target(self) -> str:
        """The target in words."""
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"

    @property
    def verdict(self) -> str:
        """Returns "pass", "short", or "-" where there is no target."""
        if self.at_least is not None:
            return "pass" if self.value >= self.at_least else "short"
        if self.at_most is not None:
            return "pass" if self.value <= self.at_most else "short"
        return "-"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    parser = command_line.FlagParser(__doc__ or "")
    parser.add_argument("--sets", default=",".join(SETS), help="factor sets, by comma")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each function")
    parser.add_argument("--json", help="file for the same figures")
    flags = parser.parse_flags(sys.argv[1:] if argv is None else argv)
    try:
        errors.check("--rounds", flags.rounds >= 1, f"{flags.rounds} must be >= 1")
        names = flags.sets.split(",")
        for name in names:
            errors.check_choice("--sets", name, tuple(SETS))
    except errors.UserError as error:
        command_line.fail(str(error))
    console = rich.console.Console()
    results = {}
    for name in names:
        figures = measure(SETS[name], rounds=flags.rounds)
        results[name] = figures
        console.print(table(SETS[name].title, figures))
    if flags.json:
        pathlib.Path(flags.json).write_text(json.dumps(as_json(results), indent=2))
    return 0


def measure(factor_set: FactorSet, *, rounds: int) -> list[Figure]:
    """Returns every figure of one set of factors."""
    shape = factor_set.shape
    params = _factors(shape)
    return [
        *_retraction_figures(params, factor_set.speedup, rounds),
        *_chain_figures(params, shape, rounds),
        *_spectron_figures(params, rounds),
    ]


def table(title: str, figures: Sequence[Figure]) -> rich.table.Table:
    """Returns the figures of one set as a table to print."""
    result = rich.table.Table(title=title, title_justify="left")
    result.add_column("figure")
    for column in ("ratio", "target", ""):
        result.add_column(column, justify="right")
    for figure in figures:
        result.add_row(
            figure.name, f"{figure.value:.3g}", figure.target, figure.verdict
        )
    return result


def as_json(results: Mapping[str, Sequence[Figure]]) -> dict[str, Any]:
    """Returns the figures of all sets as JSON can hold them."""
    return {
        name: {
            "title": SETS[name].title,
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "figures": [
                {
                    "name": figure.name,
                    "value": figure.value,
                    "target": figure.target,
                    "verdict": figure.verdict,
                }
                for figure in figures
            ],
        }
        for name, figures in results.items()
    }


def _retraction_figures(params, speedup, rounds) -> list[Figure]:
    moved = _moved(params)
    products = _make_products(params)
    times = _take_turns(
        {
            "cholesky_qr": (jax.jit(stiefel.cholesky_qr_retraction), (moved,)),
            "qr": (jax.jit(stiefel.qr_retraction), (moved,)),
            "polar": (jax.jit(stiefel.polar_retraction), (moved,)),
            "products": products,
        },
        rounds,
    )
    return [
        Figure(
            name="retraction: QR per factor / batched CholeskyQR",
            value=times["qr"] / times["cholesky_qr"],
            at_least=speedup,
        ),
        Figure(
            name="retraction: arithmetic rate / that of its two products",
            value=times["products"] / times["cholesky_qr"],
            at_least=0.7,
        ),
        Figure(
            name="retraction: polar / CholeskyQR",
            value=times["polar"] / times["cholesky_qr"],
        ),
    ]


def _chain_figures(params, shape, rounds) -> list[Figure]:
    chains = {
        "adamw": optax.adamw(1e-4, weight_decay=0.0),
        "sct": optimizers.sct(1e-4),
        "active": optimizers.sct(1e-4, max_update_norm=1e-4),
        "undecided": optimizers.sct(1e-4, max_update_norm=1e9),
        "gradient": optimizers.sct(1e-4, tangent_projection="gradient"),
        "transport": optimizers.sct(1e-4, transport_moments=True),
        "lossless": optimizers.sct(1e-4, retraction="lossless"),
        "muon": optimizers.stiefel_muon(1e-3),
    }
    steps = {name: _make_step(tx, params) for name, tx in chains.items()}
    times = _take_turns(
        steps
        | {
            "products": _make_products(params),
            "backward": _make_backward(params, shape),
        },
        rounds,
    )
    floor = times["adamw"] + times["products"]  # 4 R FLOPs per factor entry
    floor_clipped = times["adamw"] + 3 * times["products"]  # 12 R
    step = times["backward"] * TOKENS / MEASURED_TOKENS
    rank = shape.rank
    entries = sum(x.size for w in params.values() for x in (w.u, w.v))
    flops = 3 * TOKENS * shape.num_layers * accounting.block_flops(shape, seq_len=512)
    return [
        Figure(
            name="SCT chain / (AdamW + 4 R FLOPs per entry)",
            value=times["sct"] / floor,
            at_most=1.25,
        ),
        Figure(
            name="SCT chain, clip active / (AdamW + 12 R FLOPs)",
            value=times["active"] / floor_clipped,
            at_most=1.25,
        ),
        Figure(
            name="SCT chain, clip decided by its cheap bound / without a clip",
            value=times["undecided"] / times["sct"],
            at_most=1.05,
        ),
        Figure(name="SCT chain / AdamW", value=times["sct"] / times["adamw"]),
        Figure(
            name=f"SCT chain / training step of {TOKENS:,} tokens (layers alone)",
            value=times["sct"] / (times["sct"] + step),
            at_most=0.05,
        ),
        Figure(
            name="  the same by FLOPs: the retraction / the step",
            value=4 * rank * entries / (flops + 4 * rank * entries),
        ),
        Figure(
            name="with the gradient's tangent projection / SCT chain",
            value=times["gradient"] / times["sct"],
        ),
        Figure(
            name="with transported moments / SCT chain",
            value=times["transport"] / times["sct"],
        ),
        Figure(
            name="with the lossless retraction / SCT chain",
            value=times["lossless"] / times["sct"],
        ),
        Figure(name="Stiefel Muon / SCT chain", value=times["muon"] / times["sct"]),
    ]


def _spectron_figures(params, rounds) -> list[Figure]:
    params = {name: spectral.to_low_rank(w) for name, w in params.items()}

    times = _take_turns(
        {
            "spectron": _make_step(optimizers.spectron(1e-3), params),
            "muon": _make_step(optimizers.muon(1e-3), params),
        },
        rounds,
    )
    return [
        Figure(
            name="Spectron chain / optax.contrib.muon on the same factors",
            value=times["spectron"] / times["muon"],
            at_most=1.0,
        )
    ]


def _factors(shape: model.ModelConfig) -> dict[str, spectral.SpectralFactors]:
    block = jax.jit(
        lambda key: spectral.retract(
            model.init_block(key, shape, layers=(shape.num_layers,))
        )
    )(jax.random.key(0))
    return {name: w for name, w in block.items() if spectral.is_spectral(w)}


def _moved(params: Mapping[str, spectral.SpectralFactors]) -> list[tuple]:
    """What a step of Adam leaves for the retraction: signs, at a usual rate."""

    def move(x):
        sign = jnp.sign(jax.random.normal(jax.random.key(1), x.shape))
        return x + 1e-3 * sign

    return [(move(w.u), move(w.v)) for w in params.values()]


def _make_products(params):
    """The arithmetic of one pass: x.T x, and x times a square matrix."""
    points = [(w.u, w.v) for w in params.values()]
    squares = jax.tree.map(
        lambda x: jnp.ones((*x.shape[:-2], *x.shape[-1:] * 2)), points
    )

    def products(points, squares):
        return jax.tree.map(
            lambda x, z: (linalg.gram(x), linalg.matmul(x, z)),
            points,
            squares,
        )

    return jax.jit(products), (points, squares)


def _make_step(tx, params):
    """A donated step of a chain, and arguments that it hands on to itself."""

    # The gradients too: what is returned undonated is copied.
    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    grads = jax.tree.map(
        lambda x: 1e-3 * jax.random.normal(jax.random.key(2), x.shape), params
    )
    params = jax.tree.map(jnp.copy, params)
    return step, (params, jax.jit(tx.init)(params), grads)


def _make_backward(params, shape: model.ModelConfig):
    """Forward and backward pass of the layers, without embedding and head."""
    dense = model.init_block(
        jax.random.key(3),
        dataclasses.replace(shape, spectral=()),
        layers=(shape.num_layers,),
    )
    layers = dense | dict(params)
    tables = model.rotary_table(MEASURED_TOKENS, shape)
    x = jax.random.normal(jax.random.key(4), (1, MEASURED_TOKENS, shape.d_model))

    def loss_fn(layers, x):
        apply = functools.partial(model.block, config=shape)
        x, _ = jax.lax.scan(lambda x, w: (apply(w, x, tables, None), None), x, layers)
        return jnp.mean(jnp.square(x))

    return jax.jit(jax.grad(loss_fn)), (layers, x)


def _take_turns(
    functions: Mapping[str, tuple[Callable[..., Any], tuple]], rounds: int
) -> dict[str, float]:
    """Median seconds of each function, in turns, so that noise meets all alike.

    A function that returns a tuple like its arguments is handed its own results.
    """
    arguments = {name: args for name, (_, args) in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, (function, _) in functions.items():
            began = time.perf_counter()
            results = jax.block_until_ready(function(*arguments[name]))
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - began)
            if isinstance(results, tuple) and len(results) == len(arguments[name]) == 3:
                arguments[name] = results
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    sys.exit(main())
