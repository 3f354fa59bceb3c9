"""Named optimizer chains, and the typed configuration that builds one."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sct_jax import errors, spectral, stiefel, transforms

# Not the scalar type, which is callable: `optax.inject_hyperparams` would call it.
_FLOAT32 = jnp.dtype("float32")

SCHEDULES = ("constant", "cosine", "wsd")
RETRACTIONS = (*stiefel.RETRACTION_NAMES, transforms.LOSSLESS)
TANGENT_PROJECTIONS = ("gradient", "displacement")

Mask = Callable[[Any], Any]  # from params to a tree of booleans


def sct(
    learning_rate: transforms.ScalarOrSchedule,
    *,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    max_update_norm: transforms.ScalarOrSchedule | None = None,
    retraction: str = "cholesky_qr",
    singular_value_lr_multiplier: transforms.ScalarOrSchedule = 1.0,
    dense_lr_multiplier: transforms.ScalarOrSchedule = 1.0,
    moment_dtype: jax.typing.DTypeLike = _FLOAT32,
    base_width: int | None = None,
    tangent_projection: str | None = None,
    transport_moments: bool = False,
    decay_mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Spectral Compact Training: AdamW on u, s and v, then the Stiefel retraction.

    Adam, decay, the rate of each component, the learning rate, the clip of the
    composite update where asked for, and the retraction last. SpectralFactors are
    clipped and retracted; every other leaf gets plain AdamW. With the defaults this is
    Algorithm 1.

    Args:
      learning_rate: of u and v, and of everything else through its own factor.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled decay of s and of dense arrays with two or more axes;
        u and v have norm 1 by construction and never decay.
      max_update_norm: bound of ||W' - W||_2 per weight and step, as applied; None for
        no clip. See `transforms.clip_by_composite_spectral_norm`.
      retraction: "qr", "cholesky_qr" (the same map, batched), "polar", or "lossless",
        which keeps the whole product, see `transforms.retract_by_svd`.
      singular_value_lr_multiplier: factor of the learning rate for s.
      dense_lr_multiplier: factor of the learning rate for arrays outside factor tuples.
      moment_dtype: of both moments, float32 or bfloat16, which is rounded at random,
        see `transforms.scale_by_low_precision_adam`.
      base_width: fan at which the rate of u and v applies as it is; see
        `transforms.scale_components`.
      tangent_projection: "gradient" or "displacement": what of u and v is projected
        on the tangent space, if anything.
      transport_moments: whether first moments follow the factors, see
        `transforms.transport_moments`.
      decay_mask: from params to a tree of booleans that replaces the rule above, where
        the axes alone do not tell (norm scales stacked over layers).

    Returns:
      A transformation for any tree that mixes factor tuples and arrays.

    Raises:
      ValueError: for an unknown retraction or tangent projection.

    Example:
      >>> import jax, optax
      >>> from sct_jax import optimizers, spectral
      >>> params = {"w": spectral.init(jax.random.key(0), 16, 24, 4)}
      >>> tx = optimizers.sct(3e-3, max_update_norm=0.1)
      >>> state = tx.init(params)
      >>> loss = lambda p: (spectral.linear(jax.numpy.ones(16), p["w"]) ** 2).sum()
      >>> updates, state = tx.update(jax.grad(loss)(params), state, params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Kohlberger et al., Spectral Compact Training, arXiv 2604.00733, 2026, Algorithm 1
    """
    direction = transforms.scale_by_adam(b1, b2, eps, moment_dtype=moment_dtype)
    if transport_moments:
        direction = transforms.transport_moments(direction)
    parts = [
        direction,
        *_decay(weight_decay, decay_mask),
        *_rates(singular_value_lr_multiplier, dense_lr_multiplier, base_width),
        optax.scale_by_learning_rate(learning_rate),
    ]
    parts = _projected(parts, tangent_projection)
    return _on_the_manifold(parts, max_update_norm, retraction)


