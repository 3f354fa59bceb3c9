"""What the rows of a comparison say of each arm: best rate, means, deviations."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]

PROTOCOLS = {"tokens": "equal tokens", "flops": "equal FLOPs", "seconds": "equal time"}


@dataclasses.dataclass(frozen=True)
class Arm:
    """The trials of one method.

    Attributes:
      name: what tables call it.
      index: its number, for a look that stays the same over all figures.
      searched: rows of the seed that was trained at several rates, one per rate.
      rows: one row per seed, at the best rate; the first is of the lowest seed.
    """

    name: str
    index: int
    searched: Sequence[Row]
    rows: Sequence[Row]

    @property
    def rate(self) -> float:
        """The best rate."""
        return self.rows[0]["rate"]

    @property
    def num_seeds(self) -> int:
        """Seeds at the best rate."""
        return len(self.rows)

    @property
    def protocols(self) -> tuple[str, ...]:
        """Names of the horizons."""
        return tuple(self.rows[0]["results"])

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the least or the greatest that was tried."""
        rates = sorted(row["rate"] for row in self.searched)
        return len(rates) > 1 and self.rate in (rates[0], rates[-1])

    def results(self, protocol: str) -> list[Row]:
        """Returns what came out at one horizon, per seed."""
        return [row["results"][protocol] for row in self.rows]

    def mean(self, protocol: str, field: str = "loss") -> float:
        """Returns the mean over seeds; infinite where one of them diverged."""
        return float(np.mean(self._values(protocol, field)))

    def deviation(self, protocol: str, field: str = "loss") -> float:
        """Returns the sample standard deviation over seeds; 0 for a single one."""
        values = self._values(protocol, field)
        return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

    def tuning(self, protocol: str) -> list[tuple[float, float]]:
        """Returns pairs of a rate and the loss of the searched seed, ascending."""
        return sorted((row["rate"], loss_of(row, protocol)) for row in self.searched)

    def curve(self, field: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns steps, mean and deviation over seeds of a recorded curve."""
        shortest = min(len(row[field]) for row in self.rows)
        if not shortest:
            return np.zeros(0), np.zeros(0), np.zeros(0)
        points = np.array(
            [[p[1] or math.nan for p in row[field][:shortest]] for row in self.rows]
        )
        steps = np.array([p[0] for p in self.rows[0][field][:shortest]])
        spread = points.std(axis=0, ddof=1) if len(points) > 1 else 0 * points[0]
        return steps, points.mean(axis=0), spread

    @property
    def num_spikes(self) -> float:
        """Loss spikes per seed at the best rate."""
        return float(np.mean([len(row["spikes"]) for row in self.rows]))

    @property
    def largest_update(self) -> float:
        """The largest measured ||W' - W||_2 of all seeds; NaN where there is none."""
        norms = [p[1] for row in self.rows for p in row["update_norms"] if p[1]]
        return max(norms, default=math.nan)

    def _values(self, protocol: str, field: str) -> list[float]:
        values = [result[field] for result in self.results(protocol)]
        return [math.inf if value is None else value for value in values]


def loss_of(row: Row, protocol: str) -> float:
    """Returns the held-out loss of a row, infinite where it diverged."""
    loss = row["results"][protocol]["loss"]
    return math.inf if loss is None else loss


def arms(rows: Sequence[Row]) -> list[Arm]:
    """Returns the arms in the order in which their rows first appear.

    The searched seed is the lowest one; the best rate has the least loss at the first
    horizon.
    """
    named: dict[str, list[Row]] = {}
    for row in rows:
        named.setdefault(row["arm"], []).append(row)
    found = []
    for index, (name, own) in enumerate(named.items()):
        first = next(iter(own[0]["results"]))
        lowest = min(row["seed"] for row in own)
        searched = [row for row in own if row["seed"] == lowest]
        best = min(searched, key=lambda row: loss_of(row, first))["rate"]
        chosen = [row for row in own if row["rate"] == best]
        chosen.sort(key=lambda row: row["seed"])
        found.append(Arm(name, index, searched, chosen))
    return found


def horizon(kind: str, length: float) -> str:
    """Returns the name of a horizon: what is held equal, and tokens per parameter."""
    return f"{kind} {length:g}"


def kind_and_length(protocol: str) -> tuple[str, str]:
    """Returns what `horizon` was given, the length as text."""
    kind, _, length = protocol.partition(" ")
    return kind, length


def words(protocol: str) -> str:
    """Returns a horizon's name as a phrase."""
    kind, length = kind_and_length(protocol)
    phrase = PROTOCOLS.get(kind, kind)
    return f"{phrase}, {length} tokens per parameter" if length else phrase


def gap(arm: Arm, other: Arm, protocol: str) -> tuple[float, float]:
    """Returns mean and standard error of the difference of losses, seed by seed.

    Seeds share the order of the data, so pairs are compared; the error is NaN for less
    than two of them.
    """
    theirs: Mapping[int, float] = {
        row["seed"]: loss_of(row, protocol) for row in other.rows
    }
    pairs = [
        loss_of(row, protocol) - theirs[row["seed"]]
        for row in arm.rows
        if row["seed"] in theirs
    ]
    if len(pairs) < 2:
        return (pairs[0] if pairs else math.nan), math.nan
    return float(np.mean(pairs)), float(np.std(pairs, ddof=1) / math.sqrt(len(pairs)))
