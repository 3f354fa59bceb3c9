"""Counts the bytes that a training step moves between devices, without the devices.

python -m experiments.communication --config=FILE --mesh=data:2,fsdp:2,tensor:2
python -m experiments.communication --config=FILE --mesh=fsdp:64 --json=fsdp.json

Compiles the step of a configuration, and of the dense model of the same shape, for as
many CPU devices as the mesh has. Nothing is allocated. `sct_jax.training.collectives`
reads the compiled programs and says what its figures mean. Of every conditional the
costlier branch counts. Loops of unknown length count once, and are named.

XLA for CPUs is not the compiler of a GPU or TPU. All of them divide a program over a
mesh in the same way, and that decides most collectives. Afterwards, this one widens
arrays of 16 bits and makes no reduce-scatter. The first is undone here. The second is a
row of the second table, where it matters.

The last table is a model, not a measurement: FLOPs over a rate, and bytes on a ring
over the bandwidth of the slowest link on it.
"""

import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import rich.console
import rich.table
from jax.sharding import Mesh

from experiments import json_file
from sct_jax import errors, sharding
from sct_jax.training import (
    accounting,
    collectives,
    config,
    hardware,
    memory,
    overrides,
    trainer,
)

MODELS = ("spectral", "dense")
MAX_DEVICES = 4096  # more take minutes to describe

# An H100 in a node of eight: NVLink 4 and one port of NDR InfiniBand per device, bytes
# per second in each direction (NVIDIA DGX H100 datasheet), and 40 % of its peak.
_DEVICE = "NVIDIA H100 80GB HBM3"
_UTILISATION = 0.4
_NODE = 8
_NODE_BANDWIDTH = 450e9
_NETWORK_BANDWIDTH = 50e9
_MEMORY_GB = 80.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What the model of seconds assumes of the devices.

    Attributes:
      flops: FLOP/s that a device reaches.
      node_size: consecutive devices that the fast links connect.
      node_bandwidth: bytes per second that a device sends within a node.
      network_bandwidth: bytes per second that a device sends to other nodes.
    """

    flops: float
    node_size: int
    node_bandwidth: float
    network_bandwidth: float

    def validate(self) -> None:
        """Raises UserError, naming the flag."""
        for name, value in dataclasses.asdict(self).items():
            errors.check(
                f"--{name}",
                0 < value < math.inf,
                f"{value} must be above 0 and finite",
            )

    def bandwidth(self, axes: Sequence[str], mesh: Mesh) -> float:
        """Returns the bandwidth of the slowest link of a ring along these axes.

        The devices of a mesh are in order, its last axis innermost. So a ring lies
        among as many consecutive devices as its first axis and all after it have.
        """
        first = min(mesh.axis_names.index(name) for name in axes)
        span = math.prod(mesh.shape[name] for name in mesh.axis_names[first:])
        in_node = mesh.size <= self.node_size or self.node_size % span == 0
        return self.node_bandwidth if in_node else self.network_bandwidth


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A compiled training step.

    Attributes:
      experiment: the run, without "auto" in what is compiled.
      mesh: the devices.
      seconds: of the compilation.
      memory: bytes per device, from `Trainer.compiled_memory`.
      found: all collectives of the program.
    """

    experiment: config.ExperimentConfig
    mesh: Mesh
    seconds: float
    memory: dict[str, int]
    found: list[collectives.Collective]

    @property
    def most(self) -> list[collectives.Collective]:
        """The collectives with the costlier branch of every conditional."""
        return collectives.most(self.found)

    @property
    def tokens(self) -> int:
        """Tokens of a step, on all devices together."""
        return self.experiment.data.tokens_per_step

    @property
    def flops(self) -> int:
        """FLOPs of a step on all devices, without recomputation and the update."""
        shape, length = self.experiment.model, self.experiment.data.seq_len
        return self.tokens * accounting.flops_per_token(shape, seq_len=length)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    flags, pairs = _parser().parse(sys.argv[1:] if argv is None else argv)
    console = rich.console.Console()
    say = functools.partial(console.print, highlight=False, markup=False)
    try:
        sizes = parse_mesh(flags.mesh, devices=flags.devices)
        rates = Rates(
            flops=flags.flops,
            node_size=flags.node_size,
            node_bandwidth=flags.node_bandwidth,
            network_bandwidth=flags.network_bandwidth,
        )
        rates.validate()
        models = _selected(flags.models)
        errors.check(
            "--memory_gb",
            0 < flags.memory_gb < math.inf,
            f"{flags.memory_gb} must be above 0 and finite",
        )
        _check_pairs(pairs)
        with overrides.notes_on_renames():
            experiment = overrides.load(flags.config, pairs)
        experiment, notes = for_compilation(experiment, sizes)
        start(math.prod(sizes.values()))
        mesh = experiment.mesh.build(math.prod(sizes.values()))
        by_model, choices = runs(
            experiment, models, mesh, available=int(flags.memory_gb * 1e9)
        )
        notes += choices
        for note in notes:
            say(f"note: {note}")
        steps = measure(by_model, mesh, split=not flags.once, say=say)
        figures = {name: as_figures(*pair, rates) for name, pair in steps.items()}
        for table in tables(steps, figures, rates):
            console.print(table)
        for name, (step, _) in steps.items():
            if note := note_on_loops(name, step):
                say(f"note: {note}")
        if flags.json is not None:
            written = {
                "mesh": sizes,
                "rates": dataclasses.asdict(rates),
                "notes": notes,
                "models": figures,
            }
            json_file.write(flags.json, written)
    except errors.UserError as error:
        overrides.fail(str(error))
    return 0


