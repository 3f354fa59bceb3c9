"""Optimizers: one chain of transformations per method, with its default masks.

In `optax.inject_hyperparams`, name masks in `static_args`: it calls functions as
schedules. For bfloat16 parameters also pass it hyperparam_dtype=jnp.float32, because
b2 = .999 would round to 1.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sct_jax import spectral, stiefel, transforms

# A dtype, not `jnp.float32`: `optax.inject_hyperparams` calls callable arguments.
_FLOAT32 = jnp.dtype("float32")

RETRACTIONS = (*stiefel.RETRACTION_NAMES, "svd", "none")
TANGENT_PROJECTIONS = ("gradient", "displacement")

Mask = Callable[[Any], Any] | Any  # a tree of booleans, or from params to one


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

    Chains Adam, weight decay, the learning-rate multipliers, the learning rate, the
    optional clip of the composite update, and the retraction. The clip and the
    retraction act on SpectralFactors; every other leaf gets plain AdamW. The defaults
    are Algorithm 1.

    Args:
      learning_rate: of u and v; multiplied for s and for arrays outside factor tuples.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled decay of s and of dense arrays with two or more axes. u
        and v have norm 1 by construction and never decay.
      max_update_norm: bound of ||W' - W||_2 per weight and step, as applied; None for
        no clip. See `transforms.clip_by_composite_spectral_norm`.
      retraction: "qr", "cholesky_qr" (the same map, batched), "polar", "svd" (keeps the
        whole product, see `transforms.retract_by_svd`), or "none", which leaves u and
        v free, for ablations.
      singular_value_lr_multiplier: multiplies the learning rate of s.
      dense_lr_multiplier: multiplies the learning rate of arrays outside factor tuples.
      moment_dtype: of both moments, float32, or bfloat16 with stochastic rounding. See
        `transforms.scale_by_low_precision_adam`.
      base_width: fan at which the learning rate of u and v applies unscaled. See
        `transforms.scale_components`.
      tangent_projection: "gradient" or "displacement", the quantity to project onto the
        tangent space; None for no projection.
      transport_moments: whether first moments follow the factors. See
        `transforms.transport_moments`.
      decay_mask: tree of booleans, the leaves that decay, or a function from params to
        one; `decays_by_axes` if None. Norm scales stacked over layers need a mask.

    Returns:
      A transformation for trees of factor tuples and arrays.

    Raises:
      ValueError: for an unknown retraction or tangent projection, and for
        max_update_norm without a retraction.

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
    _check(locals())
    direction = transforms.scale_by_adam(b1, b2, eps, moment_dtype=moment_dtype)
    if transport_moments:
        direction = transforms.transport_moments(direction)
    parts = [
        direction,
        *_weight_decay(weight_decay, decay_mask),
        *_lr_multipliers(singular_value_lr_multiplier, dense_lr_multiplier, base_width),
        optax.scale_by_learning_rate(learning_rate),
    ]
    parts = _with_tangent_projection(parts, tangent_projection)
    return _with_retraction(parts, max_update_norm, retraction)


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
    """Truncated SVD layers: `sct` with ranks that may change and a lazy retraction.

    `Deviation:` we found no public description of the inner rules of TSVD, so these are
    our own: the update direction of `sct`; s held at zero in inactive columns
    (`transforms.freeze_inactive_columns`), which `rank.resize` marks; one retraction
    per update, after all micro-batches, or only as often as `retraction_every` and
    `retraction_tolerance` require.

    Args:
      learning_rate: see `sct`.
      b1: see `sct`.
      b2: see `sct`.
      eps: see `sct`.
      weight_decay: see `sct`.
      max_update_norm: see `sct`; not with a lazy retraction.
      retraction: see `sct`; a lazy retraction is "qr", "cholesky_qr" or "polar".
      retraction_every: number of updates between retractions.
      retraction_tolerance: retract when max |x.T x - I| would exceed this value. With
        `retraction_every`, retract when either condition holds.
      singular_value_lr_multiplier: see `sct`.
      dense_lr_multiplier: see `sct`.
      moment_dtype: see `sct`.
      base_width: see `sct`.
      decay_mask: see `sct`.

    Raises:
      ValueError: as `sct`; and for a lazy retraction with max_update_norm, whose bound
        needs orthonormal factors after every step, or with the retraction "none".

    References:
      TSVD, arXiv 2605.28573, 2026
    """
    _check(locals())
    # Under `optax.inject_hyperparams` this is a tracer, so assume lazy retraction.
    unknown = isinstance(retraction_every, jax.Array)
    lazy = unknown or retraction_every != 1 or retraction_tolerance is not None
    parts = [
        transforms.scale_by_adam(b1, b2, eps, moment_dtype=moment_dtype),
        *_weight_decay(weight_decay, decay_mask),
        *_lr_multipliers(singular_value_lr_multiplier, dense_lr_multiplier, base_width),
        optax.scale_by_learning_rate(learning_rate),
        transforms.freeze_inactive_columns(),
    ]
    if not lazy:
        return _with_retraction(parts, max_update_norm, retraction)
    if max_update_norm is not None or retraction == "none":
        combined = "retraction='none'" if retraction == "none" else "max_update_norm"
        raise ValueError(
            f"{combined} cannot be combined with a lazy retraction: remove "
            "retraction_every and retraction_tolerance; under "
            "optax.inject_hyperparams, name retraction_every in static_args"
        )
    lazy_retraction = transforms.retract_to_stiefel(
        retraction, every=retraction_every, tolerance=retraction_tolerance
    )
    return _chain(*parts, lazy_retraction)


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
    """Stiefel Muon, our own rule: orthogonalised momentum on u and v, AdamW elsewhere.

    Columns of norm 1 always rotate by the learning rate, whereas dense matrices grow
    and rotate less and less. A schedule that decays over most of the run works best.

    Args:
      learning_rate: approximate rotation of the columns of u and v per step, in
        radians; in the coordinates "svd", the approximate change of W in spectral norm.
      momentum: decay of the mean of the gradients of u and v.
      nesterov: whether to look one step ahead.
      coordinates: "factors" or "svd", see `transforms.scale_by_stiefel_muon`. "svd"
        works best with the retraction "svd", which keeps s descending.
      max_rotation: bound of the rotation of a column per step, in radians, in the
        coordinates "svd".
      b1: decay of the first moment of s and of dense leaves.
      b2: decay of the second moment of s and of dense leaves.
      eps: added to the root of the second moment.
      weight_decay: see `sct`.
      max_update_norm: see `sct`.
      retraction: see `sct`.
      singular_value_lr_multiplier: see `sct`.
      dense_lr_multiplier: multiplies the learning rate outside SpectralFactors.
      tangent_projection: see `sct`.
      decay_mask: see `sct`.

    Returns:
      A transformation for trees of factor tuples and arrays.

    Raises:
      ValueError: as `sct`, and for unknown coordinates.
    """
    _check(locals())
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
        *_weight_decay(weight_decay, decay_mask),
        *_lr_multipliers(singular_value_lr_multiplier, dense_lr_multiplier, None),
        optax.scale_by_learning_rate(learning_rate),
    ]
    if coordinates == "svd":
        parts.append(transforms.limit_rotation(max_rotation))
    moments = "whitened" if coordinates == "svd" else "gradient"
    parts = _with_tangent_projection(parts, tangent_projection)
    return _with_retraction(parts, max_update_norm, retraction, moments)


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
    """Spectron: orthogonalised momentum on a and b, divided by the norms of both.

    LowRankFactors get Algorithm 1, every other leaf AdamW. The authors' code differs
    from the paper. For the code, set `nesterov=True`, `shape_factor=True` and a
    `weight_decay`, which is multiplied by the learning rate, not by the radius.

    Args:
      learning_rate: eta, the bound of ||W' - W||_2 to first order.
      momentum: decay of the mean of the gradients of a and b.
      nesterov: see `transforms.scale_by_spectron`.
      shape_factor: see `transforms.scale_by_spectron`.
      b1: decay of the first moment of dense leaves.
      b2: decay of the second moment of dense leaves.
      eps: added to the root of the second moment.
      weight_decay: decoupled decay of a, b and dense arrays with two or more axes.
      dense_lr_multiplier: multiplies the learning rate of dense leaves.
      decay_mask: see `sct`.

    Raises:
      ValueError: at `init`, for SpectralFactors, which would not stay orthonormal.

    References:
      Spectron, arXiv 2602.12429, 2026, Algorithm 1
    """
    _check(locals())
    direction = _partition(
        _is_low_rank,
        transforms.scale_by_spectron(
            momentum, nesterov=nesterov, shape_factor=shape_factor
        ),
        transforms.scale_by_adam(b1, b2, eps),
    )
    return _unconstrained(
        direction,
        *_weight_decay(weight_decay, decay_mask),
        *_lr_multipliers(1.0, dense_lr_multiplier, None),
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
    """AdamW, a baseline for dense weights and for LowRankFactors.

    Args:
      learning_rate: of matrices; multiplied for other leaves.
      b1: see `sct`.
      b2: see `sct`.
      eps: see `sct`.
      weight_decay: decoupled decay of a, b and dense arrays with two or more axes.
      moment_dtype: see `sct`.
      dense_lr_multiplier: multiplies the learning rate of leaves other than matrices.
      decay_mask: see `sct`.
      matrix_mask: see `muon`; a and b are matrices.

    Raises:
      ValueError: at `init`, for SpectralFactors, which would not stay orthonormal.
    """
    _check(locals())
    return _unconstrained(
        transforms.scale_by_adam(b1, b2, eps, moment_dtype=moment_dtype),
        *_weight_decay(weight_decay, decay_mask),
        *_lr_multiplier_outside_matrices(dense_lr_multiplier, matrix_mask),
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
    """Muon on matrices by `optax.contrib`, a baseline; AdamW on all other leaves.

    Args:
      learning_rate: of matrices.
      momentum: decay of the mean of the gradients of matrices.
      nesterov: whether to look one step ahead.
      b1: decay of the first moment of other leaves.
      b2: decay of the second moment of other leaves.
      eps: added to the root of the second moment.
      weight_decay: decoupled decay of arrays with two or more axes.
      dense_lr_multiplier: multiplies the learning rate of leaves other than matrices.
      decay_mask: see `sct`.
      matrix_mask: from params to a tree of booleans, the leaves that are matrices in
        their last two axes, stacked over layers; `matrices_by_axes` if None.

    Raises:
      ValueError: at `init`, for SpectralFactors, which would not stay orthonormal.

    References:
      Jordan et al., Muon: an optimizer for hidden layers, 2024,
      https://kellerjordan.github.io/posts/muon
    """
    _check(locals())

    def dimensions(params):
        # Leading axes are layers.
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
    matrices = _mask_function("matrix_mask", matrix_mask, matrices_by_axes)
    for_others = optax.chain(
        transforms.scale_by_adam(b1, b2, eps),
        *_weight_decay(weight_decay, decay_mask),
        *_lr_multipliers(1.0, dense_lr_multiplier, None),
        optax.scale_by_learning_rate(learning_rate),
    )
    return _unconstrained(
        optax.partition(
            {"matrices": for_matrices, "others": for_others},
            lambda params: jax.tree.map(
                lambda is_matrix: "matrices" if is_matrix else "others",
                matrices(params),
            ),
        )
    )


def matrices_by_axes(params: optax.Params) -> Any:
    """Returns the default matrix mask: arrays with two or more axes."""
    return jax.tree.map(lambda p: jnp.ndim(p) >= 2, params)


def decays_by_axes(params: optax.Params) -> Any:
    """Returns the default decay mask: s, a, b, and dense arrays with two or more axes.

    Factor tuples of booleans mark the parts of a factorised weight.
    """

    def decays(p):
        if spectral.is_spectral(p):
            return p._replace(u=False, s=True, v=False)  # pyright: ignore
        if spectral.is_factors(p):
            return jax.tree.map(lambda _: True, p)
        return jnp.ndim(p) >= 2

    return jax.tree.map(decays, params, is_leaf=spectral.is_factors)


# Bounds of the hyperparameters of all chains, see `transforms.check_number`.
_BOUNDS: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
    ({"least": 0, "below": 1}, ("b1", "b2", "momentum")),
    ({"least": 0}, ("learning_rate", "eps", "weight_decay", "max_rotation")),
    ({"least": 0}, ("singular_value_lr_multiplier", "dense_lr_multiplier")),
    ({"above": 0}, ("max_update_norm", "retraction_tolerance", "base_width")),
    ({"least": 1, "integer": True}, ("retraction_every",)),
)
_MAY_BE_NONE = ("max_update_norm", "retraction_tolerance", "base_width")
_MAY_BE_SCHEDULES = (
    "learning_rate",
    "max_update_norm",
    "singular_value_lr_multiplier",
    "dense_lr_multiplier",
)
_FLAGS = ("nesterov", "shape_factor", "transport_moments")


def _check(hyperparams: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first hyperparameter that has no meaning.

    Tracers, as under `optax.inject_hyperparams`, and schedules pass.
    """
    for bounds, names in _BOUNDS:
        for name in filter(hyperparams.__contains__, names):
            value = hyperparams[name]
            missing = value is None and name not in _MAY_BE_NONE
            if missing or (callable(value) and name not in _MAY_BE_SCHEDULES):
                raise ValueError(f"{name} must be a number, got {value}")
            transforms.check_number(name, value, **bounds)
    for name in filter(hyperparams.__contains__, _FLAGS):
        if not isinstance(hyperparams[name], bool | np.bool_):
            raise ValueError(f"{name} must be True or False, got {hyperparams[name]!r}")


