"""The figures of a compiled training step: bytes, memory, and a model of seconds.

`communication` prints them. The model of seconds is FLOPs over a rate, and bytes on a
ring over the bandwidth of the slowest link on it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import rich.table
from jax.sharding import Mesh

from sct_jax import errors
from sct_jax.training import accounting, collectives, config

MODELS = ("spectral", "dense")


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