def _parser() -> overrides.FlagParser:
    parser = overrides.FlagParser(__doc__ or "")
    add = parser.add_argument
    add("--config", required=True, help="config file, with :variant if it has several")
    add(
        "--mesh",
        required=True,
        metavar="AXIS:SIZE,...",
        help=f"devices along each axis, of {', '.join(sharding.AXES)}",
    )
    add("--devices", type=int, help="number of devices (default: what --mesh has)")
    add("--models", default=",".join(MODELS), help="models (default: %(default)s)")
    add(
        "--once",
        action="store_true",
        help="compile each model once: leave out which bytes grow with the tokens, "
        "which needs a second compilation with a batch of twice the size",
    )
    add(
        "--memory_gb",
        type=float,
        default=_MEMORY_GB,
        help='memory of a device, where model.remat is "auto" (default: %(default)s)',
    )
    add(
        "--flops",
        type=float,
        default=_UTILISATION * hardware.PEAK_FLOPS[_DEVICE],
        help="FLOP/s that a device reaches (default: %(default)g, 40 %% of an H100)",
    )
    add(
        "--node_size",
        type=int,
        default=_NODE,
        help="consecutive devices with fast links (default: %(default)s)",
    )
    add(
        "--node_bandwidth",
        type=float,
        default=_NODE_BANDWIDTH,
        help="bytes/s that a device sends in a node (default: %(default)g, NVLink 4)",
    )
    add(
        "--network_bandwidth",
        type=float,
        default=_NETWORK_BANDWIDTH,
        help="bytes/s that a device sends to other nodes (default: %(default)g, one "
        "port of 400 Gb/s)",
    )
    json_file.add_flag(parser)
    return parser


# --- Input.


def parse_mesh(text: str, *, devices: int | None = None) -> dict[str, int]:
    """Returns the size of every axis from "axis:size,..."; 1 where none is given.

    Args:
      text: of the flag.
      devices: what the sizes have to multiply to.

    Raises:
      UserError: naming `--mesh` and the axis.
    """
    sizes: dict[str, int] = {}
    for word in text.split(","):
        name, _, size = (part.strip() for part in word.partition(":"))
        errors.check_choice("--mesh", name, sharding.AXES)
        errors.check("--mesh", name not in sizes, f"axis {name!r} is there twice")
        errors.check(
            "--mesh",
            size.isascii() and size.isdigit() and int(size) >= 1,
            f"{word.strip()!r} is not an axis and its size, such as {name}:2",
        )
        sizes[name] = int(size)
    product = math.prod(sizes.values())
    if devices is not None:
        errors.check("--devices", devices >= 1, f"{devices} must be >= 1")
        errors.check(
            "--mesh",
            product == devices,
            f"{' x '.join(f'{n} {s}' for n, s in sizes.items())} is {product} devices, "
            f"but --devices is {devices}",
        )
    errors.check(
        "--mesh",
        product <= MAX_DEVICES,
        f"{product} devices are more than the {MAX_DEVICES} that are compiled for",
    )
    return {name: sizes.get(name, 1) for name in sharding.AXES}


