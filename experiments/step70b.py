"""Takes a few training steps of a 70B-class model on this machine, and measures them.

python -m experiments.step70b
python -m experiments.step70b --reference_attention       # the published stack
python -m experiments.step70b --moment_dtype=bfloat16 --tokens=512 --json=step.json

The model has Llama-3-70B's shape with every matrix at rank 32, see
configs/llama70b_r32.py. `sct_jax.training.layerwise` has the step. All steps train on
the same window of real text, so a falling loss shows that the updates work. Seconds
depend on the machine, so its matmul rate and memory bandwidth are measured too.
"""

from sct_jax.training import process

if __name__ == "__main__":
    process.start("experiments.step70b")

import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import rich.console
import rich.table

from experiments import first_tokens, json_file
from experiments.benchmarks import machine, timing
from sct_jax import errors, model, spectral, stiefel, transforms
from sct_jax.training import (
    accounting,
    config,
    layerwise,
    optimizer_config,
    overrides,
)
from sct_jax.training import state as state_lib

REFERENCE_SECONDS, REFERENCE_BYTES = 6.47, 9.17e9  # of the published program
_MAX_ROUNDS = 3  # of the step variants that share a state


@dataclasses.dataclass(frozen=True)
class Job:
    """A model in pieces, its one batch, and its run.

    Attributes:
      experiment: the run.
      shape: the model.
      stack: the pieces of the model.
      batch: the batch of every step; all arrays are (B, L, ...).
      is_reference: whether `stack` is the published one.
    """

    experiment: config.ExperimentConfig
    shape: model.ModelConfig
    stack: layerwise.Stack
    batch: dict[str, jax.Array]
    is_reference: bool

    @property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        """The chain of the run."""
        return self.experiment.build_optimizer()

    @property
    def num_tokens(self) -> int:
        """Tokens per step."""
        return self.experiment.data.tokens_per_step

    def dense_parameters(self) -> int:
        """Returns the number of parameters with dense matrices."""
        dense = accounting.dense_config(self.shape)
        if self.is_reference:
            return self.shape.num_layers * accounting.block_parameters(dense)
        return accounting.parameters(dense)

    def product_flops(self) -> int:
        """Returns the FLOPs of the matrix products of a step."""
        if self.is_reference:  # its attention is a sum
            block = accounting.block_flops(self.shape, seq_len=0)
            return 3 * self.num_tokens * self.shape.num_layers * block
        length = self.experiment.data.seq_len
        per_token = accounting.flops_per_token(self.shape, seq_len=length)
        return self.num_tokens * per_token


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    parser = overrides.FlagParser(__doc__ or "")
    parser.add_argument(
        "--config",
        help="config file (default: %(default)s)",
        default="configs/llama70b_r32.py",
    )
    parser.add_argument(
        "--steps", type=int, default=5, help="number of steps; the first one is cold"
    )
    parser.add_argument("--tokens", type=int, help="tokens per step")
    parser.add_argument("--rank", help="rank of every matrix")
    parser.add_argument("--moment_dtype", help="float32 or bfloat16")
    parser.add_argument(
        "--reference_attention",
        action="store_true",
        help="the published stack: attention is a sum, keys and values are 8192 x "
        "8192, there is no embedding and no head, and the input is random",
    )
    parser.add_argument(
        "--steps_only",
        action="store_true",
        help="leave out what follows the steps: the machine's rates, and the shares of "
        "Adam and the retraction, which take several more steps",
    )
    json_file.add_flag(parser)
    flags, pairs = parser.parse(sys.argv[1:] if argv is None else argv)
    pairs += [
        (field, str(value))
        for field, value in (
            ("model.rank", flags.rank),
            ("data.seq_len", flags.tokens),
            ("optimizer.moment_dtype", flags.moment_dtype),
        )
        if value is not None
    ]
    try:
        errors.check("--steps", flags.steps >= 2, f"{flags.steps} must be >= 2")
        with overrides.notes_on_renames():
            experiment = overrides.load(flags.config, pairs)
        job = make_job(experiment, reference_attention=flags.reference_attention)
        sizes = accounting.layerwise_bytes(job.stack, job.tx, job.batch)
        check_memory(sizes)
        figures = measure(job, steps=flags.steps, compare=not flags.steps_only)
        figures["bytes_by_formula"] = sizes
        rich.console.Console().print(table(job, figures))
        if flags.json is not None:
            json_file.write(flags.json, figures)
    except errors.UserError as error:
        overrides.fail(str(error))
    return 0


