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
class Kind:
    """A method, and the sizes between which its best one is looked for.

    Attributes:
      arm: the method; every size is trained at each of its rates, and the best counts.
      sizes: for each budget, at least three, as a parabola needs them.
      scaled: whether the rates hold at `ScalingLaws.base_width` and are scaled by
        base_width / d_model at others; one of Adam's own is not.
    """

    arm: grid.Arm
    sizes: tuple[tuple[Size, ...], ...]
    scaled: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingLaws:
    """Kinds of models x budgets x sizes x rates x seeds.

    Attributes:
      base: the experiment that kinds and sizes override.
      kinds: methods, each with sizes of its own: the best one of a low-rank model is
        larger than that of a dense one.
      budgets: training FLOPs, head included, smallest first.
      seeds: of parameters and data order.
      rank_ratio: rank over d_model.
      base_width: d_model at which the rates of a kind hold that is `scaled`.
    """

    base: config.ExperimentConfig
    kinds: tuple[Kind, ...]
    budgets: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    rank_ratio: float = 0.25
    base_width: int = 128

    def validate(self) -> None:
        """Raises ConfigError, naming the field."""
        errors.check("budgets", len(self.budgets) >= 2, "an exponent needs two")
        errors.check(
            "budgets", list(self.budgets) == sorted(set(self.budgets)), "not sorted"
        )
        for kind in self.kinds:
            field = f"kinds.{kind.arm.name}.sizes"
            given, wanted = len(kind.sizes), len(self.budgets)
            errors.check(field, given == wanted, f"{given} for {wanted} budgets")
            for sizes in kind.sizes:
                widths = {size.d_model for size in sizes}
                errors.check(field, len(widths) >= 3, "a parabola needs three")
        for trial in self.trials():
            trial.validate()

    def trials(self) -> list[trial_lib.Trial]:
        """Returns all trials, cheapest budget first."""
        return [
            self.trial(kind, size, budget, seed, rate)
            for index, budget in enumerate(self.budgets)
            for seed in self.seeds
            for kind in self.kinds
            for size in kind.sizes[index]
            for rate in kind.arm.rates
        ]

    def trial(
        self, kind: Kind, size: Size, budget: float, seed: int, rate: float
    ) -> trial_lib.Trial:
        """Returns the trial of a kind at a size and a rate that spends the budget."""
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
        scale = self.base_width / size.d_model if kind.scaled else 1.0
        sized = grid.Comparison(
            base=dataclasses.replace(self.base, model=shape), arms=(kind.arm,)
        )
        draft = sized.trial(kind.arm, rate * scale, seed)
        steps = max(round(budget / draft.flops(1)), 2)
        return dataclasses.replace(
            draft,
            arm=f"{kind.arm.name}, d {size.d_model}",
            experiment=dataclasses.replace(draft.experiment, num_steps=steps),
            horizons=((f"budget {budget:g}", steps),),
        )
