"""What an iso-FLOP study trains: kinds of models at several sizes, for each budget."""

import dataclasses

from experiments import grid
from experiments import trial as trial_lib
from sct_jax import config, errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """One size of model; ranks follow from `ScalingLaws.rank_ratio`."""

    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingLaws:
    """Kinds of models x sizes x budgets x seeds.

    Attributes:
      base: the experiment that kinds and sizes override.
      kinds: methods with one rate each, that of `base_width`.
      sizes: smallest first.
      budgets: training FLOPs, head included, smallest first.
      sizes_per_budget: at least three, for a parabola. The first budget has so many of
        the smallest sizes, every further one starts at the next size.
      seeds: of parameters and data order.
      rank_ratio: rank over d_model.
      base_width: d_model at which the rates hold; at others they are scaled by
        base_width / d_model where a kind is named in `scaled`.
      scaled: kinds whose rate is scaled; one of Adam's own is not.
    """

    base: config.ExperimentConfig
    kinds: tuple[grid.Arm, ...]
    sizes: tuple[Size, ...]
    budgets: tuple[float, ...]
    sizes_per_budget: int
    seeds: tuple[int, ...] = (0,)
    rank_ratio: float = 0.25
    base_width: int = 128
    scaled: tuple[str, ...] = ()

    def validate(self) -> None:
        """Raises ConfigError, naming the field."""
        errors.check("budgets", len(self.budgets) >= 2, "an exponent needs two")
        errors.check(
            "budgets", list(self.budgets) == sorted(set(self.budgets)), "not sorted"
        )
        errors.check(
            "sizes_per_budget", self.sizes_per_budget >= 3, "a parabola needs three"
        )
        needed = self.sizes_per_budget + len(self.budgets) - 1
        errors.check(
            "sizes",
            len(self.sizes) == needed,
            f"{len(self.budgets)} budgets of {self.sizes_per_budget} sizes, each from "
            f"the next one on, need {needed}, not {len(self.sizes)}",
        )
        for kind in self.kinds:
            errors.check(f"kinds.{kind.name}.rates", len(kind.rates) == 1, "give one")
        for trial in self.trials():
            trial.validate()

    def trials(self) -> list[trial_lib.Trial]:
        """Returns all trials, cheapest budget first."""
        return [
            self.trial(kind, size, budget, seed)
            for start, budget in enumerate(self.budgets)
            for seed in self.seeds
            for size in self.sizes[start : start + self.sizes_per_budget]
            for kind in self.kinds
        ]

    def trial(
        self, kind: grid.Arm, size: Size, budget: float, seed: int
    ) -> trial_lib.Trial:
        """Returns the trial of a kind at a size that spends the budget."""
        rank = max(1, round(self.rank_ratio * size.d_model))
        shape = dataclasses.replace(
            self.base.model,
            d_model=size.d_model,
            d_ff=size.d_ff,
            num_layers=size.num_layers,
            num_heads=size.num_heads,
            num_kv_heads=size.num_heads,
            rank=rank,
        )
        scale = self.base_width / size.d_model if kind.name in self.scaled else 1.0
        sized = grid.Comparison(
            base=dataclasses.replace(self.base, model=shape), arms=(kind,)
        )
        draft = sized.trial(kind, kind.rates[0] * scale, seed)
        steps = max(round(budget / draft.flops(1)), 2)
        return dataclasses.replace(
            draft,
            arm=f"{kind.name}, d {size.d_model}",
            experiment=dataclasses.replace(draft.experiment, num_steps=steps),
            horizons=((f"budget {budget:g}", steps),),
        )
