"""The host loop: what happens between two steps, and when."""

import contextlib
import functools
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import rich.console

from sct_jax import data, errors, rank
from sct_jax.training import (
    accounting,
    checkpoint,
    console,
    evaluation,
    metrics,
    sampling,
    signals,
    trainer,
    workdir,
)
from sct_jax.training import config as config_lib
from sct_jax.training import state as state_lib


class Result(NamedTuple):
    """How a call of `train` ended.

    Attributes:
      status: how; "finished" may refer to an earlier call.
      step: number of applied updates.
      signal: number of the signal that interrupted the run.
    """

    status: Literal["finished", "diverged", "interrupted", "dry_run"]
    step: int = 0
    signal: int | None = None


def train(
    config: config_lib.ExperimentConfig,
    path: str | os.PathLike[str],
    *,
    dry_run: bool = False,
    output: rich.console.Console | None = None,
) -> Result:
    """Trains to the end, or until a signal arrives or the loss diverges.

    Resumes from the newest whole checkpoint of the workdir. SIGINT and SIGTERM save the
    state and return; a second signal ends the process at once. A loss that is not
    finite ends the run and is never saved.

    Args:
      config: the run.
      path: the workdir. Receives checkpoints, metrics.jsonl, config.json, summary.json
        and tokenizer.json.
      dry_run: only print the start table and write summary.json. Allocates nothing and
        needs no corpus.
      output: where to print; standard output if None.

    Raises:
      UserError: naming what the user has to change, before the step is compiled.
    """
    output = output or rich.console.Console()
    say = functools.partial(console.say, output)
    path = pathlib.Path(path)
    config.validate()
    errors.check(
        "mesh",
        jax.process_count() == 1,
        f"{jax.process_count()} processes are running, but one process drives all "
        "devices of a host; start one",
    )
    run = trainer.Trainer(workdir.resolve(config, path), config.mesh.build())
    config = run.config
    workdir.make(path)
    summary = accounting.summary(config.model, run.tx, seq_len=config.data.seq_len)
    console.print_start(output, config, summary, run.mesh)
    if dry_run:
        earlier = workdir.committed_config(path)
        if earlier and config_lib.differences(earlier, config):
            say(f"note: {path} holds another run, so its summary.json is kept")
        else:
            workdir.write_json(path / "summary.json", summary)
        return Result("dry_run")
    with signals.Signals() as interrupts, workdir.claim(path):
        try:
            if earlier := workdir.committed_config(path):
                workdir.check_same_run(earlier, config, str(path))
            workdir.write_json(path / "summary.json", summary)
            if workdir.is_finished(path, run):
                say(f"finished: {config.num_steps} steps are done, see {path}")
                return Result("finished", config.num_steps)
            return _train(run, path, output, interrupts)
        except signals.Interrupted as interrupted:
            say("interrupted before a new step; nothing to save")
            return Result("interrupted", workdir.steps_done(path), interrupted.number)


def _train(
    run: trainer.Trainer,
    path: pathlib.Path,
    output: rich.console.Console,
    interrupts: signals.Signals,
) -> Result:
    """Prepares data and state, trains, and prints a sample at the end."""
    config = run.config
    say = functools.partial(console.say, output)
    corpus = data.prepare(config.data, vocab_size=config.model.vocab_size, log=say)
    say(console.describe_passes(config, len(corpus.train)))
    text = run.held_out(corpus)
    identity = {"corpus": corpus.hash, "tokenizer": corpus.tokenizer.hash}
    with contextlib.ExitStack() as stack:
        closing = lambda x: stack.enter_context(contextlib.closing(x))
        checkpoints = closing(
            checkpoint.Checkpointer(path / "checkpoints", keep=config.checkpoint.keep)
        )
        state, start = workdir.restore_or_init(run, checkpoints, identity, log=say)
        # Only a run that starts or resumes claims the folder for its configuration.
        if not start or not (path / "config.json").exists():
            workdir.write_json(path / "config.json", config_lib.to_dict(config))
        corpus.tokenizer.save(str(path / "tokenizer.json"))
        batches = data.train_batches(
            corpus, config.data, seed=config.seed, start_step=start
        )
        sinks = closing(metrics.open_sinks(path, resume_step=start))
        progress = closing(
            console.Progress(output, start_step=start, num_steps=config.num_steps)
        )
        loop = _Loop(run, checkpoints, sinks, progress, text, identity)
        state, result = loop.steps(state, start, batches, interrupts)
    if result.status == "finished":
        sample = sampling.sample_document(
            state.params, config.model, corpus.tokenizer, seed=config.seed
        )
        say(f"sample:\n{sample}")
        say(f"finished: {config.num_steps} steps; results are in {path}")
    return result


