"""One training of a comparison: a trunk at the full rate, and a branch per horizon.

With a warm-up-stable-decay schedule the runs of several lengths share their stable
phase. So a trial trains that trunk once, and from it a branch, with a decay of its own,
for every length that is asked for: equal tokens, equal FLOPs, equal seconds.
"""

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.studies import forward_variants, summary
from sct_jax import data, errors, linalg, model, rank, sharding, spectral
from sct_jax.training import accounting, config, evaluation
from sct_jax.training import state as state_lib
from sct_jax.training import step as step_lib

DIAGNOSE_EVERY = 10  # steps between measured norms of the update of W
CURVE_POINTS = 64  # at most, of a curve in a row
KEPT_SPECTRA = ("down",)  # in a row; of the other matrices the effective rank is
SPIKE_WINDOW = 100  # trailing steps, at most, whose trend and deviation tell a spike
SPIKE_DEVIATIONS = 4.0
_LEAST_WINDOW = 50  # trailing steps without which nothing is judged
_SPECTRA = 5  # measurements of the effective ranks, spread over the trunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """What is trained.

    Attributes:
      arm: name of the method in tables.
      experiment: model, data, seed and optimizer, with the schedule "wsd";
        `num_steps` is the longest horizon.
      horizons: pairs of a name and the length of its run, in steps.
      method: one of `forward_variants.METHODS`.
      adam_rate: peak rate of what `optimizer.dense_lr_multiplier` is for, embedding and norms
        above all, where it is not that of the matrices; None: by that ratio.
    """

    arm: str
    experiment: config.ExperimentConfig
    horizons: tuple[tuple[str, int], ...]
    method: str = "plain"
    adam_rate: float | None = None

    @property
    def key(self) -> str:
        """Name of the trial: the same for the same identity, and for no other."""
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def identity(self) -> dict[str, Any]:
        """Every field, by its path, that what comes out of the trial depends on."""
        return {
            name: value
            for name, value in config.flatten(config.to_dict(self)).items()
            if name.removeprefix("experiment.") not in config.WITHOUT_EFFECT
        }

    @property
    def rate(self) -> float:
        """Peak learning rate."""
        return self.experiment.optimizer.peak_learning_rate

    @property
    def setting(self) -> summary.Setting:
        """Its two rates."""
        return summary.Setting(self.rate, self.adam_rate)

    @property
    def rate_of_others(self) -> float:
        """Peak rate of what `optimizer.dense_lr_multiplier` is for."""
        return self.setting.rate_of_others(
            self.experiment.optimizer.dense_lr_multiplier
        )

    @property
    def fade_steps(self) -> int:
        """Steps with a dense path, 0 for most methods: half of the first horizon."""
        if forward_variants.METHODS[self.method].guided_linear is None:
            return 0
        _, steps = self.horizons[0]
        return steps // 2

    def flops(self, steps: int, *, blocks_only: bool = False) -> float:
        """Returns the training FLOPs of so many steps, head included unless told."""
        shape, seq_len = self.experiment.model, self.experiment.data.seq_len
        per_token = (
            3 * shape.num_layers * accounting.block_flops(shape, seq_len=seq_len)
            if blocks_only
            else accounting.flops_per_token(shape, seq_len=seq_len)
        )
        guided = min(self.fade_steps, steps)
        return self.experiment.data.tokens_per_step * (
            steps * per_token + guided * self._guide_flops_per_token()
        )

    def _guide_flops_per_token(self) -> int:
        shape = self.experiment.model
        if not self.fade_steps:
            return 0
        dense = accounting.dense_config(shape)
        matrices = [n for n in model.BLOCK_MATRICES if n in shape.spectral]
        forward = sum(accounting.matrix_flops(dense, name) for name in matrices)
        return 3 * shape.num_layers * forward

    def validate(self) -> None:
        """Raises UserError, naming the field."""
        errors.check_choice(
            f"arms.{self.arm}.method", self.method, tuple(forward_variants.METHODS)
        )
        self.experiment.validate()
        needed = forward_variants.METHODS[self.method].factors
        errors.check(
            f"arms.{self.arm}.method",
            needed is None or needed == self.experiment.model.factors,
            f"{self.method!r} needs model.factors = {needed!r}",
        )
        errors.check(
            f"arms.{self.arm}: optimizer.schedule",
            self.experiment.optimizer.schedule == "wsd",
            'branches need the schedule "wsd"',
        )
        steps, place = self.experiment.step, self.experiment.mesh
        for field, value, only in (
            ("step", steps, "whole"),
            ("mesh", place, sharding.MeshConfig()),
        ):
            errors.check(
                f"arms.{self.arm}: {field}",
                value == only,
                f"a trial is one program on one device: leave it at {only!r}",
            )
        shortest = min(length for _, length in self.horizons)
        errors.check(
            f"arms.{self.arm}.method",
            self.fade_steps <= shortest,
            f"the dense path of {self.method!r} fades over half of the first length, "
            f"{self.fade_steps} steps; the shortest has {shortest}: name it first",
        )


class Point(NamedTuple):
    """The trunk, or the end of a branch, at one step."""

    step: int
    value: float


class _Program(NamedTuple):
    """The compiled functions that trials share which differ in rates and seed alone."""

    init: Callable[..., state_lib.TrainState]
    step: Callable[..., Any]  # as of `step_lib.make_train_step`
    guided_step: Callable[..., Any]  # the same while the dense path fades
    linear: model.Linear
    rank_budget: int  # parameters in all SpectralFactors at the start


class _Record:
    """What is kept of the trunk."""

    def __init__(self, trial: Trial):
        self._has_spectra = forward_variants.METHODS[trial.method].is_linear
        self.losses: list[float] = []
        self.update_norms: list[Point] = []
        self.effective_ranks: dict[str, list[Point]] = {}
        self.spectra: dict[str, list[float]] = {}
        self.ranks: list[tuple[int, dict[str, int]]] = []

    def measure(self, step: int, params: model.Params) -> None:
        """Adds the effective rank of every kind of matrix; keeps the latest spectra."""
        if not self._has_spectra or not optax.tree.norm(params) < math.inf:
            return  # of a diverged model there is nothing to decompose
        for name, spectrum in spectra(params).items():
            points = self.effective_ranks.setdefault(name, [])
            points.append(Point(step, effective_rank(spectrum)))
            if name in KEPT_SPECTRA:
                self.spectra[name] = [float(f"{x:.5g}") for x in spectrum]

    def as_json(self, length: int) -> dict[str, Any]:
        """Returns what a row holds of it, when `length` steps were planned."""
        # All rows of an arm have their points at the same steps, diverged ones too.
        thinned = math.ceil(length / (DIAGNOSE_EVERY * CURVE_POINTS))
        norms = self.update_norms
        groups = [norms[i : i + thinned] for i in range(0, len(norms), thinned)]
        return {
            "spikes": spikes(self.losses),
            "train_loss": _every(self.losses, thinned * DIAGNOSE_EVERY),
            "update_norms": [
                [group[-1].step, _finite(float(np.max([p.value for p in group])))]
                for group in groups
            ],
            "effective_ranks": {
                name: [[p.step, round(p.value, 2)] for p in points]
                for name, points in self.effective_ranks.items()
            },
            "spectra": self.spectra,
            "ranks": self.ranks,
        }


def run(trial: Trial, corpus: data.Corpus) -> dict[str, Any]:
    """Returns the row of a trial, ready for JSON: what it is, and what came out.

    A loss that is not finite ends the trial: it is then `null`, in that and in every
    longer horizon.
    """
    began = time.monotonic()
    program = _program(_without_rates(trial))
    mesh = sharding.MeshConfig().build(1)
    evaluate = evaluation.make_evaluation(
        trial.experiment, corpus, mesh, linear=program.linear
    )
    state = program.init(jax.random.key(trial.experiment.seed))
    size = 2 * accounting.num_bytes(state.params) + accounting.num_bytes(
        state.opt_state
    )
    record, ends, done = _Record(trial), {}, 0
    record.measure(0, state.params)
    lengths = sorted({steps for _, steps in trial.horizons})
    for length in lengths:
        fork = length - trial.experiment.optimizer.decay_steps(length)
        state = _advance(trial, program, corpus, state, done, fork, lengths[-1], record)
        done = fork
        last = length == lengths[-1]
        branch = state if last else jax.tree.map(jnp.copy, state)
        kept = record if last else None
        branch = _advance(trial, program, corpus, branch, fork, length, length, kept)
        if last:
            state = branch
        ends[length] = evaluate(branch.params)
        if not math.isfinite(ends[length]["eval/loss"]):
            ends |= {rest: ends[length] for rest in lengths if rest > length}
            break
    else:
        record.measure(lengths[-1], state.params)
    return {
        "arm": trial.arm,
        "rate": trial.rate,
        "corpus": corpus.hash,
        "seed": trial.experiment.seed,
        "definition": config.to_dict(trial),
        "parameters": accounting.count(_served(state.params)),
        "train_bytes": size,
        "wall_seconds": round(time.monotonic() - began, 1),
        "results": {
            name: _result(trial, steps, ends[steps]) for name, steps in trial.horizons
        },
        **record.as_json(lengths[-1]),
    }


def seconds_per_step(
    trials: Mapping[str, Trial], corpus: data.Corpus, *, rounds: int = 5
) -> dict[str, tuple[float, float]]:
    """Returns the median times of a step of every trial, measured in turns.

    Of a step as it is, and of one with the dense path of a guide, where there is one.
    At the peak rate, as a bound or an iteration may take longer beyond it.
    """
    mesh = sharding.MeshConfig().build(1)
    states, steps, batches, times = {}, {}, {}, {}
    for name, trial in trials.items():
        program = _program(_without_rates(trial))
        states[name] = _at_rate(program.init(jax.random.key(0)), trial, trial.rate)
        source = data.train_batches(corpus, trial.experiment.data, seed=0)
        batches[name] = evaluation.to_devices(next(source), mesh)
        # One and the same without a guide.
        steps[name] = list(dict.fromkeys((program.step, program.guided_step)))
        times[name] = [[] for _ in steps[name]]
    for _ in range(rounds + 1):
        for name, batch in batches.items():
            for step, taken in zip(steps[name], times[name], strict=True):
                began = time.monotonic()
                state, _ = step(states[name], batch, jnp.asarray(False))
                states[name] = jax.block_until_ready(state)
                taken.append(time.monotonic() - began)
    found = {}
    for name, taken in times.items():
        medians = [float(np.median(each[1:])) for each in taken]  # the first compiles
        found[name] = (medians[0], medians[-1])
    return found


def spikes(losses: list[float]) -> list[int]:
    """Returns the steps whose loss is over the trend of the trailing ones by 4 sigma.

    The trend is a line in the logarithm of the step, as a loss that falls hides its
    spikes from a mean; sigma is the deviation from it. A run of such steps is one
    spike, and none of them is among the trailing ones of the next.
    """
    found, calm, inside = [], [], False
    for step, loss in enumerate(losses, 1):
        before = calm[-SPIKE_WINDOW:]
        if len(before) < _LEAST_WINDOW:
            high = not math.isfinite(loss)
        else:
            at, values = np.transpose(before)
            line = np.polynomial.Polynomial.fit(np.log(at), values, deg=1)
            sigma = np.std(values - line(np.log(at)), ddof=2)
            high = not loss <= line(math.log(step)) + SPIKE_DEVIATIONS * sigma
        if high and not inside:
            found.append(step)
        inside = high
        if not high:
            calm.append((step, loss))
    return found


def spectra(params: model.Params) -> dict[str, np.ndarray]:
    """Returns the singular values of every kind of matrix, descending, mean of layers.

    For analysis: those of a dense matrix cost its full decomposition.
    """
    blocks, found = _blocks(params), {}
    for name in model.BLOCK_MATRICES:
        rows = [np.atleast_2d(_singular_values(block[name])) for block in blocks]
        shortest = min(row.shape[-1] for row in rows)
        found[name] = np.mean(
            np.concatenate([row[:, :shortest] for row in rows]), axis=0
        )
    return found


def effective_rank(spectrum: np.ndarray) -> float:
    """Returns exp of the entropy of the singular values as shares of their sum.

    References:
      Roy and Vetterli, The effective rank, EUSIPCO 2007
    """
    shares = spectrum / max(float(spectrum.sum()), 1e-30)
    shares = shares[shares > 0]
    return float(np.exp(-np.sum(shares * np.log(shares))))


def _without_rates(trial: Trial) -> Trial:
    """The trial with all that its program does not depend on at fixed values."""
    optimizer = dataclasses.replace(
        trial.experiment.optimizer, peak_learning_rate=1.0, warmup_steps=0
    )
    experiment = dataclasses.replace(
        trial.experiment, optimizer=optimizer, seed=0, num_steps=1
    )
    return dataclasses.replace(
        trial,
        arm="",
        experiment=experiment,
        horizons=(("", max(2 * trial.fade_steps, 1)),),  # the fade stays as it is
        adam_rate=None,
    )


@functools.lru_cache(maxsize=32)
def _program(trial: Trial) -> _Program:
    shape, method = trial.experiment.model, forward_variants.METHODS[trial.method]
    tx = _with_rates(trial)

    def init(key):
        params = method.prepare(model.init(key, shape))
        return state_lib.TrainState(
            step=jnp.zeros([], jnp.int32), params=params, opt_state=tx.init(params)
        )

    def compiled(linear_at):
        bare = step_lib.make_train_step(
            shape,
            tx,
            num_microbatches=trial.experiment.data.num_microbatches,
            linear_at=linear_at,
        )
        return jax.jit(_with_norms(bare), donate_argnums=0)

    plain = compiled(lambda step: method.linear)
    guided = plain
    if method.guided_linear is not None:
        mix, fade_steps = method.guided_linear, trial.fade_steps
        guided = compiled(
            lambda step: mix(forward_variants.guide_share(step, fade_steps))
        )
    start = jax.eval_shape(init, jax.random.key(0))
    return _Program(
        jax.jit(init), plain, guided, method.linear, rank.num_parameters(start.params)
    )


def _with_rates(trial: Trial) -> optax.GradientTransformation:
    """The chain with its rates in the state, so that they change without compiling."""
    optimizer = trial.experiment.optimizer
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


def _with_norms(step):
    """The step with the largest ||W' - W||_2 of all matrices of the layers."""

    def wrapped(state, batch, diagnose):
        new_state, metrics = step(state, batch, diagnose)
        dense = jax.lax.cond(
            diagnose,
            lambda: _dense_update_norm(state.params, new_state.params),
            lambda: jnp.zeros([]),
        )
        factors = metrics.get("composite_update_norm", 0.0)
        metrics["composite_update_norm"] = jnp.maximum(factors, dense)
        return new_state, metrics

    return wrapped


