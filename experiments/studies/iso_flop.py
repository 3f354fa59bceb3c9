"""What an iso-FLOP study trains: kinds of models at several sizes, for each budget."""

import dataclasses
import functools
from collections.abc import Mapping

from experiments.studies import forward_variants, grid, summary
from experiments.studies import trial as trial_lib
from sct_jax import errors
from sct_jax.training import config


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
      arm: the method; every size of a budget is trained at each of its rates, and on
        beyond an end that is best.
      sizes: for each budget, at least three, as a parabola needs them.
    """

    arm: grid.Arm
    sizes: tuple[tuple[Size, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingLaws:
    """Kinds of models x budgets x sizes x rates, and the best rates x seeds.

    Attributes:
      base: the experiment that kinds and sizes override.
      kinds: methods, each with sizes of its own: the best one of a low-rank model is
        larger than that of a dense one.
      budgets: training FLOPs, head included, smallest first.
      seeds: of parameters and data order; the first one chooses the rates.
      rank_ratio: rank over d_model.
      max_rates: most rates of a size and budget.
    """

    base: config.ExperimentConfig
    kinds: tuple[Kind, ...]
    budgets: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    rank_ratio: float = 0.25
    max_rates: int = 5

    def validate(self) -> None:
        """Raises UserError, naming the field."""
        errors.check("budgets", len(self.budgets) >= 2, "an exponent needs two")
        errors.check(
            "budgets", list(self.budgets) == sorted(set(self.budgets)), "not sorted"
        )
        errors.check("seeds", bool(self.seeds), "there are none")
        errors.check("kinds", bool(self.kinds), "there are none")
        for kind in self.kinds:
            grid.check_rates(f"kinds.{kind.arm.name}.rates", kind.arm.rates)
            method = forward_variants.METHODS.get(kind.arm.method)
            errors.check(
                f"kinds.{kind.arm.name}.method",
                method is None or method.guided_linear is None,
                "a guide's share of a budget is not told apart here",
            )
            field = f"kinds.{kind.arm.name}.sizes"
            given, wanted = len(kind.sizes), len(self.budgets)
            errors.check(field, given == wanted, f"{given} for {wanted} budgets")
            for sizes in kind.sizes:
                widths = {size.d_model for size in sizes}
                errors.check(field, len(widths) >= 3, "a parabola needs three")
        for trial in self.trials():
            trial.validate()

    def trials(
        self, rows: Mapping[str, summary.Row] | None = None
    ) -> list[trial_lib.Trial]:
        """Returns all trials as far as they are known, cheapest budget first.

        The first seed is trained at all rates, the others at its best one.

        Args:
          rows: what has been trained, by the key of its trial: it decides whether rates
            are added beyond those of an arm.
        """
        points = [
            self._of_point(kind, size, budget, rows or {})
            for index, budget in enumerate(self.budgets)
            for kind in self.kinds
            for size in kind.sizes[index]
        ]
        return [
            *(trial for searched, _ in points for trial in searched),
            *(trial for _, repeated in points for trial in repeated),
        ]

    def _of_point(
        self, kind: Kind, size: Size, budget: float, rows: Mapping[str, summary.Row]
    ) -> tuple[list[trial_lib.Trial], list[trial_lib.Trial]]:
        """Trials of the first seed, and of the others once its best rate is known."""
        at = functools.partial(self.trial, kind, size, budget)
        horizon = summary.horizon("budget", budget)
        searched = grid.search_rates(
            kind.arm.rates,
            functools.partial(at, self.seeds[0]),
            rows=rows,
            horizons=[horizon],
            max_rates=self.max_rates,
        )
        found = [rows[trial.key] for trial in searched if trial.key in rows]
        if len(found) < len(searched):
            return searched, []
        rate = summary.best(found, horizon)["rate"]
        return searched, [at(seed, rate) for seed in self.seeds[1:]]

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
        sized = grid.Comparison(
            base=dataclasses.replace(self.base, model=shape), arms=(kind.arm,)
        )
        draft = sized.trial(kind.arm, rate, seed)
        steps = max(round(budget / draft.flops(1)), 2)
        return dataclasses.replace(
            draft,
            arm=f"{kind.arm.name}, d {size.d_model}",
            experiment=dataclasses.replace(draft.experiment, num_steps=steps),
            horizons=((summary.horizon("budget", budget), steps),),
        )
