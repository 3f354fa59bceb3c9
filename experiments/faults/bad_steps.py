"""Gradients that are not finite, and losses far above their trend."""

import functools
import math
import unittest.mock
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.faults import cases, runs, workspace
from sct_jax import data, model, spectral
from sct_jax.training import exit_codes, overrides, records, trainer
from sct_jax.training import state as state_lib

# Of the model, from the number of the step on the device.
LinearAt = Callable[[jax.Array], model.Linear]

_SPIKE_AT, _SPIKE = 73, 600.0
_SPIKING: workspace.Changes = {"num_steps": 90, "log_every": 10, "checkpoint.every": 30}


# --- Models with a fault in some steps.


@jax.custom_vjp
def _spoil_gradient(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns x; its gradient is multiplied by the factor."""
    return x


def _spoil_gradient_fwd(x: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, factor


def _spoil_gradient_bwd(
    factor: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return gradient * factor, jnp.zeros_like(factor)


_spoil_gradient.defvjp(_spoil_gradient_fwd, _spoil_gradient_bwd)


class Bad(NamedTuple):
    """Steps and the factor that spoils each; and one for all steps from one on."""

    steps: Mapping[int, float]
    rest: tuple[int, float] = (1 << 30, 1.0)

    def factor(self, done: jax.Array) -> jax.Array:
        """Returns the factor of the step after `done` steps; 1 if it is not bad."""
        start, value = self.rest
        factor = jnp.where(done + 1 >= start, value, 1.0)
        for step, value in self.steps.items():
            factor = jnp.where(done + 1 == step, value, factor)
        return factor.astype(jnp.float32)


def bad_gradients(bad: Bad) -> LinearAt:
    """Returns a model in which every gradient below a product is spoiled."""

    def linear_at(done: jax.Array) -> model.Linear:
        factor = bad.factor(done)
        return lambda x, w: _spoil_gradient(spectral.linear(x, w), factor)

    return linear_at


def one_bad_gradient(bad: Bad, *, fan_in: int) -> LinearAt:
    """Returns a model in which one entry of one weight's gradient is spoiled."""

    def linear_at(done: jax.Array) -> model.Linear:
        factor = bad.factor(done)

        def linear(x: jax.Array, w: spectral.Weight) -> jax.Array:
            if spectral.is_spectral(w) and w.u.shape[-2] == fan_in:
                factors = jnp.ones_like(w.s).at[..., 0].set(factor)
                w = w._replace(s=_spoil_gradient(w.s, factors))
            return spectral.linear(x, w)

        return linear

    return linear_at


def large_logits(bad: Bad, *, vocab_size: int) -> LinearAt:
    """Returns a model whose logits are multiplied by the factor."""

    def linear_at(done: jax.Array) -> model.Linear:
        factor = bad.factor(done)

        def linear(x: jax.Array, w: spectral.Weight) -> jax.Array:
            y = spectral.linear(x, w)
            return y * factor if y.shape[-1] == vocab_size else y

        return linear

    return linear_at


# --- Steps of a trainer, and whole runs.


def _host(state: state_lib.TrainState) -> Any:
    return jax.tree.map(lambda x: np.array(x), state)


class _Step(NamedTuple):
    """The state before and after a step, and the metrics of the step."""

    before: Any
    after: Any
    values: dict[str, Any]


def _watch(
    context: cases.Context,
    linear_at: LinearAt,
    steps: Collection[int],
    changes: workspace.Changes,
) -> list[_Step]:
    """What the given steps of a trainer do."""
    pairs = {"data.source": context.space.source, **changes}
    config = overrides.load(
        str(workspace.CONFIG), [(k, str(v)) for k, v in pairs.items()]
    )
    corpus = data.prepare(
        config.data, vocab_size=config.model.vocab_size, log=lambda line: None
    )
    run = trainer.Trainer(config, config.mesh.build(), linear_at=linear_at)
    state = run.init(jax.random.key(config.seed))
    batches = data.train_batches(corpus, config.data, seed=config.seed)
    found = []
    for step in range(1, max(steps) + 1):
        before = _host(state) if step in steps else None
        state, values = run.step(state, next(batches), diagnose=False)
        if step in steps:
            found.append(_Step(before, _host(state), jax.device_get(values)))
    return found


def _same(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.tobytes() == y.tobytes() for x, y in pairs)


def _train(
    context: cases.Context, name: str, linear_at: LinearAt, changes: workspace.Changes
) -> runs.Ended:
    """A whole run, of a trainer with the fault."""
    faulty = functools.partial(trainer.Trainer, linear_at=linear_at)
    with unittest.mock.patch.object(trainer, "Trainer", faulty):
        return runs.call(*context.space.flags(context.folder / name, changes))


def _logged(context: cases.Context, name: str) -> dict[int, dict[str, Any]]:
    rows = workspace.rows(context.folder / name)
    return {row["step"]: row for row in rows if "train/loss" in row}


def _not_finite(context: cases.Context) -> cases.Outcome:
    seen = cases.Seen()
    nan, inf = context.rng.sample(range(11, 20), 2)
    rest = context.rng.randrange(22, 28)
    bad = Bad({nan: math.nan, inf: math.inf}, rest=(rest, math.nan))
    changes = {
        "model.num_layers": 1,
        "model.spectral": "down",
        "optimizer.max_update_norm": "none",
        "optimizer.skip_nonfinite": 3,
    }
    steps = sorted((nan, inf))
    for number, step in enumerate(
        _watch(context, bad_gradients(bad), steps, changes), start=1
    ):
        norm = step.values["grad_norm"]
        cases.injected(not np.isfinite(norm), f"the norm is {norm}")
        _unchanged(seen, step)
        seen.equal("steps", int(step.after.step), steps[number - 1])
        seen.equal("skipped", int(step.after.guard.skipped), number)
    ended = _train(context, "run", bad_gradients(bad), changes)
    seen.equal("exit code", ended.code, exit_codes.ExitCode.DIVERGED)
    said = f"diverged: 3 steps in a row, up to step {rest + 2}"
    seen.that(said in ended.out, "the run ends after 3 in a row", ended.text[-300:])
    folder = context.folder / "run"
    seen.equal("checkpoints", workspace.saved_steps(folder), [10, 20])
    workspace.state_at(folder, 20)
    record = records.read(folder / "checkpoints" / "20", 20)
    seen.that(record["finite"], "the last finite checkpoint is kept")
    return seen.outcome(
        f"the gradient NaN at step {nan}, infinite at {inf}, NaN from {rest} on"
    )


def _unchanged(seen: cases.Seen, step: _Step) -> None:
    seen.that(_same(step.before.params, step.after.params), "parameters unchanged")
    same = _same(step.before.opt_state, step.after.opt_state)
    seen.that(same, "moments unchanged")


def _one_weight(context: cases.Context) -> cases.Outcome:
    seen, step = cases.Seen(), context.rng.randrange(12, 19)
    changes: workspace.Changes = {"model.num_layers": 1}
    linear_at = one_bad_gradient(Bad({step: math.nan}), fan_in=48)
    (watched,) = _watch(context, linear_at, [step], changes)
    norm = watched.values["grad_norm"]
    cases.injected(np.isnan(norm), f"the norm is {norm}")
    _unchanged(seen, watched)
    ended = _train(context, "run", linear_at, changes)
    seen.finished(ended)
    counts = {k: row["skipped_steps"] for k, row in _logged(context, "run").items()}
    wanted = {k: int(k >= step) for k in range(1, workspace.NUM_STEPS + 1)}
    seen.that(counts == wanted, "counted in the rows", counts)
    seen.that("1 of the steps" in ended.out, "said when it happens", ended.out[-300:])
    folder = context.folder / "run"
    states = [workspace.state_at(folder, at).leaves for at in (20, 30, 40)]
    names = [
        name for name in states[0] if name.startswith("params") and "down.s" in name
    ]
    cases.injected(names, "the weight has another name")
    moved = all(len({str(s[name]) for s in states}) == 3 for name in names)
    seen.that(moved, "its s moves on afterwards")
    finite = records.read(folder / "checkpoints" / "40", 40)["finite"]
    seen.that(finite, "parameters and moments are finite at the end")
    return seen.outcome(
        f"one NaN in the gradient of s of one weight at step {step}; max_update_norm "
        ".5, no grad_clip"
    )


def _spikes(context: cases.Context) -> cases.Outcome:
    seen = cases.Seen()
    linear_at = large_logits(Bad({_SPIKE_AT: _SPIKE}), vocab_size=300)
    for policy in ("skip", "log"):
        changes = {**_SPIKING, "optimizer.spikes": policy}
        (step,) = _watch(context, linear_at, [_SPIKE_AT], changes)
        before, after, values = step
        trend = float(before.guard.loss.mean)
        times = float(values["loss"]) / trend
        cases.injected(times >= 100, f"{times:.0f} times the trend")
        skipped = policy == "skip"
        same = _same(before.params, after.params)
        seen.that(same == skipped, f"{policy}: parameters {'un' * skipped}changed")
        same = _same(before.opt_state, after.opt_state)
        seen.that(same == skipped, f"{policy}: moments {'un' * skipped}changed")
        seen.equal(f"{policy}: spikes", int(after.guard.spikes), 1)
        seen.equal(f"{policy}: skipped", int(after.guard.skipped), int(skipped))
        ended = _train(context, policy, linear_at, changes)
        seen.finished(ended)
        last = _logged(context, policy)[90]
        seen.equal(f"{policy}: spikes in the last row", last["spikes"], 1)
        seen.equal(f"{policy}: skipped there", last["skipped_steps"], int(skipped))
    return seen.outcome(f"a loss of over 100 times the trend at step {_SPIKE_AT} of 90")


def _spike_between_rows(context: cases.Context) -> cases.Outcome:
    seen = cases.Seen()
    linear_at = large_logits(Bad({_SPIKE_AT: _SPIKE}), vocab_size=300)
    seen.finished(_train(context, "run", linear_at, _SPIKING))
    rows = _logged(context, "run")
    cases.injected(_SPIKE_AT not in rows, "the step has a row of its own")
    quiet, loud = rows[70], rows[80]
    seen.equal("spikes before and after", (quiet["spikes"], loud["spikes"]), (0, 1))
    times = loud["train/loss_max"] / quiet["train/loss_max"]
    seen.that(times >= 100, "the largest loss since the last row is logged", times)
    norm = loud["grad_norm_max"] / quiet["grad_norm_max"]
    seen.that(norm > 2, "and the largest gradient norm", norm)
    return seen.outcome(f"a spike at step {_SPIKE_AT}; rows of steps 70 and 80")


CASES = (
    cases.Case(
        10,
        "a gradient that is NaN or infinite",
        "that step changes nothing and is counted; after K in a row the run ends with "
        "code 3, the last finite checkpoint kept",
        _not_finite,
        group="numerics",
        quick=True,
    ),
    cases.Case(
        11,
        "a loss of 100 times its trend",
        "counted; skipped or applied, as configured",
        _spikes,
        group="numerics",
    ),
    cases.Case(
        23,
        "one NaN in the gradient of one weight",
        "that step changes nothing and is counted; the weight moves on",
        _one_weight,
        group="numerics",
    ),
    cases.Case(
        37,
        "a loss of 100 times its trend between two logged rows",
        "the next row shows the largest loss and counts the spike",
        _spike_between_rows,
        group="numerics",
    ),
)
