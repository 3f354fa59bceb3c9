"""The rows of a study: a finished trial with its results, one per line of a file."""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.studies import legacy
from experiments.studies import trial as trial_lib
from sct_jax import errors
from sct_jax.training import metrics

FILE = "runs.jsonl"
AFTER_SWITCH = 50  # steps in which the loss of a truncation is no spike


class Sample(NamedTuple):
    """A point of a recorded curve; infinite where the run diverged."""

    step: int
    value: float


class Switch(NamedTuple):
    """A truncation between two phases.

    Attributes:
      length: steps of the branch.
      step: steps before the switch.
      before: held-out loss of the weights as they were, in nats per token.
      after: of the truncated ones, before they are trained.
    """

    length: int
    step: int
    before: float
    after: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a branch spent and reached.

    Attributes:
      steps: updates.
      tokens: training tokens.
      flops: training FLOPs, head included.
      layer_flops: training FLOPs of the layers alone.
      loss: held out, in nats per token; infinite after a divergence.
      bits_per_byte: the same per byte of text.
    """

    steps: int
    tokens: int
    flops: float
    layer_flops: float
    loss: float
    bits_per_byte: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A finished trial.

    Attributes:
      trial: what was trained.
      results: by budget, in the order of the branches.
      corpus: hash of the text; None in rows written before it was recorded.
      parameters: numbers that remain after training.
      train_bytes: parameters, gradients and optimizer state at the start; of the
        largest phase, where there are several.
      phase_bytes: the same of every phase, if there are several.
      wall_seconds: duration of the trial.
      spikes: steps with a loss spike; None if they were not counted.
      train_loss: means over some steps, of the longest branch.
      update_norms: largest ||W' - W||_2 over some steps.
      effective_ranks: by kind of matrix.
      spectra: singular values at the end, by kind of matrix.
      ranks: pairs of a step and the stored ranks, per decision of an adaptive rank.
      switches: truncations between phases.
      environment: command, commit, versions and hardware.
    """

    trial: trial_lib.Trial
    results: Mapping[trial_lib.Budget, Result]
    parameters: int
    train_bytes: int = 0
    phase_bytes: Sequence[int] = dataclasses.field(default_factory=list)
    wall_seconds: float = 0.0
    corpus: str | None = None
    spikes: Sequence[int] | None = None
    train_loss: Sequence[Sample] = dataclasses.field(default_factory=list)
    update_norms: Sequence[Sample] = dataclasses.field(default_factory=list)
    effective_ranks: Mapping[str, Sequence[Sample]] = dataclasses.field(
        default_factory=dict
    )
    spectra: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    ranks: Sequence[Sequence[Any]] = dataclasses.field(default_factory=list)
    switches: Sequence[Switch] = dataclasses.field(default_factory=list)
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Seed of parameters and data order."""
        return self.trial.experiment.seed

    @property
    def spikes_of_training(self) -> Sequence[int] | None:
        """`spikes` without those that a truncation makes."""
        if self.spikes is None:
            return None
        longest = max((switch.length for switch in self.switches), default=0)
        cuts = [s.step for s in self.switches if s.length == longest]
        return [
            step
            for step in self.spikes
            if not any(cut < step <= cut + AFTER_SWITCH for cut in cuts)
        ]

    def loss(self, budget: trial_lib.Budget) -> float:
        """Returns the held-out loss at a budget, infinite after a divergence."""
        return self.results[budget].loss


def to_dict(row: Row) -> dict[str, Any]:
    """Returns what a line holds; values to five digits, null where not finite."""
    curve = lambda samples: [[s.step, _to_json(s.value)] for s in samples]
    results = [
        budget._asdict()
        | dataclasses.asdict(result)
        | {
            "loss": _to_json(result.loss),
            "bits_per_byte": _to_json(result.bits_per_byte),
        }
        for budget, result in row.results.items()
    ]
    return {
        "environment": dict(row.environment),
        "trial": trial_lib.to_dict(row.trial),
        "results": results,
        "corpus": row.corpus,
        "parameters": row.parameters,
        "train_bytes": row.train_bytes,
        "phase_bytes": list(row.phase_bytes),
        "wall_seconds": row.wall_seconds,
        "spikes": row.spikes,
        "train_loss": curve(row.train_loss),
        "update_norms": curve(row.update_norms),
        "effective_ranks": {
            name: curve(samples) for name, samples in row.effective_ranks.items()
        },
        "spectra": dict(row.spectra),
        "ranks": [list(ranks) for ranks in row.ranks],
        "switches": [
            [s.length, s.step, _to_json(s.before), _to_json(s.after)]
            for s in row.switches
        ],
    }


def from_dict(values: Mapping[str, Any]) -> Row:
    """Returns the row that `to_dict` was given, now or in an earlier version.

    Raises:
      UserError: for a field that this version does not know.
    """
    if legacy.is_legacy(values):
        values = legacy.upgrade(values)
    curve = lambda samples: [Sample(step, _from_json(x)) for step, x in samples]
    results = {}
    for result in values["results"]:
        fields = dict(result)
        budget = trial_lib.Budget(fields.pop("kind"), fields.pop("amount"))
        fields["loss"] = _from_json(fields["loss"])
        fields["bits_per_byte"] = _from_json(fields["bits_per_byte"])
        results[budget] = Result(**fields)
    return Row(
        **dict(values)
        | {
            "trial": _trial_of(json.dumps(values["trial"])),
            "results": results,
            "train_loss": curve(values["train_loss"]),
            "update_norms": curve(values["update_norms"]),
            "effective_ranks": {
                name: curve(samples)
                for name, samples in values["effective_ranks"].items()
            },
            "switches": [
                Switch(length, step, _from_json(before), _from_json(after))
                for length, step, before, after in values.get("switches", ())
            ],
        }
    )


def path_in(folder: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the file of a folder's rows."""
    return pathlib.Path(folder) / FILE


def read(folder: str | os.PathLike[str]) -> list[Row]:
    """Returns the rows of a folder, without a torn last line.

    Raises:
      UserError: for a line or a trial that cannot be read, naming it.
    """
    path, found = path_in(folder), []
    for number, values in enumerate(metrics.read_rows(path), 1):
        try:
            found.append(from_dict(values))
        except (errors.UserError, KeyError, TypeError) as error:
            raise errors.UserError(
                f"{path}: row {number} was written by another version: {error}"
            ) from error
    return found


def by_trial(folder: str | os.PathLike[str]) -> dict[trial_lib.Trial, Row]:
    """Returns the rows of a folder by the identity of their trials, see `read`."""
    return {row.trial.identity: row for row in read(folder)}


@functools.cache
def _trial_of(text: str) -> trial_lib.Trial:
    """The trial of a line, cached: a study reads its rows after every trial."""
    return trial_lib.from_dict(json.loads(text))


def _to_json(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _from_json(value: float | None) -> float:
    return math.inf if value is None else value
