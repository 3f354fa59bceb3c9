"""The optimizer of a run: a schedule, and one typed configuration per chain.

Every class holds the fields of one chain of `sct_jax.optimizers` and no others. A field
that is not shared by all chains is a keyword of that function, under the same name.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import optax

from sct_jax import errors, optimizers, transforms
from sct_jax.training import guard as guard_lib

C = TypeVar("C", bound="OptimizerConfig")

Chain = Callable[..., optax.GradientTransformationExtraArgs]

SCHEDULES = ("constant", "cosine", "wsd")
MOMENT_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """What all chains share: the learning rate and the clip of the global norm.

    Attributes:
      name: the chain: sct, tsvd, stiefel_muon, spectron, adamw or muon.
      peak_learning_rate: learning rate after warmup.
      schedule: "constant", "cosine" or "wsd" (warmup, stable, decay).
      warmup_steps: steps of linear warmup.
      final_rate_ratio: final over peak learning rate, for cosine and wsd. It would be
        reached one step after the last.
      decay_ratio: share of all steps that "wsd" decays over, linearly.
      grad_clip: bound of the global gradient norm; None for no clip.
      skip_nonfinite: a step with a loss or gradient that is not finite is not applied;
        after this many in a row the run ends. None applies every step.
      spikes: "log" counts losses and gradient norms far above their trend, "skip" does
        not apply those steps either, see `guard.Guard`.
    """

    name: str = dataclasses.field(default="", init=False)
    peak_learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    final_rate_ratio: float = 0.1
    decay_ratio: float = 0.2
    grad_clip: float | None = None
    skip_nonfinite: int | None = guard_lib.DEFAULT.max_skipped
    spikes: str = guard_lib.DEFAULT.spikes

    # The function of `sct_jax.optimizers`, and whether it takes a `matrix_mask`.
    chain_fn: ClassVar[Chain]
    takes_matrix_mask: ClassVar[bool] = False

    def validate(self) -> None:
        """Raises UserError, naming the field, for an invalid value."""
        for field, choices in _CHOICES.items():
            if hasattr(self, field):
                errors.check_choice(f"optimizer.{field}", getattr(self, field), choices)
        for bounds, names in _BOUNDS:
            present = [name for name in names.split() if hasattr(self, name)]
            errors.check_bounds("optimizer.", self, *present, **bounds)
        try:
            self.chain(0.0)
        except ValueError as error:
            raise errors.UserError(f"optimizer: {error}") from error

    @property
    def guard(self) -> guard_lib.Guard:
        """Returns what decides which steps are applied."""
        return guard_lib.Guard(self.skip_nonfinite, self.spikes)

    def unused_fields(self) -> list[str]:
        """Returns a sentence for every field that is set but has no effect."""
        decays = self.schedule in ("cosine", "wsd")
        needs = {
            "decay_ratio": (self.schedule == "wsd", 'optimizer.schedule = "wsd"'),
            "final_rate_ratio": (decays, "an optimizer.schedule that decays"),
        }
        return [
            f"optimizer.{field}: has no effect without {needed}"
            for field, (met, needed) in needs.items()
            if not met and getattr(self, field) != _default(type(self), field)
        ]

    def learning_rate(self, num_steps: int) -> optax.Schedule:
        """Returns the learning rate as a function of the number of applied updates."""
        peak, last = self.peak_learning_rate, num_steps - self.warmup_steps
        floor = peak * self.final_rate_ratio
        if self.schedule == "cosine":
            main = optax.cosine_decay_schedule(
                peak, max(last, 1), self.final_rate_ratio
            )
        elif self.schedule == "wsd":
            # A long warmup shortens the decay, so that the run still ends at the floor.
            decay = min(self.decay_steps(num_steps), max(last, 1))
            main = optax.join_schedules(
                [
                    optax.constant_schedule(peak),
                    optax.linear_schedule(peak, floor, decay),
                ],
                [max(last - decay, 0)],
            )
        else:
            main = optax.constant_schedule(peak)
        if not self.warmup_steps:
            return main
        # Starting at zero would waste the first update.
        warmup = optax.linear_schedule(
            peak / self.warmup_steps, peak, max(self.warmup_steps - 1, 1)
        )
        return optax.join_schedules([warmup, main], [self.warmup_steps])

    def decay_steps(self, num_steps: int) -> int:
        """Returns the number of steps that the schedule "wsd" decays over."""
        return max(round(self.decay_ratio * num_steps), 1)

    def build(
        self,
        num_steps: int,
        *,
        decay_mask: optimizers.Mask | None = None,
        matrix_mask: optimizers.Mask | None = None,
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the transformation for a run of `num_steps` updates.

        Args:
          num_steps: length of the run, for the schedule.
          decay_mask: leaves that decay; by their number of axes if None.
          matrix_mask: leaves that `muon` and `adamw` treat as matrices, likewise.
        """
        return self.chain(
            self.learning_rate(num_steps),
            decay_mask=decay_mask,
            matrix_mask=matrix_mask,
        )

    def chain(
        self,
        learning_rate: transforms.ScalarOrSchedule,
        *,
        decay_mask: optimizers.Mask | None = None,
        matrix_mask: optimizers.Mask | None = None,
        **hyperparams: Any,
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the transformation at a given learning rate.

        Args:
          learning_rate: replaces `peak_learning_rate` and its schedule.
          decay_mask: see `build`.
          matrix_mask: see `build`.
          **hyperparams: replace fields of this chain. They may be tracers, as under
            `optax.inject_hyperparams`.
        """
        keywords = {name: getattr(self, name) for name in own_fields(type(self))}
        keywords |= {"decay_mask": decay_mask} | hyperparams
        if self.takes_matrix_mask:
            keywords["matrix_mask"] = matrix_mask
        tx = type(self).chain_fn(learning_rate, **keywords)
        if self.grad_clip is not None:
            tx = optax.chain(optax.clip_by_global_norm(self.grad_clip), tx)
        return optax.with_extra_args_support(tx)

    def to(self, kind: type[C], **changes: Any) -> C:
        """Returns another chain with the fields that were set here and that it has.

        Fields at the default of this class take the default of `kind`: b2 and eps
        differ among chains.

        Args:
          kind: class of the other chain.
          **changes: fields of `kind` to set.
        """
        names = {field.name for field in dataclasses.fields(kind)}
        kept = {name: x for name, x in self.set_fields().items() if name in names}
        return kind(**(kept | changes))

    def set_fields(self) -> dict[str, Any]:
        """Returns the fields that differ from their defaults."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.init and getattr(self, field.name) != field.default
        }