def _blocks(params: model.Params) -> Sequence[model.Params]:
    """The layers as they are stored: one tree of them all, or one tree for each."""
    layers = params["layers"]
    return layers if isinstance(layers, tuple) else (layers,)


def _dense_update_norm(old: model.Params, new: model.Params) -> jax.Array:
    """The largest spectral norm of the change of a dense matrix of a layer; or 0."""
    largest = jnp.zeros([])
    pairs = [
        (before[name], after[name])
        for before, after in zip(_blocks(old), _blocks(new), strict=True)
        for name in model.BLOCK_MATRICES
    ]
    for before, after in pairs:
        if not isinstance(before, jax.Array):
            continue
        change = (after - before).reshape(-1, *before.shape[-2:])
        if change.shape[-2] < change.shape[-1]:
            change = linalg.transpose(change)
        radius = linalg.spectral_radius_bound(linalg.gram(change), squarings=8)
        largest = jnp.maximum(largest, jnp.sqrt(jnp.max(radius)))
    return largest


def _advance(
    trial: Trial,
    program: _Program,
    corpus: data.Corpus,
    state: state_lib.TrainState,
    start: int,
    stop: int,
    length: int,
    record: _Record | None,
) -> state_lib.TrainState:
    """The state after the steps start .. stop of a run of `length` steps."""
    if start == stop:
        return state
    experiment = trial.experiment
    mesh = sharding.MeshConfig().build(1)
    batches = data.train_batches(
        corpus, experiment.data, seed=experiment.seed, start_step=start
    )
    rates = np.asarray(
        jax.vmap(experiment.optimizer.learning_rate(length))(jnp.arange(stop))
    )
    measured = {round(length * i / (_SPECTRA - 1)) for i in range(1, _SPECTRA - 1)}
    # The norm of an update is that of a matrix that multiplies.
    measurable = forward_variants.METHODS[trial.method].is_linear
    losses: list[jax.Array] = []
    norms: list[tuple[int, jax.Array]] = []
    for step in range(start + 1, stop + 1):
        state = _at_rate(state, trial, float(rates[step - 1]))
        diagnose = step % DIAGNOSE_EVERY == 0
        compiled = program.guided_step if step <= trial.fade_steps else program.step
        batch = evaluation.to_devices(next(batches), mesh)
        state, metrics = compiled(state, batch, jnp.asarray(diagnose))
        losses.append(metrics["loss"])
        if diagnose:
            if measurable and step > trial.fade_steps:
                norms.append((step, metrics["composite_update_norm"]))
            if not math.isfinite(float(metrics["loss"])):
                break
        if experiment.rank.decides_at(step) and step != length:
            state = _with_ranks(state, experiment, step, program.rank_budget)
            if record:
                record.ranks.append((step, rank.stored_ranks(state.params)))
        if record and step in measured:
            record.measure(step, state.params)
    if record:
        record.losses += [float(loss) for loss in losses]
        record.update_norms += [Point(step, float(norm)) for step, norm in norms]
    return state


