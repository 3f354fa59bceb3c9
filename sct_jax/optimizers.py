"""Named optimizer chains, and the typed configuration that builds one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sct_jax import errors, spectral, stiefel, transforms

# Not the scalar type, which is callable: `optax.inject_hyperparams` would call it.
_FLOAT32 = jnp.dtype("float32")

SCHEDULES = ("constant", "cosine", "wsd")


def sct(
    learning_rate: transforms.ScalarOrSchedule,
    *,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    max_update_norm: transforms.ScalarOrSchedule | None = None,
    retraction: str = "cholesky_qr",
    singular_value_rate: transforms.ScalarOrSchedule = 1.0,
    dense_rate: transforms.ScalarOrSchedule = 1.0,
    moment_dtype: jax.typing.DTypeLike = _FLOAT32,
    base_width: int | None = None,
    decay_mask: Callable[[Any], Any] | None = None,
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
      retraction: see `stiefel.retract`.
      singular_value_rate: factor of the learning rate for s.
      dense_rate: factor of the learning rate for arrays outside factor tuples.
      moment_dtype: of the first moment.
      base_width: fan at which the rate of u and v applies as it is; see
        `transforms.scale_components`.
      decay_mask: from params to a tree of booleans that replaces the rule above, where
        the axes alone do not tell (norm scales stacked over layers).

    Returns:
      A transformation for any tree that mixes factor tuples and arrays.

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
    parts = [optax.scale_by_adam(b1, b2, eps, mu_dtype=moment_dtype)]
    if not _is(weight_decay, 0.0):
        parts.append(
            optax.add_decayed_weights(weight_decay, mask=decay_mask or decays_by_axes)
        )
    shared = _is(singular_value_rate, 1.0) and _is(dense_rate, 1.0)
    if not shared or base_width is not None:
        parts.append(
            transforms.scale_components(
                s=singular_value_rate, dense=dense_rate, base_width=base_width
            )
        )
    parts.append(optax.scale_by_learning_rate(learning_rate))
    if max_update_norm is not None:
        parts.append(
            transforms.clip_by_composite_spectral_norm(
                max_update_norm, retraction=retraction
            )
        )
    parts.append(transforms.retract_to_stiefel(retraction))
    return optax.with_extra_args_support(optax.chain(*parts))


def _is(value: Any, neutral: float) -> bool:
    """Whether a setting is left at its neutral value; an array may change later."""
    return isinstance(value, float | int) and value == neutral


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
      name: the chain; "sct".
      peak_learning_rate: rate after warm-up.
      schedule: "constant", "cosine" or "wsd" (warm-up, stable, decay), after warm-up.
      warmup_steps: steps of linear warm-up from 0.
      final_rate_ratio: rate of the last step over the peak (cosine and wsd).
      decay_ratio: share of all steps in the linear decay of "wsd".
      max_update_norm: bound of ||W' - W||_2 per weight and step; None: no clip.
      weight_decay: decoupled decay of s and of dense matrices.
      grad_clip: bound of the global gradient norm; None: no clip.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: Adam's epsilon.
      singular_value_rate: factor of the rate for s.
      dense_rate: factor of the rate for dense arrays.
      base_width: fan at which the rate of u and v applies as it is; None: everywhere.
      retraction: "cholesky_qr", "qr" or "polar".
      moment_dtype: of the first moment.
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
    b2: float = 0.999
    eps: float = 1e-8
    singular_value_rate: float = 1.0
    dense_rate: float = 1.0
    base_width: int | None = None
    retraction: str = "cholesky_qr"
    moment_dtype: str = "float32"

    def validate(self) -> None:
        """Raises ConfigError, naming the field, for values that make no optimizer."""
        errors.check_choice("optimizer.name", self.name, tuple(_CHAINS))
        errors.check_choice("optimizer.schedule", self.schedule, SCHEDULES)
        errors.check_choice(
            "optimizer.retraction", self.retraction, stiefel.RETRACTION_NAMES
        )
        errors.check_choice(
            "optimizer.moment_dtype", self.moment_dtype, ("float32", "bfloat16")
        )
        for field in ("peak_learning_rate", "max_update_norm", "grad_clip", "eps"):
            value = getattr(self, field)
            errors.check(
                f"optimizer.{field}", value is None or value > 0, f"{value} must be > 0"
            )
        for field in ("weight_decay", "singular_value_rate", "dense_rate"):
            value = getattr(self, field)
            errors.check(f"optimizer.{field}", value >= 0, f"{value} must be >= 0")
        for field in ("b1", "b2"):
            value = getattr(self, field)
            errors.check(f"optimizer.{field}", 0 <= value < 1, f"{value} not in [0, 1)")
        for field in ("final_rate_ratio", "decay_ratio"):
            value = getattr(self, field)
            errors.check(
                f"optimizer.{field}", 0 <= value <= 1, f"{value} not in [0, 1]"
            )
        errors.check(
            "optimizer.warmup_steps",
            self.warmup_steps >= 0,
            f"{self.warmup_steps} must be >= 0",
        )
        errors.check(
            "optimizer.base_width",
            self.base_width is None or self.base_width > 0,
            f"{self.base_width} must be > 0",
        )

    def learning_rate(self, num_steps: int) -> optax.Schedule:
        """Returns the rate as a function of the number of updates already applied."""
        peak, last = self.peak_learning_rate, num_steps - self.warmup_steps
        floor = peak * self.final_rate_ratio
        if self.schedule == "cosine":
            main = optax.cosine_decay_schedule(
                peak, max(last, 1), self.final_rate_ratio
            )
        elif self.schedule == "wsd":
            decay = max(round(self.decay_ratio * num_steps), 1)
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

    def build(
        self,
        num_steps: int,
        *,
        decay_mask: Callable[[Any], Any] | None = None,
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the transformation for a run of `num_steps` updates."""
        tx = _CHAINS[self.name](self, self.learning_rate(num_steps), decay_mask)
        if self.grad_clip is not None:
            tx = optax.chain(optax.clip_by_global_norm(self.grad_clip), tx)
        return optax.with_extra_args_support(tx)


def _build_sct(config, learning_rate, decay_mask):
    return sct(
        learning_rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        max_update_norm=config.max_update_norm,
        retraction=config.retraction,
        singular_value_rate=config.singular_value_rate,
        dense_rate=config.dense_rate,
        moment_dtype=jnp.dtype(config.moment_dtype),
        base_width=config.base_width,
        decay_mask=decay_mask,
    )


_CHAINS = {"sct": _build_sct}
