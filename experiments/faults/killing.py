"""Processes that are killed or signalled, in whatever they are doing."""

import signal
import time

from experiments.faults import cases, runs, workspace
from sct_jax.training import exit_codes

_LONG, _ENDLESS = workspace.LONG, workspace.ENDLESS
# Attention over long sequences: seconds per step, with few parameters.
_SLOW_STEP: workspace.Changes = {
    "model.num_heads": 16,
    "model.num_kv_heads": 16,
    "model.remat": "full",
    "data.seq_len": 1024,
    "data.batch_size": 1,
}
# Layers that are not scanned are compiled one by one.
_SLOW_COMPILE: workspace.Changes = {
    "model.scan_layers": "false",
    "model.num_layers": 24,
    "num_steps": 400,
}
_NO_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
_BEFORE_COMPILING = "passes over the training text"

_ExitCode = exit_codes.ExitCode


def _at_a_step(context: cases.Context) -> cases.Outcome:
    seen, folder = cases.Seen(), context.folder / "run"
    # Beyond the second save, which waits for the first.
    step, last = context.rng.randrange(21, 38), workspace.NUM_STEPS
    with context.space.start(folder) as process:
        process.until(lambda: workspace.last_step(folder) >= step)
        process.signal(signal.SIGKILL)
        ended = process.wait()
    reached = workspace.last_step(folder)
    cases.injected(ended.code == -signal.SIGKILL, f"the run ended first: {ended}")
    cases.injected(step <= reached < last, f"killed at step {reached}")
    saved = workspace.saved_steps(folder)
    ended = context.space.train(folder)
    seen.finished(ended)
    seen.resumed(ended, saved)
    seen.same_end(folder, context.space.clean())
    return seen.outcome(
        f"SIGKILL after step {reached} of {last}, then the same command"
    )


def _in_a_save(context: cases.Context) -> cases.Outcome:
    seen, folder = cases.Seen(), context.folder / "run"
    halves: list[str] = []
    for _ in range(8):  # a save may end in the moment in which it is seen
        step = workspace.last_step(folder) + context.rng.randrange(1, 60)
        with context.space.start(folder, _LONG) as process:
            process.until(
                lambda step=step: (
                    workspace.last_step(folder) >= step and workspace.half_saves(folder)
                )
            )
            process.signal(signal.SIGKILL)
            ended = process.wait()
        halves = workspace.half_saves(folder)
        if halves or ended.code != -signal.SIGKILL:
            break
    cases.injected(halves, "no half save was left")
    reached, saved = workspace.last_step(folder), workspace.saved_steps(folder)
    ended = context.space.train(folder, _LONG)
    seen.finished(ended)
    seen.resumed(ended, saved)
    seen.that(not workspace.half_saves(folder), "the half save is removed")
    seen.same_end(folder, context.space.clean(_LONG))
    return seen.outcome(
        f"SIGKILL in the save after step {reached}, then the same command"
    )