def _at_rate(
    state: state_lib.TrainState, trial: Trial, rate: float
) -> state_lib.TrainState:
    rates = {"learning_rate": rate}
    if trial.adam_rate is not None:
        # Of the same shape over the run as the rate of the matrices.
        rates["dense_lr_multiplier"] = trial.adam_rate / trial.rate
    old = state.opt_state.hyperparams
    new = old | {k: jnp.asarray(v, old[k].dtype) for k, v in rates.items()}
    return state.replace(opt_state=state.opt_state._replace(hyperparams=new))


def _with_ranks(
    state: state_lib.TrainState,
    experiment: config.ExperimentConfig,
    step: int,
    budget: int,
) -> state_lib.TrainState:
    change = rank.next_change(
        state.params, state.opt_state, experiment.rank, budget=budget
    )
    if change is None:
        return state
    key = jax.random.fold_in(jax.random.key(experiment.seed), step)
    params, opt_state = jax.jit(functools.partial(rank.resize, ranks=change.ranks))(
        state.params, state.opt_state, active=change.active, key=key
    )
    return state.replace(params=params, opt_state=opt_state)


def _served(params: model.Params) -> model.Params:
    """The parameters that remain after training: no dense path of a guide."""
    return jax.tree.map(
        lambda w: w.factors if isinstance(w, forward_variants.Guided) else w,
        params,
        is_leaf=lambda w: isinstance(w, forward_variants.Guided),
    )


