"""Prints the memory that training takes: per matrix, and for whole models.

python -m experiments.memory_table
python -m experiments.memory_table --rank=64 --json=memory.json

Bytes count the weight, the gradient and Adam's two moments in float32, computed
from shapes. For the columns "measured", one step of Adam runs on one matrix, and its
arrays on the device are counted. Activations are not included.
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import rich.console
import rich.table

from configs import llama70b_r32, smollm_r128
from experiments import json_file
from sct_jax import errors, optimizers, spectral
from sct_jax.training import accounting, config, layerwise, overrides

# MLP matrices in the table of the SCT paper.
MATRICES = {
    "SmolLM2-135M": (576, 1536),
    "SmolLM2-1.7B": (2048, 8192),
    "LLaMA-7B": (4096, 11008),
    "Qwen-27B": (4096, 17408),
    "LLaMA-70B": (8192, 28672),
}
MAX_MEASURED_BYTES = 2_000_000_000  # larger matrices are computed only


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    parser = overrides.FlagParser(__doc__ or "")
    parser.add_argument("--rank", type=int, default=32, help="rank of the matrices")
    json_file.add_flag(parser)
    flags = parser.parse_flags(sys.argv[1:] if argv is None else argv)
    smallest = min(min(shape) for shape in MATRICES.values())
    try:
        holds = 1 <= flags.rank <= smallest
        errors.check("--rank", holds, f"{flags.rank} is not in 1..{smallest}")
        figures = {"matrices": matrices(flags.rank), "models": models()}
        console = rich.console.Console()
        title = f"one MLP matrix at rank {flags.rank}"
        console.print(_table(title, figures["matrices"]))
        console.print(_table("whole models, as configured", figures["models"]))
        if flags.json is not None:
            json_file.write(flags.json, figures)
    except errors.UserError as error:
        overrides.fail(str(error))
    return 0


def matrices(rank: int) -> dict[str, dict[str, float | None]]:
    """Returns the bytes per matrix: dense and spectral, computed and measured."""
    rows = {}
    for name, (fan_in, fan_out) in MATRICES.items():
        dense = accounting.matrix_bytes(fan_in, fan_out, None)
        low_rank = accounting.matrix_bytes(fan_in, fan_out, rank)
        measured = dense <= MAX_MEASURED_BYTES
        rows[f"{name}, {fan_in} x {fan_out}"] = {
            "dense": dense,
            "dense, measured": (
                measured_bytes(fan_in, fan_out, None) if measured else None
            ),
            "spectral": low_rank,
            "spectral, measured": measured_bytes(fan_in, fan_out, rank),
            "ratio": dense / low_rank,
        }
    return rows


def measured_bytes(fan_in: int, fan_out: int, rank: int | None) -> int:
    """Returns the bytes on the device after one training step of one matrix."""
    if rank is None:
        w, tx = jnp.zeros((fan_in, fan_out)), optax.adamw(1e-3)
    else:
        w = spectral.init(jax.random.key(0), fan_in, fan_out, rank)
        tx = optimizers.sct(1e-3)
    state = tx.init(w)
    x = jnp.ones((1, fan_in))
    grads = jax.jit(jax.grad(lambda w: spectral.linear(x, w).sum()))(w)

    @jax.jit
    def step(grads, state, w):
        updates, state = tx.update(grads, state, w)
        return optax.apply_updates(w, updates), state

    w, state = jax.block_until_ready(step(grads, state, w))
    return sum(array.nbytes for array in jax.tree.leaves((w, grads, state)))


def models() -> dict[str, dict[str, float]]:
    """Returns the bytes of whole models: dense, spectral, and with a layerwise step."""
    rows = {}
    tx = optimizers.sct(1e-3)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    batch = {"inputs": ids, "targets": ids}
    for name, experiment in experiments().items():
        shape = experiment.model
        dense = accounting.parameters(accounting.dense_config(shape))
        stack = layerwise.stack_of(shape)
        layer_by_layer = accounting.layerwise_bytes(stack, tx, batch)["total"]
        rows[name] = {
            "parameters": accounting.parameters(shape),
            "dense": 16 * dense,
            "spectral": accounting.step_bytes(shape, tx)["total"],
            "layerwise, 8 tokens": layer_by_layer,
            "ratio": 16 * dense / layer_by_layer,
        }
    return rows


def experiments() -> dict[str, config.ExperimentConfig]:
    """Returns the runs whose models are in the table."""
    return {
        f"SmolLM2-{variant.upper()}, MLP at R 128": smollm_r128.get_config(variant)
        for variant in ("135m", "360m", "1.7b")
    } | {"Llama-3-70B, all at R 32": llama70b_r32.get_config()}


def _table(title: str, rows: dict[str, Any]) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left")
    table.add_column("")
    for column in next(iter(rows.values())):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(_cell(column, value) for column, value in row.items()))
    return table


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    if column == "parameters":
        return f"{value:,.0f}"
    return f"{value:.1f}x" if column == "ratio" else f"{value / 1e6:,.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
