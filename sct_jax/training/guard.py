"""Whether a step may be applied: finite losses and gradients, and no spikes.

A step that is not applied leaves parameters and optimizer state untouched. It still
counts as a step, as its batch is consumed: the optimizer has counted `step - skipped`
updates. The decision uses global scalars alone, so all devices make the same one.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SPIKES = ("log", "skip")

# The estimates follow the last hundred steps, and judge none of the first fifty.
_RATE = 0.01
_WARMUP = 50
# Both in mean absolute deviations. Eight standard deviations of a normal variable are
# ten of these.
_SPIKE = 10.0
_CLIP = 4.0
# What never counts: relative to the loss, and in units of log(gradient norm).
_LEAST_SPIKE = (0.1, 0.7)


class Trend(NamedTuple):
    """Running location and mean absolute deviation, robust against outliers."""

    mean: Float[Array, ""]
    deviation: Float[Array, ""]

    def follow(self, x: Float[Array, ""], count: Int[Array, ""]) -> "Trend":
        """Returns the trend after `x`, whose excess over the trend is clipped.

        Args:
          x: the next value.
          count: number of values before it.
        """
        rate = jnp.maximum(1 / (count + 1.0), _RATE)
        # The second term lets a constant sequence follow a change, slowly.
        limit = _CLIP * self.deviation + 0.01 * jnp.abs(self.mean)
        limit = jnp.where(count < _WARMUP, jnp.inf, limit)
        change = jnp.clip(x - self.mean, -limit, limit)
        first = count == 0  # nothing deviates from the first value
        spread = jnp.where(first, 0.0, jnp.abs(change)) - self.deviation
        return Trend(self.mean + rate * change, self.deviation + rate * spread)

    def exceeded(self, x: Float[Array, ""], least: Array | float) -> Bool[Array, ""]:
        """Returns whether `x` is above the trend by `_SPIKE` deviations and `least`."""
        return x > self.mean + jnp.maximum(_SPIKE * self.deviation, least)


class GuardState(NamedTuple):
    """What the guard remembers. All zero before the first step of a phase.

    Attributes:
      skipped: number of steps that were not applied.
      skipped_in_a_row: length of the unbroken series of steps that are not finite
        and ends here; 0 after a finite one, unless the run was given up.
      spikes: number of spikes.
      count: number of steps with finite values.
      loss: trend of the loss.
      log_grad_norm: trend of the logarithm of the gradient's norm.
      largest_loss: largest finite loss since the last logged step.
      largest_grad_norm: largest finite norm of a gradient since then.
    """

    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]
    spikes: Int[Array, ""]
    count: Int[Array, ""]
    loss: Trend
    log_grad_norm: Trend
    largest_loss: Float[Array, ""]
    largest_grad_norm: Float[Array, ""]


def init() -> GuardState:
    """Returns the state before the first step."""
    # Each an array of its own, as a step donates them all.
    none = lambda: jnp.zeros([], jnp.int32)
    zero = lambda: jnp.zeros([], jnp.float32)
    trend = lambda: Trend(zero(), zero())
    return GuardState(none(), none(), none(), none(), trend(), trend(), zero(), zero())


class Guard(NamedTuple):
    """Decides which steps are applied.

    Attributes:
      max_skipped: once as many steps in a row have a loss or gradient that is not
        finite, no further step is applied. None applies every step.
      spikes: "log" counts spikes, "skip" does not apply them either. A spike is a loss
        or gradient norm above its running mean by ten mean absolute deviations, and by
        10 % (loss) or a factor of two (norm). The first fifty steps have none.
    """

    max_skipped: int | None = 10
    spikes: str = "log"

    @property
    def rejects(self) -> bool:
        """Returns whether any step can be rejected."""
        return self.max_skipped is not None or self.spikes == "skip"

    def accepts(
        self,
        state: GuardState,
        loss: Float[Array, ""],
        grad_norm: Float[Array, ""] | None = None,
    ) -> Bool[Array, ""]:
        """Returns whether a step is applied.

        Args:
          state: before the step.
          loss: of the step.
          grad_norm: global norm of its gradient; None to judge by the loss alone. A
            norm that overflows counts as not finite: the second moments would overflow.
        """
        accepted = jnp.array(True)
        if self.max_skipped is not None:
            accepted = _finite(loss, grad_norm) & jnp.logical_not(
                self.gives_up(state.skipped_in_a_row)
            )
        if self.spikes == "skip":
            accepted &= ~_is_spike(state, loss, grad_norm)
        return accepted

    def gives_up(
        self, skipped_in_a_row: Int[Array, ""] | int
    ) -> Bool[Array, ""] | bool:
        """Returns whether the run is over, as so many steps in a row were skipped."""
        if self.max_skipped is None:
            return False
        return skipped_in_a_row >= self.max_skipped

    def after(
        self,
        state: GuardState,
        loss: Float[Array, ""],
        grad_norm: Float[Array, ""] | None,
        *,
        accepted: Bool[Array, ""],
        logged: Bool[Array, ""],
    ) -> tuple[GuardState, dict[str, Float[Array, ""]]]:
        """Returns the state after a step, and the metrics of the step.

        The metrics are `skipped_steps`, `skipped_in_a_row`, `spikes`, `loss_max` and
        `grad_norm_max`. The maxima cover all steps since the last logged one.

        Args:
          state: before the step.
          loss: of the step.
          grad_norm: of the step; None if its loss alone rejected it.
          accepted: whether the step was applied.
          logged: whether a new maximum starts after this step.
        """
        finite = _finite(loss, grad_norm)
        ended = self.gives_up(state.skipped_in_a_row)
        loss_max = _largest(state.largest_loss, loss)
        norm_trend, norm_max = state.log_grad_norm, state.largest_grad_norm
        if grad_norm is not None:
            norm_trend = _follow_if(finite, norm_trend, _log(grad_norm), state.count)
            norm_max = _largest(norm_max, grad_norm)
        new = GuardState(
            skipped=state.skipped + ~accepted,
            skipped_in_a_row=jnp.where(
                finite & jnp.logical_not(ended), 0, state.skipped_in_a_row + 1
            ),
            spikes=state.spikes + _is_spike(state, loss, grad_norm),
            count=state.count + finite,
            loss=_follow_if(finite, state.loss, loss, state.count),
            log_grad_norm=norm_trend,
            largest_loss=jnp.where(logged, 0.0, loss_max),
            largest_grad_norm=jnp.where(logged, 0.0, norm_max),
        )
        return new, {
            "skipped_steps": new.skipped.astype(jnp.float32),
            "skipped_in_a_row": new.skipped_in_a_row.astype(jnp.float32),
            "spikes": new.spikes.astype(jnp.float32),
            "loss_max": loss_max,
            "grad_norm_max": norm_max,
        }


DEFAULT = Guard()


def _finite(loss: Array, grad_norm: Array | None) -> Bool[Array, ""]:
    finite = jnp.isfinite(loss)
    return finite if grad_norm is None else finite & jnp.isfinite(grad_norm)


def _is_spike(
    state: GuardState, loss: Array, grad_norm: Array | None
) -> Bool[Array, ""]:
    least_loss, least_norm = _LEAST_SPIKE
    spike = state.loss.exceeded(loss, least_loss * jnp.abs(state.loss.mean))
    if grad_norm is not None:
        spike |= state.log_grad_norm.exceeded(_log(grad_norm), least_norm)
    return spike & (state.count >= _WARMUP) & _finite(loss, grad_norm)


def _follow_if(
    followed: Bool[Array, ""], trend: Trend, x: Array, count: Int[Array, ""]
) -> Trend:
    new = trend.follow(x.astype(jnp.float32), count)
    return Trend(*(jnp.where(followed, n, t) for n, t in zip(new, trend, strict=True)))


def _largest(before: Array, x: Array) -> Array:
    x = x.astype(jnp.float32)
    return jnp.where(jnp.isfinite(x), jnp.maximum(x, before), before)


def _log(grad_norm: Float[Array, ""]) -> Float[Array, ""]:
    """A logarithm that is finite at zero."""
    return jnp.log(jnp.maximum(grad_norm.astype(jnp.float32), 1e-30))
