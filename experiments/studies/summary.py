"""What the rows of a comparison say of each arm: best rate, means, deviations."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Row = dict[str, Any]


class Setting(NamedTuple):
    """What an arm is tuned over, see `trial.Trial`."""

    rate: float
    adam_rate: float | None

    def __str__(self) -> str:
        return " / ".join(f"{rate:g}" for rate in self if rate is not None)

    def rate_of_others(self, dense_lr_multiplier: float) -> float:
        """Returns the rate of what `optimizer.dense_lr_multiplier`, given here, is for."""
        return (
            self.rate * dense_lr_multiplier
            if self.adam_rate is None
            else self.adam_rate
        )


PROTOCOLS = {"tokens": "equal tokens", "flops": "equal FLOPs", "seconds": "equal time"}


@dataclasses.dataclass(frozen=True)
class Arm:
    """The trials of one method.

    Rates are chosen for every protocol, as `best` does; the rows of a horizon are those
    of these rates, one per seed.

    Attributes:
      name: what tables call it.
      index: its number, for a look that stays the same over all figures.
      searched: rows of the seed that was trained at most rates, one per setting.
      trials: all rows.
    """

    name: str
    index: int
    searched: Sequence[Row]
    trials: Sequence[Row]

    @property
    def protocols(self) -> tuple[str, ...]:
        """Names of the horizons."""
        return tuple(self.trials[0]["results"])

    def setting(self, protocol: str) -> Setting:
        """Returns the best rates."""
        return setting(best(self.searched, protocol))

    def rows(self, protocol: str) -> list[Row]:
        """Returns the rows at the best rates, the searched seed first."""
        chosen, first = self.setting(protocol), self.searched[0]["seed"]
        rows = [row for row in self.trials if setting(row) == chosen]
        return sorted(rows, key=lambda row: (row["seed"] != first, row["seed"]))

    def num_seeds(self, protocol: str) -> int:
        """Returns the number of seeds at the best rates."""
        return len(self.rows(protocol))

    def at_edge(self, protocol: str) -> bool:
        """Returns whether one of the best rates is the least or greatest tried.

        Each of the two on the line through both: at the best of the other one.
        """
        chosen = best(self.searched, protocol)
        rate, adam_rate = chosen["rate"], rate_of_others(chosen)
        at_adam_rate = {
            row["rate"] for row in self.searched if rate_of_others(row) == adam_rate
        }
        if len(at_adam_rate) == 1:  # it was searched where Adam's rate goes with it
            at_adam_rate = {at for at, _ in self.tuning(protocol)}
        at_rate = {at for at, _ in self.tuning_of_others(protocol)}
        return any(
            len(line) > 1 and at in (min(line), max(line))
            for line, at in ((at_adam_rate, rate), (at_rate, adam_rate))
        )

    def results(self, protocol: str) -> list[Row]:
        """Returns what came out at one horizon, per seed."""
        return [row["results"][protocol] for row in self.rows(protocol)]

    def mean(self, protocol: str, field: str = "loss") -> float:
        """Returns the mean over seeds; infinite where one of them diverged."""
        return float(np.mean(self._values(protocol, field)))

    def deviation(self, protocol: str, field: str = "loss") -> float:
        """Returns the sample standard deviation over seeds; 0 for a single one."""
        values = self._values(protocol, field)
        return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

    def with_error(self, protocol: str, field: str = "loss") -> str:
        """Returns mean ± deviation in words, the mean alone of a single seed."""
        mean = self.mean(protocol, field)
        if not math.isfinite(mean):
            return "diverged"
        if self.num_seeds(protocol) == 1:
            return f"{mean:.3f}"
        return f"{mean:.3f} ± {self.deviation(protocol, field):.3f}"

    def choice(self, protocol: str) -> str:
        """Returns the best rates in words, with the number of seeds at them."""
        edge = ", at the edge" if self.at_edge(protocol) else ""
        return f"{self.setting(protocol)} ({self.num_seeds(protocol)}{edge})"

    def tuning(self, protocol: str) -> list[tuple[float, float]]:
        """Returns pairs of a rate and the loss of the searched seed, ascending.

        Adam's rate is as in the first search.
        """
        first = setting(self.searched[0]).adam_rate
        return sorted(
            (row["rate"], loss_of(row, protocol))
            for row in self.searched
            if setting(row).adam_rate == first
        )

    def tuning_of_others(self, protocol: str) -> list[tuple[float, float]]:
        """Returns the same pairs of Adam's rate, at the best rate of the matrices."""
        rate = self.setting(protocol).rate
        return sorted(
            (rate_of_others(row), loss_of(row, protocol))
            for row in self.searched
            if row["rate"] == rate
        )

    def curve(
        self, field: str, protocol: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns steps, mean and deviation over seeds of a recorded curve."""
        rows = self.rows(protocol)
        shortest = min(len(row[field]) for row in rows)
        if not shortest:
            return np.zeros(0), np.zeros(0), np.zeros(0)
        points = np.array(
            [[p[1] or math.nan for p in row[field][:shortest]] for row in rows]
        )
        steps = np.array([p[0] for p in rows[0][field][:shortest]])
        spread = points.std(axis=0, ddof=1) if len(points) > 1 else 0 * points[0]
        return steps, points.mean(axis=0), spread

    def num_spikes(self, protocol: str) -> float:
        """Returns loss spikes per seed up to this horizon; NaN where none were counted.

        What is recorded is the longest run; of that, the steps that this one has.
        """
        counts = [
            sum(step <= row["results"][protocol]["steps"] for step in row["spikes"])
            for row in self.rows(protocol)
            if row["spikes"] is not None
        ]
        return float(np.mean(counts)) if counts else math.nan

    def largest_update(self, protocol: str) -> float:
        """Returns the largest ||W' - W||_2 of all seeds, likewise; NaN without any."""
        norms = [
            norm
            for row in self.rows(protocol)
            for step, norm in row["update_norms"]
            if norm and step <= row["results"][protocol]["steps"]
        ]
        return max(norms, default=math.nan)

    def last_train_loss(self, protocol: str) -> float:
        """Returns the training loss at the end of the longest run, mean of seeds.

        Of its last recorded steps, on text that it has not seen before; NaN where none
        was recorded, infinite where one of them diverged.
        """
        last = [
            row["train_loss"][-1][1] for row in self.rows(protocol) if row["train_loss"]
        ]
        values = [math.inf if value is None else value for value in last]
        return float(np.mean(values)) if values else math.nan

    def _values(self, protocol: str, field: str) -> list[float]:
        values = [result[field] for result in self.results(protocol)]
        return [math.inf if value is None else value for value in values]


def setting(row: Row) -> Setting:
    """Returns the rates of a row."""
    return Setting(row["rate"], row["definition"].get("adam_rate"))


def rate_of_others(row: Row) -> float:
    """Returns the rate of what `optimizer.dense_lr_multiplier` is for."""
    optimizer = row["definition"]["experiment"]["optimizer"]
    return setting(row).rate_of_others(optimizer["dense_lr_multiplier"])


def best(rows: Sequence[Row], protocol: str) -> Row:
    """Returns the row with the least held-out loss, of equals that of least rates.

    A rate is chosen once per kind of protocol: at its first length, whichever length
    `protocol` names.
    """
    kind, _ = kind_and_length(protocol)
    first = firsts(rows[0]["results"])[kind]
    return min(
        rows, key=lambda row: (loss_of(row, first), row["rate"], rate_of_others(row))
    )


def ranked(arms: Sequence[Arm], protocol: str) -> list[Arm]:
    """Returns arms by their mean loss, those with fewer seeds below the others.

    Seeds are worth a few hundredths of a nat, so means over other ones do not compare.
    """
    return sorted(arms, key=lambda a: (-a.num_seeds(protocol), a.mean(protocol)))


def repeated(arms: Sequence[Arm], protocol: str) -> list[Arm]:
    """Returns the arms with the most seeds at their best rate, in their order."""
    most = max(arm.num_seeds(protocol) for arm in arms)
    return [arm for arm in arms if arm.num_seeds(protocol) == most]


def loss_of(row: Row, protocol: str) -> float:
    """Returns the held-out loss of a row, infinite where it diverged."""
    loss = row["results"][protocol]["loss"]
    return math.inf if loss is None else loss


def arms(rows: Sequence[Row]) -> list[Arm]:
    """Returns the arms in the order in which their rows first appear.

    Of rows of one arm, setting and seed, as where folders were joined, one counts.
    """
    named: dict[str, list[Row]] = {}
    for row in {(row["arm"], setting(row), row["seed"]): row for row in rows}.values():
        named.setdefault(row["arm"], []).append(row)
    found = []
    for index, (name, own) in enumerate(named.items()):
        tried = collections.Counter(row["seed"] for row in own)
        seed = max(tried, key=lambda seed: (tried[seed], -seed))
        searched = [row for row in own if row["seed"] == seed]
        found.append(Arm(name, index, searched, own))
    return found


def horizon(kind: str, length: float) -> str:
    """Returns the name of a horizon: what is held equal, and tokens per parameter."""
    return f"{kind} {length:g}"


def kind_and_length(protocol: str) -> tuple[str, str]:
    """Returns what `horizon` was given, the length as text."""
    kind, _, length = protocol.partition(" ")
    return kind, length


def firsts(protocols: Iterable[str]) -> dict[str, str]:
    """Returns the first horizon of every kind: there its rate is chosen."""
    found: dict[str, str] = {}
    for protocol in protocols:
        found.setdefault(kind_and_length(protocol)[0], protocol)
    return found


def words(protocol: str) -> str:
    """Returns a horizon's name as a phrase."""
    kind, length = kind_and_length(protocol)
    phrase = PROTOCOLS.get(kind, kind)
    return f"{phrase}, {length} tokens per parameter" if length else phrase


def gap(arm: Arm, other: Arm, protocol: str) -> tuple[float, float]:
    """Returns mean and standard error of the difference of losses, seed by seed.

    Seeds share the order of the data, so pairs are compared; the error is NaN for less
    than two of them, the mean NaN where the other one diverged.
    """
    theirs: Mapping[int, float] = {
        row["seed"]: loss_of(row, protocol) for row in other.rows(protocol)
    }
    pairs = [
        loss_of(row, protocol) - theirs[row["seed"]]
        for row in arm.rows(protocol)
        if math.isfinite(theirs.get(row["seed"], math.inf))
    ]
    if len(pairs) < 2:
        return (pairs[0] if pairs else math.nan), math.nan
    return float(np.mean(pairs)), float(np.std(pairs, ddof=1) / math.sqrt(len(pairs)))
