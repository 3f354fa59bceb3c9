"""What a study trains: a trunk at the full learning rate, and a branch per budget.

With a warmup-stable-decay schedule, runs of several lengths share their stable phase.
A trial trains this trunk once. Every budget then branches off with its own decay.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.studies import forward_variants
from sct_jax import errors, model, sharding
from sct_jax.training import accounting, config
from sct_jax.training import phases as phases_lib

# What methods spend equally, at a length given in tokens per parameter.
EQUAL = {"tokens": "equal tokens", "flops": "equal FLOPs", "seconds": "equal time"}
TOTAL_FLOPS = "total_flops"


class Budget(NamedTuple):
    """How long a method may train.

    Attributes:
      kind: "tokens", "flops" or "seconds", as many as the dense reference uses; or
        "total_flops", an absolute number.
      amount: training tokens per parameter of the dense model; FLOPs for
        "total_flops".
    """

    kind: str
    amount: float

    def __str__(self) -> str:
        if self.kind == TOTAL_FLOPS:
            return f"{self.amount:g} FLOPs"
        return f"{EQUAL[self.kind]}, {self.amount:g} tokens per parameter"


class Branch(NamedTuple):
    """A run within a trial: its budget, and the steps that spend it."""

    budget: Budget
    steps: int


class Setting(NamedTuple):
    """The tuned hyperparameters, see `Trial`."""

    learning_rate: float
    non_matrix_lr: float | None

    def __str__(self) -> str:
        return " / ".join(f"{rate:g}" for rate in self if rate is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One training run, with its branches.

    Attributes:
      method: name of the method in tables.
      experiment: model, data, seed and optimizer, with the schedule "wsd". `num_steps`
        is the length of the longest branch.
      branches: one per budget.
      forward: one of `forward_variants.FORWARD_VARIANTS`.
      non_matrix_lr: peak learning rate of the parameters that
        `optimizer.dense_lr_multiplier` applies to: embedding and norms above all. None
        leaves it to that multiplier.
      variation_of: name of the method that this one varies, if any.
    """

    method: str
    experiment: config.ExperimentConfig
    branches: tuple[Branch, ...]
    forward: str = "plain"
    non_matrix_lr: float | None = None
    variation_of: str | None = None

    @functools.cached_property
    def identity(self) -> "Trial":
        """The trial without fields that change no result. Equal trials are the same."""
        experiment, default = self.experiment, config.ExperimentConfig()
        for field in config.WITHOUT_EFFECT:
            experiment = _reset(experiment, default, field)
        if experiment.data.source != "stdlib":  # the hash of its text says the same
            experiment = _reset(experiment, default, "data.split")
        return dataclasses.replace(self, experiment=experiment, variation_of=None)

    @property
    def digest(self) -> str:
        """Name of a file for this trial."""
        text = json.dumps(to_dict(self.identity), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def learning_rate(self) -> float:
        """Peak learning rate."""
        return self.experiment.optimizer.peak_learning_rate

    @property
    def setting(self) -> Setting:
        """Both learning rates, as they were set."""
        return Setting(self.learning_rate, self.non_matrix_lr)

    @property
    def rates(self) -> tuple[float, float]:
        """Peak learning rates of the matrices and of all other parameters."""
        if self.non_matrix_lr is not None:
            return self.learning_rate, self.non_matrix_lr
        optimizer: Any = self.experiment.optimizer  # every chain has the multiplier
        return self.learning_rate, self.learning_rate * optimizer.dense_lr_multiplier

    @property
    def is_dense(self) -> bool:
        """Whether no matrix has factors."""
        return not self.experiment.model.spectral

    @property
    def fade_steps(self) -> int:
        """Steps with a dense path: half of the first branch for a guide, or 0."""
        if forward_variants.FORWARD_VARIANTS[self.forward].guided_linear is None:
            return 0
        return self.branches[0].steps // 2

    def phases(self, steps: int) -> tuple[config.Phase, ...]:
        """Returns the phases of a branch of so many steps."""
        return config.phases_of(dataclasses.replace(self.experiment, num_steps=steps))

    def steps_for(self, flops: float) -> int:
        """Returns how many steps without a guide a budget of FLOPs pays."""
        settings, experiment = self.experiment.phases, self.experiment
        costs = [
            accounting.flops_per_token(shape, seq_len=experiment.data.seq_len)
            * experiment.data.tokens_per_step
            for shape in settings.models(experiment.model)
        ]
        ends = settings.switch_at
        if ends and ends[0] >= 1:  # in steps
            steps = [b - a for a, b in itertools.pairwise((0.0, *ends))]
            spent = sum(n * cost for n, cost in zip(steps, costs[:-1], strict=True))
            return round(ends[-1] + (flops - spent) / costs[-1])
        return round(flops * sum(phases_lib.steps_per_flop(ends, costs)))

    def flops(self, steps: int, *, layers_only: bool = False) -> float:
        """Returns the training FLOPs of so many steps.

        Args:
          steps: number of updates.
          layers_only: leave out embedding and head.
        """
        if not steps:
            return 0.0
        if self.experiment.phases.switch_at:
            parts = [
                dataclasses.replace(self, experiment=phase.config)
                for phase in self.phases(steps)
            ]
            return sum(
                part.flops(part.experiment.num_steps, layers_only=layers_only)
                for part in parts
            )
        shape, seq_len = self.experiment.model, self.experiment.data.seq_len
        per_token = (
            3 * shape.num_layers * accounting.block_flops(shape, seq_len=seq_len)
            if layers_only
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
        """Raises UserError, naming the method and the field."""
        prefix = f"methods.{self.method}"
        errors.check_choice(
            f"{prefix}.forward", self.forward, tuple(forward_variants.FORWARD_VARIANTS)
        )
        self.experiment.validate()
        shape, needed = (
            self.experiment.model,
            forward_variants.FORWARD_VARIANTS[self.forward].factors,
        )
        errors.check(
            f"{prefix}.forward",
            needed is None or needed == shape.factors,
            f"{self.forward!r} needs model.factors = {needed!r}",
        )
        errors.check(
            f"{prefix}: model.spectral",
            self.forward == "plain" or set(shape.spectral) <= set(model.BLOCK_MATRICES),
            f"{self.forward!r} needs a dense embedding and head",
        )
        errors.check(
            f"{prefix}: optimizer.schedule",
            self.experiment.optimizer.schedule == "wsd",
            'branches need the schedule "wsd"',
        )
        for field, value, only in (
            ("step", self.experiment.step, "fused"),
            ("mesh", self.experiment.mesh, sharding.MeshConfig()),
        ):
            errors.check(
                f"{prefix}: {field}",
                value == only,
                f"a trial is one program on one device; leave it at {only!r}",
            )
        for branch in self.branches:
            self.phases(branch.steps)  # raises where one has no step
        shortest = min(branch.steps for branch in self.branches)
        errors.check(
            f"{prefix}.forward",
            self.fade_steps <= shortest,
            f"the dense path of {self.forward!r} fades over half of the first branch, "
            f"{self.fade_steps} steps; the shortest has {shortest}, so name it first",
        )


def to_dict(trial: Trial) -> dict[str, Any]:
    """Returns the trial as nested dictionaries and lists that JSON can hold."""
    return {
        "method": trial.method,
        "variation_of": trial.variation_of,
        "experiment": config.to_dict(trial.experiment),
        "branches": [
            branch.budget._asdict() | {"steps": branch.steps}
            for branch in trial.branches
        ],
        "forward": trial.forward,
        "non_matrix_lr": trial.non_matrix_lr,
    }


def from_dict(values: Mapping[str, Any]) -> Trial:
    """Returns the trial that `to_dict` was given. Missing fields take their defaults.

    Raises:
      UserError: for a field that this version does not know.
    """
    known = tuple(field.name for field in dataclasses.fields(Trial))
    for name in values.keys() - set(known):
        errors.check_choice("trial", name, known)
    branches = tuple(
        Branch(Budget(branch["kind"], branch["amount"]), branch["steps"])
        for branch in values["branches"]
    )
    experiment = config.from_dict(values["experiment"])
    return Trial(**dict(values) | {"experiment": experiment, "branches": branches})


def differences(old: Trial, new: Trial) -> list[str]:
    """Returns the fields, by their paths, in which two trials are not the same."""
    flat = [config.flatten(to_dict(trial.identity)) for trial in (old, new)]
    names = sorted(flat[0].keys() | flat[1].keys())
    return [name for name in names if flat[0].get(name) != flat[1].get(name)]


def _reset(value: Any, default: Any, path: str) -> Any:
    """A nested configuration with one field at its default."""
    field, _, rest = path.partition(".")
    new = getattr(default, field)
    if rest:
        new = _reset(getattr(value, field), new, rest)
    return dataclasses.replace(value, **{field: new})