def _selected(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        errors.check_choice("--models", name, MODELS)
    return names


def _check_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    for field, _ in pairs:
        errors.check(
            f"--config.{field}",
            field not in [f"mesh.{axis}" for axis in sharding.AXES],
            "the mesh is that of --mesh; set it there",
        )


def for_compilation(
    experiment: config.ExperimentConfig, sizes: Mapping[str, int]
) -> tuple[config.ExperimentConfig, list[str]]:
    """Returns the run with the step that is compiled here, and what that changed.

    That is the fused step of scanned layers, whose program does not grow with their
    number. Every step is applied: the guard puts the update into a branch, and would
    not change what it moves.

    Args:
      experiment: the run.
      sizes: devices along each axis.
    """
    changes = {"step": "fused", "model.scan_layers": "true"}
    if experiment.optimizer.guard.rejects:
        changes |= {"optimizer.skip_nonfinite": "none", "optimizer.spikes": "log"}
    changed = overrides.apply(experiment, changes.items())
    before, after = (config.flatten(config.to_dict(x)) for x in (experiment, changed))
    notes = [
        f"{field}={json.dumps(value)} here, not {json.dumps(before[field])}"
        for field, value in after.items()
        if before[field] != value
    ]
    mesh = dataclasses.replace(changed.mesh, **sizes)
    meshed = dataclasses.replace(changed, mesh=mesh)
    meshed.validate()
    return meshed, notes


def start(num_devices: int) -> None:
    """Starts JAX with at least so many CPU devices, unless it runs already.

    Raises:
      UserError: if it runs with fewer.
    """
    # LLVM comes after all that is read here, and takes most of the time.
    fast = "--xla_backend_optimization_level=0"
    if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fast}".strip()
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", num_devices)
    except RuntimeError:  # it runs already
        pass
    errors.check(
        "--mesh",
        jax.device_count() >= num_devices,
        f"{num_devices} devices, and JAX runs with {jax.device_count()}; start the "
        "program by itself",
    )


# --- Figures.


def runs(
    experiment: config.ExperimentConfig,
    models: Sequence[str],
    mesh: Mesh,
    *,
    available: int,
) -> tuple[dict[str, config.ExperimentConfig], list[str]]:
    """Returns model -> its run without "auto" for `remat`, and notes on the choices.

    Args:
      experiment: from `for_compilation`.
      models: from `MODELS`.
      mesh: the devices.
      available: bytes of memory of each.

    Raises:
      UserError: where the mesh does not divide the batch or the parameters.
    """
    found, notes = {}, []
    for name in models:
        run = experiment
        if name == "dense":
            shape = accounting.dense_config(experiment.model)
            run = dataclasses.replace(experiment, model=shape)
        state = trainer.Trainer(run, mesh).abstract_state
        run, reasons = memory.resolve(run, mesh, state, available=available)
        found[name] = run
        notes += [
            f"{name}: {field}={json.dumps(run.model.remat)} here ({reason})"
            for field, reason in reasons.items()
        ]
    return found, notes


def measure(
    runs: Mapping[str, config.ExperimentConfig],
    mesh: Mesh,
    *,
    split: bool,
    say: Callable[[str], None],
) -> dict[str, tuple[Step, Step | None]]:
    """Returns the compiled step of every model, and the step of a doubled batch.

    Args:
      runs: model -> its run.
      mesh: the devices.
      split: whether to compile the second step; None otherwise.
      say: receives one line per compilation.
    """
    steps = {}
    for name, run in runs.items():
        first = compile_step(run, mesh)
        say(f"{name}: compiled for {mesh.size} devices in {first.seconds:.0f} s")
        second = None
        if split:
            data = dataclasses.replace(run.data, batch_size=2 * run.data.batch_size)
            second = compile_step(dataclasses.replace(run, data=data), mesh)
            say(f"{name}: with a batch of twice the size, in {second.seconds:.0f} s")
        steps[name] = first, second
    return steps


