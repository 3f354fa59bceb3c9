"""The host loop: what happens between two steps, and when."""

import contextlib
import functools
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import rich.console

from sct_jax import data, files, paths, rank
from sct_jax.training import (
    accounting,
    checkpoint,
    console,
    evaluation,
    exit_codes,
    failures,
    hardware,
    layerwise,
    metrics,
    origin,
    planning,
    processes,
    profiling,
    resuming,
    sample,
    signals,
    switching,
    trainer,
    watchdog,
    workdir,
)
from sct_jax.training import config as config_lib
from sct_jax.training import state as state_lib


class Result(NamedTuple):
    """How a call of `train` ended.

    Attributes:
      status: how; "finished" may refer to an earlier call.
      step: number of steps, skipped ones included.
      signal: number of the signal that interrupted the run.
    """

    status: Literal["finished", "diverged", "interrupted", "dry_run"]
    step: int = 0
    signal: int | None = None


@contextlib.contextmanager
def _ending_together() -> Iterator[None]:
    """Lets an exception that ends this process end the other ones too."""
    processes.attach()
    try:
        yield
    except BaseException as error:
        code = failures.code_of(error)
        if code == exit_codes.ExitCode.INTERNAL_ERROR and failures.is_of_runtime(error):
            processes.await_loss()  # which is then the cause
        is_refusal = code == exit_codes.ExitCode.BAD_INPUT
        processes.leave(code, f"error: {error}" if is_refusal else code.meaning)
        raise


@_ending_together()
def train(
    config: config_lib.ExperimentConfig,
    path: str | os.PathLike[str],
    *,
    dry_run: bool = False,
    compile_step: bool = False,
    allow_change: Collection[str] = (),
    stall_timeout: float | None = None,
    profile: tuple[int, int] | None = None,
    init_from: str | None = None,
    output: rich.console.Console | None = None,
) -> Result:
    """Trains to the end, or until a signal arrives or the loss diverges.

    Resumes from the newest whole checkpoint of the workdir. SIGINT, SIGTERM and SIGHUP
    save the state and return; a second signal ends the process at once. A step whose
    loss or gradient is not finite is skipped, and `optimizer.skip_nonfinite` of them in
    a row end the run. Parameters that are not finite are never saved.

    Args:
      config: the run.
      path: the workdir. Receives checkpoints, metrics.jsonl, config.json, summary.json
        and tokenizer.json.
      dry_run: only print the start table and write summary.json. Allocates nothing and
        needs no corpus.
      compile_step: with `dry_run`, also compile the step for the mesh, print the
        compiler's memory per device, and add it to summary.json as "compiled".
      allow_change: fields in which the run may differ from the one that it resumes.
      stall_timeout: seconds without a step, evaluation or save after which the process
        ends; None waits for ever. See `watchdog.Watchdog`.
      profile: first and last step of a profiler trace, both included and counted from
        1, which goes to the folder `profile` of the workdir. See `profiling.Profile`.
      init_from: workdir of another run, whose parameters a new run starts from. Its
        tokenizer is taken, and matrices that are to have less rank are truncated, see
        `TruncationConfig`. Without effect once the run has a checkpoint, which
        remembers it.
      output: where to print; standard output if None.

    Of several processes, an exception in one ends the others, with its exit code.

    Raises:
      UserError: naming what the user has to change, before the step is compiled.
      ValueError: for `compile_step` without `dry_run`.
    """
    if compile_step and not dry_run:
        raise ValueError("compile_step: set dry_run too, as a run compiles in any case")
    output = output or console.standard_output()
    say = functools.partial(console.say, output)
    path = pathlib.Path(paths.expand("workdir", path))
    config.validate()
    if profile is not None:
        profiling.check_range(profile, num_steps=config.num_steps)
    hardware.check_backend()
    metrics.check_sinks(config.log)
    if not processes.is_first():
        output = rich.console.Console(quiet=True)
        say = functools.partial(console.say, output)
    options = {"workdir": str(path), "--dry-run": dry_run, "--init-from": init_from}
    processes.check_same(
        "--config",
        config_lib.flatten(config_lib.to_dict(config))
        | options
        | {"--allow-change": sorted(allow_change), "jax": jax.__version__},
    )
    workdir.check_resumable(path)
    source = None
    if init_from is not None and workdir.steps_done(path):
        say(f"note: --init-from has no effect, as {path} has a checkpoint to resume")
    elif init_from is not None:
        source = origin.find(init_from)
        config = origin.adopt(config, source, log=say)
    config = workdir.resolve(config, path)
    planned = planning.plan(config, source)
    workdir.make(path)
    planned.print_start(output)
    if dry_run:
        planning.dry_run(
            planned, path, output, compile_step=compile_step, allow_change=allow_change
        )
        return Result("dry_run")
    for note in planned.memory_notes():
        say(f"note: {note}")
    with signals.Signals() as interrupts:
        try:
            with workdir.claim(path) as claimed:
                call = _Call(
                    config=config,
                    phases=planned.phases,
                    runs=planned.runs,
                    path=path,
                    claimed=claimed,
                    output=output,
                    interrupts=interrupts,
                    allow_change=allow_change,
                    stall_timeout=stall_timeout,
                    profile=profile,
                    source=source,
                    summary=planned.summary,
                )
                if _is_finished(call):
                    return _finished_before(call)
                return _train(call)
        except (signals.Interrupted, Exception):
            if interrupts.raised is None:
                raise
    done = workdir.steps_done(path)
    kept = f"step {done} is saved" if done else "nothing to save"
    say(f"interrupted before a new step; {kept}")
    processes.leave(
        exit_codes.of_signal(interrupts.raised), f"signal {interrupts.raised}"
    )
    return Result("interrupted", done, interrupts.raised)


