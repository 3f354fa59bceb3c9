"""Takes a few training steps of a 70B-class model on this machine, and measures them.

python -m experiments.step70b
python -m experiments.step70b --reference-attention       # the published stack
python -m experiments.step70b --moment-dtype=bfloat16 --tokens=512 --json=step.json

The model is Llama-3-70B's shape with every matrix at rank 32, see
configs/llama70b_r32.py; the step is `sct_jax.layerwise`. All steps see the same window
of real text, so the loss tells whether the updates work. Seconds depend on the machine:
its matmul rate and memory bandwidth are printed beside them.
"""

import sys

from experiments import huge_pages

if __name__ == "__main__":
    huge_pages.restart_with_huge_pages()

import ctypes
import dataclasses
import gc
import json
import pathlib
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import rich.console
import rich.table

from experiments import first_tokens
from sct_jax import errors, model, optimizers, spectral, transforms
from sct_jax.training import accounting, command_line, config, layerwise
from sct_jax.training import state as state_lib

REFERENCE_SECONDS, REFERENCE_BYTES = 6.47, 9.17e9
_TURNS = 3  # at most, of the variants whose difference is a share


@dataclasses.dataclass(frozen=True)
class Job:
    """What is measured: a model in pieces, its one batch, and the run it belongs to."""

    shape: model.ModelConfig
    stack: layerwise.Stack
    batch: dict[str, Any]
    experiment: config.ExperimentConfig

    @property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        """The chain of the run."""
        return self.experiment.build_optimizer()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    parser = command_line.FlagParser(__doc__ or "")
    parser.add_argument("--config", default="configs/llama70b_r32.py")
    parser.add_argument(
        "--steps", type=int, default=5, help="steps, the first one cold"
    )
    parser.add_argument("--tokens", type=int, help="tokens per step")
    parser.add_argument("--rank", help="rank of every matrix")
    parser.add_argument("--moment_dtype", help="float32 or bfloat16")
    parser.add_argument(
        "--reference_attention",
        action="store_true",
        help="the published stack: attention is a sum, 8192 x 8192 keys and values, "
        "neither embedding nor head, random input",
    )
    parser.add_argument("--json", help="file for the same figures")
    flags, overrides = parser.parse(sys.argv[1:] if argv is None else argv)
    for field, value in (
        ("model.rank", flags.rank),
        ("data.seq_len", flags.tokens),
        ("optimizer.moment_dtype", flags.moment_dtype),
    ):
        if value is not None:
            overrides.append((field, str(value)))
    try:
        errors.check("--steps", flags.steps >= 2, f"{flags.steps} must be >= 2")
        experiment = config.load(flags.config, overrides)
        job = make_job(experiment, reference_attention=flags.reference_attention)
        sizes = accounting.layerwise_bytes(job.stack, job.tx, job.batch)
        check_memory(sizes)
    except errors.UserError as error:
        command_line.fail(str(error))
    figures = measure(job, steps=flags.steps)
    figures |= {"bytes_by_formula": sizes}
    print_tables(rich.console.Console(), job, figures)
    if flags.json:
        pathlib.Path(flags.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def make_job(
    experiment: config.ExperimentConfig, *, reference_attention: bool = False
) -> Job:
    """Returns the job of a configuration with `step="layerwise"`.

    Raises:
      UserError: for another step, or text that the model's vocabulary cannot hold.
    """
    errors.check(
        "step", experiment.step == "layerwise", "'layerwise' is what is measured here"
    )
    shape = experiment.model
    length = experiment.data.tokens_per_step
    if reference_attention:
        shape = dataclasses.replace(
            shape,
            num_kv_heads=shape.num_heads,
            spectral=model.BLOCK_MATRICES,
        )
        stream = (experiment.data.batch_size, experiment.data.seq_len, shape.d_model)
        batch = {"stream": jax.random.normal(jax.random.key(1), stream)}
        return Job(shape, reference_stack(shape), batch, experiment)
    errors.check(
        "model.vocab_size",
        shape.vocab_size >= first_tokens.VOCAB_SIZE,
        f"{shape.vocab_size} holds no tokenizer of {first_tokens.VOCAB_SIZE} entries",
    )
    ids = jnp.array(first_tokens.read_first_tokens(length + 1), jnp.int32)
    rows = (experiment.data.batch_size, experiment.data.seq_len)
    batch = {"inputs": ids[:-1].reshape(rows), "targets": ids[1:].reshape(rows)}
    return Job(shape, layerwise.stack_of(shape), batch, experiment)


def reference_stack(shape: model.ModelConfig) -> layerwise.Stack:
    """Returns the stack of the paper's demonstration, to compare like with like.

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
        enter=lambda ends, batch: batch["stream"],
        block=block,
        leave=lambda ends, x, batch: jnp.mean(jnp.square(x)),
        enter_keys=(),
        leave_keys=(),
    )


def check_memory(sizes: dict[str, int], *, available: int | None = None) -> None:
    """Raises UserError where a step needs more than this machine has free."""
    have = available_memory() if available is None else available
    if have is None:
        return
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items())
    errors.check(
        "memory",
        sizes["total"] <= have,
        f"the step needs {sizes['total'] / 1e9:.2f} GB, {have / 1e9:.2f} GB are free "
        f"({parts} GB): take fewer --tokens or a smaller --rank",
    )


def available_memory() -> int | None:
    """Returns the bytes that the system can give to a process; None if it won't say."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = {line.split(":")[0]: line.split()[1] for line in lines}
    return int(values["MemAvailable"]) * 1024 if "MemAvailable" in values else None


def peak_rss_bytes() -> int:
    """Returns the largest resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(job: Job, *, steps: int) -> dict[str, Any]:
    """Returns every figure of a job.

    The order keeps the peak of the process that of the steps: what is compiled is
    compiled with one layer, before there is a model; what is compared comes after.
    """
    step = layerwise.make_train_step(job.stack, job.tx)
    with _Clock() as compiling:
        _warm_up(job, step)
    with _Clock() as initialising:
        state = step.init(jax.random.key(job.experiment.seed))
        jax.block_until_ready(state)

    forward, backward, losses = [], [], []
    for _ in range(steps):
        with _Clock() as clock:
            tape = jax.block_until_ready(step.forward(state.params, job.batch))
        forward.append(clock.seconds)
        with _Clock() as clock:
            state, metrics = step.backward(state, tape, job.batch, False)
            jax.block_until_ready((state, metrics))
        backward.append(clock.seconds)
        losses.append(float(metrics["loss"]))
    peak = peak_rss_bytes()

    error = max(
        float(_orthonormality_error(part))
        for part in (state.params | {"layers": ()}, *state.params["layers"])
    )
    totals = [f + b for f, b in zip(forward, backward, strict=True)]
    rates = machine_rates()
    return {
        "parameters": accounting.count(state.params),
        "dense_equivalent_parameters": dense_parameters(job),
        "tokens_per_step": _num_tokens(job),
        "seconds_per_step": statistics.median(totals[1:]),
        "seconds": {
            "compile": compiling.seconds,
            "init": initialising.seconds,
            "forward": statistics.median(forward[1:]),
            "backward_and_update": statistics.median(backward[1:]),
        },
        "peak_rss_bytes": peak,
        "orthonormality_error": error,
        "losses": losses,
        "machine": rates,
        "roofline": roofline(job, state, rates),
        "shares": _shares(job, step, state, turns=min(steps - 1, _TURNS)),
    }


def dense_parameters(job: Job) -> int:
    """Returns the number of parameters of the same model with dense matrices."""
    dense = accounting.dense_config(job.shape)
    if job.stack.enter_keys:
        return accounting.parameters(dense)
    return job.shape.num_layers * accounting.block_parameters(dense)


def machine_rates() -> dict[str, float]:
    """Returns FLOP/s of a large float32 product, and bytes/s of a large copy."""
    size = 2048
    square = jnp.ones((size, size))
    product = jax.jit(lambda x: x @ x)
    vector = jnp.ones(64 * 2**20)  # 256 MB, beyond every cache
    # In place: pages that are new to the process cost more than the copy.
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    seconds = []
    vector = jax.block_until_ready(copy(vector))
    for _ in range(5):
        with _Clock() as clock:
            vector = jax.block_until_ready(copy(vector))
        seconds.append(clock.seconds)
    return {
        "flops_per_second": 2 * size**3 / _median_seconds(lambda: product(square)),
        "bytes_per_second": 2 * vector.nbytes / statistics.median(seconds),
    }


def roofline(
    job: Job, state: state_lib.TrainState, rates: dict[str, float]
) -> dict[str, float]:
    """Returns the least a step moves and computes, and the seconds that alone takes.

    Bytes: parameters are read by the forward pass and again by the backward pass,
    parameters and optimizer state are read and written by the update. FLOPs: matrix
    products of both passes, causal attention at half and nothing computed twice, and
    4 R per entry of a factor for its retraction.
    """
    params = accounting.num_bytes(state.params)
    moved = 4 * params + 2 * accounting.num_bytes(state.opt_state)
    retraction = sum(
        4 * w.s.shape[-1] * (w.u.size + w.v.size)
        for w in jax.tree.leaves(state.params, is_leaf=spectral.is_factors)
        if spectral.is_spectral(w)
    )
    flops = _product_flops(job) + retraction
    return {
        "bytes": moved,
        "flops": flops,
        "seconds_of_bytes": moved / rates["bytes_per_second"],
        "seconds_of_flops": flops / rates["flops_per_second"],
        "seconds_of_retraction_flops": retraction / rates["flops_per_second"],
    }


def _product_flops(job: Job) -> int:
    num_tokens, shape = _num_tokens(job), job.shape
    if job.stack.enter_keys:
        length = jax.tree.leaves(job.batch)[0].shape[1]
        return num_tokens * accounting.flops_per_token(shape, seq_len=length)
    # The attention of the published stack is a sum.
    block = accounting.block_flops(shape, seq_len=0)
    return 3 * num_tokens * shape.num_layers * block


def print_tables(
    console: rich.console.Console, job: Job, figures: dict[str, Any]
) -> None:
    """Prints the figures of a job, one a line."""
    seconds, formula = figures["seconds"], figures["bytes_by_formula"]
    roof, machine = figures["roofline"], figures["machine"]
    dense = figures["dense_equivalent_parameters"]
    shape = job.shape
    gigabytes = lambda size: f"{size / 1e9:,.2f} GB"
    rank = shape.matrix_rank("gate")
    rows = {
        "parameters": f"{figures['parameters']:,}",
        "dense equivalent": f"{dense:,}",
        "tokens per step": f"{figures['tokens_per_step']:,}",
        "compile, init": f"{seconds['compile']:.1f} s, {seconds['init']:.1f} s",
        "step (median of all but the first)": f"{figures['seconds_per_step']:.2f} s",
        "  forward": f"{seconds['forward']:.2f} s",
        "  backward and update": f"{seconds['backward_and_update']:.2f} s",
        **{
            f"  share of {name}, by difference": f"{share:.0%}"
            for name, share in figures["shares"].items()
        },
        "least time for its bytes, for its FLOPs": (
            f"{roof['seconds_of_bytes']:.2f} s, {roof['seconds_of_flops']:.2f} s"
        ),
        "peak resident memory of the process": gigabytes(figures["peak_rss_bytes"]),
        **{f"  by formula: {name}": gigabytes(size) for name, size in formula.items()},
        "dense Adam, 16 bytes a parameter": gigabytes(16 * dense),
        f"one {shape.d_model} x {shape.d_ff} matrix at R {rank}, dense": (
            f"{accounting.matrix_bytes(shape.d_model, shape.d_ff, rank) / 1e6:,.1f} MB,"
            f" {accounting.matrix_bytes(shape.d_model, shape.d_ff, None) / 1e6:,.0f} MB"
        ),
        "orthonormality error, all factors": f"{figures['orthonormality_error']:.1e}",
        "loss per step": ", ".join(f"{loss:.4f}" for loss in figures["losses"]),
        "this machine": (
            f"{machine['flops_per_second'] / 1e9:.0f} GFLOP/s, "
            f"{machine['bytes_per_second'] / 1e9:.1f} GB/s"
        ),
        "the published program, on other cores": (
            f"{REFERENCE_SECONDS} s, {gigabytes(REFERENCE_BYTES)}"
        ),
    }
    table = rich.table.Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _num_tokens(job: Job) -> int:
    batch, length = jax.tree.leaves(job.batch)[0].shape[:2]
    return batch * length


def _warm_up(job: Job, step: layerwise.LayerwiseStep) -> None:
    """Compiles everything with a model of one layer, and gives its memory back."""
    state = step.init(jax.random.key(job.experiment.seed), num_layers=1)
    state, _ = step(state, job.batch, False)
    jax.block_until_ready(state)
    _orthonormality_error(state.params)
    del state
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@jax.jit
def _orthonormality_error(params: Any) -> jax.Array:
    return spectral.orthonormality_error(params)


def parts_of_chain(
    experiment: config.ExperimentConfig,
) -> dict[str, optax.GradientTransformation] | None:
    """Returns Adam, the rate and the retraction of a run, in the order of its chain.

    None for a chain that has more parts: what they cost is neither's.
    """
    optimizer = experiment.optimizer
    fields = ("peak_learning_rate", "schedule", "warmup_steps", "final_rate_ratio")
    fields += ("decay_ratio", "moment_dtype", "retraction")
    plain = optimizers.OptimizerConfig(
        name="sct", **{field: getattr(optimizer, field) for field in fields}
    )
    if optimizer != plain or optimizer.retraction == transforms.LOSSLESS:
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


def _shares(
    job: Job,
    step: layerwise.LayerwiseStep,
    state: state_lib.TrainState,
    *,
    turns: int,
) -> dict[str, float]:
    """Shares of Adam and of the retraction in a step: what it saves to leave them out.

    The whole step and the two lesser ones take turns on the same state, of which each
    passes by what belongs to the part that it lacks: a second state may not fit.
    """
    parts = parts_of_chain(job.experiment)
    if parts is None:
        return {}
    kept = {
        lacking: [name for name in parts if name != lacking]
        for lacking in (None, "Adam", "retraction")
    }
    steps: dict[str | None, layerwise.LayerwiseStep] = {None: step}
    for lacking in ("Adam", "retraction"):
        chain = optax.chain(*(parts[name] for name in kept[lacking]))
        steps[lacking] = layerwise.make_train_step(job.stack, chain)
    seconds: dict[str | None, list[float]] = {lacking: [] for lacking in steps}
    opt_states = dict(zip(parts, state.opt_state, strict=True))
    for _ in range(turns + 1):
        for lacking, variant in steps.items():
            own = tuple(opt_states[name] for name in kept[lacking])
            state = state.replace(opt_state=own)
            with _Clock() as clock:
                state, _ = variant(state, job.batch, False)
                jax.block_until_ready(state)
            seconds[lacking].append(clock.seconds)
            opt_states |= zip(kept[lacking], state.opt_state, strict=True)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    whole = medians[None]
    return {name: 1 - lesser / whole for name, lesser in medians.items() if name}


def _median_seconds(function: Callable[[], Any], turns: int = 5) -> float:
    jax.block_until_ready(function())
    seconds = []
    for _ in range(turns):
        with _Clock() as clock:
            jax.block_until_ready(function())
        seconds.append(clock.seconds)
    return statistics.median(seconds)


class _Clock:
    """Seconds between entering and leaving."""

    def __enter__(self) -> "_Clock":
        self._began = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds = time.perf_counter() - self._began


if __name__ == "__main__":
    sys.exit(main())