def make_job(
    experiment: config.ExperimentConfig, *, reference_attention: bool = False
) -> Job:
    """Returns the job of a configuration with `step="layerwise"`.

    Raises:
      UserError: for another step, or a vocabulary smaller than the tokenizer's.
    """
    errors.check(
        "step",
        experiment.step == "layerwise",
        f"{experiment.step!r} is not measured here; set it to 'layerwise'",
    )
    shape, rows = experiment.model, experiment.data.batch_size
    length = experiment.data.seq_len
    if reference_attention:
        shape = dataclasses.replace(
            shape, num_kv_heads=shape.num_heads, spectral=model.BLOCK_MATRICES
        )
        stream = jax.random.normal(jax.random.key(1), (rows, length, shape.d_model))
        stack, batch = reference_stack(shape), {"stream": stream}
    else:
        errors.check(
            "model.vocab_size",
            shape.vocab_size >= first_tokens.VOCAB_SIZE,
            f"{shape.vocab_size} is smaller than the tokenizer's vocabulary of "
            f"{first_tokens.VOCAB_SIZE}",
        )
        ids = first_tokens.read_first_tokens(experiment.data.tokens_per_step + 1)
        inputs, targets = (
            jnp.array(x, jnp.int32).reshape(rows, length) for x in (ids[:-1], ids[1:])
        )
        stack = layerwise.stack_of(shape)
        batch = {"inputs": inputs, "targets": targets}
    return Job(experiment, shape, stack, batch, is_reference=reference_attention)


def reference_stack(shape: model.ModelConfig) -> layerwise.Stack:
    """Returns the stack of the paper's demonstration, for a like-for-like comparison.

    References:
      Kohlberger et al., Spectral Compact Training, arXiv 2604.00733, 2026 (70B class)
    """

    def block(layer, x, batch, linear):
        del batch
        h = model.rms_norm(x, layer["attention_norm"], shape.norm_eps)
        mixed = linear(h, layer["q"]) + linear(h, layer["k"]) + linear(h, layer["v"])
        x = x + linear(mixed, layer["o"])
        h = model.rms_norm(x, layer["mlp_norm"], shape.norm_eps)
        gate = jax.nn.silu(linear(h, layer["gate"]))
        return x + linear(gate * linear(h, layer["up"]), layer["down"])

    return layerwise.Stack(
        num_layers=shape.num_layers,
        init_ends=lambda key: {},
        init_layer=lambda key: model.orthonormalize(
            model.init_block(key, shape), shape
        ),
        embed=lambda ends, batch: batch["stream"],
        block=block,
        head_loss=lambda ends, x, batch, linear: jnp.mean(jnp.square(x)),
        embed_keys=(),
        head_keys=(),
    )


def check_memory(sizes: dict[str, int], *, available: int | None = None) -> None:
    """Raises UserError if a step needs more bytes than this machine has free."""
    free = machine.available_memory() if available is None else available
    if free is None:
        return
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items())
    errors.check(
        "memory",
        sizes["total"] <= free,
        f"the step needs {sizes['total'] / 1e9:.2f} GB, but {free / 1e9:.2f} GB are "
        f"free ({parts} GB); reduce --tokens or --rank",
    )