def _chain(function: Chain) -> Any:
    """A chain as a class attribute: `staticmethod` keeps it from binding `self`."""
    return staticmethod(function)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Adam(OptimizerConfig):
    """Adam's hyperparameters, which every chain has for some of its leaves.

    Attributes:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled decay of s and of dense matrices.
      dense_lr_multiplier: multiplies the learning rate of arrays outside factors; with
        adamw and muon, of all but the matrices of the layers.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    dense_lr_multiplier: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OnStiefel(_Adam):
    """Chains that keep u and v on the Stiefel manifold.

    Attributes:
      max_update_norm: bound of ||W' - W||_2 per weight and step; None for no clip.
      retraction: "cholesky_qr", "qr", "polar", "svd", or "none" to leave u and v free.
      singular_value_lr_multiplier: multiplies the learning rate of s.
    """

    max_update_norm: float | None = None
    retraction: str = "cholesky_qr"
    singular_value_lr_multiplier: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sct(_OnStiefel):
    """`optimizers.sct`: AdamW on u, s and v, then the Stiefel retraction.

    Attributes:
      moment_dtype: of Adam's moments, "float32" or "bfloat16".
      base_width: fan at which the learning rate of u and v applies unscaled; None to
        scale nowhere.
      tangent_projection: None, "gradient" or "displacement".
      transport_moments: whether first moments follow the factors.
    """

    name: str = dataclasses.field(default="sct", init=False)
    moment_dtype: str = "float32"
    base_width: int | None = None
    tangent_projection: str | None = None
    transport_moments: bool = False

    chain_fn: ClassVar[Chain] = _chain(optimizers.sct)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tsvd(_OnStiefel):
    """`optimizers.tsvd`: sct with ranks that may change and a lazy retraction.

    Attributes:
      moment_dtype: of Adam's moments, "float32" or "bfloat16".
      base_width: fan at which the learning rate of u and v applies unscaled; None to
        scale nowhere.
      retraction_every: steps between retractions.
      retraction_tolerance: retract only beyond this orthonormality error.
    """

    name: str = dataclasses.field(default="tsvd", init=False)
    moment_dtype: str = "float32"
    base_width: int | None = None
    retraction_every: int = 1
    retraction_tolerance: float | None = None

    chain_fn: ClassVar[Chain] = _chain(optimizers.tsvd)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StiefelMuon(_OnStiefel):
    """`optimizers.stiefel_muon`: orthogonalised momentum on u and v, Adam on the rest.

    Attributes:
      b2: decay of the second moment.
      momentum: decay of the mean of gradients that is orthogonalised.
      nesterov: whether that mean looks one step ahead.
      coordinates: "factors" or "svd".
      max_rotation: bound of the rotation of a column per step, in radians, for the
        coordinates "svd".
      tangent_projection: None, "gradient" or "displacement".
    """

    name: str = dataclasses.field(default="stiefel_muon", init=False)
    b2: float = 0.95
    momentum: float = 0.95
    nesterov: bool = True
    coordinates: str = "factors"
    max_rotation: float = 0.1
    tangent_projection: str | None = None

    chain_fn: ClassVar[Chain] = _chain(optimizers.stiefel_muon)

    def unused_fields(self) -> list[str]:
        """Returns a sentence for every field that is set but has no effect."""
        unused = super().unused_fields()
        moved = self.max_rotation != _default(type(self), "max_rotation")
        if moved and self.coordinates != "svd":
            unused.append(
                "optimizer.max_rotation: has no effect without "
                'optimizer.coordinates = "svd"'
            )
        return unused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spectron(_Adam):
    """`optimizers.spectron`: orthogonalised momentum on a and b, radius by their norms.

    Attributes:
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      momentum: decay of the mean of gradients that is orthogonalised.
      nesterov: whether that mean looks one step ahead.
      shape_factor: whether to multiply by sqrt(max(1, rows / columns)).
    """

    name: str = dataclasses.field(default="spectron", init=False)
    b2: float = 0.95
    eps: float = 1e-10
    momentum: float = 0.95
    nesterov: bool = False
    shape_factor: bool = False

    chain_fn: ClassVar[Chain] = _chain(optimizers.spectron)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(_Adam):
    """`optimizers.adamw`, a baseline on dense weights or on LowRankFactors.

    Attributes:
      moment_dtype: of Adam's moments, "float32" or "bfloat16".
    """

    name: str = dataclasses.field(default="adamw", init=False)
    moment_dtype: str = "float32"

    chain_fn: ClassVar[Chain] = _chain(optimizers.adamw)
    takes_matrix_mask: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(_Adam):
    """`optimizers.muon`, a baseline on dense weights or on LowRankFactors.

    Attributes:
      b2: decay of the second moment.
      momentum: decay of the mean of gradients that is orthogonalised.
      nesterov: whether that mean looks one step ahead.
    """

    name: str = dataclasses.field(default="muon", init=False)
    b2: float = 0.95
    momentum: float = 0.95
    nesterov: bool = True

    chain_fn: ClassVar[Chain] = _chain(optimizers.muon)
    takes_matrix_mask: ClassVar[bool] = True


CHAINS: dict[str, type[OptimizerConfig]] = {
    kind.name: kind for kind in (Sct, Tsvd, StiefelMuon, Spectron, AdamW, Muon)
}

# Chains that leave factors unconstrained; the others need SpectralFactors.
LOW_RANK_CHAINS = ("spectron", "adamw", "muon")

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "name": tuple(CHAINS),
    "schedule": SCHEDULES,
    "retraction": optimizers.RETRACTIONS,
    "moment_dtype": MOMENT_DTYPES,
    "tangent_projection": (None, *optimizers.TANGENT_PROJECTIONS),
    "coordinates": transforms.COORDINATES,
    "spikes": guard_lib.SPIKES,
}

_BOUNDS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"above": 0}, "peak_learning_rate max_update_norm grad_clip eps"),
    ({"above": 0}, "retraction_tolerance max_rotation base_width"),
    ({"least": 0}, "weight_decay warmup_steps"),
    ({"least": 0}, "singular_value_lr_multiplier dense_lr_multiplier"),
    ({"least": 0, "below": 1}, "b1 b2 momentum"),
    ({"least": 0, "most": 1}, "final_rate_ratio decay_ratio"),
    ({"least": 1}, "retraction_every skip_nonfinite"),
    # Steps and widths meet int32 arrays.
    ({"most": errors.MAX_INT32}, "warmup_steps retraction_every skip_nonfinite"),
    ({"most": errors.MAX_INT32}, "base_width"),
)


def own_fields(kind: type[OptimizerConfig]) -> tuple[str, ...]:
    """Returns the fields of a chain that not all chains share: its keywords."""
    shared = {field.name for field in dataclasses.fields(OptimizerConfig)}
    return tuple(f.name for f in dataclasses.fields(kind) if f.name not in shared)


@functools.cache
def field_kinds() -> dict[str, type[OptimizerConfig]]:
    """Returns every field of any chain, with a class that has it."""
    kinds = (OptimizerConfig, *CHAINS.values())
    return {field.name: kind for kind in kinds for field in dataclasses.fields(kind)}


def from_fields(values: Mapping[str, Any]) -> OptimizerConfig:
    """Returns the configuration of the chain `values["name"]`.

    Accepts fields of other chains at their defaults: configurations written before each
    chain had its own class hold them, and a flag may reset one.

    Raises:
      UserError: for an unknown chain or field, and for a field of another chain that is
        not at its default.
    """
    errors.check_choice("optimizer.name", values.get("name", "sct"), tuple(CHAINS))
    kind = CHAINS[values.get("name", "sct")]
    names = {field.name for field in dataclasses.fields(kind)}
    own = {}
    for field, value in values.items():
        if field == "name":
            continue
        if field in names:
            own[field] = value
            continue
        errors.check_choice("optimizer", field, tuple(field_kinds()))
        default = _default(field_kinds()[field], field)
        errors.check(
            f"optimizer.{field}",
            value == default,
            f"{value!r} has no effect, as optimizer.name = {kind.name!r} has no such "
            f"field; set it to {default!r}, or choose a chain that has it",
        )
    return kind(**own)


def _default(kind: type[OptimizerConfig], field: str) -> Any:
    return next(f.default for f in dataclasses.fields(kind) if f.name == field)
