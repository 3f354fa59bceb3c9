"""What a study compares: methods, learning rates, seeds and budgets."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from experiments.studies import trial as trial_lib
from sct_jax import errors, model
from sct_jax.training import accounting, config

Change = Callable[[config.ExperimentConfig], config.ExperimentConfig]

# By method, seconds of a plain step, and of one with the dense path of a guide.
Seconds = Mapping[str, Sequence[float]]


def unchanged(experiment: config.ExperimentConfig) -> config.ExperimentConfig:
    """Returns the experiment."""
    return experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A training method, and the learning rates to tune it over.

    Attributes:
      name: for tables.
      learning_rates: peak learning rates, ascending. The search adds more beyond an end
        that is best.
      change: makes the experiment of the method from the base of the study.
      forward: one of `forward_variants.FORWARD_VARIANTS`.
      non_matrix_lr: see `trial.Trial`.
      always: train all seeds, however the method ranks.
      narrow: shrink d_model and d_ff of a dense model to the FLOPs per token of the
        low-rank base. It shows what any smaller model would gain.
      variation_of: name of the method that this one varies.
    """

    name: str
    learning_rates: tuple[float, ...]
    change: Change = unchanged
    forward: str = "plain"
    non_matrix_lr: float | None = None
    always: bool = False
    narrow: bool = False
    variation_of: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Methods x learning rates x seeds on one architecture and corpus.

    All methods are tuned alike, with the first seed. A search adds learning rates
    beyond an end that is best, by the ratio of its neighbours, up to
    `max_learning_rates`. Every kind of budget has its own best rate, see
    `summary.best`. The non-matrix learning rate is searched in the same way at that
    rate, and both in turn until neither alone improves the loss. The other seeds are
    then trained at all best settings of the `finalists` best methods at the first kind
    of budget, and of those marked `always`.

    Attributes:
      base: the experiment that methods change, with the model of the low-rank ones.
      methods: what is compared.
      seeds: of parameters and data order.
      tokens_per_parameter: lengths, in training tokens per parameter of the dense
        model. The first one chooses the learning rates.
      budgets: what is held equal at each length: "tokens", "flops", "seconds". The
        first one ranks the methods.
      reference: method whose time per step sets the budget "seconds".
      non_matrix_lr_factors: non-matrix learning rates to search, as multiples of the
        best; empty for none.
      max_learning_rates: most learning rates of one search.
      finalists: how many methods get all seeds.
    """

    base: config.ExperimentConfig
    methods: tuple[Method, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    tokens_per_parameter: tuple[float, ...] = (0.4,)
    budgets: tuple[str, ...] = ("tokens", "flops")
    reference: str = ""
    non_matrix_lr_factors: tuple[float, ...] = ()
    max_learning_rates: int = 6
    finalists: int = 6

    def validate(self) -> None:
        """Raises UserError, naming the field."""
        names = [method.name for method in self.methods]
        check_distinct("methods", names)
        errors.check("methods", "," not in "".join(names), "a name has a comma")
        check_distinct("seeds", self.seeds)
        lengths = self.tokens_per_parameter
        check_distinct("tokens_per_parameter", lengths)
        errors.check("tokens_per_parameter", min(lengths) > 0, "must be positive")
        check_distinct("budgets", self.budgets)
        for kind in self.budgets:
            errors.check_choice("budgets", kind, tuple(trial_lib.EQUAL))
        if "seconds" in self.budgets:
            errors.check_choice("reference", self.reference, tuple(names))
        if self.non_matrix_lr_factors:
            check_ascending("non_matrix_lr_factors", self.non_matrix_lr_factors)
            errors.check(
                "non_matrix_lr_factors",
                1 in self.non_matrix_lr_factors,
                "must contain 1",
            )
        self._check_base()
        for method in self.methods:
            field = f"methods.{method.name}.learning_rates"
            check_ascending(field, method.learning_rates)
            self.trial(method, method.learning_rates[0], self.seeds[0]).validate()
            errors.check(
                f"methods.{method.name}: phases.switch_at",
                "seconds" not in self.budgets
                or not self.experiment(method).phases.switch_at,
                'has no equal time: leave "seconds" out of budgets',
            )
            self._check_text(method)

    def _check_base(self) -> None:
        """Raises UserError for a field of the base that every trial sets."""
        base, default = self.base, config.ExperimentConfig()
        rate, default_rate = (
            experiment.optimizer.peak_learning_rate for experiment in (base, default)
        )
        for field, value, unset, instead in (
            ("num_steps", base.num_steps, default.num_steps, "budgets"),
            ("seed", base.seed, default.seed, "seeds"),
            ("optimizer.peak_learning_rate", rate, default_rate, "learning_rates"),
        ):
            errors.check(
                f"base.{field}", value == unset, f"has no effect; set {instead}"
            )

    def _check_text(self, method: Method) -> None:
        """Raises UserError if a method would be evaluated on other text."""
        own, base = self.experiment(method), self.base
        evaluated = [x.eval.num_batches * x.data.batch_size for x in (own, base)]
        pairs = [
            ("model.vocab_size", own.model.vocab_size, base.model.vocab_size),
            ("eval.num_batches x data.batch_size", *evaluated),
        ]
        pairs += [
            (f"data.{f.name}", getattr(own.data, f.name), getattr(base.data, f.name))
            for f in dataclasses.fields(own.data)
            if f.name not in ("batch_size", "num_microbatches")
        ]
        for field, value, expected in pairs:
            errors.check(
                f"methods.{method.name}: {field}",
                value == expected,
                f"{value!r} differs from {expected!r} of the base; losses on different "
                "text do not compare",
            )

    def experiment(self, method: Method) -> config.ExperimentConfig:
        """Returns the experiment of a method, without its learning rate and seed."""
        experiment = method.change(self.base)
        if not method.narrow:
            return experiment
        width, d_ff = _narrow_sizes(self.base.model, self.base.data.seq_len)
        narrow = dataclasses.replace(experiment.model, d_model=width, d_ff=d_ff)
        return dataclasses.replace(experiment, model=narrow)

    def trial(
        self,
        method: Method,
        learning_rate: float,
        seed: int,
        *,
        non_matrix_lr: float | None = None,
        seconds: Seconds | None = None,
    ) -> trial_lib.Trial:
        """Returns the trial of a method.

        Args:
          method: what to train.
          learning_rate: peak learning rate.
          seed: of parameters and data order.
          non_matrix_lr: see `trial.Trial`; None takes the method's own.
          seconds: time per step of every method, for the budget "seconds".
        """
        experiment = self.experiment(method)
        optimizer = dataclasses.replace(
            experiment.optimizer, peak_learning_rate=learning_rate
        )
        draft = trial_lib.Trial(
            method=method.name,
            experiment=dataclasses.replace(experiment, seed=seed, optimizer=optimizer),
            branches=tuple(
                trial_lib.Branch(
                    trial_lib.Budget("tokens", length), self._steps(length, experiment)
                )
                for length in self.tokens_per_parameter
            ),
            forward=method.forward,
            non_matrix_lr=(
                method.non_matrix_lr if non_matrix_lr is None else non_matrix_lr
            ),
            variation_of=method.variation_of,
        )
        branches = tuple(
            trial_lib.Branch(
                trial_lib.Budget(kind, length),
                self._equal_steps(kind, length, draft, seconds),
            )
            for length in self.tokens_per_parameter
            for kind in self.budgets
            if kind != "seconds" or seconds is not None
        )
        longest = max(branch.steps for branch in branches)
        return dataclasses.replace(
            draft,
            experiment=dataclasses.replace(draft.experiment, num_steps=longest),
            branches=branches,
        )

    def _steps(
        self, tokens_per_parameter: float, experiment: config.ExperimentConfig
    ) -> int:
        """Steps for so many tokens per parameter of the dense model."""
        tokens = tokens_per_parameter * dense_parameters(self.base.model)
        return max(round(tokens / experiment.data.tokens_per_step), 2)

    def _equal_steps(
        self,
        kind: str,
        length: float,
        draft: trial_lib.Trial,
        seconds: Seconds | None,
    ) -> int:
        """Steps in which a method spends as much as the dense reference."""
        if kind == "flops":
            dense = accounting.flops_per_token(
                accounting.dense_config(self.base.model),
                seq_len=self.base.data.seq_len,
            )
            steps = self._steps(length, self.base)
            budget = steps * self.base.data.tokens_per_step * dense
            # FLOPs are linear in the steps beyond those with a dense path.
            plain = dataclasses.replace(draft, forward="plain")
            extra = draft.flops(draft.fade_steps) - plain.flops(draft.fade_steps)
            return plain.steps_for(budget - extra)
        if kind == "seconds" and seconds is not None:
            plain, guided = seconds[draft.method]
            (reference,) = (m for m in self.methods if m.name == self.reference)
            steps = self._steps(length, self.experiment(reference))
            budget = steps * seconds[self.reference][0]
            extra = draft.fade_steps * (guided - plain)
            return max(round((budget - extra) / plain), 2)
        return self._steps(length, draft.experiment)


def check_distinct(field: str, values: Sequence[object]) -> None:
    """Raises UserError, naming the field, for no values or one that repeats."""
    errors.check(field, bool(values), "must not be empty")
    errors.check(field, len(set(values)) == len(values), "a value repeats")


def check_ascending(field: str, values: Sequence[float]) -> None:
    """Raises UserError, naming the field, for values that are not 0 < a < b < ..."""
    check_distinct(field, values)
    errors.check(field, min(values) > 0, "must be positive")
    errors.check(field, list(values) == sorted(values), "must be ascending")


@functools.lru_cache
def _narrow_sizes(low_rank: model.ModelConfig, seq_len: int) -> tuple[int, int]:
    """d_model and d_ff of a dense model with the FLOPs per token of a low-rank one.

    The nearest width at the same proportions, then the nearest d_ff at that width.
    """
    budget = accounting.flops_per_token(low_rank, seq_len=seq_len)

    def at(width: int, d_ff: int) -> model.ModelConfig:
        dense = accounting.dense_config(low_rank)
        return dataclasses.replace(dense, d_model=width, d_ff=d_ff)

    def excess(shape: model.ModelConfig) -> float:
        return abs(accounting.flops_per_token(shape, seq_len=seq_len) - budget)

    even_heads = 2 * low_rank.num_heads
    widths = range(even_heads, low_rank.d_model, even_heads)
    ratio = low_rank.d_ff / low_rank.d_model
    found = min((at(w, round(w * ratio)) for w in widths), key=excess)
    found = min((at(found.d_model, f) for f in range(1, low_rank.d_ff)), key=excess)
    return found.d_model, found.d_ff


@functools.lru_cache
def dense_parameters(shape: model.ModelConfig) -> int:
    """Returns the parameters of the dense model, by which lengths are measured."""
    return accounting.parameters(accounting.dense_config(shape))