def compile_step(experiment: config.ExperimentConfig, mesh: Mesh) -> Step:
    """Returns the compiled step of a run, without what it computes for the log."""
    run = trainer.Trainer(experiment, mesh, diagnose=lambda old, new: {})
    seconds = run.compile(run.abstract_state)
    text = run.compiled_text(run.abstract_state)
    assert text is not None  # the trainer refuses `diagnose` for another step
    return Step(
        experiment=experiment,
        mesh=mesh,
        seconds=seconds,
        memory=run.compiled_memory(run.abstract_state) or {},
        found=collectives.read(text, mesh),
    )


def as_figures(step: Step, twice: Step | None, rates: Rates) -> dict[str, Any]:
    """Returns all figures of a model, ready for JSON; bytes are per device and step.

    Args:
      step: the compiled step.
      twice: the step of a batch of twice the size.
      rates: of the devices.
    """
    most = step.most
    total = collectives.total(most)
    figures: dict[str, Any] = {
        "parameters": accounting.parameters(step.experiment.model),
        "tokens": step.tokens,
        "flops": step.flops,
        "collectives": [
            {"kind": kind, "axes": list(axes), **part._asdict()}
            for (kind, axes), part in collectives.totals(most).items()
        ],
        "total": total._asdict(),
        "least": collectives.total(collectives.least(step.found))._asdict(),
        "as_compiled_bytes": sum(
            c.count * c.wire_bytes * c.compiled_bytes / c.operand_bytes
            for c in most
            if c.operand_bytes
        ),
        # A reduce-scatter moves half of what an all-reduce does.
        "sliced_bytes": sum(c.count * c.wire_bytes / 2 for c in most if c.is_sliced),
        "unknown_loop_bytes": sum(c.count * c.wire_bytes for c in most if c.loops),
        "memory": step.memory,
        "compile_seconds": step.seconds,
        "plan": plan(step, rates),
    }
    if twice is not None:
        grown = collectives.total(twice.most).wire_bytes - total.wire_bytes
        slope = grown / (twice.tokens - step.tokens)
        figures["bytes_per_token"] = slope * step.mesh.size
        figures["fixed_bytes"] = total.wire_bytes - slope * step.tokens
    return figures


def plan(step: Step, rates: Rates) -> dict[str, float]:
    """Returns the seconds of a step by a model, by part and altogether.

    Args:
      step: the compiled step.
      rates: of the devices.
    """
    compute = step.flops / step.mesh.size / rates.flops
    seconds: dict[str, float] = {"node": 0.0, "network": 0.0}
    for (_, axes), part in collectives.totals(step.most).items():
        bandwidth = rates.bandwidth(axes, step.mesh)
        link = "node" if bandwidth == rates.node_bandwidth else "network"
        seconds[link] += part.wire_bytes / bandwidth
    communication = sum(seconds.values())
    return {
        "compute": compute,
        **seconds,
        "without_overlap": compute + communication,
        "with_full_overlap": max(compute, communication),
    }


def note_on_loops(name: str, step: Step) -> str | None:
    """Returns a sentence on the loops of unknown length that move bytes, if any do."""
    inside = [c for c in step.most if c.loops]
    if not inside:
        return None
    size = collectives.total(inside).wire_bytes
    loops = dict.fromkeys(c.loops[-1] for c in inside)
    return (
        f"{name}: {size / 1e6:,.1f} MB of it are in loops of unknown length, and count "
        f"for one iteration of each: {'; '.join(loops)}"
    )


# --- Tables.


def tables(
    steps: Mapping[str, tuple[Step, Step | None]],
    figures: Mapping[str, Mapping[str, Any]],
    rates: Rates,
) -> list[rich.table.Table]:
    """Returns the tables of all models, side by side.

    Args:
      steps: from `measure`.
      figures: model -> its figures.
      rates: of the devices.
    """
    step = next(iter(steps.values()))[0]
    mesh = " x ".join(f"{n} {s}" for n, s in step.mesh.shape.items())
    return [
        _by_collective(figures, mesh),
        _summary(figures, f"per device, for a step of {step.tokens:,} tokens"),
        _planned(figures, rates, step.mesh.size),
    ]