class _Loop(NamedTuple):
    """The steps of one process, and what each one writes."""

    run: trainer.Trainer
    checkpoints: checkpoint.Checkpointer
    sinks: metrics.Sinks
    progress: console.Progress
    text: evaluation.HeldOut
    identity: dict[str, str]

    def steps(
        self,
        state: state_lib.TrainState,
        start_step: int,
        batches: Iterator[trainer.HostBatch],
        interrupts: signals.Signals,
    ) -> tuple[state_lib.TrainState, Result]:
        """The state after the last step taken, and why it was the last."""
        config = self.run.config
        log = metrics.StepLog(
            self.sinks,
            learning_rate=config.optimizer.learning_rate(config.num_steps),
            tokens_per_step=config.data.tokens_per_step,
            start_step=start_step,
        )
        self._compile(state)
        interrupts.defer()
        self.progress.begin()
        log.start()
        for step in range(start_step + 1, config.num_steps + 1):
            last = step == config.num_steps
            logged = last or step == 1 or step % config.log_every == 0
            state, values = self.run.step(state, next(batches), diagnose=logged)
            finite = self._flush(log)
            self.progress.advance(step)
            if logged:
                log.hold(step, values)
            stop = interrupts.received
            saved = last or stop or step % config.checkpoint.every == 0
            evaluated = last or step % config.eval.every == 0
            decided = config.adaptive_rank.decides_at(step) and not last
            # The work below takes time of its own, and a layerwise step is over when it
            # returns: in both cases the row of this step is due now.
            if saved or evaluated or decided or config.step == "layerwise":
                finite = finite and self._flush(log)
            if saved and finite:
                # The loss belongs to the parameters before the step.
                largest = trainer.largest_magnitude(state.params)
                checked = {"loss": values["loss"], "largest parameter": largest}
                finite = self._check_finite(step, checked)
            if not finite:
                return state, Result("diverged", step)
            if decided:
                with log.paused():
                    state = self._change_ranks(step, state)
            if evaluated:
                with log.paused():
                    row = self.run.evaluate(state.params, self.text)
                    self.sinks.write({"step": step, **row})
                    self.progress.print(console.describe_evaluation(step, row))
            if saved:
                with log.paused():
                    self.sinks.flush()
                    record = workdir.record(config, step, state, self.identity)
                    self.checkpoints.save(step, state, record=record)
            if stop and not last:
                self.checkpoints.wait()
                self.progress.print(
                    f"interrupted: saved at step {step}; the same command resumes"
                )
                return state, Result("interrupted", step, stop)
        self.checkpoints.wait()
        return state, Result("finished", config.num_steps)

    def _compile(self, state: state_lib.TrainState) -> None:
        if seconds := self.run.compile(state):
            self.progress.print(f"compiled in {seconds:.1f} s")

    def _flush(self, log: metrics.StepLog) -> bool:
        """Writes the row that is due; False where its loss is not finite."""
        row = log.flush()
        if row is None:
            return True
        self.progress.show(row)
        return self._check_finite(int(row["step"]), {"loss": row["train/loss"]})

    def _check_finite(self, step: int, values: dict[str, Any]) -> bool:
        for name, value in values.items():
            if not math.isfinite(float(value)):
                kept, config = self.checkpoints.latest_step(), self.run.config
                text = console.describe_divergence(config, step, name, value, kept)
                self.progress.print(text)
                return False
        return True

    def _change_ranks(
        self, step: int, state: state_lib.TrainState
    ) -> state_lib.TrainState:
        before = rank.stored_ranks(state.params)
        state, change = self.run.change_ranks(state, step)
        if change is None:
            return state
        self.sinks.write(metrics.rank_row(step, change))
        self.progress.print(console.describe_ranks(step, before, change))
        self._compile(state)
        return state