def measure(job: Job, *, steps: int, compare: bool = True) -> dict[str, Any]:
    """Returns every figure of a job.

    The order makes the peak memory of the process the peak of the steps. Compilation
    comes first and uses one layer; comparisons that need more memory come last.

    Args:
      job: what to run.
      steps: how many steps; the first one is cold.
      compare: whether to measure `machine`, `roofline` and `shares`.
    """
    step = layerwise.make_train_step(job.stack, job.tx)
    key = jax.random.key(job.experiment.seed)
    state: Any = None
    tape: Any = None
    losses = []

    def init():
        nonlocal state
        state = step.init(key)
        return state

    def forward():
        nonlocal tape
        tape = step.forward(state.params, job.batch)
        return tape

    def backward():
        nonlocal state
        state, metrics = step.backward(state, tape, job.batch, False)
        losses.append(metrics["loss"])
        return state, metrics

    setup = {"compile": lambda: _compile(job, step, key), "init": init}
    setup_seconds = timing.interleaved(setup, rounds=1, warmup=0)
    passes = {"forward": forward, "backward_and_update": backward}
    seconds = timing.interleaved(passes, rounds=steps - 1)
    peak = machine.peak_rss_bytes()

    totals = [sum(pair) for pair in zip(*seconds.values(), strict=True)]
    error = max(
        float(_orthonormality_error(part))
        for part in (state.params | {"layers": ()}, *state.params["layers"])
    )
    figures = {
        "parameters": accounting.count(state.params),
        "dense_equivalent_parameters": job.dense_parameters(),
        "tokens_per_step": job.num_tokens,
        "seconds_per_step": statistics.median(totals),
        "seconds": timing.medians(setup_seconds | seconds),
        "peak_rss_bytes": peak,
        "orthonormality_error": error,
        "losses": [float(loss) for loss in losses],
    }
    if compare:
        rates = machine.rates()
        figures |= {
            "machine": rates,
            "roofline": roofline(job, state, rates),
            "shares": shares(job, step, state, rounds=min(steps - 1, _MAX_ROUNDS)),
        }
    return figures


def _compile(job: Job, step: layerwise.LayerwiseStep, key: jax.Array) -> None:
    """Compiles everything with a model of one layer, then frees its memory."""
    state = step.init(key, num_layers=1)
    state, _ = step(state, job.batch, False)
    jax.block_until_ready(state)
    _orthonormality_error(state.params)
    del state
    machine.release_memory()


_orthonormality_error = jax.jit(spectral.orthonormality_error)


def roofline(
    job: Job, state: state_lib.TrainState, rates: dict[str, float]
) -> dict[str, float]:
    """Returns the minimal bytes and FLOPs of a step, and the seconds of each alone.

    Bytes: the forward and the backward pass read the parameters, the update reads and
    writes parameters and optimizer state. FLOPs: the matrix products of both passes,
    with causal attention and without recomputation, and 4 R per entry of a factor for
    the retraction.
    """
    params = accounting.num_bytes(state.params)
    moved = 4 * params + 2 * accounting.num_bytes(state.opt_state)
    retraction = sum(
        4 * w.s.shape[-1] * (w.u.size + w.v.size)
        for w in jax.tree.leaves(state.params, is_leaf=spectral.is_factors)
        if spectral.is_spectral(w)
    )
    flops = job.product_flops() + retraction
    return {
        "bytes": moved,
        "flops": flops,
        "seconds_of_bytes": moved / rates["bytes_per_second"],
        "seconds_of_flops": flops / rates["flops_per_second"],
        "seconds_of_retraction_flops": retraction / rates["flops_per_second"],
    }


def parts_of_chain(
    experiment: config.ExperimentConfig,
) -> dict[str, optax.GradientTransformation] | None:
    """Returns Adam, learning rate and retraction of a run, in the order of its chain.

    Returns None for a chain with other parts.
    """
    optimizer = experiment.optimizer
    schedule = ("peak_learning_rate", "schedule", "warmup_steps", "final_rate_ratio")
    known = {*schedule, "decay_ratio", "moment_dtype", "retraction"}
    if (
        not isinstance(optimizer, optimizer_config.Sct)
        or not optimizer.set_fields().keys() <= known
        or optimizer.retraction not in stiefel.RETRACTION_NAMES
    ):
        return None
    return {
        "Adam": transforms.scale_by_adam(
            0.9, 0.999, 1e-8, moment_dtype=optimizer.moment_dtype
        ),
        "rate": optax.scale_by_learning_rate(
            optimizer.learning_rate(experiment.num_steps)
        ),
        "retraction": transforms.retract_to_stiefel(optimizer.retraction),
    }