class _Call(NamedTuple):
    """A call of `train` that takes steps.

    Its last trainer serves for what is alike in all phases.
    """

    config: config_lib.ExperimentConfig
    phases: Sequence[config_lib.Phase]
    runs: Sequence[trainer.Trainer]
    path: pathlib.Path
    claimed: files.HeldFolder
    output: rich.console.Console
    interrupts: signals.Signals
    allow_change: Collection[str]
    stall_timeout: float | None
    profile: tuple[int, int] | None
    source: origin.Origin | None
    summary: Mapping[str, Any]

    def say(self, text: str) -> None:
        console.say(self.output, text)

    def run_at(self, step: int) -> trainer.Trainer:
        """The trainer of the phase that the state after a step is of."""
        return self.runs[config_lib.phase_number(self.phases, step)]


def _train(call: _Call) -> Result:
    """Prepares data and state, trains, and prints a sample at the end."""
    config, interrupts, say = call.config, call.interrupts, call.say
    with processes.first_goes_ahead("corpus"):
        corpus = data.prepare(config.data, vocab_size=config.model.vocab_size, log=say)
    processes.check_same("data", _identity(corpus))
    say(console.describe_passes(config, len(corpus.train)))
    interrupts.end_at_once()
    text = call.runs[-1].held_out(corpus)
    torn: set[int] = set()  # steps that only a later attempt can leave out
    begun = False  # whether a phase has ended before
    while True:
        state = None  # of that phase: the next one needs the memory
        try:
            state, result = _attempt(call, corpus, text, torn, begun=begun)
            begun = True
            if result.status != "finished" or result.step == config.num_steps:
                break
            if received := _received(interrupts):
                say(f"interrupted after a phase; step {result.step} is saved")
                return result._replace(status="interrupted", signal=received[0])
        except layerwise.TornStep as error:
            torn.add(error.step)
            begun = False
            say(
                f"warning: {error}; starting from the newest checkpoint again, to skip "
                "that step"
            )
    if state is None:
        return _finished_before(call)
    interrupts.stop_deferring()
    received = _received(interrupts)
    if received and result.status == "finished":
        say(
            "interrupted after the last step, which is saved; results are in "
            f"{call.path}"
        )
        return result._replace(status="interrupted", signal=received[0])
    if result.status == "finished":
        if processes.count() > 1:  # no process has all of the parameters
            say(
                "sample: python -m experiments.generate --prompt=... "
                f"--workdir={call.path} prints one"
            )
        else:
            document = sample.sample_document(
                state.params, config.model, corpus.tokenizer, seed=config.seed
            )
            say(f"sample:\n{document}")
        say(f"finished: {config.num_steps} steps; results are in {call.path}")
    return result


