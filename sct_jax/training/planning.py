"""What a run is, before anything of it is allocated."""

import functools
import pathlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import rich.console

from sct_jax.training import (
    accounting,
    console,
    hardware,
    memory,
    origin,
    processes,
    trainer,
    workdir,
)
from sct_jax.training import config as config_lib


class Plan(NamedTuple):
    """A run before anything of it is allocated.

    Attributes:
      config: the run.
      phases: of the run.
      runs: the trainer of each phase.
      needs: the memory of each phase.
      summary: what summary.json holds, of the last phase.
    """

    config: config_lib.ExperimentConfig
    phases: Sequence[config_lib.Phase]
    runs: Sequence[trainer.Trainer]
    needs: Sequence[memory.Plan]
    summary: dict[str, Any]

    def print_start(self, output: rich.console.Console) -> None:
        """Prints the start table."""
        run = self.runs[-1]
        choices = run.choices | self.needs[-1].choices
        if len(self.phases) > 1:
            choices["phases"] = console.describe_phases(self.phases, self.needs)
        console.print_start(
            output, self.config, self.summary, run.mesh, choices=choices
        )

    def memory_notes(self) -> Iterator[str]:
        """Yields a sentence per phase whose memory may not suffice.

        Raises:
          UserError: where it certainly does not.
        """
        for phase, plan, run in zip(self.phases, self.needs, self.runs, strict=True):
            if note := memory.check(plan, run.mesh, run.abstract_state):
                several = len(self.phases) > 1
                yield f"phase to step {phase.last:,}: {note}" if several else note


def plan(config: config_lib.ExperimentConfig, source: origin.Origin | None) -> Plan:
    """Returns the plan of a run.

    Args:
      config: the run.
      source: what it starts from, if not from random parameters.

    Raises:
      UserError: the mesh does not match the devices, a setting does not fit the mesh,
        or the arrays of the source do not fit the first phase.
    """
    mesh = config.mesh.build()
    phases = config_lib.phases_of(config)
    runs = [trainer.Trainer(phase.config, mesh) for phase in phases]
    if source is not None:
        origin.check_arrays(runs[0], source)
    needs = [run.plan() for run in runs]
    summary = accounting.summary(
        config.model,
        runs[-1].tx,
        seq_len=config.data.seq_len,
        state=runs[-1].abstract_state,
        sizes=needs[-1].sizes,
    )
    return Plan(config, phases, runs, needs, summary)


def dry_run(
    planned: Plan,
    path: pathlib.Path,
    output: rich.console.Console,
    *,
    compile_step: bool,
    allow_change: Collection[str],
) -> None:
    """Writes summary.json, unless the folder holds another run.

    Args:
      planned: the run.
      path: the workdir.
      output: where to print.
      compile_step: whether to compile the steps and add the compiler's memory.
      allow_change: see `loop.train`.
    """
    say = functools.partial(console.say, output)
    config, summary = planned.config, planned.summary
    if compile_step:
        found = []
        for phase, plan, run in zip(
            planned.phases, planned.needs, planned.runs, strict=True
        ):
            if len(planned.phases) > 1:
                say(f"phase to step {phase.last:,}:")
            found.append(_compile_only(run, plan, output))
        if largest := [sizes for sizes in found if sizes]:
            summary["compiled"] = max(largest, key=lambda x: x["total_bytes"])
    earlier = workdir.committed_config(path)
    if earlier and config_lib.differences(earlier, config, allowed=allow_change):
        say(f"note: {path} holds another run, so its summary.json is kept")
    elif processes.is_first():
        workdir.write_json(path / "summary.json", summary)


def _compile_only(
    run: trainer.Trainer, plan: memory.Plan, output: rich.console.Console
) -> dict[str, Any]:
    """Bytes of the compiled step by kind; empty if it cannot be told."""
    say = functools.partial(console.say, output)
    if run.config.step == "layerwise":
        say(
            'note: step = "layerwise" is compiled in parts during its first step, so '
            "--compile compiles nothing and adds nothing to summary.json"
        )
        return {}
    seconds = run.compile(run.abstract_state)
    say(f"compiled in {seconds:.1f} s")
    compiled = run.compiled_memory(run.abstract_state)
    if compiled is None:
        say(
            "note: this backend does not tell the memory of a compiled program, so "
            "summary.json has none"
        )
        return {}
    estimate = {
        "argument_bytes": hardware.shard_bytes(
            (run.abstract_state, run.abstract_batch())
        ),
        "temporary_bytes": sum(plan.needed.values())
        - plan.needed["parameters"]
        - plan.needed["optimizer"],
    }
    estimate["total_bytes"] = sum(estimate.values())
    output.print(console.compiled_table(compiled, estimate))
    return compiled
