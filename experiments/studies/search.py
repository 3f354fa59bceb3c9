"""Which trials a comparison still needs: it tunes all methods alike."""

import functools
from collections.abc import Callable, Mapping, Sequence

from experiments.studies import grid, summary
from experiments.studies import rows as rows_lib
from experiments.studies import trial as trial_lib
from sct_jax import errors

Rows = Mapping[trial_lib.Trial, rows_lib.Row]  # by the identity of their trials


def missing(
    comparison: grid.Comparison,
    rows: Rows,
    *,
    methods: Sequence[grid.Method] | None = None,
    seconds: grid.Seconds | None = None,
) -> list[trial_lib.Trial]:
    """Returns the trials that a comparison still needs, most wanted first.

    A middle learning rate of every method comes first. The other seeds come last,
    because they need the best rates of all methods.

    Args:
      comparison: what is compared.
      rows: finished trials.
      methods: those to train now, all if None. They are ranked among all methods whose
        search is complete.
      seconds: see `Comparison.trial`.
    """
    methods = comparison.methods if methods is None else methods
    budgets = [
        trial_lib.Budget(kind, comparison.tokens_per_parameter[0])
        for kind in comparison.budgets
    ]
    # A method that was neither asked for nor timed has no trial.
    known = [m for m in comparison.methods if seconds is None or m.name in seconds]
    first: list[trial_lib.Trial] = []
    others: list[trial_lib.Trial] = []
    searched: list[tuple[grid.Method, list[rows_lib.Row]]] = []
    for method in known:
        trials = _search(comparison, method, rows, budgets, seconds)
        lacking = [t for t in trials if t.identity not in rows]
        if not lacking:
            searched.append((method, [rows[t.identity] for t in trials]))
        elif method in methods:
            middle = trials[len(method.learning_rates) // 2]
            first += [t for t in lacking if t is middle]
            others += [t for t in lacking if t is not middle]
    if first or others:
        return first + others
    searched.sort(key=lambda pair: min(row.loss(budgets[0]) for row in pair[1]))
    chosen = [
        (method, dict.fromkeys(summary.best(found, b).trial.setting for b in budgets))
        for place, (method, found) in enumerate(searched)
        if (place < comparison.finalists or method.always) and method in methods
    ]
    repeated = [
        comparison.trial(
            method,
            setting.learning_rate,
            seed,
            non_matrix_lr=setting.non_matrix_lr,
            seconds=seconds,
        )
        for seed in comparison.seeds[1:]
        for method, settings in chosen
        for setting in settings
    ]
    return [trial for trial in repeated if trial.identity not in rows]


def _search(
    comparison: grid.Comparison,
    method: grid.Method,
    rows: Rows,
    budgets: Sequence[trial_lib.Budget],
    seconds: grid.Seconds | None,
) -> list[trial_lib.Trial]:
    """The trials of a method's tuning, as far as `rows` determine them.

    Trials of the first search come first, by ascending learning rate.
    """
    at = functools.partial(
        comparison.trial, method, seed=comparison.seeds[0], seconds=seconds
    )
    search = functools.partial(
        search_rates, rows=rows, max_rates=comparison.max_learning_rates
    )

    def at_both(rate: float, non_matrix: float) -> trial_lib.Trial:
        first = at(rate)  # the same trial where it has this non-matrix rate anyway
        same = first.rates[1] == non_matrix
        return first if same else at(rate, non_matrix_lr=non_matrix)

    def over_non_matrix(rate, non_matrix, own):
        line = _around(non_matrix, comparison.non_matrix_lr_factors)
        return search(line, lambda other: at_both(rate, other), budgets=own)

    def over_matrix(rate, non_matrix, own):
        rates = method.learning_rates
        ratios = [other / rates[0] for other in rates[:2]]
        line = _around(rate, sorted({*ratios, *(1 / ratio for ratio in ratios)}))
        return search(line, lambda other: at_both(other, non_matrix), budgets=own)

    first = search(method.learning_rates, at, budgets=budgets)
    found = {trial.identity: trial for trial in first}
    while comparison.non_matrix_lr_factors and found.keys() <= rows.keys():
        best: dict[tuple[float, float], list[trial_lib.Budget]] = {}
        for budget in budgets:
            row = summary.best([rows[identity] for identity in found], budget)
            best.setdefault(row.trial.rates, []).append(budget)
        for line in (over_non_matrix, over_matrix):
            known = len(found)
            for (rate, non_matrix), own in best.items():
                found |= {t.identity: t for t in line(rate, non_matrix, own)}
            if len(found) > known:
                break
        else:  # every best setting has neighbours on both lines
            break
    return list(found.values())


def _around(rate: float, factors: Sequence[float]) -> list[float]:
    """Multiples of a rate to three digits; the rate itself stays exact."""
    return [rate if f == 1 else float(f"{f * rate:.3g}") for f in factors]


def search_rates(
    rates: Sequence[float],
    at: Callable[[float], trial_lib.Trial],
    *,
    rows: Rows,
    budgets: Sequence[trial_lib.Budget],
    max_rates: int,
) -> list[trial_lib.Trial]:
    """Returns the trials at these rates, and beyond an end that is best.

    Args:
      rates: ascending.
      at: makes the trial at a rate.
      rows: finished trials.
      budgets: each needs its best rate inside, as far as `max_rates` allows.
      max_rates: most rates.
    """
    while True:
        trials = [at(rate) for rate in rates]
        found = [rows[t.identity] for t in trials if t.identity in rows]
        room = max_rates - len(rates)
        if len(found) < len(trials) or room <= 0:
            return trials
        best = [found.index(summary.best(found, budget)) for budget in budgets]
        further = dict.fromkeys(_beyond(rates, index) for index in best)
        more = [rate for rate in further if rate is not None][:room]
        if not more:
            return trials
        rates = sorted([*rates, *more])


def _beyond(rates: Sequence[float], best: int) -> float | None:
    """The next rate beyond an end that is best; None if the best is inside."""
    if len(rates) < 2 or 0 < best < len(rates) - 1:
        return None
    if best == 0:
        return float(f"{rates[0] ** 2 / rates[1]:.3g}")
    return float(f"{rates[-1] ** 2 / rates[-2]:.3g}")


def check_same(
    comparison: grid.Comparison, rows: Rows, *, seconds: grid.Seconds | None = None
) -> None:
    """Raises UserError for a row of these methods from another comparison."""
    methods = {method.name: method for method in comparison.methods}
    for identity in rows:
        if identity.method not in methods:
            continue
        searched = bool(comparison.non_matrix_lr_factors)
        expected = comparison.trial(
            methods[identity.method],
            identity.learning_rate,
            identity.experiment.seed,
            non_matrix_lr=identity.non_matrix_lr if searched else None,
            seconds=seconds,
        )
        if expected.identity != identity:
            changed = trial_lib.differences(identity, expected)
            raise errors.UserError(
                f"--results: contains trials of {identity.method!r} with another "
                f"{', '.join(changed[:5])}; choose another folder"
            )


def most_tokens(
    comparison: grid.Comparison,
    methods: Sequence[grid.Method],
    *,
    seconds: grid.Seconds | None = None,
) -> int:
    """Returns the training tokens of the longest trial of these methods."""
    experiments = [
        comparison.trial(
            method, method.learning_rates[0], comparison.seeds[0], seconds=seconds
        ).experiment
        for method in methods
    ]
    return max(e.num_steps * e.data.tokens_per_step for e in experiments)