def shares(
    job: Job,
    step: layerwise.LayerwiseStep,
    state: state_lib.TrainState,
    *,
    rounds: int,
) -> dict[str, float]:
    """Returns the fractions of a step that Adam and the retraction take.

    Each is the time saved by a step without that part. The full step and the two
    variants share one state, since a second one may not fit into memory. A variant
    leaves the state of its missing part unchanged.
    """
    parts = parts_of_chain(job.experiment)
    if parts is None:
        return {}
    opt_states = dict(zip(parts, state.opt_state, strict=True))

    def call(variant: layerwise.LayerwiseStep, names: Sequence[str]) -> Any:
        nonlocal state
        own = tuple(opt_states[name] for name in names)
        state, _ = variant(state.replace(opt_state=own), job.batch, False)
        opt_states.update(zip(names, state.opt_state, strict=True))
        return state

    calls: dict[str, Callable[[], Any]] = {"full": lambda: call(step, tuple(parts))}
    for missing in ("Adam", "retraction"):
        names = [name for name in parts if name != missing]
        chain = optax.chain(*(parts[name] for name in names))
        variant = layerwise.make_train_step(job.stack, chain)
        calls[missing] = lambda variant=variant, names=names: call(variant, names)
    seconds = timing.medians(timing.interleaved(calls, rounds=rounds))
    full = seconds.pop("full")
    return {missing: 1 - without / full for missing, without in seconds.items()}


def table(job: Job, figures: dict[str, Any]) -> rich.table.Table:
    """Returns the figures of a job as a table, one per row."""
    seconds, formula = figures["seconds"], figures["bytes_by_formula"]
    dense, shape = figures["dense_equivalent_parameters"], job.shape
    rank = shape.matrix_rank("gate")
    one_matrix = [
        accounting.matrix_bytes(shape.d_model, shape.d_ff, r) / 1e6
        for r in (rank, None)
    ]
    gigabytes = lambda size: f"{size / 1e9:,.2f} GB"
    rows = {
        "parameters": f"{figures['parameters']:,}",
        "dense equivalent": f"{dense:,}",
        "tokens per step": f"{figures['tokens_per_step']:,}",
        "compile, init": f"{seconds['compile']:.1f} s, {seconds['init']:.1f} s",
        "step (median without the first)": f"{figures['seconds_per_step']:.2f} s",
        "  forward": f"{seconds['forward']:.2f} s",
        "  backward and update": f"{seconds['backward_and_update']:.2f} s",
        **{
            f"  share of {name}, by difference": f"{share:.0%}"
            for name, share in figures.get("shares", {}).items()
        },
        "peak resident memory of the process": gigabytes(figures["peak_rss_bytes"]),
        **{f"  by formula: {name}": gigabytes(size) for name, size in formula.items()},
        "dense Adam, 16 bytes per parameter": gigabytes(16 * dense),
        f"one {shape.d_model} x {shape.d_ff} matrix at R {rank}, dense": (
            f"{one_matrix[0]:,.1f} MB, {one_matrix[1]:,.0f} MB"
        ),
        "orthonormality error, all factors": f"{figures['orthonormality_error']:.1e}",
        "loss per step": ", ".join(f"{loss:.4f}" for loss in figures["losses"]),
        **(_bounds(figures) if "roofline" in figures else {}),
        "published program, on other hardware": (
            f"{REFERENCE_SECONDS} s, {gigabytes(REFERENCE_BYTES)}"
        ),
    }
    result = rich.table.Table(show_header=False)
    for name, value in rows.items():
        result.add_row(name, value)
    return result


def _bounds(figures: dict[str, Any]) -> dict[str, str]:
    """The rows of what this machine could do at best."""
    roof, rates = figures["roofline"], figures["machine"]
    return {
        "lower bound by bytes, by FLOPs": (
            f"{roof['seconds_of_bytes']:.2f} s, {roof['seconds_of_flops']:.2f} s"
        ),
        "this machine": (
            f"{rates['flops_per_second'] / 1e9:.0f} GFLOP/s, "
            f"{rates['bytes_per_second'] / 1e9:.1f} GB/s"
        ),
    }