def _singular_values(w: Any) -> np.ndarray:
    if isinstance(w, forward_variants.Guided):
        w = w.factors
    if isinstance(w, spectral.SpectralFactors):
        # Without a retraction u and v need not be orthonormal.
        w = spectral.to_low_rank(w)
    if isinstance(w, spectral.LowRankFactors):
        # W = Q_a (R_a R_b.T) Q_b.T has the singular values of the core.
        cores = [np.linalg.qr(np.asarray(x), mode="r") for x in (w.a, w.b)]
        w = cores[0] @ np.swapaxes(cores[1], -1, -2)
    return np.linalg.svd(np.asarray(w), compute_uv=False)


def _result(trial: Trial, steps: int, figures: Mapping[str, float]) -> dict[str, Any]:
    """What a row holds of one horizon."""
    return {
        "steps": steps,
        "tokens": steps * trial.experiment.data.tokens_per_step,
        "flops": trial.flops(steps),
        "block_flops": trial.flops(steps, blocks_only=True),
        "loss": _finite(figures["eval/loss"]),
        "bits_per_byte": _finite(figures["eval/bits_per_byte"]),
    }


def _finite(value: float) -> float | None:
    """The value to five digits; None (JSON's null) where it is not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _every(losses: list[float], n: int) -> list[list[float | None]]:
    """Means of n steps in a row, each with its last step."""
    return [
        [stop, _finite(float(np.mean(losses[stop - n : stop])))]
        for stop in range(n, len(losses) + 1, n)
    ]
