"""What the rows of a study say about each method: best rates, means, deviations."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from experiments.studies import rows as rows_lib
from experiments.studies import trial as trial_lib

Budget = trial_lib.Budget
Row = rows_lib.Row


@dataclasses.dataclass(frozen=True)
class MethodSummary:
    """The rows of one method.

    Learning rates are chosen per kind of budget, see `best`. The rows of a budget are
    those at its rates, one per seed.

    Attributes:
      name: of the method.
      index: its number, so that all figures draw it alike.
      tuning_rows: rows of the seed that was trained at most settings, one per setting.
      all_rows: every row.
    """

    name: str
    index: int
    tuning_rows: Sequence[Row]
    all_rows: Sequence[Row]

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """Budgets of its trials."""
        return tuple(self.all_rows[0].results)

    @property
    def is_dense(self) -> bool:
        """Whether its model has no factors."""
        return self.all_rows[0].trial.is_dense

    @property
    def variation_of(self) -> str | None:
        """Name of the method that this one varies, if any."""
        return self.all_rows[0].trial.variation_of

    def setting(self, budget: Budget) -> trial_lib.Setting:
        """Returns the best learning rates."""
        return best(self.tuning_rows, budget).trial.setting

    def rows(self, budget: Budget) -> list[Row]:
        """Returns the rows at the best learning rates, the tuning seed first."""
        chosen, first = self.setting(budget), self.tuning_rows[0].seed
        found = [row for row in self.all_rows if row.trial.setting == chosen]
        return sorted(found, key=lambda row: (row.seed != first, row.seed))

    def results(self, budget: Budget) -> list[rows_lib.Result]:
        """Returns the results at a budget, per seed."""
        return [row.results[budget] for row in self.rows(budget)]

    def num_seeds(self, budget: Budget) -> int:
        """Returns the number of seeds at the best learning rates."""
        return len(self.rows(budget))

    def at_edge(self, budget: Budget) -> bool:
        """Returns whether a best learning rate is the lowest or highest one tried.

        Each rate counts along its own line: at the best value of the other.
        """
        rate, non_matrix = best(self.tuning_rows, budget).trial.rates
        tried = [row.trial.rates for row in self.tuning_rows]
        rates = {one for one, other in tried if other == non_matrix}
        if len(rates) == 1:  # the search had both rates in a fixed ratio
            rates = {one for one, _ in self.tuning(budget)}
        non_matrix_rates = {one for one, _ in self.non_matrix_tuning(budget)}
        return any(
            len(line) > 1 and chosen in (min(line), max(line))
            for line, chosen in ((rates, rate), (non_matrix_rates, non_matrix))
        )

    def mean(self, budget: Budget, field: str = "loss") -> float:
        """Returns the mean over seeds, infinite if one of them diverged."""
        return float(np.mean(self._values(budget, field)))

    def deviation(self, budget: Budget, field: str = "loss") -> float:
        """Returns the sample standard deviation over seeds, 0 for a single one."""
        values = self._values(budget, field)
        return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

    def with_error(self, budget: Budget, field: str = "loss") -> str:
        """Returns "mean ± deviation", or the mean alone for a single seed."""
        mean = self.mean(budget, field)
        if not math.isfinite(mean):
            return "diverged"
        if self.num_seeds(budget) == 1:
            return f"{mean:.3f}"
        return f"{mean:.3f} ± {self.deviation(budget, field):.3f}"

    def choice(self, budget: Budget) -> str:
        """Returns the best learning rates as text, with their number of seeds."""
        edge = ", at the edge" if self.at_edge(budget) else ""
        return f"{self.setting(budget)} ({self.num_seeds(budget)}{edge})"

    def tuning(self, budget: Budget) -> list[tuple[float, float]]:
        """Returns learning rates and losses of the tuning seed, ascending.

        The non-matrix learning rate comes from the first search.
        """
        first = self.tuning_rows[0].trial.non_matrix_lr
        return sorted(
            (row.trial.learning_rate, row.loss(budget))
            for row in self.tuning_rows
            if row.trial.non_matrix_lr == first
        )

    def non_matrix_tuning(self, budget: Budget) -> list[tuple[float, float]]:
        """Returns the same for the non-matrix rate, at the best matrix rate."""
        best_rate = self.setting(budget).learning_rate
        return sorted(
            (row.trial.rates[1], row.loss(budget))
            for row in self.tuning_rows
            if row.trial.learning_rate == best_rate
        )

    def train_loss(self, budget: Budget) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns steps, mean and deviation over seeds of the training loss."""
        curves = [row.train_loss for row in self.rows(budget)]
        shortest = min(map(len, curves))
        steps = np.array([sample.step for sample in curves[0][:shortest]])
        values = np.array([[s.value for s in curve[:shortest]] for curve in curves])
        values[~np.isfinite(values)] = math.nan  # leaves a gap in a figure
        spread = values.std(axis=0, ddof=1) if len(values) > 1 else 0 * values[0]
        return steps, values.mean(axis=0), spread

    def num_spikes(self, budget: Budget) -> float:
        """Returns loss spikes per seed; NaN where none were counted.

        Rows record the longest run. Spikes count up to the steps of this budget.
        """
        counts = [
            sum(step <= row.results[budget].steps for step in found)
            for row in self.rows(budget)
            if (found := row.spikes_of_training) is not None
        ]
        return float(np.mean(counts)) if counts else math.nan

    def largest_update(self, budget: Budget) -> float:
        """Returns the largest ||W' - W||_2 over seeds and steps of a budget, or NaN."""
        norms = [
            sample.value
            for row in self.rows(budget)
            for sample in row.update_norms
            if 0 < sample.value < math.inf and sample.step <= row.results[budget].steps
        ]
        return max(norms, default=math.nan)

    def final_train_loss(self, budget: Budget) -> float:
        """Returns the training loss at the end of the longest run, mean over seeds.

        Over the last recorded steps, on text that was not seen before. NaN where none
        was recorded, infinite after a divergence.
        """
        final = [
            row.train_loss[-1].value for row in self.rows(budget) if row.train_loss
        ]
        return float(np.mean(final)) if final else math.nan

    def _values(self, budget: Budget, field: str) -> list[float]:
        return [getattr(result, field) for result in self.results(budget)]


