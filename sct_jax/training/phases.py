"""Runs that start dense, or at larger ranks, and are truncated on the way.

A run is a sequence of phases. Each has a model and an optimizer of its own; between two
of them the matrices are truncated, and the optimizer starts anew.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from sct_jax import errors, model
from sct_jax.training import accounting, optimizer_config

DENSE_OPTIMIZERS = {"adamw": optimizer_config.AdamW, "muon": optimizer_config.Muon}
DENSE = 0.0  # in place of a multiple of the rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhasesConfig:
    """Phases before the one that `model` and `optimizer` describe.

    Attributes:
      switch_at: where each phase but the last ends: a number of steps, or below 1 a
        share of the training FLOPs. Empty for a run of one phase.
      rank_multiples: multiplies the ranks of `model` in each phase, clamped to the
        largest rank of the matrix; 0 is dense. All phases are dense if it is empty.
      dense_optimizer: chain of dense phases, "adamw" or "muon". It takes the fields
        that it shares with `optimizer`, except those below.
      dense_learning_rate: peak learning rate of dense phases.
      dense_lr_multiplier: multiplies `dense_learning_rate` for all but the matrices of
        the layers.
      decay_ratio: share of each phase but the last over which the learning rate falls
        to `optimizer.final_rate_ratio` of its peak. 0 keeps the peak.
      warmup_steps: steps over which the learning rate rises again after a switch;
        `optimizer.warmup_steps` is for the first phase.
      carry_momentum: whether the momentum of "muon" is projected onto the factors, for
        `optimizer.name` = "stiefel_muon". Other moments start at zero: Adam corrects
        them by the number of its steps, which starts anew.
    """

    switch_at: tuple[float, ...] = ()
    rank_multiples: tuple[float, ...] = ()
    dense_optimizer: str = "adamw"
    dense_learning_rate: float = 1e-3
    dense_lr_multiplier: float = 1.0
    decay_ratio: float = 0.0
    warmup_steps: int = 0
    carry_momentum: bool = False

    @property
    def multiples(self) -> tuple[float, ...]:
        """Multiples of the ranks, one per entry of `switch_at`."""
        return self.rank_multiples or (DENSE,) * len(self.switch_at)

    def validate(self, *, num_steps: int, shape: model.ModelConfig) -> None:
        """Raises UserError, naming the field.

        Args:
          num_steps: of the run.
          shape: model of the last phase.
        """
        for at in self.switch_at:
            if 0 < at < 1:
                continue
            errors.check(
                "phases.switch_at",
                at == int(at) and 1 <= at < num_steps,
                f"{at:g} is neither a step in 1..{num_steps - 1}, inside the run, nor "
                "a share of its FLOPs above 0 and below 1",
            )
        kinds = {at < 1 for at in self.switch_at}
        errors.check(
            "phases.switch_at",
            len(kinds) < 2 and list(self.switch_at) == sorted(set(self.switch_at)),
            f"{self.switch_at} must ascend, all steps or all shares",
        )
        errors.check(
            "phases.rank_multiples",
            len(self.rank_multiples) in (0, len(self.switch_at)),
            f"has {len(self.rank_multiples)} values for {len(self.switch_at)} in "
            "phases.switch_at; give one each, 0 for dense",
        )
        multiples = [m or math.inf for m in (*self.multiples, 1.0)]
        falls = all(a > b for a, b in itertools.pairwise(multiples))
        errors.check(
            "phases.rank_multiples",
            falls,
            f"{self.multiples} must fall from phase to phase and stay above 1; 0 is "
            "dense and can only come first",
        )
        errors.check(
            "phases.switch_at",
            not self.switch_at or bool(shape.spectral),
            "nothing is to be truncated: model.spectral is empty; name matrices there",
        )
        errors.check_choice(
            "phases.dense_optimizer", self.dense_optimizer, tuple(DENSE_OPTIMIZERS)
        )
        errors.check_bounds(
            "phases.", self, "dense_learning_rate", "dense_lr_multiplier", above=0
        )
        errors.check_bounds("phases.", self, "decay_ratio", least=0, most=1)
        errors.check_bounds(
            "phases.", self, "warmup_steps", least=0, most=errors.MAX_INT32
        )

    def unused_fields(self) -> list[str]:
        """Returns a sentence for every field that is set but has no effect."""
        dense = DENSE in self.multiples
        needs = {
            "dense_optimizer": (dense, "a dense phase"),
            "dense_learning_rate": (dense, "a dense phase"),
            "dense_lr_multiplier": (dense, "a dense phase"),
            "decay_ratio": (bool(self.switch_at), "phases.switch_at"),
            "warmup_steps": (bool(self.switch_at), "phases.switch_at"),
            "carry_momentum": (
                dense and self.dense_optimizer == "muon",
                'a dense phase with phases.dense_optimizer = "muon"',
            ),
        }
        plain = PhasesConfig()
        return [
            f"phases.{name}: has no effect without {needed}"
            for name, (met, needed) in needs.items()
            if not met and getattr(self, name) != getattr(plain, name)
        ]

    def models(self, last: model.ModelConfig) -> list[model.ModelConfig]:
        """Returns the model of every phase, of which `last` is the last."""
        return [*(_scaled(last, multiple) for multiple in self.multiples), last]

    def optimizers(
        self, last: optimizer_config.OptimizerConfig
    ) -> list[optimizer_config.OptimizerConfig]:
        """Returns the optimizer of every phase, of which `last` is the last."""
        found = []
        for multiple in self.multiples:
            kind = DENSE_OPTIMIZERS[self.dense_optimizer] if not multiple else None
            early = {"schedule": "constant"}
            if self.decay_ratio:
                early = {"schedule": "wsd", "decay_ratio": self.decay_ratio}
            if kind:
                early |= {
                    "peak_learning_rate": self.dense_learning_rate,
                    "dense_lr_multiplier": self.dense_lr_multiplier,
                }
                found.append(last.to(kind, **early))
            else:
                found.append(dataclasses.replace(last, **early))
        found.append(last)
        return [
            dataclasses.replace(optimizer, warmup_steps=self.warmup_steps)
            if index
            else optimizer
            for index, optimizer in enumerate(found)
        ]

    def ends(
        self, last: model.ModelConfig, *, num_steps: int, seq_len: int
    ) -> list[int]:
        """Returns the number of steps at the end of every phase.

        Raises:
          UserError: for shares so small that a phase would have no step.
        """
        if not self.switch_at or self.switch_at[0] >= 1:
            return [*map(int, self.switch_at), num_steps]
        costs = [
            accounting.flops_per_token(shape, seq_len=seq_len)
            for shape in self.models(last)
        ]
        ends = flop_ends(self.switch_at, costs, num_steps)
        errors.check(
            "phases.switch_at",
            all(a < b for a, b in itertools.pairwise((0, *ends))),
            f"shares {self.switch_at} of the FLOPs of {num_steps} steps end phases "
            f"after {', '.join(map(str, ends))} steps, so one phase would have no "
            "step; take other shares, or more steps",
        )
        return ends


def flop_ends(
    shares: Sequence[float], costs: Sequence[int | float], num_steps: int
) -> list[int]:
    """Returns the step at which every phase ends, for given shares of the FLOPs.

    Args:
      shares: of all FLOPs, spent when each phase but the last ends; ascending.
      costs: FLOPs per step, or per token, of every phase.
      num_steps: of all phases.
    """
    steps = steps_per_flop(shares, costs)
    scale, total, ends = num_steps / sum(steps), 0.0, []
    for count in steps:
        total += count * scale
        ends.append(round(total))
    return ends


def steps_per_flop(
    shares: Sequence[float], costs: Sequence[int | float]
) -> list[float]:
    """Returns the steps of each phase per FLOP of the run; arguments as `flop_ends`."""
    spans = [b - a for a, b in itertools.pairwise((0.0, *shares, 1.0))]
    return [span / cost for span, cost in zip(spans, costs, strict=True)]


def _scaled(shape: model.ModelConfig, multiple: float) -> model.ModelConfig:
    """The model with all ranks multiplied; 0 is dense."""
    if not multiple:
        return accounting.dense_config(shape)
    shapes = shape.matrix_shapes()
    ranks = {
        name: min(max(int(multiple * rank), 1), *shapes[name])
        for name in shape.spectral
        if (rank := shape.matrix_rank(name)) is not None
    }
    return dataclasses.replace(
        shape,
        ranks=model.MatrixRanks(**ranks),
        rank_ratios=model.MatrixRankRatios(),
    )
