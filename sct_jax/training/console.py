"""What a person sees of a run: the start table, progress and messages."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress
import rich.table
from jax.sharding import Mesh

from sct_jax import model, rank
from sct_jax.training import config as config_lib
from sct_jax.training import memory, metrics, optimizer_config, streams


def standard_output() -> rich.console.Console:
    """Returns a console for standard output that a closed or full one cannot stop."""
    return rich.console.Console(file=streams.forgiving(sys.stdout))


def say(console: rich.console.Console, text: str) -> None:
    """Prints text verbatim: no markup, no wrapping."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_start(
    console: rich.console.Console,
    config: config_lib.ExperimentConfig,
    summary: Mapping[str, Any],
    mesh: Mesh,
    *,
    choices: Mapping[str, str],
) -> None:
    """Prints the start table and a note for each setting without effect.

    Args:
      console: where to print.
      config: the run.
      summary: from `accounting.summary`.
      mesh: the devices.
      choices: row -> what a setting that the run leaves to "auto" became, and why.
    """
    devices = jax.devices()
    console.print(
        start_table(
            summary,
            devices=f"{len(devices)} x {devices[0].device_kind}",
            mesh=mesh.shape,
            tokens_per_step=config.data.tokens_per_step,
            num_steps=config.num_steps,
            choices=choices,
        )
    )
    for note in (*config.model.clamped_ratios(), *config.unused_fields()):
        say(console, f"note: {note}")