def _received(interrupts: signals.Signals) -> list[int]:
    """The signals that any process has received."""
    return [n for n in processes.exchange("signal", interrupts.received) if n]


def _attempt(
    call: _Call,
    corpus: data.Corpus,
    text: evaluation.HeldOut,
    torn: Collection[int],
    *,
    begun: bool,
) -> tuple[state_lib.TrainState | None, Result]:
    """Trains from the newest checkpoint to the end of a phase.

    Returns no state if that checkpoint is of the last step. What is resumed is only
    said where no phase has ended just before.
    """
    path, config, source = call.path, call.config, call.source
    identity = _identity(corpus)
    processes.connect_devices(call.runs[0].mesh)

    def say(line: str) -> None:
        if not begun or line.startswith("warning"):
            call.say(line)

    def begin() -> state_lib.TrainState:
        nonlocal source
        assert source is not None
        run, calibration = call.runs[0], None
        if origin.truncates(run, source):
            calibration = switching.calibration_text(
                run, corpus, step=0, seed=config.seed
            )
        begun, source = origin.start(run, source, text=calibration, log=call.say)
        return begun

    with contextlib.ExitStack() as stack:
        closing = lambda x: stack.enter_context(contextlib.closing(x))
        checkpoints = closing(
            workdir.writing(call.claimed, keep=config.checkpoint.keep)
        )
        state, start = workdir.restore_or_init(
            config,
            call.run_at,
            checkpoints,
            identity,
            log=say,
            allow_change=call.allow_change,
            start=None if source is None else begin,
        )
        if start >= config.num_steps:
            return None, Result("finished", config.num_steps)
        record = checkpoints.read_record(start) if start else None
        before = resuming.windows_before(record, config)
        number = config_lib.phase_number(call.phases, start)
        ended = start == call.phases[number].last
        number += ended
        phase, run = call.phases[number], call.runs[number]
        came_from = workdir.origin_of(record) if record else None
        if source and not start:
            came_from = source.describe()
        if processes.is_first():
            # Only a run that starts or resumes claims the folder for its configuration.
            if not start or call.allow_change or not (path / "config.json").exists():
                workdir.write_json(path / "config.json", config_lib.to_dict(config))
            corpus.tokenizer.save(str(path / "tokenizer.json"))
        batches = data.train_batches(
            corpus,
            config.data,
            seed=config.seed,
            start_step=start,
            windows_before=before,
            rows=run.rows,
        )
        about = {"config": config_lib.to_dict(config), "summary": call.summary}
        sinks = closing(
            metrics.open_sinks(path, resume_step=start, log=config.log, about=about)
        )
        if ended:
            state, losses = _switch(
                call, number, state, corpus, text, windows_before=before
            )
            sinks.write({"step": start, **losses})
        progress = closing(
            console.Progress(call.output, start_step=start, num_steps=config.num_steps)
        )
        # Closed before `progress`, which its lines go through.
        traced = call.profile if processes.is_first() else None
        profile = stack.enter_context(
            profiling.Profile(traced, path / "profile", say=progress.print)
        )
        if not begun:
            profile.resume(start)
        watch = stack.enter_context(
            watchdog.Watchdog(call.stall_timeout, path, before_exit=processes.leave)
        )
        loop = _Loop(
            config,
            phase,
            run,
            checkpoints,
            sinks,
            progress,
            profile,
            text,
            identity,
            watch,
            before,
            came_from,
        )
        return loop.steps(state, start, batches, call.interrupts, torn=torn)