def _new_table(title: str, figures: Mapping[str, Any]) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left")
    table.add_column("")
    for name in figures:
        table.add_column(name, justify="right")
    if len(figures) == len(MODELS):
        table.add_column("ratio", justify="right")
    return table


def _ratio(values: Sequence[float]) -> list[str]:
    if len(values) < len(MODELS):
        return []
    spectral, dense = values
    return [f"{dense / spectral:.2f}" if spectral > 0 and dense > 0 else "-"]


def _by_collective(
    figures: Mapping[str, Mapping[str, Any]], mesh: str
) -> rich.table.Table:
    totals = [model["total"] for model in figures.values()]
    large = max(total["wire_bytes"] for total in totals) >= 1e11
    unit, scale = ("GB", 1e9) if large else ("MB", 1e6)
    title = f"{unit} that each device sends per step, in so many collectives\n({mesh})"
    table = _new_table(title, figures)
    empty = collectives.Total(0, 0, 0.0)._asdict()
    rows: dict[str, list[Mapping[str, float]]] = {}
    for column, model in enumerate(figures.values()):
        for part in model["collectives"]:
            row = f"{part['kind']}, {' + '.join(part['axes'])}"
            rows.setdefault(row, [empty] * len(figures))[column] = part
    for row, parts in (rows | {"total": totals}).items():
        sent = [part["wire_bytes"] for part in parts]
        cells = [
            f"{part['wire_bytes'] / scale:,.1f} in {part['count']:,}" for part in parts
        ]
        table.add_row(row, *cells, *_ratio(sent))
    return table


def _summary(figures: Mapping[str, Mapping[str, Any]], title: str) -> rich.table.Table:
    table = _new_table(title, figures)
    kilobytes = lambda value: f"{value / 1e3:,.1f}"
    megabytes = lambda value: f"{value / 1e6:,.1f}"
    gigabytes = lambda value: f"{value / 1e9:,.2f}"
    plain = lambda value: f"{value:,.0f}"
    rows = {
        "parameters": (lambda f: f["parameters"], plain),
        "payload, MB": (lambda f: f["total"]["payload_bytes"], megabytes),
        "sent, MB": (lambda f: f["total"]["wire_bytes"], megabytes),
        "- in every step": (lambda f: f["least"]["wire_bytes"], megabytes),
        "- fixed per step": (lambda f: f.get("fixed_bytes"), megabytes),
        "- less by reduce-scatters": (lambda f: f["sliced_bytes"], megabytes),
        "- in types of this compiler": (lambda f: f["as_compiled_bytes"], megabytes),
        "sent by all per token, KB": (lambda f: f.get("bytes_per_token"), kilobytes),
        "arguments, GB": (lambda f: f["memory"].get("argument_bytes"), gigabytes),
        "temporaries, GB": (lambda f: f["memory"].get("temporary_bytes"), gigabytes),
    }
    for name, (read, show) in rows.items():
        values = [read(model) for model in figures.values()]
        if None not in values and any(values):
            table.add_row(name, *map(show, values), *_ratio(values))
    return table


def _planned(
    figures: Mapping[str, Mapping[str, Any]], rates: Rates, num_devices: int
) -> rich.table.Table:
    title = (
        f"a model, not measured: seconds per step on {num_devices} devices\n"
        f"({rates.flops:.3g} FLOP/s each; {rates.node_bandwidth / 1e9:g} GB/s among "
        f"{rates.node_size},\n{rates.network_bandwidth / 1e9:g} GB/s beyond)"
    )
    table = _new_table(title, figures)
    names = {
        "compute": "compute",
        "node": "rings within nodes",
        "network": "rings between nodes",
        "without_overlap": "step, without overlap",
        "with_full_overlap": "step, with full overlap",
    }
    for key, name in names.items():
        values = [model["plan"][key] for model in figures.values()]
        table.add_row(name, *(f"{v:.3g}" for v in values), *_ratio(values))
    return table


if __name__ == "__main__":
    sys.exit(main())