def _in_every_phase(context: cases.Context) -> cases.Outcome:
    seen, folder, space = cases.Seen(), context.folder / "run", context.space
    number, code = signal.SIGTERM, _ExitCode.TERMINATED
    done = [_interrupt_compile(context, seen, number)]

    def interrupted(phase: str, ended: runs.Ended) -> None:
        logged, saved = workspace.last_step(folder), workspace.saved_steps(folder)
        cases.injected(logged < 400, f"the run was over before the {phase}")
        seen.equal("exit code", ended.code, code)
        seen.that("Traceback" not in ended.text, "no traceback", ended.err[-300:])
        seen.that(saved and saved[-1] == logged, "the last step is saved", saved[-1:])
        if saved:
            workspace.state_at(folder, saved[-1])
        done.append(f"{phase} at step {logged}")

    step = context.rng.randrange(21, 39)  # between two saves
    with space.start(folder, _LONG) as process:
        process.until(lambda: workspace.last_step(folder) >= step)
        process.signal(number)
        interrupted("step", process.wait())

    # Nearly all of the time goes to evaluations, which change no result.
    evaluating = {**_LONG, "eval.every": 1, "eval.num_batches": 1000}
    start = workspace.last_step(folder)
    with space.start(folder, evaluating) as process:
        due = lambda: (
            workspace.last_step(folder) >= start + 3
            and "train/loss" in workspace.rows(folder)[-1]
        )
        cases.injected(process.until(due), "no evaluation was due")
        process.signal(number)
        interrupted("evaluation", process.wait())

    in_save = False
    while not in_save:  # a save may end in the moment in which it is seen
        start = workspace.last_step(folder)
        with space.start(folder, _LONG) as process:
            process.until(
                lambda start=start: (
                    workspace.last_step(folder) > start and workspace.half_saves(folder)
                )
            )
            process.signal(number)
            in_save = bool(workspace.half_saves(folder))
            interrupted("save" if in_save else "step after a save", process.wait())

    saved = workspace.saved_steps(folder)
    ended = space.train(folder, _LONG)
    seen.finished(ended)
    seen.resumed(ended, saved)
    same = workspace.final_state(folder) == workspace.final_state(space.clean(_LONG))
    seen.that(same, "end bitwise equal to the uninterrupted run")
    steps = [row["step"] for row in workspace.rows(folder) if "train/loss" in row]
    seen.that(steps == list(range(1, 401)), "no step lost", f"{len(steps)} steps")
    return seen.outcome(f"SIGTERM: {', '.join(done)}; then the same command")


def _interrupt_compile(context: cases.Context, seen: cases.Seen, number: int) -> str:
    """Signals a run that compiles; notes how it ends, and returns what was done."""
    folder = context.folder / f"compiling-{number}"
    with context.space.start(folder, _SLOW_COMPILE, environment=_NO_CACHE) as process:
        process.until(lambda: _BEFORE_COMPILING in process.out)
        wait = context.rng.uniform(1.0, 2.5)  # the state is drawn first
        time.sleep(wait)
        cases.injected(
            process.signal(number) and "compiled in" not in process.out,
            "it was not compiling",
        )
        ended = process.wait()
    cases.injected("compiled in" not in ended.out, "the compilation was over")
    seen.equal("exit code", ended.code, exit_codes.of_signal(number))
    seen.that(ended.seconds < 1.5, "over within 1.5 s", f"{ended.seconds:.1f} s")
    seen.that("Traceback" not in ended.text, "no traceback", ended.err[-300:])
    seen.that(not workspace.saved_steps(folder), "no checkpoint of an unborn state")
    return f"compilation after {wait:.1f} s"


def _while_compiling(context: cases.Context) -> cases.Outcome:
    seen = cases.Seen()
    numbers = (signal.SIGTERM, signal.SIGINT)
    done = [
        f"{signal.Signals(n).name} in the {_interrupt_compile(context, seen, n)}"
        for n in numbers
    ]
    return seen.outcome("; ".join(done))


def _twice_in_a_step(context: cases.Context) -> cases.Outcome:
    seen, layers, seconds = cases.Seen(), 6, 0.0
    while seconds < 2:  # faster machines need more of them
        layers *= 2
        folder = context.folder / str(layers)
        changes = {**_SLOW_STEP, "model.num_layers": layers}
        with context.space.start(folder, changes) as process:
            process.until(lambda folder=folder: workspace.last_step(folder) >= 2)
            before = workspace.rows(folder)
            seconds = _SLOW_STEP["data.seq_len"] / before[-1]["tokens_per_second"]
            if seconds < 2 and layers < 500:
                continue
            time.sleep(0.4)  # what is done between two steps takes less
            process.signal(signal.SIGTERM)
            time.sleep(0.15)
            cases.injected(
                process.signal(signal.SIGTERM) and workspace.rows(folder) == before,
                f"a step of {seconds:.1f} s was over before the second signal",
            )
            ended = process.wait()
            seen.equal("exit code", ended.code, _ExitCode.TERMINATED)
            seen.that(ended.seconds < 1, "over at once", f"{ended.seconds:.1f} s later")
            seen.that("Traceback" not in ended.text, "no traceback", ended.err[-300:])
    return seen.outcome("SIGTERM, and .15 s later another one, in a step of seconds")


