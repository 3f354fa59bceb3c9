"""What is compared, and which trials are missing: arms, rates, seeds, horizons."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.studies import summary
from experiments.studies import trial as trial_lib
from sct_jax import errors, model
from sct_jax.training import accounting, config

# Of every arm, a step as it is and one with the dense path of a guide.
Seconds = Mapping[str, Sequence[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One method, and the rates among which its best one is looked for.

    Attributes:
      name: what tables call it.
      rates: peak learning rates, ascending; more are added beyond an end that is best.
      overrides: pairs of a field of the experiment and its value as text.
      method: one of `forward_variants.METHODS`.
      adam_rate: see `trial.Trial`.
      always: whether it gets all seeds, however it ranks.
      narrow: whether its model is dense, and as narrow as has the FLOPs per token of
        the low-rank one: what that gains at equal FLOPs, any smaller model does.
    """

    name: str
    rates: tuple[float, ...]
    overrides: tuple[tuple[str, str], ...] = ()
    method: str = "plain"
    adam_rate: float | None = None
    always: bool = False
    narrow: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A grid of arms x rates x seeds on one architecture and corpus.

    Every arm is tuned alike: the first seed is trained at its rates; while the best of
    them is at an end, at one more beyond it, by the ratio of its neighbours, up to
    `max_rates`. There is a best rate for every protocol: that with the least held-out
    loss at the first of `tokens_per_parameter`, see `summary.best`. Through these,
    Adam's rate of the embedding and norms is searched in the same way, and then each of
    the two at the best of the other, until the best has neighbours on both lines. Then
    the best `finalists` arms at equal tokens, and those marked `always`, are trained
    with the other seeds too, at all their best settings.

    Attributes:
      base: the experiment that arms override; its model is that of the low-rank arms.
      arms: the methods.
      seeds: of parameters and data order.
      tokens_per_parameter: lengths, in training tokens per parameter when dense.
      protocols: what is held equal to the dense model at each length: "tokens",
        "flops", "seconds".
      reference: the arm whose time per step "seconds" refers to.
      adam_rate_factors: Adam's rates of the second search, in that of the best; none:
        there is no second one.
      max_rates: most rates of one line.
      finalists: how many arms get all seeds.
    """

    base: config.ExperimentConfig
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    tokens_per_parameter: tuple[float, ...] = (0.4,)
    protocols: tuple[str, ...] = ("tokens", "flops")
    reference: str = ""
    adam_rate_factors: tuple[float, ...] = ()
    max_rates: int = 6
    finalists: int = 6

    def validate(self) -> None:
        """Raises UserError, naming the field."""
        names = [arm.name for arm in self.arms]
        errors.check("arms", bool(names), "there are none")
        errors.check("arms", len(set(names)) == len(names), "a name stands twice")
        errors.check("arms", "," not in "".join(names), "a name has a comma")
        errors.check("seeds", bool(self.seeds), "there are none")
        lengths = self.tokens_per_parameter
        errors.check("tokens_per_parameter", bool(lengths), "there are none")
        errors.check("tokens_per_parameter", min(lengths) > 0, "must be positive")
        errors.check(
            "tokens_per_parameter",
            len(set(lengths)) == len(lengths),
            "one stands twice",
        )
        self._check_base()
        errors.check(
            "protocols",
            self.protocols[:1] == ("tokens",),
            'the first must be "tokens": arms are ranked by it',
        )
        for protocol in self.protocols:
            errors.check_choice("protocols", protocol, tuple(summary.PROTOCOLS))
        if "seconds" in self.protocols:
            errors.check_choice("reference", self.reference, tuple(names))
        factors = self.adam_rate_factors
        errors.check(
            "adam_rate_factors",
            not factors or (factors[0] > 0 and 1 in factors),
            "must be positive, with 1 among them",
        )
        errors.check(
            "adam_rate_factors", list(factors) == sorted(set(factors)), "not sorted"
        )
        for arm in self.arms:
            check_rates(f"arms.{arm.name}.rates", arm.rates)
            self.trial(arm, arm.rates[0], self.seeds[0]).validate()
            self._check_text(arm)

    def _check_base(self) -> None:
        """Raises UserError for a field of the base that every arm replaces."""
        default = config.ExperimentConfig()
        for field, value, unset, instead in (
            ("num_steps", self.base.num_steps, default.num_steps, "protocols"),
            ("seed", self.base.seed, default.seed, "seeds"),
            (
                "optimizer.peak_learning_rate",
                self.base.optimizer.peak_learning_rate,
                default.optimizer.peak_learning_rate,
                "arms.rates",
            ),
        ):
            errors.check(
                f"base.{field}", value == unset, f"has no effect beside {instead}"
            )

    def _check_text(self, arm: Arm) -> None:
        """Raises UserError where an arm would be judged by another text."""
        own = self._experiment(arm)
        may_differ = ("batch_size", "num_microbatches")
        judged = [x.eval.num_batches * x.data.batch_size for x in (own, self.base)]
        pairs = [
            ("model.vocab_size", own.model.vocab_size, self.base.model.vocab_size),
            ("eval.num_batches x data.batch_size", *judged),
        ]
        pairs += [
            (
                f"data.{f.name}",
                getattr(own.data, f.name),
                getattr(self.base.data, f.name),
            )
            for f in dataclasses.fields(own.data)
            if f.name not in may_differ
        ]
        for field, value, base in pairs:
            errors.check(
                f"arms.{arm.name}: {field}",
                value == base,
                f"{value!r} is not that of the base, {base!r}: losses of two texts "
                "cannot be compared",
            )

    def trial(
        self,
        arm: Arm,
        rate: float,
        seed: int,
        *,
        adam_rate: float | None = None,
        seconds: Seconds | None = None,
    ) -> trial_lib.Trial:
        """Returns the trial of an arm.

        Args:
          arm: the method.
          rate: peak learning rate.
          seed: of parameters and data order.
          adam_rate: see `trial.Trial`; None: that of the arm.
          seconds: times per step of every arm, for the protocol "seconds".

        Raises:
          UserError: for an override that does not fit.
        """
        experiment = self._experiment(arm)
        experiment = dataclasses.replace(
            experiment,
            seed=seed,
            optimizer=dataclasses.replace(
                experiment.optimizer, peak_learning_rate=rate
            ),
        )
        draft = trial_lib.Trial(
            arm=arm.name,
            experiment=experiment,
            horizons=tuple(
                (summary.horizon("tokens", length), self._steps(length, experiment))
                for length in self.tokens_per_parameter
            ),
            method=arm.method,
            adam_rate=arm.adam_rate if adam_rate is None else adam_rate,
        )
        horizons = tuple(
            (summary.horizon(protocol, length), steps)
            for length in self.tokens_per_parameter
            for protocol, steps in self._equal(draft, length, seconds).items()
        )
        longest = max(steps for _, steps in horizons)
        return dataclasses.replace(
            draft,
            experiment=dataclasses.replace(experiment, num_steps=longest),
            horizons=horizons,
        )

    def _experiment(self, arm: Arm) -> config.ExperimentConfig:
        experiment = self.base
        for field, text in arm.overrides:
            experiment = config.override(experiment, field, text)
        if not arm.narrow:
            return experiment
        width, d_ff = _narrow_sizes(self.base.model, self.base.data.seq_len)
        narrow = dataclasses.replace(experiment.model, d_model=width, d_ff=d_ff)
        return dataclasses.replace(experiment, model=narrow)

    def _steps(
        self, tokens_per_parameter: float, experiment: config.ExperimentConfig
    ) -> int:
        """Steps of an arm for so many tokens per parameter of the dense model."""
        tokens = tokens_per_parameter * _dense_parameters(self.base.model)
        return max(round(tokens / experiment.data.tokens_per_step), 2)

    def _equal(
        self,
        draft: trial_lib.Trial,
        length: float,
        seconds: Seconds | None,
    ) -> dict[str, int]:
        """Steps at which the arm has spent what the dense model has, per protocol."""
        found = {}
        for protocol in self.protocols:
            if protocol == "tokens":
                found[protocol] = self._steps(length, draft.experiment)
            elif protocol == "flops":
                dense = accounting.flops_per_token(
                    accounting.dense_config(self.base.model),
                    seq_len=self.base.data.seq_len,
                )
                steps = self._steps(length, self.base)
                budget = steps * self.base.data.tokens_per_step * dense
                # Linear beyond the steps with a dense path.
                plain = dataclasses.replace(draft, method="plain")
                extra = draft.flops(draft.fade_steps) - plain.flops(draft.fade_steps)
                found[protocol] = round((budget - extra) / plain.flops(1))
            elif seconds is not None:
                plain, guided = seconds[draft.arm]
                (reference,) = (a for a in self.arms if a.name == self.reference)
                steps = self._steps(length, self._experiment(reference))
                budget = steps * seconds[self.reference][0]
                extra = draft.fade_steps * (guided - plain)
                found[protocol] = max(round((budget - extra) / plain), 2)
        return found


@functools.lru_cache
def _narrow_sizes(low_rank: model.ModelConfig, seq_len: int) -> tuple[int, int]:
    """d_model and d_ff of a dense model with the FLOPs per token of this one.

    The nearest width of the same proportions, then the nearest d_ff at that width.
    """
    budget = accounting.flops_per_token(low_rank, seq_len=seq_len)

    def at(width: int, d_ff: int) -> model.ModelConfig:
        dense = accounting.dense_config(low_rank)
        return dataclasses.replace(dense, d_model=width, d_ff=d_ff)

    def excess(shape: model.ModelConfig) -> float:
        return abs(accounting.flops_per_token(shape, seq_len=seq_len) - budget)

    even_heads = 2 * low_rank.num_heads
    widths = range(even_heads, low_rank.d_model, even_heads)
    ratio = low_rank.d_ff / low_rank.d_model
    found = min((at(w, round(w * ratio)) for w in widths), key=excess)
    found = min((at(found.d_model, f) for f in range(1, low_rank.d_ff)), key=excess)
    return found.d_model, found.d_ff


@functools.lru_cache
def _dense_parameters(shape: model.ModelConfig) -> int:
    return accounting.parameters(accounting.dense_config(shape))


def missing(
    comparison: Comparison,
    rows: Mapping[str, summary.Row],
    *,
    arms: Sequence[Arm] | None = None,
    seconds: Seconds | None = None,
) -> list[trial_lib.Trial]:
    """Returns the trials that the comparison still needs, most wanted first.

    A middle rate of every arm comes first, then the others; the further seeds last, as
    they need the best rates of all.

    Args:
      comparison: the grid.
      rows: what has been trained, by the key of its trial.
      arms: those that are wanted now; None for all. Finalists are the best of all arms
        that have been searched.
      seconds: see `Comparison.trial`.
    """
    arms = comparison.arms if arms is None else arms
    horizons = [
        summary.horizon(protocol, comparison.tokens_per_parameter[0])
        for protocol in comparison.protocols
    ]
    make = functools.partial(comparison.trial, seconds=seconds)
    # An arm that was neither asked for nor timed cannot have been trained.
    known = [a for a in comparison.arms if seconds is None or a.name in seconds]
    first: list[trial_lib.Trial] = []  # a middle rate per arm
    others: list[trial_lib.Trial] = []
    searched: list[tuple[Arm, list[summary.Row]]] = []
    for arm in known:
        at = functools.partial(make, arm, seed=comparison.seeds[0])
        trials = _search_both(comparison, arm, at, rows, horizons)
        lacking = [t for t in trials if t.key not in rows]
        if not lacking:
            searched.append((arm, [rows[t.key] for t in trials]))
        elif arm in arms:
            middle = trials[len(arm.rates) // 2]
            first += [t for t in lacking if t is middle]
            others += [t for t in lacking if t is not middle]
    if first or others:
        return first + others
    loss = lambda found: min(summary.loss_of(row, horizons[0]) for row in found)
    searched.sort(key=lambda pair: loss(pair[1]))
    chosen = [
        (arm, dict.fromkeys(summary.setting(summary.best(found, h)) for h in horizons))
        for place, (arm, found) in enumerate(searched)
        if (place < comparison.finalists or arm.always) and arm in arms
    ]
    return [
        t
        for seed in comparison.seeds[1:]
        for arm, settings in chosen
        for rate, adam_rate in settings
        if (t := make(arm, rate, seed, adam_rate=adam_rate)).key not in rows
    ]


def most_tokens(
    comparison: Comparison, *, arms: Sequence[Arm], seconds: Seconds | None = None
) -> int:
    """Returns the training tokens of the longest trial of these arms."""
    trials = [
        comparison.trial(arm, arm.rates[0], comparison.seeds[0], seconds=seconds)
        for arm in arms
    ]
    return max(
        trial.experiment.num_steps * trial.experiment.data.tokens_per_step
        for trial in trials
    )


def _search_both(
    comparison: Comparison,
    arm: Arm,
    at: Callable[..., trial_lib.Trial],
    rows: Mapping[str, summary.Row],
    horizons: Sequence[str],
) -> list[trial_lib.Trial]:
    """The trials of an arm's search, as far as it is known: rates, then both rates.

    Those of the first search come first, in the order of their rates.
    """
    search = functools.partial(search_rates, rows=rows, max_rates=comparison.max_rates)

    def at_both(rate: float, adam_rate: float) -> trial_lib.Trial:
        first = at(rate)  # not defined anew where it has this rate of Adam
        same = first.rate_of_others == adam_rate
        return first if same else at(rate, adam_rate=adam_rate)

    def over_adam_rates(rate, adam_rate, own):
        line = _around(adam_rate, comparison.adam_rate_factors)
        return search(line, lambda other: at_both(rate, other), horizons=own)

    def over_rates(rate, adam_rate, own):
        ratios = [other / arm.rates[0] for other in arm.rates[:2]]
        line = _around(rate, sorted({*ratios, *(1 / ratio for ratio in ratios)}))
        return search(line, lambda other: at_both(other, adam_rate), horizons=own)

    found = {t.key: t for t in search(arm.rates, at, horizons=horizons)}
    while comparison.adam_rate_factors and found.keys() <= rows.keys():
        best: dict[tuple[float, float], list[str]] = {}
        for horizon in horizons:
            row = summary.best([rows[key] for key in found], horizon)
            at_best = row["rate"], summary.rate_of_others(row)
            best.setdefault(at_best, []).append(horizon)
        for line in (over_adam_rates, over_rates):
            known = len(found)
            for (rate, adam_rate), own in best.items():
                found |= {t.key: t for t in line(rate, adam_rate, own)}
            if len(found) > known:
                break
        else:  # the best has neighbours on both lines
            break
    return list(found.values())


def _around(rate: float, factors: Sequence[float]) -> list[float]:
    """Rates to three digits, the given one as it is."""
    return [rate if f == 1 else float(f"{f * rate:.3g}") for f in factors]


def search_rates(
    rates: Sequence[float],
    at: Callable[[float], trial_lib.Trial],
    *,
    rows: Mapping[str, summary.Row],
    horizons: Sequence[str],
    max_rates: int,
) -> list[trial_lib.Trial]:
    """Returns the trials at these rates, and on beyond an end that was the best.

    For any of the horizons, as long as there is room for more.

    Args:
      rates: ascending.
      at: the trial at a rate.
      rows: what has been trained, by the key of its trial.
      horizons: those whose best rate must be inside.
      max_rates: most rates.
    """
    while True:
        trials = [at(rate) for rate in rates]
        found = [rows[t.key] for t in trials if t.key in rows]
        room = max_rates - len(rates)
        if len(found) < len(trials) or room <= 0:
            return trials
        best = [found.index(summary.best(found, h)) for h in horizons]
        further = dict.fromkeys(_beyond(rates, index) for index in best)
        more = [rate for rate in further if rate is not None][:room]
        if not more:
            return trials
        rates = sorted([*rates, *more])


def check_same(
    comparison: Comparison, rows: Mapping[str, summary.Row], **keywords: Any
) -> None:
    """Raises UserError where a row of one of the arms is not of this comparison."""
    arms = {arm.name: arm for arm in comparison.arms}
    for key, row in rows.items():
        if row["arm"] not in arms:
            continue
        arm = arms[row["arm"]]
        rate, adam_rate = summary.setting(row)
        if not comparison.adam_rate_factors:
            adam_rate = None  # that of the arm
        same = comparison.trial(arm, rate, row["seed"], adam_rate=adam_rate, **keywords)
        if same.key == key:
            continue
        old = config.from_dict(row["definition"], trial_lib.Trial).identity
        new = same.identity
        changed = sorted(k for k in old | new if old.get(k) != new.get(k))
        raise errors.UserError(
            f"--results: holds trials of {arm.name!r} with another "
            f"{', '.join(changed[:5])}: choose another folder"
        )


def check_rates(field: str, rates: Sequence[float]) -> None:
    """Raises UserError, naming the field, for rates that cannot be searched."""
    errors.check(field, len(rates) >= 1, "there are none")
    errors.check(field, rates[0] > 0, f"{rates[0]} must be > 0")
    errors.check(field, list(rates) == sorted(set(rates)), "not sorted")


def _beyond(rates: Sequence[float], best: int) -> float | None:
    """The next rate beyond an end that is best; None where the best is inside."""
    if len(rates) < 2 or 0 < best < len(rates) - 1:
        return None
    if best == 0:
        return float(f"{rates[0] ** 2 / rates[1]:.3g}")
    return float(f"{rates[-1] ** 2 / rates[-2]:.3g}")