def _switch(
    call: _Call,
    number: int,
    state: state_lib.TrainState,
    corpus: data.Corpus,
    text: evaluation.HeldOut,
    *,
    windows_before: int,
) -> tuple[state_lib.TrainState, metrics.Row]:
    """The state that a phase starts from, and the held-out losses around truncation."""
    before, after = call.runs[number - 1 : number + 1]
    step = call.phases[number].first
    full = before.evaluate(state.params, text)["eval/loss"]
    calibration = switching.calibration_text(
        after,
        corpus,
        step=step,
        seed=call.config.seed,
        windows_before=windows_before,
    )
    state = switching.switch(
        state,
        before,
        after,
        text=calibration,
        carry_momentum=call.config.phases.carry_momentum,
    )
    cut = after.evaluate(state.params, text)["eval/loss"]
    call.say(console.describe_switch(step, after.config.model, full, cut))
    return state, {
        f"{metrics.TRUNCATION}loss_before": full,
        f"{metrics.TRUNCATION}loss_after": cut,
    }


def _identity(corpus: data.Corpus) -> dict[str, str]:
    """What may not change during a run."""
    return {"corpus": corpus.hash, "tokenizer": corpus.tokenizer.hash}


def _is_finished(call: _Call) -> bool:
    """Whether a claimed folder holds the whole run; writes its summary.json.

    Raises:
      UserError: the folder holds another run.
    """
    earlier, same_text = workdir.committed_config(call.path), True
    if earlier:
        resuming.check_same_run(
            earlier, call.config, str(call.path), allowed=call.allow_change
        )
        same_text = not config_lib.text_changes(earlier, call.config)
    if processes.is_first():
        workdir.write_json(call.path / "summary.json", call.summary)
    # Text that moved is read, to see whether it is the same.
    return same_text and workdir.is_finished(call.config, call.run_at, call.path)


def _finished_before(call: _Call) -> Result:
    num_steps = call.config.num_steps
    profiling.Profile(call.profile, call.path, say=call.say).resume(num_steps)
    call.say(f"finished: {num_steps} steps are done, see {call.path}")
    return Result("finished", num_steps)