SOAK_STEPS, SOAK_KILLS = 2000, 10
_SOAK: workspace.Changes = {
    "num_steps": SOAK_STEPS,
    "checkpoint.every": 40,
    "eval.every": 500,
}


def _soak(context: cases.Context) -> cases.Outcome:
    seen, folder = cases.Seen(), context.folder / "run"
    targets = sorted(context.rng.sample(range(5, SOAK_STEPS - 100), SOAK_KILLS))
    reached = []
    saved: list[int] = []
    for target in targets:
        with context.space.start(folder, _SOAK) as process:
            process.until(lambda target=target: workspace.last_step(folder) >= target)
            process.signal(signal.SIGKILL)
            ended = process.wait()
        reached.append(workspace.last_step(folder))
        cases.injected(ended.code == -signal.SIGKILL, f"the run ended first: {ended}")
        seen.resumed(ended, saved)
        saved = workspace.saved_steps(folder)
    cases.injected(reached[-1] < SOAK_STEPS, f"killed at steps {reached}")
    ended = context.space.train(folder, _SOAK)
    seen.finished(ended)
    seen.resumed(ended, saved)
    seen.same_end(folder, context.space.clean(_SOAK))
    steps = [row["step"] for row in workspace.rows(folder) if "train/loss" in row]
    lost = SOAK_STEPS - len(set(steps))
    seen.equal("lost updates", lost, 0)
    where = ", ".join(map(str, reached))
    return seen.outcome(
        f"{SOAK_STEPS} steps with {SOAK_KILLS} times SIGKILL, at steps {where}"
    )


def _second_trainer(context: cases.Context) -> cases.Outcome:
    seen, folder, space = cases.Seen(), context.folder / "run", context.space
    with space.start(folder, _ENDLESS) as first:
        first.until(lambda: workspace.last_step(folder) >= 20)
        seen.refused(space.train(folder, _ENDLESS), "another process is training")
        other = space.train(folder, {**_ENDLESS, "model.rank": 3})
        seen.refused(other, "another process is training")
        cases.injected(first.is_running(), "the first trainer was over")
        before = workspace.last_step(folder)
        moves = first.until(lambda: workspace.last_step(folder) > before)
        seen.that(moves, "the first trainer trains on")
        first.signal(signal.SIGTERM)
        ended = first.wait()
    seen.equal("exit code of the first trainer", ended.code, _ExitCode.TERMINATED)
    other = space.train(folder, {**_ENDLESS, "model.rank": 3, "seed": 1})
    seen.refused(other, "workdir", "model.rank", "seed")
    return seen.outcome(
        "a second trainer, with the same and with another configuration, during the "
        "run; another configuration after it"
    )


CASES = (
    cases.Case(
        1,
        "a process killed at a random step",
        "final parameters bitwise equal to the uninterrupted run",
        _at_a_step,
        quick=True,
    ),
    cases.Case(
        2,
        "a process killed in a save",
        "the half save is ignored and removed; the same end",
        _in_a_save,
    ),
    cases.Case(
        3,
        "SIGTERM in a compilation, a step, an evaluation, a save",
        "one valid save, exit code 143, no lost step",
        _in_every_phase,
    ),
    cases.Case(
        19,
        "two trainers in one workdir, and a workdir used with another configuration",
        "the second one is refused",
        _second_trainer,
    ),
    cases.Case(
        42,
        "SIGTERM or Ctrl-C while compiling",
        "exit code 143 or 130 within 1.5 s",
        _while_compiling,
    ),
    cases.Case(
        43,
        "two SIGTERM .15 s apart in a step that takes seconds",
        "the second one ends the process at once",
        _twice_in_a_step,
    ),
    cases.Case(
        58,
        f"a run of {SOAK_STEPS} steps, killed {SOAK_KILLS} times",
        "bitwise equal to the uninterrupted run, no lost update",
        _soak,
    ),
)
