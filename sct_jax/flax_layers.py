"""Spectral layers for Flax: replacements for `nn.Dense` and `nnx.Linear`.

The kernel is one `SpectralFactors` among the parameters, so every chain in `optimizers`
can train it. With NNX, wrap the chain in `for_nnx`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx
from jaxtyping import Array, Inexact, Shaped

from sct_jax import spectral


class SpectralDense(linen.Module):
    """y = x u diag(s) v.T + bias, for Flax Linen.

    Attributes:
      features: fan_out.
      rank: R, at most min(fan_in, fan_out).
      use_bias: whether to add a bias.
      dtype: dtype of the computation. Defaults to the dtype of the input, or of the
        parameters for integers and booleans.
      scale: multiplies the standard deviation 1 / sqrt(fan_in) of the init.
      flatten_rows: see `spectral.linear`; faster gradients on a single CPU device.

    Example:
      >>> import jax
      >>> from sct_jax import flax_layers
      >>> layer = flax_layers.SpectralDense(24, rank=4)
      >>> variables = layer.init(jax.random.key(0), jax.numpy.ones((2, 16)))
      >>> variables["params"]["kernel"].u.shape
      (16, 4)
    """

    features: int
    rank: int
    use_bias: bool = True
    dtype: Any = None
    scale: float = 1.0
    flatten_rows: bool = False

    @linen.compact
    def __call__(self, x: Shaped[Array, "... I"]) -> Inexact[Array, "... O"]:
        """Returns the output of the layer.

        Raises:
          ValueError: if the rank exceeds min(fan_in, fan_out); names the layer.
        """

        def draw(key):
            try:
                return spectral.init(
                    key, x.shape[-1], self.features, self.rank, scale=self.scale
                )
            except ValueError as error:
                path = "/".join((*self.path, "kernel"))
                raise ValueError(f"{path}: {error}") from error

        kernel = self.param("kernel", draw)
        bias = None
        if self.use_bias:
            bias = self.param("bias", lambda key: jnp.zeros(self.features, jnp.float32))
        return _apply(x, kernel, bias, self.dtype, self.flatten_rows)


class SpectralLinear(nnx.Module):
    """y = x u diag(s) v.T + bias, for Flax NNX.

    Args:
      in_features: fan_in.
      out_features: fan_out.
      rank: R, at most min(fan_in, fan_out).
      use_bias: whether to add a bias.
      dtype: dtype of the computation. Defaults to the dtype of the input, or of the
        parameters for integers and booleans.
      scale: multiplies the standard deviation 1 / sqrt(fan_in) of the init.
      flatten_rows: see `spectral.linear`; faster gradients on a single CPU device.
      rngs: random keys; uses one key of the `params` stream.

    Raises:
      ValueError: if the rank exceeds min(fan_in, fan_out).

    Example:
      >>> from flax import nnx
      >>> from sct_jax import flax_layers
      >>> layer = flax_layers.SpectralLinear(16, 24, rank=4, rngs=nnx.Rngs(0))
      >>> layer.kernel.get_value().s.shape
      (4,)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        use_bias: bool = True,
        dtype: Any = None,
        scale: float = 1.0,
        flatten_rows: bool = False,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(
            spectral.init(rngs.params(), in_features, out_features, rank, scale=scale)
        )
        self.bias = (
            nnx.Param(jnp.zeros(out_features, jnp.float32)) if use_bias else None
        )
        self.dtype = dtype
        self.flatten_rows = flatten_rows

    def __call__(self, x: Shaped[Array, "... I"]) -> Inexact[Array, "... O"]:
        """Returns the output of the layer."""
        bias = None if self.bias is None else self.bias.get_value()
        return _apply(x, self.kernel.get_value(), bias, self.dtype, self.flatten_rows)


def for_nnx(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation usable in `nnx.Optimizer` for models with factor tuples.

    `nnx.Optimizer` (Flax 0.12) initialises tx from variables but updates it with their
    values. A moment would then start as one variable that holds a factor tuple, and the
    first update would replace it by an `nnx.State`. The returned transformation
    initialises from values, so u, s and v have one variable each.

    Args:
      tx: any gradient transformation.

    Example:
      >>> from flax import nnx
      >>> from sct_jax import flax_layers, optimizers
      >>> layer = flax_layers.SpectralLinear(16, 24, rank=4, rngs=nnx.Rngs(0))
      >>> tx = flax_layers.for_nnx(optimizers.sct(3e-3, max_update_norm=0.1))
      >>> optimizer = nnx.Optimizer(layer, tx, wrt=nnx.Param)
    """

    def is_variable(x):
        return isinstance(x, nnx.Variable)

    def init_fn(params):
        return tx.init(
            jax.tree.map(
                lambda x: x.get_value() if is_variable(x) else x,
                params,
                is_leaf=is_variable,
            )
        )

    update = optax.with_extra_args_support(tx).update
    return optax.GradientTransformationExtraArgs(init_fn, update)


def _apply(
    x: Array,
    kernel: spectral.SpectralFactors,
    bias: Array | None,
    dtype: Any,
    flatten_rows: bool,
) -> jax.Array:
    if dtype is not None:
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(f"dtype must be a floating-point dtype, got {dtype}")
        x = x.astype(dtype)
    y = spectral.linear(x, kernel, flatten_rows=flatten_rows)
    if bias is None:
        return y
    return y + jnp.expand_dims(bias.astype(y.dtype), tuple(range(y.ndim - 1)))