class _Loop(NamedTuple):
    """The steps of one process in a phase, and what each one writes."""

    config: config_lib.ExperimentConfig
    phase: config_lib.Phase
    run: trainer.Trainer
    checkpoints: checkpoint.Checkpointer
    sinks: metrics.Sinks
    progress: console.Progress
    profile: profiling.Profile
    text: evaluation.HeldOut
    identity: dict[str, str]
    watch: watchdog.Watchdog
    windows_before: int  # see `workdir.record`, and below
    origin: Mapping[str, Any] | None

    def steps(
        self,
        state: state_lib.TrainState,
        start_step: int,
        batches: Iterator[trainer.HostBatch],
        interrupts: signals.Signals,
        *,
        torn: Collection[int] = (),
    ) -> tuple[state_lib.TrainState, Result]:
        """The state after the last step taken, and why it was the last.

        Steps in `torn` are not applied. Raises `layerwise.TornStep` for another one.
        """
        config, (first, end, own) = self.config, self.phase
        schedule = own.optimizer.learning_rate(own.num_steps)
        log = metrics.StepLog(
            self.sinks,
            learning_rate=lambda updates: schedule(updates - first),
            tokens_per_step=config.data.tokens_per_step,
            start_step=start_step,
            tokens_before=self.windows_before * config.data.seq_len,
            skipped=int(state.guard.skipped),
            peak_tokens_per_second=self._peak_tokens_per_second(state),
        )
        self._compile(state)
        if config.step == "fused":  # "layerwise" compiles in its first step
            interrupts.defer()
            self.watch.kick()
        self.progress.begin()
        log.start()
        for step in range(start_step + 1, end + 1):
            last = step == end
            logged = last or step == first + 1 or step % config.log_every == 0
            with self.profile.step(step, state):
                state, values = self.run.step(
                    state, next(batches), diagnose=logged, reject=step in torn
                )
            self.profile.after(step, state, values)
            interrupts.defer()
            self.watch.kick()
            self.checkpoints.poll()
            sound = self._flush(log)
            self.progress.advance(step)
            if logged:
                log.hold(step, values)
            stop = processes.agreed_stop(step, interrupts.received)
            saved = last or stop or step % config.checkpoint.every == 0
            evaluated = last or step % config.eval.every == 0
            decided = own.adaptive_rank.decides_at(step - first) and not last
            # The work below takes time of its own, and a layerwise step is over when it
            # returns: in both cases the row of this step is due now.
            if saved or evaluated or decided or config.step == "layerwise":
                sound = sound and self._flush(log)
            if saved and sound:
                # The loss belongs to the parameters before the step.
                largest = trainer.largest_magnitude(state.params)
                sound = self._is_sound(step, values, largest_parameter=largest)
            if not sound:
                return state, Result("diverged", step)
            if saved or evaluated or decided:
                jax.block_until_ready(values)  # time of steps, not of what follows
            if decided:
                with log.paused():
                    state = self._change_ranks(step, state)
                log.peak_tokens_per_second = self._peak_tokens_per_second(state)
            if evaluated:
                with log.paused():
                    with self._compiling():
                        self.run.compile_evaluation(state.params)
                    row = self.run.evaluate(state.params, self.text)
                    self.sinks.write({"step": step, **row})
                    self.progress.print(console.describe_evaluation(step, row))
                    self.watch.kick()
            if saved:
                with log.paused():
                    self.sinks.flush()
                    record = workdir.record(
                        config,
                        step,
                        state,
                        self.identity,
                        windows_before=self.windows_before,
                        origin=self.origin,
                    )
                    self.checkpoints.save(step, state, record=record)
                    self.watch.kick()
            if stop and step != config.num_steps:
                self.checkpoints.wait()
                self.progress.print(
                    f"interrupted: saved at step {step}; the same command resumes"
                )
                return state, Result("interrupted", step, stop)
        self.checkpoints.wait()
        return state, Result("finished", end)

    def _compile(self, state: state_lib.TrainState) -> None:
        if seconds := self.run.compile(state):
            self.progress.print(f"compiled in {seconds:.1f} s")
        processes.exchange("compiled")
        processes.connect_devices(self.run.mesh)

    def _peak_tokens_per_second(self, state: state_lib.TrainState) -> float | None:
        """What all FLOPs of the devices would train, at the stored ranks of a state."""
        peak = hardware.peak_flops(self.run.mesh.devices.flat)
        if peak is None:
            return None
        config = self.run.config
        model = accounting.at_ranks(config.model, rank.stored_ranks(state.params))
        return peak / accounting.flops_per_token(model, seq_len=config.data.seq_len)

    def _flush(self, log: metrics.StepLog) -> bool:
        """Writes the row that is due; False where it shows that the run diverged."""
        skipped_before = log.skipped
        row = log.flush()
        if row is None:
            return True
        self.progress.show(row)
        if log.skipped > skipped_before:
            self.progress.print(console.describe_skipped(row, skipped_before))
        return self._is_sound(int(row["step"]), {**row, "loss": row["train/loss"]})

    def _is_sound(
        self, step: int, values: Mapping[str, Any], *, largest_parameter: Any = 0.0
    ) -> bool:
        """Whether the run may go on; prints why not."""
        own = self.phase.config
        problem = console.describe_problem(
            own.optimizer, step, values, largest_parameter=float(largest_parameter)
        )
        if problem:
            kept = self.checkpoints.latest_step()
            rate = "optimizer.peak_learning_rate"
            if self.config.model.spectral and not own.model.spectral:
                rate = "phases.dense_learning_rate"
            self.progress.print(
                console.describe_divergence(own, problem, kept, rate=rate)
            )
        return not problem

    def _change_ranks(
        self, step: int, state: state_lib.TrainState
    ) -> state_lib.TrainState:
        before = rank.stored_ranks(state.params)
        with self._compiling():
            state, change = self.run.change_ranks(state, step)
            if change is not None:
                self.sinks.write(metrics.rank_row(step, change))
                self.progress.print(console.describe_ranks(step, before, change))
                self._compile(state)
        return state

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        """What may take any time: compilers differ too much for the watchdog."""
        self.watch.pause()
        yield
        self.watch.kick()