def start_table(
    summary: Mapping[str, Any],
    *,
    devices: str,
    mesh: Mapping[str, int],
    tokens_per_step: int,
    num_steps: int,
    choices: Mapping[str, str] = MappingProxyType({}),
) -> rich.table.Table:
    """Returns the table printed before a run, from `accounting.summary`."""
    stored = summary["parameters"]
    dense = summary["dense_equivalent_parameters"]
    sizes = summary["bytes"]
    table = rich.table.Table(show_header=False, title="sct_jax", title_justify="left")
    rows = {
        "parameters (stored)": f"{stored:,}",
        "parameters (dense equivalent)": f"{dense:,}",
        "compression": f"{dense / stored:.2f}x",
        **{
            f"bytes, {name}": f"{size:,} ({memory.human(size)})"
            for name, size in sizes.items()
        },
        "FLOPs per token": f"{summary['flops_per_token']:,}",
        "tokens per step": f"{tokens_per_step:,}",
        "tokens in total": f"{tokens_per_step * num_steps:,}",
        "devices": devices,
        "mesh": ", ".join(f"{name} {size}" for name, size in mesh.items()),
        **choices,
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def compiled_table(
    compiled: Mapping[str, int], estimate: Mapping[str, int]
) -> rich.table.Table:
    """Returns a table of bytes per device: the compiler's beside the estimate.

    Args:
      compiled: from `Trainer.compiled_memory`.
      estimate: bytes by the same names, as far as they are known.
    """
    table = rich.table.Table(title="bytes per device", title_justify="left")
    for column in ("", "compiler", "estimate"):
        table.add_column(column)
    for name, size in compiled.items():
        known = estimate.get(name)
        table.add_row(
            name.removesuffix("_bytes"),
            f"{size:,} ({memory.human(size)})",
            "" if known is None else f"{known:,} ({memory.human(known)})",
        )
    return table


def describe_ranks(step: int, before: Mapping[str, int], change: rank.Change) -> str:
    """Returns a line about a change of ranks: stored ones, and the mean in use."""
    changed = [
        f"{name} {before[name]} -> {stored}"
        for name, stored in change.ranks.items()
        if before[name] != stored
    ]
    in_use = [f"{name} {np.mean(a):.1f}" for name, a in change.active.items()]
    return (
        f"step {step}: stored ranks {', '.join(changed) or 'unchanged'}; in use "
        + ", ".join(in_use)
    )


def describe_phases(
    phases: Sequence[config_lib.Phase], plans: Sequence[memory.Plan]
) -> str:
    """Returns where every phase of a run ends, its ranks, and its bytes per device."""
    return ", ".join(
        f"{describe_rank(phase.config.model)} to step {phase.last:,} "
        f"({memory.human(sum(plan.needed.values()))})"
        for phase, plan in zip(phases, plans, strict=True)
    )


def describe_rank(shape: model.ModelConfig) -> str:
    """Returns the ranks of a model in a few words."""
    ranks = sorted({shape.matrix_rank(name) or 0 for name in shape.spectral})
    if not ranks:
        return "dense"
    return "rank " + (f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}")


def describe_switch(
    step: int, shape: model.ModelConfig, before: float, after: float
) -> str:
    """Returns a line about a truncation, with the held-out losses around it."""
    return (
        f"step {step}: truncated to {describe_rank(shape)}; held-out loss "
        f"{before:.4f} before, {after:.4f} nats per token after"
    )


def describe_evaluation(step: int, row: metrics.Row) -> str:
    """Returns a line about an evaluation."""
    return (
        f"step {step}: held-out loss {row['eval/loss']:.4f} nats per token, "
        f"perplexity {row['eval/perplexity']:.2f}, "
        f"{row['eval/bits_per_byte']:.4f} bits per byte"
    )


def describe_passes(config: config_lib.ExperimentConfig, num_tokens: int) -> str:
    """Returns a line about how often a run reads `num_tokens` of training text."""
    tokens = config.num_steps * config.data.tokens_per_step
    return (
        f"data: {tokens:,} tokens in {config.num_steps:,} steps, "
        f"{tokens / num_tokens:.3g} passes over the training text"
    )


def describe_skipped(row: metrics.Row, before: int) -> str:
    """Returns a line about steps that were not applied since the last row.

    Args:
      row: a logged row.
      before: number of such steps in the row before.
    """
    now = int(row["skipped_steps"])
    return (
        f"warning: {now - before} of the steps up to {row['step']} were not applied "
        f"({now} so far): the loss or gradient was not finite, or a spike"
    )


def describe_problem(
    optimizer: optimizer_config.OptimizerConfig,
    step: int,
    values: Mapping[str, Any],
    *,
    largest_parameter: float,
) -> str | None:
    """Returns why a run cannot continue after a step; None if it can.

    Args:
      optimizer: of the run.
      step: the step.
      values: `loss` and `skipped_in_a_row` of the step.
      largest_parameter: largest magnitude of the parameters after the step.
    """
    if optimizer.guard.gives_up(int(values["skipped_in_a_row"])):
        return (
            f"{optimizer.skip_nonfinite} steps in a row, up to step {step}, have a "
            "loss or gradient that is not finite"
        )
    checked = {"largest parameter": largest_parameter}
    if optimizer.skip_nonfinite is None:
        checked["loss"] = float(values["loss"])
    for name, value in checked.items():
        if not math.isfinite(value):
            return f"the {name} of step {step} is {value}"
    return None


def describe_divergence(
    config: config_lib.ExperimentConfig,
    problem: str,
    kept: int | None,
    *,
    rate: str = "optimizer.peak_learning_rate",
) -> str:
    """Returns what is not finite, what remains, and what to try.

    Args:
      config: the run, or its phase.
      problem: from `describe_problem`.
      kept: step of the newest checkpoint, None without one.
      rate: the field that sets the learning rate.
    """
    last = f"the checkpoint of step {kept} is kept" if kept else "nothing is saved"
    can_clip = hasattr(config.optimizer, "max_update_norm")
    bound = "optimizer.max_update_norm" if can_clip else "optimizer.grad_clip"
    return (
        f"diverged: {problem}; {last}. Lower {rate}, or set "
        f"{bound}, in another --workdir"
    )


class Progress:
    """A live bar on a terminal, plain lines elsewhere: loss, rate, tokens/s, ETA.

    Adds the model FLOPs utilisation (MFU) where rows have it.
    """

    def __init__(
        self, console: rich.console.Console, *, start_step: int, num_steps: int
    ):
        self._console = console
        self._num_steps = num_steps
        self._start_step = start_step
        self._began = time.monotonic()
        self._printed = -math.inf
        self._bar: rich.progress.Progress | None = None
        if console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.completed}/{task.total}"),
                rich.progress.BarColumn(),
                rich.progress.TextColumn("{task.description}"),
                rich.progress.TimeRemainingColumn(),
                console=console,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                "compiling", total=num_steps, completed=start_step
            )

    def begin(self) -> None:
        """Starts the clock of the ETA once compilation is over."""
        self._began = time.monotonic()

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def show(self, row: metrics.Row) -> None:
        """Shows a logged row: in the bar, or as a line at most every two seconds."""
        text = (
            f"loss {row['train/loss']:.4f}  lr {row['learning_rate']:.2e}  "
            f"{row['tokens_per_second']:,.0f} tokens/s"
        )
        if "mfu" in row:
            text += f"  MFU {row['mfu']:.1%}"
        step = int(row["step"])
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
            return
        now = time.monotonic()
        if now - self._printed >= 2 or step == self._num_steps:
            self._printed = now
            rate = (now - self._began) / max(step - self._start_step, 1)
            eta = round(rate * (self._num_steps - step))
            self.print(
                f"step {step}/{self._num_steps}  {text}  ETA {eta // 60}:{eta % 60:02d}"
            )

    def print(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        say(self._console, text)

    def close(self) -> None:
        """Leaves the bar at its last step."""
        if self._bar:
            self._bar.stop()