def _chain(
    *parts: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(optax.chain(*parts))


def _with_tangent_projection(
    parts: list[optax.GradientTransformation], tangent_projection: str | None
) -> list[optax.GradientTransformation]:
    """The parts with the projection at the start or at the end, if any."""
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


def _with_retraction(
    parts: Sequence[optax.GradientTransformation],
    max_update_norm: transforms.ScalarOrSchedule | None,
    retraction: str,
    moments: str = "gradient",
) -> optax.GradientTransformationExtraArgs:
    """The chain of the parts, the clip if any, and the retraction."""
    if retraction == "none":
        if max_update_norm is not None:
            raise ValueError(
                "max_update_norm bounds the update after the retraction, and "
                "retraction='none' has none: choose a retraction or remove the bound"
            )
        return _chain(*parts)
    if max_update_norm is not None:
        clip = transforms.clip_by_composite_spectral_norm(
            max_update_norm, retraction=retraction
        )
        parts = [*parts, clip]
    if retraction == "svd":
        return transforms.retract_by_svd(optax.chain(*parts), moments=moments)
    return _chain(*parts, transforms.retract_to_stiefel(retraction))


def _unconstrained(
    *parts: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The chain of the parts; refuses trees with factors that must stay orthonormal."""

    def init_fn(params):
        nodes = jax.tree.leaves(params, is_leaf=spectral.is_factors)
        # One that `optax.masked` removed has no arrays.
        if any(spectral.is_spectral(w) and jax.tree.leaves(w) for w in nodes):
            raise ValueError(
                "SpectralFactors would not stay orthonormal under this optimizer: use "
                "sct, tsvd or stiefel_muon, or convert them by spectral.to_low_rank"
            )
        return tx.init(params)

    tx = _chain(*parts)
    return optax.GradientTransformationExtraArgs(init_fn, tx.update)


def _partition(
    is_chosen: Callable[[Any], bool],
    for_chosen: optax.GradientTransformation,
    for_others: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Two rules for two kinds of weights; a factor tuple is never split."""
    tx = optax.partition(
        {"factors": for_chosen, "others": for_others},
        lambda params: jax.tree.map(
            lambda p: "factors" if is_chosen(p) else "others",
            params,
            is_leaf=spectral.is_factors,
        ),
    )

    def init_fn(params):
        transforms.check_whole(params)
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(init_fn, tx.update)


def _weight_decay(
    weight_decay: float | jax.Array, decay_mask: Mask | None
) -> list[optax.GradientTransformation]:
    if _is_constant(weight_decay, 0.0):
        return []
    mask = _mask_function("decay_mask", decay_mask, decays_by_axes)
    return [optax.add_decayed_weights(weight_decay, mask=mask)]


def _mask_function(
    name: str, mask: Mask | None, default: Callable[[Any], Any]
) -> Callable[[Any], Any]:
    if mask is None:
        return default
    if isinstance(mask, jax.Array | np.ndarray | bool):
        raise ValueError(
            f"{name} is one value, and no tree of booleans. optax.inject_hyperparams "
            f"calls functions as schedules: name {name} in its static_args"
        )
    return mask if callable(mask) else lambda params: mask


def _lr_multipliers(
    s: transforms.ScalarOrSchedule,
    dense: transforms.ScalarOrSchedule,
    base_width: int | None,
) -> list[optax.GradientTransformation]:
    if _is_constant(s, 1.0) and _is_constant(dense, 1.0) and base_width is None:
        return []
    return [transforms.scale_components(s=s, dense=dense, base_width=base_width)]


def _lr_multiplier_outside_matrices(
    dense: transforms.ScalarOrSchedule, matrix_mask: Mask | None
) -> list[optax.GradientTransformation]:
    matrices = _mask_function("matrix_mask", matrix_mask, matrices_by_axes)
    others = lambda params: jax.tree.map(
        lambda is_matrix: not is_matrix, matrices(params)
    )
    return [optax.masked(part, others) for part in _lr_multipliers(1.0, dense, None)]


def _is_constant(value: Any, number: float) -> bool:
    """Whether a hyperparameter is this Python number; arrays may change later."""
    return isinstance(value, float | int) and value == number


def _is_low_rank(x: Any) -> bool:
    return isinstance(x, spectral.LowRankFactors)
