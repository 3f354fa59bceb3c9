"""Trains a trial through `sct_jax.training.trainer`, as `loop.train` does a run."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import timing
from experiments.studies import forward_variants, measure, rows
from experiments.studies import trial as trial_lib
from sct_jax import data, model, rank, sharding
from sct_jax.training import accounting, config, switching, trainer
from sct_jax.training import state as state_lib


def run(trial: trial_lib.Trial, corpus: data.Corpus) -> rows.Row:
    """Returns the row of a trial, without its environment.

    A loss that is not finite ends the trial. It then counts for this branch and for
    every longer one.
    """
    began = time.monotonic()
    lengths = sorted({branch.steps for branch in trial.branches})
    variant = forward_variants.FORWARD_VARIANTS[trial.forward]
    record = measure.Record(lengths[-1], is_linear=variant.is_linear)
    branches = _in_phases if trial.experiment.phases.switch_at else _from_a_trunk
    held_out, params, phase_bytes = branches(trial, corpus, lengths, record)
    return rows.Row(
        trial=trial,
        results={
            branch.budget: _result(trial, branch.steps, held_out[branch.steps])
            for branch in trial.branches
        },
        corpus=corpus.hash,
        parameters=accounting.count(_served(params)),
        train_bytes=max(phase_bytes),
        phase_bytes=phase_bytes if len(phase_bytes) > 1 else [],
        wall_seconds=round(time.monotonic() - began, 1),
        **record.fields(),
    )


Figures = dict[int, Mapping[str, float]]  # held out, by length


def _from_a_trunk(
    trial: trial_lib.Trial,
    corpus: data.Corpus,
    lengths: Sequence[int],
    record: measure.Record,
) -> tuple[Figures, model.Params, list[int]]:
    """Held-out figures, parameters, and bytes of training, of branches of one run."""
    plain = trainer_of(trial)
    state = plain.init(jax.random.key(trial.experiment.seed))
    text = plain.held_out(corpus)
    train_bytes = _train_bytes(state)
    record.measure(0, state.params)
    held_out, done = {}, 0
    for length in lengths:
        fork = length - trial.experiment.optimizer.decay_steps(length)
        trunk = Segment(trial, corpus, start=done, stop=fork, length=lengths[-1])
        state, done = trunk.train(state, record), fork
        decay = Segment(trial, corpus, start=fork, stop=length, length=length)
        if length == lengths[-1]:
            params = (state := decay.train(state, record)).params
        else:
            params = decay.train(jax.tree.map(jnp.copy, state)).params
        held_out[length] = plain.evaluate(params, text)
        if not math.isfinite(held_out[length]["eval/loss"]):
            longer = [other for other in lengths if other > length]
            held_out |= dict.fromkeys(longer, held_out[length])
            break
    return held_out, state.params, [train_bytes]


def _train_bytes(state: state_lib.TrainState) -> int:
    """Bytes of parameters, gradients and optimizer state."""
    return 2 * accounting.num_bytes(state.params) + accounting.num_bytes(
        state.opt_state
    )


def _in_phases(
    trial: trial_lib.Trial,
    corpus: data.Corpus,
    lengths: Sequence[int],
    record: measure.Record,
) -> tuple[Figures, model.Params, list[int]]:
    """The same for a run in phases, which trains every branch from the start."""
    held_out, params, phase_bytes = {}, {}, []
    for length in lengths:
        params, phase_bytes, figures = _branch_in_phases(trial, corpus, length, record)
        held_out[length] = figures
        if not math.isfinite(figures["eval/loss"]):
            longer = [other for other in lengths if other > length]
            held_out |= dict.fromkeys(longer, figures)
            break
    return held_out, params, phase_bytes


def _branch_in_phases(
    trial: trial_lib.Trial, corpus: data.Corpus, length: int, record: measure.Record
) -> tuple[model.Params, list[int], Mapping[str, float]]:
    """Parameters, bytes of every phase, and held-out figures.

    Ends with the phase that diverges. The record gets all truncations, and the curves
    of the longest branch, but for the norms and singular values of the first phase.
    """
    phases = trial.phases(length)
    parts = [_of_phase(trial, phase) for phase in phases]
    state, losses = _first_phase(parts[0], corpus)
    longest = length == trial.experiment.num_steps
    if longest:
        record.losses += losses
    run, phase_bytes = trainer_of(parts[0]), [_train_bytes(state)]
    text = run.held_out(corpus)
    figures = run.evaluate(state.params, text)
    for phase, part in zip(phases[1:], parts[1:], strict=True):
        if not math.isfinite(figures["eval/loss"]):
            break
        before, run = run, trainer_of(part)
        calibration = switching.calibration_text(
            run, corpus, step=phase.first, seed=phase.config.seed
        )
        state = switching.switch(
            state,
            before,
            run,
            text=calibration,
            carry_momentum=trial.experiment.phases.carry_momentum,
        )
        cut = run.evaluate(state.params, text)["eval/loss"]
        record.switches.append(
            rows.Switch(length, phase.first, figures["eval/loss"], cut)
        )
        phase_bytes.append(_train_bytes(state))
        segment = Segment.of_phase(part, corpus, first=phase.first)
        state = segment.train(state, record if longest else None)
        figures = run.evaluate(state.params, text)
    return state.params, phase_bytes, figures


def _of_phase(trial: trial_lib.Trial, phase: config.Phase) -> trial_lib.Trial:
    """The trial of a phase. A dense one has rates of its own, which are not tuned."""
    steps = phase.last - phase.first
    branch = trial_lib.Branch(trial_lib.Budget("tokens", 1.0), steps)
    part = dataclasses.replace(trial, experiment=phase.config, branches=(branch,))
    return dataclasses.replace(part, non_matrix_lr=None) if part.is_dense else part


class _FirstPhase(NamedTuple):
    """A first phase that trials share: its state on the host, and its losses."""

    state: state_lib.TrainState
    losses: Sequence[float]


_first_phases: dict[tuple[trial_lib.Trial, str], _FirstPhase] = {}
_KEPT_PHASES = 4


def _first_phase(
    part: trial_lib.Trial, corpus: data.Corpus
) -> tuple[state_lib.TrainState, Sequence[float]]:
    """The state after a first phase, and the losses of its steps.

    Trials that differ in later phases alone share it.
    """
    own = dataclasses.replace(part.experiment, truncation=config.TruncationConfig())
    shared = dataclasses.replace(part, experiment=own, method="").identity
    run, key = trainer_of(part), (shared, corpus.hash)
    if key not in _first_phases:
        state = run.init(jax.random.key(part.experiment.seed))
        record = measure.Record(part.experiment.num_steps, is_linear=False)
        state = Segment.of_phase(part, corpus).train(state, record)
        for oldest in list(_first_phases)[: 1 - _KEPT_PHASES]:
            del _first_phases[oldest]
        _first_phases[key] = _FirstPhase(jax.device_get(state), record.losses)
    found = _first_phases[key]
    placed = jax.tree.map(lambda x: x.sharding, run.abstract_state)
    return jax.device_put(found.state, placed), found.losses


class Segment(NamedTuple):
    """Consecutive steps of a trial.

    Attributes:
      trial: what is trained.
      corpus: the text.
      start: number of updates before the segment.
      stop: number of updates after it.
      length: steps of the run whose schedule the segment follows.
      first: steps of earlier phases, which the updates above do not count.
    """

    trial: trial_lib.Trial
    corpus: data.Corpus
    start: int
    stop: int
    length: int
    first: int = 0

    @classmethod
    def of_phase(
        cls, part: trial_lib.Trial, corpus: data.Corpus, *, first: int = 0
    ) -> "Segment":
        """Returns all steps of a phase.

        Args:
          part: the trial of the phase alone.
          corpus: the text.
          first: steps before it.
        """
        steps = part.experiment.num_steps
        return cls(part, corpus, start=0, stop=steps, length=steps, first=first)

    def train(
        self, state: state_lib.TrainState, record: measure.Record | None = None
    ) -> state_lib.TrainState:
        """Returns the state after the segment, or after a divergence; consumes `state`.

        Args:
          state: after `start` updates.
          record: receives losses, norms, ranks and singular values.
        """
        if self.start == self.stop:
            return state
        experiment = self.trial.experiment
        plain, guided = trainer_of(self.trial), trainer_of(self.trial, guided=True)
        batches = data.train_batches(
            self.corpus,
            experiment.data,
            seed=experiment.seed,
            start_step=self.first + self.start,
        )
        schedule = experiment.optimizer.learning_rate(self.length)
        rates = np.asarray(jax.vmap(schedule)(jnp.arange(self.stop)))
        losses: list[jax.Array] = []
        norms: list[tuple[int, jax.Array]] = []
        for step in range(self.start + 1, self.stop + 1):
            state = at_rate(state, self.trial, float(rates[step - 1]))
            diagnose = step % measure.DIAGNOSE_EVERY == 0
            used = guided if step <= self.trial.fade_steps else plain
            state, metrics = used.step(state, next(batches), diagnose=diagnose)
            losses.append(metrics["loss"])
            if diagnose:
                norms.append((self.first + step, metrics["composite_update_norm"]))
                if not math.isfinite(float(metrics["loss"])):
                    break
            if experiment.adaptive_rank.decides_at(step) and step != self.length:
                state, _ = used.change_ranks(state, step)
                if record:
                    record.ranks.append((step, rank.stored_ranks(state.params)))
            if record:
                record.measure(self.first + step, state.params)
        if record:
            record.losses += [float(loss) for loss in losses]
            # A forward pass that is not linear in W has no norm of its change.
            record.update_norms += [
                rows.Sample(step, float(norm))
                for step, norm in norms
                if record.is_linear and step > self.trial.fade_steps
            ]
        return state


def trainer_of(trial: trial_lib.Trial, *, guided: bool = False) -> trainer.Trainer:
    """Returns the trainer of a trial; trials that differ in rates or seed share it.

    Args:
      trial: what to train.
      guided: mix in the dense path of a guide, while there is one.
    """
    return _trainer(_without_rates(trial), guided and trial.fade_steps > 0)


@functools.lru_cache(maxsize=32)
def _trainer(trial: trial_lib.Trial, guided: bool) -> trainer.Trainer:
    variant = forward_variants.FORWARD_VARIANTS[trial.forward]
    linear_at = None
    if guided and variant.guided_linear is not None:
        mix, fade_steps = variant.guided_linear, trial.fade_steps
        linear_at = lambda step: mix(forward_variants.guide_share(step, fade_steps))
    return trainer.Trainer(
        trial.experiment,
        sharding.MeshConfig().build(1),
        tx=_injected(trial),
        linear=variant.linear,
        linear_at=linear_at,
        init_params=lambda key: variant.prepare(
            model.init(key, trial.experiment.model)
        ),
        diagnose=measure.diagnose,
    )


def _without_rates(trial: trial_lib.Trial) -> trial_lib.Trial:
    """The trial with everything fixed that its compiled programs do not depend on."""
    experiment = trial.experiment
    # A rate that diverges shall be seen to diverge: no step is skipped.
    optimizer = dataclasses.replace(
        experiment.optimizer,
        peak_learning_rate=1.0,
        warmup_steps=0,
        skip_nonfinite=None,
        spikes="log",
    )
    adapts = experiment.adaptive_rank.energy is not None
    experiment = dataclasses.replace(
        experiment,
        optimizer=optimizer,
        num_steps=1,
        seed=experiment.seed if adapts else 0,  # it seeds the columns that are added
    )
    length = max(2 * trial.fade_steps, 1)
    return dataclasses.replace(
        trial.identity,
        method="",
        experiment=experiment,
        branches=(trial_lib.Branch(trial_lib.Budget("tokens", 1.0), length),),
        non_matrix_lr=None,
    )


def _injected(trial: trial_lib.Trial) -> optax.GradientTransformation:
    """The chain with its learning rates in the state: a new rate compiles nothing."""
    optimizer: Any = trial.experiment.optimizer
    masks = {
        "decay_mask": model.decay_mask,
        "matrix_mask": model.hidden_matrices,
    }

    def chain(learning_rate, dense_lr_multiplier):
        return optimizer.chain(
            learning_rate, dense_lr_multiplier=dense_lr_multiplier, **masks
        )

    return optax.inject_hyperparams(chain)(
        learning_rate=1.0, dense_lr_multiplier=optimizer.dense_lr_multiplier
    )


def at_rate(
    state: state_lib.TrainState, trial: trial_lib.Trial, learning_rate: float
) -> state_lib.TrainState:
    """Returns the state whose next update has this learning rate."""
    new = {"learning_rate": learning_rate}
    if trial.non_matrix_lr is not None:  # it follows the schedule of the matrices
        new["dense_lr_multiplier"] = trial.non_matrix_lr / trial.learning_rate
    old = state.opt_state.hyperparams
    hyperparams = old | {k: jnp.asarray(v, old[k].dtype) for k, v in new.items()}
    return state.replace(opt_state=state.opt_state._replace(hyperparams=hyperparams))


def seconds_per_step(
    trials: Mapping[str, trial_lib.Trial], corpus: data.Corpus, *, rounds: int = 5
) -> dict[str, tuple[float, float]]:
    """Returns median seconds of a step of every trial, and of one with a dense path.

    Both are the same without a guide. Steps run at the peak learning rate: a clip or an
    iteration may take longer there.
    """
    states = {}
    for name, trial in trials.items():
        state = trainer_of(trial).init(jax.random.key(0))
        states[name] = at_rate(state, trial, trial.learning_rate)

    def step_of(name: str, *, guided: bool) -> Callable[[], state_lib.TrainState]:
        used = trainer_of(trials[name], guided=guided)
        source = data.train_batches(corpus, trials[name].experiment.data, seed=0)
        batch = next(source)

        def step():
            states[name], _ = used.step(states[name], batch, diagnose=False)
            return states[name]

        return step

    timed = [
        (name, guided)
        for name, trial in trials.items()
        for guided in ((False, True) if trial.fade_steps else (False,))
    ]
    steps = {str(i): step_of(n, guided=guided) for i, (n, guided) in enumerate(timed)}
    taken = timing.medians(timing.interleaved(steps, rounds=rounds))
    medians = dict(zip(timed, taken.values(), strict=True))
    return {
        name: (medians[name, False], medians.get((name, True), medians[name, False]))
        for name in trials
    }


def _served(params: model.Params) -> model.Params:
    """The parameters that remain after training: without the dense path of a guide."""
    return jax.tree.map(
        lambda w: w.factors if isinstance(w, forward_variants.Guided) else w,
        params,
        is_leaf=lambda w: isinstance(w, forward_variants.Guided),
    )


def _result(
    trial: trial_lib.Trial, steps: int, figures: Mapping[str, float]
) -> rows.Result:
    finite = lambda value: value if math.isfinite(value) else math.inf
    return rows.Result(
        steps=steps,
        tokens=steps * trial.experiment.data.tokens_per_step,
        flops=trial.flops(steps),
        layer_flops=trial.flops(steps, layers_only=True),
        loss=finite(figures["eval/loss"]),
        bits_per_byte=finite(figures["eval/bits_per_byte"]),
    )
