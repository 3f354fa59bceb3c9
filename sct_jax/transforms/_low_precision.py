"""Adam, with moments in float32 or in stochastically rounded bfloat16."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int

from sct_jax import sharding
from sct_jax.transforms import _common


def scale_by_low_precision_adam(
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates by Adam with both moments in bfloat16: 4 bytes per parameter.

    .. math::
      m \leftarrow b_1 m + (1 - b_1) g, \quad v \leftarrow b_2 v + (1 - b_2) g^2, \quad
      \Delta = \frac{m / (1 - b_1^t)}{\sqrt{v / (1 - b_2^t)} + \epsilon}

    Computes in float32 and returns updates in the dtype of the parameters. The state
    stores m and v, rounded stochastically, so stored moments are unbiased. Rounding to
    nearest would keep v from decaying: b2 = .999 lowers it by 1/1000 per step, but
    neighbouring bfloat16 numbers are 1/256 to 1/128 apart.

    The state is `optax.ScaleByAdamState`. All leaves are treated alike.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.

    Raises:
      ValueError: for a decay outside [0, 1), or a negative eps.

    References:
      Kingma, Ba, Adam: a method for stochastic optimization, arXiv 1412.6980, 2014
      Zamirai et al., Revisiting BFloat16 Training, arXiv 2010.06192, 2020
    """
    _check_adam(b1, b2, eps)

    def init_fn(params):
        _check_real(params)
        zeros = lambda: jax.tree.map(
            lambda p: jnp.zeros_like(p, dtype=jnp.bfloat16), params
        )
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), zeros(), zeros())

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        like = updates if params is None else params
        count = jnp.asarray(optax.safe_increment(state.count))
        mean = lambda old, new, decay: (
            decay * old.astype(jnp.float32) + (1 - decay) * new.astype(jnp.float32)
        ).astype(jnp.float32)
        mu = jax.tree.map(lambda m, g: mean(m, g, b1), state.mu, updates)
        nu = jax.tree.map(
            lambda v, g: mean(v, jnp.square(g.astype(jnp.float32)), b2),
            state.nu,
            updates,
        )
        correction_1, correction_2 = (
            _common.bias_correction(b, count) for b in (b1, b2)
        )
        directions = jax.tree.map(
            lambda m, v, p: (
                (m / correction_1) / (jnp.sqrt(v / correction_2) + eps)
            ).astype(jnp.result_type(p)),
            mu,
            nu,
            like,
        )
        mu, nu = (
            jax.tree.map(lambda x, salt=salt: round_stochastically(x, salt), moment)
            for moment, salt in ((mu, 2 * count), (nu, 2 * count + 1))
        )
        return directions, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_adam(
    b1: float | jax.Array,
    b2: float | jax.Array,
    eps: float | jax.Array,
    *,
    moment_dtype: jax.typing.DTypeLike = jnp.float32,
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by `optax.scale_by_adam` or `scale_by_low_precision_adam`.

    Unlike in optax, float32 moments are float32 for leaves of lower precision too: a
    bfloat16 second moment that is rounded to nearest never decays. Those of float64
    leaves are float64.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      moment_dtype: of both moments, float32 or bfloat16.

    Raises:
      ValueError: for another dtype of the moments, a decay outside [0, 1), or a
        negative eps.
    """
    _check_adam(b1, b2, eps)
    dtype = jnp.dtype(moment_dtype)
    if dtype == jnp.bfloat16:
        return scale_by_low_precision_adam(b1, b2, eps)
    if dtype != jnp.float32:
        raise ValueError(
            f"moment_dtype must be float32 or bfloat16, got {dtype.name!r}"
        )
    tx = optax.scale_by_adam(b1, b2, eps)

    def init_fn(params):
        _check_real(params)
        return tx.init(
            jax.tree.map(
                lambda p: jnp.zeros_like(
                    p, dtype=jnp.promote_types(jnp.result_type(p), jnp.float32)
                ),
                params,
            )
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        like = updates if params is None else params
        updates = jax.tree.map(lambda g, old: g.astype(old.dtype), updates, state.mu)
        directions, new = tx.update(updates, state)
        # A float64 decay, as of `optax.inject_hyperparams`, must not change dtypes.
        new = jax.tree.map(lambda x, old: x.astype(old.dtype), new, state)
        cast = lambda d, p: d.astype(jnp.result_type(p))
        return jax.tree.map(cast, directions, like), new

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_real(params: optax.Params) -> None:
    """Raises ValueError for a complex leaf."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise ValueError(
                f"{sharding.path_name(path) or 'the parameter'} is complex, and these "
                "moments are real: give it to optax.adam, by optax.partition"
            )


def _check_adam(
    b1: float | jax.Array, b2: float | jax.Array, eps: float | jax.Array
) -> None:
    for name, decay in {"b1": b1, "b2": b2}.items():
        _common.check_number(name, decay, least=0, below=1)
    _common.check_number("eps", eps, least=0)


@jax.jit
def round_stochastically(
    x: Float[Array, "*N"], salt: Int[Array, ""]
) -> Float[Array, "*N"]:
    """Returns x in bfloat16, rounded up or down at random to a neighbour.

    The probability of rounding up is the fraction cut off, over all values of `salt`.
    The random bits are a hash of x, its position in the last two axes, and salt. So
    equal arguments give equal results under any sharding, and a layer is rounded alike
    alone and in a stack. Infinities and NaN stay.

    Args:
      x: float32.
      salt: a different integer at each step.

    References:
      Wellons, Prospecting for hash functions, 2018, https://nullprogram.com/blog/2018
      (the mixing constants)
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = bits + salt.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    # Without a sharding, every device of an Explicit mesh would hold the whole iota.
    sharding = jax.typeof(x).sharding
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    # Equal numbers at different positions get different noise, but layers may share it.
    for axis, odd in zip(range(x.ndim)[-2:], (0x85EBCA6B, 0xC2B2AE35), strict=False):
        position = jax.lax.broadcasted_iota(
            jnp.uint32, x.shape, axis, out_sharding=sharding if explicit else None
        )
        noise = noise + position * jnp.uint32(odd)
    noise = (noise ^ (noise >> 16)) * jnp.uint32(0x21F0AAAD)
    noise = (noise ^ (noise >> 15)) * jnp.uint32(0x735A2D97)
    noise = (noise ^ (noise >> 15)) & jnp.uint32(0xFFFF)
    # Adding to the bits of a NaN could carry into its sign.
    upper = jnp.where(jnp.isfinite(x), bits + noise, bits) >> 16
    rounded = jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isnan(x), jnp.bfloat16(jnp.nan), rounded)
