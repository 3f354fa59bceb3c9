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

import jax
import rich.console
from jax.sharding import Mesh

from experiments import json_file, step_figures
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

MAX_DEVICES = 4096  # more take minutes to describe

# An H100 in a node of eight: NVLink 4 and one port of NDR InfiniBand per device, bytes
# per second in each direction (NVIDIA DGX H100 datasheet), and 40 % of its peak.
_DEVICE = "NVIDIA H100 80GB HBM3"
_UTILISATION = 0.4
_NODE = 8
_NODE_BANDWIDTH = 450e9
_NETWORK_BANDWIDTH = 50e9
_MEMORY_GB = 80.0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    flags, pairs = _parser().parse(sys.argv[1:] if argv is None else argv)
    console = rich.console.Console()
    say = functools.partial(console.print, highlight=False, markup=False)
    try:
        sizes = parse_mesh(flags.mesh, devices=flags.devices)
        rates = step_figures.Rates(
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
        figures = {
            name: step_figures.as_figures(*pair, rates) for name, pair in steps.items()
        }
        for table in step_figures.tables(steps, figures, rates):
            console.print(table)
        for name, (step, _) in steps.items():
            if note := step_figures.note_on_loops(name, step):
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
    add(
        "--models",
        default=",".join(step_figures.MODELS),
        help="models (default: %(default)s)",
    )
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
        help='memory of an accelerator, where model.remat is "auto" (default: '
        "%(default)s)",
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
    names = text.split(",")
    for name in names:
        errors.check_choice("--models", name, step_figures.MODELS)
    return [name for name in step_figures.MODELS if name in names]


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
      models: from `step_figures.MODELS`.
      mesh: the devices.
      available: bytes of memory of each accelerator that they stand for.

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
        run, reasons = memory.resolve(
            run, mesh, state, available=available, platform="gpu"
        )
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
) -> dict[str, tuple[step_figures.Step, step_figures.Step | None]]:
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


def compile_step(experiment: config.ExperimentConfig, mesh: Mesh) -> step_figures.Step:
    """Returns the compiled step of a run, without what it computes for the log."""
    run = trainer.Trainer(experiment, mesh, diagnose=lambda old, new: {})
    seconds = run.compile(run.abstract_state)
    text = run.compiled_text(run.abstract_state)
    assert text is not None  # the trainer refuses `diagnose` for another step
    return step_figures.Step(
        experiment=experiment,
        mesh=mesh,
        seconds=seconds,
        memory=run.compiled_memory(run.abstract_state) or {},
        found=collectives.read(text, mesh),
    )


if __name__ == "__main__":
    sys.exit(main())