def summarize(rows: Iterable[Row]) -> list[MethodSummary]:
    """Returns a summary per method, in the order of their first rows.

    Rows of the same method, setting and seed count once: joined folders hold some
    twice.
    """
    unique = {(row.trial.method, row.trial.setting, row.seed): row for row in rows}
    by_name: dict[str, list[Row]] = {}
    for row in unique.values():
        by_name.setdefault(row.trial.method, []).append(row)
    found = []
    for index, (name, own) in enumerate(by_name.items()):
        tried = collections.Counter(row.seed for row in own)
        seed = max(tried, key=lambda seed: (tried[seed], -seed))
        tuning = [row for row in own if row.seed == seed]
        found.append(MethodSummary(name, index, tuning, own))
    return found


def best(rows: Sequence[Row], budget: Budget) -> Row:
    """Returns the row with the lowest loss; ties go to the lower learning rates.

    Rates are chosen once per kind of budget: at its first amount, whichever amount
    `budget` has.
    """
    first = first_of_each_kind(rows[0].results)[budget.kind]
    return min(rows, key=lambda row: (row.loss(first), *row.trial.rates))


def first_of_each_kind(budgets: Iterable[Budget]) -> dict[str, Budget]:
    """Returns the first budget of every kind, the one that chooses learning rates."""
    found: dict[str, Budget] = {}
    for budget in budgets:
        found.setdefault(budget.kind, budget)
    return found


def ranked(methods: Iterable[MethodSummary], budget: Budget) -> list[MethodSummary]:
    """Returns methods by mean loss; those with fewer seeds come last.

    Seeds differ by a few hundredths of a nat, so means over different seeds do not
    compare.
    """
    return sorted(methods, key=lambda m: (-m.num_seeds(budget), m.mean(budget)))


def with_most_seeds(
    methods: Sequence[MethodSummary], budget: Budget
) -> list[MethodSummary]:
    """Returns the methods with the most seeds at their best rates, in their order."""
    most = max(method.num_seeds(budget) for method in methods)
    return [method for method in methods if method.num_seeds(budget) == most]


def references(methods: Sequence[MethodSummary]) -> list[MethodSummary]:
    """Returns the methods that the others are compared with.

    These are the first one and the dense ones, without variations of another method.
    """
    names = {method.name for method in methods}
    return [
        method
        for method in methods
        if method is methods[0]
        or (method.is_dense and method.variation_of not in names)
    ]


def gap_text(method: MethodSummary, reference: MethodSummary, budget: Budget) -> str:
    """Returns `gap` as text, "-" or "diverged" where there is none."""
    mean, error = gap(method, reference, budget)
    if not math.isfinite(mean):
        return "-" if math.isnan(mean) else "diverged"
    return f"{mean:+.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def gap(
    method: MethodSummary, reference: MethodSummary, budget: Budget
) -> tuple[float, float]:
    """Returns mean and standard error of the paired differences of losses, by seed.

    Seeds share the order of the data, so paired differences have lower variance. The
    error is NaN below two pairs; the mean is NaN where the reference diverged.
    """
    theirs = {row.seed: row.loss(budget) for row in reference.rows(budget)}
    pairs = [
        row.loss(budget) - theirs[row.seed]
        for row in method.rows(budget)
        if math.isfinite(theirs.get(row.seed, math.inf))
    ]
    if len(pairs) < 2:
        return (pairs[0] if pairs else math.nan), math.nan
    return float(np.mean(pairs)), float(np.std(pairs, ddof=1) / math.sqrt(len(pairs)))


def around(switches: Sequence[rows_lib.Switch]) -> tuple[float, float]:
    """Returns the mean losses before and after a truncation, over seeds."""
    return (
        float(np.mean([switch.before for switch in switches])),
        float(np.mean([switch.after for switch in switches])),
    )


def megabytes(row: Row) -> str:
    """Returns the memory of training, one after the other where a run has phases."""
    return " then ".join(
        f"{size / 1e6:.1f}" for size in row.phase_bytes or [row.train_bytes]
    )
