"""What an iso-FLOP study trains: kinds of models at several sizes, per budget."""

import dataclasses
import functools

from experiments.studies import forward_variants, grid, search, summary
from experiments.studies import trial as trial_lib
from sct_jax import errors
from sct_jax.training import config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """One size of model. `ScalingLaws.rank_ratio` determines its rank."""

    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A method, and the sizes to search for its best one.

    Attributes:
      method: trained at each of its learning rates for every size of a budget, and
        beyond an end that is best.
      sizes: at least three per budget, because a parabola needs them.
    """

    method: grid.Method
    sizes: tuple[tuple[Size, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingLaws:
    """Kinds of models x budgets x sizes x learning rates, and the best rates x seeds.

    Attributes:
      base: the experiment that kinds and sizes change.
      kinds: methods, each with its own sizes: the best low-rank model is wider than the
        best dense one.
      budgets: training FLOPs, head included, ascending.
      seeds: of parameters and data order. The first one chooses the learning rates.
      rank_ratio: rank over d_model.
      max_learning_rates: most learning rates of a size and budget.
    """

    base: config.ExperimentConfig
    kinds: tuple[Kind, ...]
    budgets: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    rank_ratio: float = 0.25
    max_learning_rates: int = 5

    def validate(self) -> None:
        """Raises UserError, naming the field."""
        grid.check_ascending("budgets", self.budgets)
        errors.check("budgets", len(self.budgets) >= 2, "an exponent needs two")
        grid.check_distinct("seeds", self.seeds)
        grid.check_distinct("kinds", [kind.method.name for kind in self.kinds])
        for kind in self.kinds:
            field = f"kinds.{kind.method.name}"
            rates = kind.method.learning_rates
            grid.check_ascending(f"{field}.learning_rates", rates)
            variant = forward_variants.FORWARD_VARIANTS.get(kind.method.forward)
            errors.check(
                f"{field}.forward",
                variant is None or variant.guided_linear is None,
                "a budget of FLOPs does not account for the dense path of a guide",
            )
            given, wanted = len(kind.sizes), len(self.budgets)
            errors.check(
                f"{field}.sizes", given == wanted, f"{given} for {wanted} budgets"
            )
            for sizes in kind.sizes:
                widths = {size.d_model for size in sizes}
                errors.check(
                    f"{field}.sizes", len(widths) >= 3, "a parabola needs three"
                )
        for trial in self.trials({}):
            trial.validate()

    def trials(self, rows: search.Rows) -> list[trial_lib.Trial]:
        """Returns all trials that `rows` determine, cheapest budget first.

        The first seed is trained at all learning rates, the others at its best one.

        Args:
          rows: finished trials, which decide about more learning rates and seeds.
        """
        points = [
            self._at_size(kind, size, budget, rows)
            for index, budget in enumerate(self.budgets)
            for kind in self.kinds
            for size in kind.sizes[index]
        ]
        return [
            *(trial for tuning, _ in points for trial in tuning),
            *(trial for _, repeated in points for trial in repeated),
        ]

    def _at_size(
        self, kind: Kind, size: Size, budget: float, rows: search.Rows
    ) -> tuple[list[trial_lib.Trial], list[trial_lib.Trial]]:
        """Trials of the first seed, and of the others at a known best rate."""
        at = functools.partial(self.trial, kind, size, budget)
        total = trial_lib.Budget(trial_lib.TOTAL_FLOPS, budget)
        tuning = search.search_rates(
            kind.method.learning_rates,
            functools.partial(at, self.seeds[0]),
            rows=rows,
            budgets=[total],
            max_rates=self.max_learning_rates,
        )
        found = [rows[t.identity] for t in tuning if t.identity in rows]
        if len(found) < len(tuning):
            return tuning, []
        rate = summary.best(found, total).trial.learning_rate
        return tuning, [at(seed, rate) for seed in self.seeds[1:]]

    def trial(
        self, kind: Kind, size: Size, budget: float, seed: int, learning_rate: float
    ) -> trial_lib.Trial:
        """Returns the trial of a kind at a size that spends the budget."""
        shape = dataclasses.replace(
            self.base.model,
            d_model=size.d_model,
            d_ff=size.d_ff,
            num_layers=size.num_layers,
            num_heads=size.num_heads,
            num_kv_heads=size.num_heads,
            rank=max(1, round(self.rank_ratio * size.d_model)),
        )
        sized = grid.Comparison(
            base=dataclasses.replace(self.base, model=shape), methods=(kind.method,)
        )
        draft = sized.trial(kind.method, learning_rate, seed)
        steps = max(round(budget / draft.flops(1)), 2)
        total = trial_lib.Budget(trial_lib.TOTAL_FLOPS, budget)
        return dataclasses.replace(
            draft,
            experiment=dataclasses.replace(draft.experiment, num_steps=steps),
            branches=(trial_lib.Branch(total, steps),),
        )
