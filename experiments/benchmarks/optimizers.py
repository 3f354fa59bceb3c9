"""Measures the cost of the optimizer chains, against floors measured beside them.

python -m experiments.benchmarks.optimizers
python -m experiments.benchmarks.optimizers --sets=smollm2-135m --rounds=9 \
    --json=bench.json

Every figure is a ratio of median seconds; the functions take turns in one process. A
row ends with "pass", "short", or "-" if it has no target. The exit code is 0,
or 2 for bad input.
"""

from sct_jax.training import process

if __name__ == "__main__":
    process.start("experiments.benchmarks.optimizers")

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import rich.console

from experiments import json_file
from experiments.benchmarks import tables, timing
from sct_jax import errors, linalg, model, optimizers, spectral, stiefel
from sct_jax.training import accounting, overrides

Call = Callable[[], Any]

TOKENS = 8192  # of the training step that the chain is compared with
MEASURED_TOKENS = 512  # of the timed backward pass, scaled up to TOKENS


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactorSet:
    """The spectral matrices of some layers of a model.

    Attributes:
      title: title of the table.
      shape: the model; all of its `num_layers` layers are measured.
      speedup: target for the time of QR per factor over the batched retraction.
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


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    parser = overrides.FlagParser(__doc__ or "")
    parser.add_argument(
        "--sets", default=",".join(SETS), help="factor sets, comma-separated"
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="timed runs of each function"
    )
    json_file.add_flag(parser)
    flags = parser.parse_flags(sys.argv[1:] if argv is None else argv)
    try:
        errors.check("--rounds", flags.rounds >= 1, f"{flags.rounds} must be >= 1")
        names = flags.sets.split(",")
        for name in names:
            errors.check_choice("--sets", name, tuple(SETS))
        console = rich.console.Console()
        results = {}
        for name in names:
            figures = measure(SETS[name], rounds=flags.rounds)
            results[name] = figures
            console.print(tables.table(SETS[name].title, figures))
        if flags.json is not None:
            titles = {name: SETS[name].title for name in names}
            json_file.write(flags.json, tables.as_json(titles, results))
    except errors.UserError as error:
        overrides.fail(str(error))
    return 0


def measure(factor_set: FactorSet, *, rounds: int) -> list[tables.Figure]:
    """Returns all figures of one set of factors."""
    shape = factor_set.shape
    params = _factors(shape)
    return [
        *_retraction_figures(params, factor_set.speedup, rounds),
        *_chain_figures(params, shape, rounds),
        *_spectron_figures(params, rounds),
    ]


def _retraction_figures(params, speedup, rounds) -> list[tables.Figure]:
    moved = _moved(params)
    retractions = {
        "cholesky_qr": stiefel.cholesky_qr_retraction,
        "qr": stiefel.qr_retraction,
        "polar": stiefel.polar_retraction,
    }
    calls: dict[str, Call] = {
        name: functools.partial(jax.jit(retract), moved)
        for name, retract in retractions.items()
    }
    calls["products"] = _make_products(params)
    times = _median_seconds(calls, rounds)
    return [
        tables.Figure(
            name="retraction: QR per factor / batched CholeskyQR",
            value=times["qr"] / times["cholesky_qr"],
            at_least=speedup,
        ),
        tables.Figure(
            name="retraction: FLOP/s / FLOP/s of its two products",
            value=times["products"] / times["cholesky_qr"],
            at_least=0.7,
        ),
        tables.Figure(
            name="retraction: polar / CholeskyQR",
            value=times["polar"] / times["cholesky_qr"],
        ),
    ]


def _chain_figures(params, shape, rounds) -> list[tables.Figure]:
    chains = {
        "adamw": optax.adamw(1e-4, weight_decay=0.0),
        "sct": optimizers.sct(1e-4),
        "active": optimizers.sct(1e-4, max_update_norm=1e-4),
        "undecided": optimizers.sct(1e-4, max_update_norm=1e9),
        "gradient": optimizers.sct(1e-4, tangent_projection="gradient"),
        "transport": optimizers.sct(1e-4, transport_moments=True),
        "svd": optimizers.sct(1e-4, retraction="svd"),
        "stiefel_muon": optimizers.stiefel_muon(1e-3),
    }
    calls = {name: _make_step(tx, params) for name, tx in chains.items()}
    calls["products"] = _make_products(params)
    calls["backward"] = _make_backward(params, shape)
    times = _median_seconds(calls, rounds)
    floor = times["adamw"] + times["products"]  # 4 R FLOPs per factor entry
    floor_clipped = times["adamw"] + 3 * times["products"]  # 12 R
    step = times["backward"] * TOKENS / MEASURED_TOKENS
    rank = shape.rank
    entries = sum(x.size for w in params.values() for x in (w.u, w.v))
    flops = 3 * TOKENS * shape.num_layers * accounting.block_flops(shape, seq_len=512)
    return [
        tables.Figure(
            name="SCT chain / (AdamW + 4 R FLOPs per entry)",
            value=times["sct"] / floor,
            at_most=1.25,
        ),
        tables.Figure(
            name="SCT chain, clip active / (AdamW + 12 R FLOPs)",
            value=times["active"] / floor_clipped,
            at_most=1.25,
        ),
        tables.Figure(
            name="SCT chain, clip inactive by its cheap bound / without a clip",
            value=times["undecided"] / times["sct"],
            at_most=1.05,
        ),
        tables.Figure(name="SCT chain / AdamW", value=times["sct"] / times["adamw"]),
        tables.Figure(
            name=f"SCT chain / training step of {TOKENS:,} tokens (layers only)",
            value=times["sct"] / (times["sct"] + step),
            at_most=0.05,
        ),
        tables.Figure(
            name="  the same by FLOPs: the retraction / the step",
            value=4 * rank * entries / (flops + 4 * rank * entries),
        ),
        tables.Figure(
            name="with the gradient's tangent projection / SCT chain",
            value=times["gradient"] / times["sct"],
        ),
        tables.Figure(
            name="with transported moments / SCT chain",
            value=times["transport"] / times["sct"],
        ),
        tables.Figure(
            name="with the SVD retraction / SCT chain",
            value=times["svd"] / times["sct"],
        ),
        tables.Figure(
            name="Stiefel Muon / SCT chain", value=times["stiefel_muon"] / times["sct"]
        ),
    ]


def _spectron_figures(params, rounds) -> list[tables.Figure]:
    params = {name: spectral.to_low_rank(w) for name, w in params.items()}
    chains = {"spectron": optimizers.spectron(1e-3), "muon": optimizers.muon(1e-3)}
    calls = {name: _make_step(tx, params) for name, tx in chains.items()}
    times = _median_seconds(calls, rounds)
    return [
        tables.Figure(
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
    return {n: w for n, w in block.items() if isinstance(w, spectral.SpectralFactors)}


def _moved(params: Mapping[str, spectral.SpectralFactors]) -> list[tuple]:
    """Points after a step of Adam: the factors plus signs, at a usual learning rate."""

    def move(x):
        sign = jnp.sign(jax.random.normal(jax.random.key(1), x.shape))
        return x + 1e-3 * sign

    return [(move(w.u), move(w.v)) for w in params.values()]


def _make_products(params) -> Call:
    """The matrix products of one pass: x.T x, and x times a square matrix."""
    points = [(w.u, w.v) for w in params.values()]
    squares = jax.tree.map(
        lambda x: jnp.ones((*x.shape[:-2], *x.shape[-1:] * 2)), points
    )

    @jax.jit
    def products(points, squares):
        return jax.tree.map(
            lambda x, z: (linalg.gram(x), linalg.matmul(x, z)),
            points,
            squares,
        )

    return lambda: products(points, squares)


def _make_step(tx: optax.GradientTransformation, params) -> Call:
    """A step of a chain that updates parameters and state in place."""

    # Donates the gradients too: returning them undonated would copy them.
    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    grads = jax.tree.map(
        lambda x: 1e-3 * jax.random.normal(jax.random.key(2), x.shape), params
    )
    params = jax.tree.map(jnp.copy, params)
    carry = params, jax.jit(tx.init)(params), grads

    def call():
        nonlocal carry
        carry = step(*carry)
        return carry

    return call


def _make_backward(params, shape: model.ModelConfig) -> Call:
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
        linear = functools.partial(spectral.linear, flatten_rows=True)
        apply = functools.partial(model.block, config=shape, linear=linear)
        x, _ = jax.lax.scan(lambda x, w: (apply(w, x, tables, None), None), x, layers)
        return jnp.mean(jnp.square(x))

    return functools.partial(jax.jit(jax.grad(loss_fn)), layers, x)


def _median_seconds(calls: Mapping[str, Call], rounds: int) -> dict[str, float]:
    return timing.medians(timing.interleaved(calls, rounds=rounds))