def tsvd(
    learning_rate: transforms.ScalarOrSchedule,
    *,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    max_update_norm: transforms.ScalarOrSchedule | None = None,
    retraction: str = "cholesky_qr",
    retraction_every: int | jax.Array = 1,
    retraction_tolerance: float | jax.Array | None = None,
    singular_value_lr_multiplier: transforms.ScalarOrSchedule = 1.0,
    dense_lr_multiplier: transforms.ScalarOrSchedule = 1.0,
    moment_dtype: jax.typing.DTypeLike = _FLOAT32,
    base_width: int | None = None,
    decay_mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Truncated SVD layers: AdamW on factors whose rank may change, lazily retracted.

    `Deviation:` the inner rules of TSVD are not public in a form that we could read.
    These are our own design: the direction of `sct`; columns that are not active held
    at s = 0 (`transforms.freeze_inactive_columns`), for `rank.resize` to mark; and orthonormality
    made cheap by retracting once per update whatever the micro-batches, and with
    `retraction_every` or `retraction_tolerance` only when it has drifted.

    Args:
      learning_rate: as of `sct`, and so for every argument that is not named here.
      b1: see `sct`.
      b2: see `sct`.
      eps: see `sct`.
      weight_decay: see `sct`.
      max_update_norm: see `sct`; not together with a lazy retraction.
      retraction: "qr", "cholesky_qr" or "polar".
      retraction_every: retract on every so many updates only.
      retraction_tolerance: retract only where max |x.T x - I| would pass this; with
        `retraction_every`, whichever comes first.
      singular_value_lr_multiplier: see `sct`.
      dense_lr_multiplier: see `sct`.
      moment_dtype: see `sct`.
      base_width: see `sct`.
      decay_mask: see `sct`.

    Raises:
      ValueError: for a clip together with a lazy retraction, whose promise needs
        orthonormal factors after every step.

    References:
      TSVD, arXiv 2605.28573, 2026
    """
    # What `optax.inject_hyperparams` hands on has no value here: it may be lazy.
    unknown = isinstance(retraction_every, jax.Array)
    lazy = unknown or retraction_every != 1 or retraction_tolerance is not None
    if lazy and max_update_norm is not None:
        raise ValueError(
            "max_update_norm bounds the update as applied, which needs a retraction on "
            "every step: leave retraction_every and retraction_tolerance out, and make "
            "the first one of the static_args where hyperparameters are injected"
        )
    parts = [
        transforms.scale_by_adam(b1, b2, eps, moment_dtype=moment_dtype),
        *_decay(weight_decay, decay_mask),
        *_rates(singular_value_lr_multiplier, dense_lr_multiplier, base_width),
        optax.scale_by_learning_rate(learning_rate),
        transforms.freeze_inactive_columns(),
    ]
    if not lazy:
        return _on_the_manifold(parts, max_update_norm, retraction)
    parts.append(
        transforms.retract_to_stiefel(
            retraction, every=retraction_every, tolerance=retraction_tolerance
        )
    )
    return optax.with_extra_args_support(optax.chain(*parts))


def stiefel_muon(
    learning_rate: transforms.ScalarOrSchedule,
    *,
    momentum: float | jax.Array = 0.95,
    nesterov: bool = True,
    coordinates: str = "factors",
    max_rotation: float | jax.Array = 0.1,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.95,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    max_update_norm: transforms.ScalarOrSchedule | None = None,
    retraction: str = "cholesky_qr",
    singular_value_lr_multiplier: transforms.ScalarOrSchedule = 1.0,
    dense_lr_multiplier: transforms.ScalarOrSchedule = 1.0,
    tangent_projection: str | None = None,
    decay_mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Stiefel Muon, ours: orthogonalised momentum on u and v, AdamW on all the rest.

    Columns of norm 1 turn by the rate however long they have trained, where a dense
    matrix grows and turns less: a rate that falls over most of the run suits it best.

    Args:
      learning_rate: by about as much, in radians, the columns of u and v turn per step;
        with the coordinates "svd", about the change of W in spectral norm.
      momentum: decay of the mean of the gradients of u and v.
      nesterov: whether to look one step ahead.
      coordinates: see `transforms.scale_by_stiefel_muon`. With "svd" the retraction is best
        "lossless", which keeps s descending.
      max_rotation: with the coordinates "svd", bound of the turn of a column, in radians.
      b1: decay of the first moment of s and of dense leaves.
      b2: decay of their second moment.
      eps: added to its root.
      weight_decay: decoupled decay of s and of dense arrays with two or more axes.
      max_update_norm: bound of ||W' - W||_2 per weight and step, as applied.
      retraction: see `sct`.
      singular_value_lr_multiplier: factor of the learning rate for s.
      dense_lr_multiplier: factor of the learning rate outside SpectralFactors.
      tangent_projection: see `sct`.
      decay_mask: see `sct`.

    Returns:
      A transformation for any tree that mixes factor tuples and arrays.

    Raises:
      ValueError: for an unknown coordinates, retraction or tangent projection.
    """
    direction = _partition(
        spectral.is_spectral,
        transforms.scale_by_stiefel_muon(
            momentum,
            nesterov=nesterov,
            coordinates=coordinates,
            s_b1=b1,
            s_b2=b2,
            eps=eps,
        ),
        transforms.scale_by_adam(b1, b2, eps),
    )
    parts = [
        direction,
        *_decay(weight_decay, decay_mask),
        *_rates(singular_value_lr_multiplier, dense_lr_multiplier, None),
        optax.scale_by_learning_rate(learning_rate),
    ]
    if coordinates == "svd":
        parts.append(transforms.limit_rotation(max_rotation))
    moments = "whitened" if coordinates == "svd" else "gradient"
    parts = _projected(parts, tangent_projection)
    return _on_the_manifold(parts, max_update_norm, retraction, moments)


def spectron(
    learning_rate: transforms.ScalarOrSchedule,
    *,
    momentum: float | jax.Array = 0.95,
    nesterov: bool = False,
    shape_factor: bool = False,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.95,
    eps: float | jax.Array = 1e-10,
    weight_decay: float | jax.Array = 0.0,
    dense_lr_multiplier: transforms.ScalarOrSchedule = 1.0,
    decay_mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Spectron: orthogonalised momentum on a and b, radius from their norms.

    LowRankFactors get Algorithm 1, every other leaf AdamW. The authors' code differs
    from the paper: it is had by `nesterov=True`, `shape_factor=True` and a
    `weight_decay`, which acts at the learning rate itself, not at the radius.

    Args:
      learning_rate: eta, to first order the bound of ||W' - W||_2.
      momentum: decay of the mean of the gradients of a and b.
      nesterov: see `transforms.scale_by_spectron`.
      shape_factor: see `transforms.scale_by_spectron`.
      b1: decay of the first moment of dense leaves.
      b2: decay of their second moment.
      eps: added to its root.
      weight_decay: decoupled decay of a, b and dense arrays with two or more axes.
      dense_lr_multiplier: factor of the learning rate for dense leaves.
      decay_mask: see `sct`.

    Raises:
      ValueError: for SpectralFactors in the tree, which would leave the manifold.

    References:
      Spectron, arXiv 2602.12429, 2026, Algorithm 1
    """
    direction = _partition(
        _is_low_rank,
        transforms.scale_by_spectron(
            momentum, nesterov=nesterov, shape_factor=shape_factor
        ),
        transforms.scale_by_adam(b1, b2, eps),
    )
    return _free(
        direction,
        *_decay(weight_decay, decay_mask),
        *_rates(1.0, dense_lr_multiplier, None),
        optax.scale_by_learning_rate(learning_rate),
    )


def adamw(
    learning_rate: transforms.ScalarOrSchedule,
    *,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    moment_dtype: jax.typing.DTypeLike = _FLOAT32,
    dense_lr_multiplier: transforms.ScalarOrSchedule = 1.0,
    decay_mask: Mask | None = None,
    matrix_mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Plain AdamW, a baseline: on dense weights, or naively on LowRankFactors.

    Args:
      learning_rate: of every leaf, but for `dense_lr_multiplier`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to its root.
      weight_decay: decoupled decay of a, b and dense arrays with two or more axes.
      moment_dtype: see `sct`.
      dense_lr_multiplier: factor of the learning rate for leaves that are not matrices.
      decay_mask: see `sct`.
      matrix_mask: see `muon`; a and b are matrices.

    Raises:
      ValueError: for SpectralFactors in the tree, which would leave the manifold.
    """
    return _free(
        transforms.scale_by_adam(b1, b2, eps, moment_dtype=moment_dtype),
        *_decay(weight_decay, decay_mask),
        *_rate_of_others(dense_lr_multiplier, matrix_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def muon(
    learning_rate: transforms.ScalarOrSchedule,
    *,
    momentum: float | jax.Array = 0.95,
    nesterov: bool = True,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.95,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    dense_lr_multiplier: transforms.ScalarOrSchedule = 1.0,
    decay_mask: Mask | None = None,
    matrix_mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon on matrices, a baseline, by `optax.contrib`; AdamW on all the rest.

    Args:
      learning_rate: of the matrices.
      momentum: decay of the mean of gradients.
      nesterov: whether to look one step ahead.
      b1: decay of the first moment of the other leaves.
      b2: decay of their second moment.
      eps: added to its root.
      weight_decay: decoupled decay of arrays with two or more axes.
      dense_lr_multiplier: factor of the learning rate for leaves that are not matrices.
      decay_mask: see `sct`.
      matrix_mask: from params to a tree of booleans, for which leaves are matrices;
        None: those with two or more axes. Leading axes are layers.

    Raises:
      ValueError: for SpectralFactors in the tree, which would leave the manifold.

    References:
      Jordan et al., Muon: an optimizer for hidden layers, 2024,
      https://kellerjordan.github.io/posts/muon
    """

    def dimensions(params):
        # The last two axes; those before them are layers.
        return jax.tree.map(
            lambda p: optax.contrib.MuonDimensionNumbers(p.ndim - 2, p.ndim - 1), params
        )

    for_matrices = optax.contrib.muon(
        learning_rate,
        beta=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        weight_decay_mask=decay_mask,
        muon_weight_dimension_numbers=dimensions,
    )
    for_others = optax.chain(
        transforms.scale_by_adam(b1, b2, eps),
        *_decay(weight_decay, decay_mask),
        *_rates(1.0, dense_lr_multiplier, None),
        optax.scale_by_learning_rate(learning_rate),
    )
    return _free(
        optax.partition(
            {"matrices": for_matrices, "others": for_others},
            lambda params: jax.tree.map(
                lambda is_matrix: "matrices" if is_matrix else "others",
                (matrix_mask or matrices_by_axes)(params),
            ),
        )
    )


def _projected(parts, tangent_projection):
    """The parts of a chain with the projection first or last, if any."""
    if tangent_projection is None:
        return parts
    if tangent_projection == "gradient":
        return [transforms.project_to_tangent(), *parts]
    if tangent_projection == "displacement":
        return [*parts, transforms.project_to_tangent()]
    raise ValueError(
        f"unknown tangent projection {tangent_projection!r}: choose one of "
        f"{', '.join(TANGENT_PROJECTIONS)}"
    )


def _on_the_manifold(parts, max_update_norm, retraction, moments="gradient"):
    """The chain of parts, then the clip if any, then the retraction."""
    if max_update_norm is not None:
        clip = transforms.clip_by_composite_spectral_norm(
            max_update_norm, retraction=retraction
        )
        parts = [*parts, clip]
    if retraction == transforms.LOSSLESS:
        return transforms.retract_by_svd(optax.chain(*parts), moments=moments)
    return optax.with_extra_args_support(
        optax.chain(*parts, transforms.retract_to_stiefel(retraction))
    )


def _free(*parts):
    """The chain of parts, for trees in which nothing has to stay orthonormal."""

    def init_fn(params):
        leaves = jax.tree.leaves(params, is_leaf=spectral.is_factors)
        if any(map(spectral.is_spectral, leaves)):
            raise ValueError(
                "SpectralFactors would not stay orthonormal under this rule: use sct, "
                "tsvd or stiefel_muon, or convert them by spectral.to_low_rank"
            )
        return tx.init(params)

    tx = optax.with_extra_args_support(optax.chain(*parts))
    return optax.GradientTransformationExtraArgs(init_fn, tx.update)


def _partition(chosen, for_chosen, for_others):
    """Two rules for two kinds of weights; factor tuples are never split."""
    return optax.partition(
        {"factors": for_chosen, "others": for_others},
        lambda params: jax.tree.map(
            lambda p: "factors" if chosen(p) else "others",
            params,
            is_leaf=spectral.is_factors,
        ),
    )


def _decay(weight_decay, decay_mask) -> list[optax.GradientTransformation]:
    if _is(weight_decay, 0.0):
        return []
    return [optax.add_decayed_weights(weight_decay, mask=decay_mask or decays_by_axes)]


def _rates(s, dense, base_width) -> list[optax.GradientTransformation]:
    if _is(s, 1.0) and _is(dense, 1.0) and base_width is None:
        return []
    return [transforms.scale_components(s=s, dense=dense, base_width=base_width)]


def _rate_of_others(dense, matrix_mask) -> list[optax.GradientTransformation]:
    """A factor of the rate for leaves that are not matrices, factors or dense."""
    others = lambda params: jax.tree.map(
        lambda is_matrix: not is_matrix, (matrix_mask or matrices_by_axes)(params)
    )
    return [optax.masked(part, others) for part in _rates(1.0, dense, None)]


def _is(value: Any, neutral: float) -> bool:
    """Whether a setting is left at its neutral value; an array may change later."""
    return isinstance(value, float | int) and value == neutral


def _is_low_rank(x: Any) -> bool:
    return isinstance(x, spectral.LowRankFactors)


def matrices_by_axes(params: optax.Params) -> Any:
    """Returns the default matrix mask: arrays with two or more axes."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def decays_by_axes(params: optax.Params) -> Any:
    """Returns the default decay mask: s, a, b, and dense arrays of rank >= 2."""

    def decays(p):
        if spectral.is_spectral(p):
            return spectral.SpectralFactors(False, True, False)  # pyright: ignore
        if spectral.is_factors(p):
            return jax.tree.map(lambda _: True, p)
        return p.ndim >= 2

    return jax.tree.map(decays, params, is_leaf=spectral.is_factors)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """What builds the optimizer of a run.

    Attributes:
      name: the chain, one of `CHAINS`. A field below that is named like a keyword of
        that function is handed on to it; others must stay at their defaults.
      peak_learning_rate: rate after warm-up.
      schedule: "constant", "cosine" or "wsd" (warm-up, stable, decay), after warm-up.
      warmup_steps: steps of linear warm-up from 0.
      final_rate_ratio: rate over the peak that cosine and wsd fall to; they would
        reach it one step after the last.
      decay_ratio: share of all steps in the linear decay of "wsd".
      max_update_norm: bound of ||W' - W||_2 per weight and step; None: no clip.
      weight_decay: decoupled decay of s and of dense matrices.
      grad_clip: bound of the global gradient norm; None: no clip.
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment; None: that of the chain, .95 or .999.
      eps: Adam's epsilon; None: that of the chain.
      singular_value_lr_multiplier: factor of the rate for s.
      dense_lr_multiplier: factor of the rate for arrays outside factors and, with adamw and
        muon, outside the matrices of the layers.
      base_width: fan at which the rate of u and v applies as it is; None: everywhere.
      retraction: "cholesky_qr", "qr", "polar" or "lossless".
      moment_dtype: of Adam's moments, "float32" or "bfloat16".
      tangent_projection: None, "gradient" or "displacement".
      transport_moments: whether first moments follow the factors.
      retraction_every: lazy retraction, on every so many steps only.
      retraction_tolerance: lazy retraction, only beyond this orthonormality error.
      momentum: decay of the mean of gradients that Newton and Schulz orthogonalise.
      nesterov: whether that mean looks one step ahead; None: as the rule has it.
      shape_factor: Spectron's factor sqrt(max(1, rows / columns)).
      coordinates: Stiefel Muon's, "factors" or "svd".
      max_rotation: bound of the turn of a column in the coordinates "svd", in radians.
    """

    name: str = "sct"
    peak_learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    final_rate_ratio: float = 0.1
    decay_ratio: float = 0.2
    max_update_norm: float | None = None
    weight_decay: float = 0.0
    grad_clip: float | None = None
    b1: float = 0.9
    b2: float | None = None
    eps: float | None = None
    singular_value_lr_multiplier: float = 1.0
    dense_lr_multiplier: float = 1.0
    base_width: int | None = None
    retraction: str = "cholesky_qr"
    moment_dtype: str = "float32"
    tangent_projection: str | None = None
    transport_moments: bool = False
    retraction_every: int = 1
    retraction_tolerance: float | None = None
    momentum: float = 0.95
    nesterov: bool | None = None
    shape_factor: bool = False
    coordinates: str = "factors"
    max_rotation: float = 0.1

    def validate(self) -> None:
        """Raises UserError, naming the field, for values that make no optimizer."""
        errors.check_choice("optimizer.name", self.name, tuple(CHAINS))
        errors.check_choice("optimizer.schedule", self.schedule, SCHEDULES)
        for field, choices in (
            ("retraction", RETRACTIONS),
            ("moment_dtype", ("float32", "bfloat16")),
            ("tangent_projection", (None, *TANGENT_PROJECTIONS)),
            ("coordinates", transforms.COORDINATES),
        ):
            errors.check_choice(f"optimizer.{field}", getattr(self, field), choices)
        check = functools.partial(errors.check_bounds, "optimizer.", self)
        check("peak_learning_rate", "max_update_norm", "grad_clip", "eps", above=0)
        check("retraction_tolerance", "max_rotation", "base_width", above=0)
        check(
            "weight_decay",
            "singular_value_lr_multiplier",
            "dense_lr_multiplier",
            least=0,
        )
        check("b1", "b2", "momentum", least=0, below=1)
        check("final_rate_ratio", "decay_ratio", least=0, most=1)
        check("warmup_steps", least=0)
        check("retraction_every", least=1)
        self._validate_chain()

    def _validate_chain(self) -> None:
        """Raises UserError for fields that the chain does not know or allow."""
        known = inspect.signature(CHAINS[self.name]).parameters
        for field in dataclasses.fields(self):
            errors.check(
                f"optimizer.{field.name}",
                field.name in known
                or field.name in _OF_EVERY_CHAIN
                or getattr(self, field.name) == field.default,
                f"has no effect with optimizer.name = {self.name!r}: leave it at "
                f"{field.default!r}",
            )
        try:
            self.chain(0.0)
        except ValueError as error:
            raise errors.UserError(f"optimizer: {error}") from error

    def without_effect(self) -> list[str]:
        """Returns a sentence for every field that is set, but in vain."""
        cosine, wsd = self.schedule == "cosine", self.schedule == "wsd"
        needs = {
            "decay_ratio": (wsd, 'optimizer.schedule = "wsd"'),
            "final_rate_ratio": (cosine or wsd, "an optimizer.schedule that decays"),
            "max_rotation": (
                self.coordinates == "svd",
                'optimizer.coordinates = "svd"',
            ),
        }
        return [
            f"optimizer.{field}: has no effect without {needed}"
            for field, (met, needed) in needs.items()
            if not met and getattr(self, field) != getattr(OptimizerConfig, field)
        ]

    def learning_rate(self, num_steps: int) -> optax.Schedule:
        """Returns the rate as a function of the number of updates already applied."""
        peak, last = self.peak_learning_rate, num_steps - self.warmup_steps
        floor = peak * self.final_rate_ratio
        if self.schedule == "cosine":
            main = optax.cosine_decay_schedule(
                peak, max(last, 1), self.final_rate_ratio
            )
        elif self.schedule == "wsd":
            # Where warm-up leaves less, all of that: the end is where it should be.
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
        # The first update must not be lost to a rate of zero.
        warmup = optax.linear_schedule(
            peak / self.warmup_steps, peak, max(self.warmup_steps - 1, 1)
        )
        return optax.join_schedules([warmup, main], [self.warmup_steps])

    def decay_steps(self, num_steps: int) -> int:
        """Returns the length of the decay that ends a run with the schedule "wsd"."""
        return max(round(self.decay_ratio * num_steps), 1)

    def build(
        self,
        num_steps: int,
        *,
        decay_mask: Mask | None = None,
        matrix_mask: Mask | None = None,
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the transformation for a run of `num_steps` updates.

        Args:
          num_steps: length of the run, for the schedule.
          decay_mask: which leaves decay, where the axes alone do not tell.
          matrix_mask: which leaves are matrices to muon and adamw, likewise.
        """
        return self.chain(
            self.learning_rate(num_steps),
            decay_mask=decay_mask,
            matrix_mask=matrix_mask,
        )

    def chain(
        self, learning_rate: transforms.ScalarOrSchedule, **keywords: Any
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the transformation at a rate of one's own.

        Args:
          learning_rate: in the place of `peak_learning_rate` and its schedule.
          **keywords: of the chain's function, in the place of the fields; those that it
            does not have are ignored.
        """
        fields = dataclasses.asdict(self) | keywords
        for field in ("b2", "eps", "nesterov"):  # as the chain has them
            if fields[field] is None:
                del fields[field]
        known = inspect.signature(CHAINS[self.name]).parameters
        tx = CHAINS[self.name](
            learning_rate, **{k: v for k, v in fields.items() if k in known}
        )
        if self.grad_clip is not None:
            tx = optax.chain(optax.clip_by_global_norm(self.grad_clip), tx)
        return optax.with_extra_args_support(tx)


CHAINS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    chain.__name__: chain for chain in (sct, tsvd, stiefel_muon, spectron, adamw, muon)
}

_OF_EVERY_CHAIN = (
    "name",
    "peak_learning_rate",
    "schedule",
    "warmup_steps",
    "final_rate_ratio",
    "decay_ratio",
    "grad_clip",
)
