"""Block-spectral weights: how they start, and the nearest ones to dense weights.

All else about them is in `sct_jax.spectral`, beside the other factors.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sct_jax import linalg, spectral


def init(
    key: PRNGKeyArray,
    fan_in: int,
    fan_out: int,
    rank: int,
    *,
    blocks: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
    layers: Sequence[int] = (),
    scale: float = 1.0,
    rescale: bool = False,
    orthonormal: bool = True,
) -> spectral.BlockSpectralFactors:
    """Initialises blocks whose B R singular values are equal.

    Every u_b and v_b is a sample from the Haar distribution. Where B R = min(I, O), W
    has the Frobenius norm of the dense matrix N(0, scale^2 / I): outputs have the mean
    square of the dense layer. For smaller B R, W has the norm of the B R largest
    singular values of that matrix, and `rescale` restores the full norm.

    The spectrum of a Gaussian, as in `spectral.init`, has values near zero if B R is
    the full rank. Gradients of their columns are as small, and training is slower.

    Args:
      key: random key.
      fan_in: I.
      fan_out: O.
      rank: R, columns per block.
      blocks: B.
      dtype: dtype of the factors.
      layers: leading axes; layers are independent.
      scale: as in `spectral.init`.
      rescale: whether to scale s so that W has the Frobenius norm of the dense matrix.
      orthonormal: as in `spectral.init`.

    Raises:
      ValueError: as `spectral.init`; for blocks that do not divide fan_in and fan_out;
        and for a rank outside 1..min(fan_in, fan_out) / B.
    """
    check_shape(fan_in, fan_out, rank, blocks)
    key_u, key_v = jax.random.split(key)
    spectrum = functools.partial(
        spectral.initial_spectrum, fan_in, fan_out, blocks * rank, rescale=rescale
    )
    unit = spectrum(dtype=jnp.float32, scale=1.0)
    mean = float(np.sqrt(np.mean(np.square(unit))) / unit[0])  # of the largest
    s = mean * spectrum(dtype=dtype, scale=scale)[0]
    drawn = spectral.BlockSpectralFactors(
        jax.random.normal(key_u, (*layers, blocks, fan_in // blocks, rank), dtype),
        jnp.full((*layers, blocks, rank), s, dtype),
        jax.random.normal(key_v, (*layers, blocks, fan_out // blocks, rank), dtype),
    )
    return spectral.retract(drawn) if orthonormal else drawn


def check_shape(fan_in: int, fan_out: int, rank: int, blocks: int) -> None:
    """Raises ValueError unless a matrix of this shape can have such blocks."""
    if blocks < 1 or fan_in % blocks or fan_out % blocks:
        raise ValueError(
            f"blocks must divide fan_in {fan_in} and fan_out {fan_out}, got {blocks}"
        )
    most = min(fan_in, fan_out) // blocks
    if not 1 <= rank <= most:
        raise ValueError(
            f"rank must be in 1..{most} for shape ({fan_in}, {fan_out}) in {blocks} "
            f"blocks, got {rank}"
        )


def from_dense(
    w: Float[Array, "*layers I O"],
    *,
    blocks: int,
    rank: int,
    second_moment: Float[Array, "*layers M M"] | None = None,
    sweeps: int = 20,
) -> spectral.BlockSpectralFactors:
    r"""Returns blocks close to w in Frobenius norm; exact if w is block-spectral.

    Tile (i, j) of W is U_ij diag(s_ij) V_ij.T, with the R / B columns of u_i and v_j
    that meet, so truncated SVDs of the tiles of w are the start. The columns of
    different tiles in one u_i need not be orthogonal, so u_i becomes the polar factor
    of all of them, weighted by s. Each sweep then lowers the error over s, over u and
    over v in turn. The minimum over u_i is the polar factor of [w_ij V_ij
    diag(s_ij)]_j, likewise that over v_j.

    With `second_moment`, the sweeps minimise the error of the outputs, as
    `spectral.from_dense` does. Because v stays orthonormal, the minima over s and v
    have closed forms too. u takes a step that minimises an upper bound, which replaces
    its block of the moment by the largest eigenvalue of that block.

    The error never grows from sweep to sweep, and W = 0 has a larger one. The sweeps
    may end in a local minimum: this is a heuristic. If the tiles of a block-spectral w
    have rank R / B, the start is w already, to float32 rounding.

    Args:
      w: dense weight or a stack of dense weights.
      blocks: B.
      rank: R, a multiple of B.
      second_moment: as in `spectral.from_dense`.
      sweeps: number of sweeps.

    Raises:
      ValueError: for shapes that `init` refuses, for a rank that is no multiple
        of B, and for a second moment that `spectral.from_dense` refuses.
    """
    fan_in, fan_out = w.shape[-2:]
    check_shape(fan_in, fan_out, rank, blocks)
    spectral.check_even(blocks, rank)
    share, layers = rank // blocks, w.shape[:-2]
    w = linalg.as_float32(w)

    def to_tiles(x: Float[Array, "*L I O"]) -> Float[Array, "*L i j I_B O_B"]:
        rows, columns = (n // blocks for n in x.shape[-2:])
        return jnp.moveaxis(x.reshape(*layers, blocks, rows, blocks, columns), -3, -2)

    tiles = seen = to_tiles(w)
    moments: Any = None
    largest: Any = None  # eigenvalue of each
    if second_moment is not None:
        root = spectral.square_root(second_moment, fan_in)
        moment = linalg.gram(root)
        seen = to_tiles(linalg.matmul(moment, w))
        moments = jnp.stack([to_tiles(moment)[..., i, i, :, :] for i in range(blocks)])
        moments = jnp.moveaxis(moments, 0, -3)[..., None, :, :]  # (*L, i, 1, I_B, I_B)
        largest = jnp.linalg.eigvalsh(moments)[..., -1:, None]

    def polar(x: Float[Array, "*L i j n K"]) -> Float[Array, "*L i j n K"]:
        """The nearest x whose columns are orthonormal over all j."""
        flat = jnp.moveaxis(x, -3, -2).reshape(*x.shape[:-3], x.shape[-2], rank)
        p, _, qt = jnp.linalg.svd(flat, full_matrices=False)
        near = linalg.matmul(p, qt).reshape(*x.shape[:-3], x.shape[-2], blocks, share)
        return jnp.moveaxis(near, -2, -3)

    swap = lambda x: jnp.swapaxes(x, -4, -3)  # between (i, j) and (j, i)

    def scales(u, v):
        s = jnp.sum(u * linalg.matmul(seen, v), axis=-2, keepdims=True)
        if moments is None:
            return s
        weight = jnp.sum(u * linalg.matmul(moments, u), axis=-2, keepdims=True)
        return s / linalg.safe_divisor(weight)

    def sweep(_, uv):
        u, v = uv
        s = scales(u, v)
        toward = linalg.matmul(seen, v) * s
        if moments is not None:
            toward += jnp.square(s) * (largest * u - linalg.matmul(moments, u))
        u = polar(toward)
        return u, swap(polar(swap(linalg.matmul(linalg.transpose(seen), u) * s)))

    if moments is None:
        start = spectral.from_dense(tiles, rank=share)
    else:
        wide = jnp.broadcast_to(moments, (*tiles.shape[:-1], tiles.shape[-2]))
        start = spectral.from_dense(tiles, rank=share, second_moment=wide)
    s = start.s[..., None, :]
    uv = polar(start.u * s), swap(polar(swap(start.v * s)))
    u, v = jax.lax.fori_loop(0, sweeps, sweep, uv)
    s = scales(u, v)[..., 0, :]  # (*L, i, j, K)

    def join(x: Float[Array, "*L i j n K"]) -> Float[Array, "*L i n R"]:
        return jnp.moveaxis(x, -3, -2).reshape(*x.shape[:-3], x.shape[-2], rank)

    # Columns of u_i are ordered (j, k), and columns of v_j are ordered (k, i).
    v = spectral.swap_column_axes(join(swap(v)), share)
    return spectral.BlockSpectralFactors(
        join(u), spectral.fed_s(s.reshape(*layers, blocks, rank)), v
    )
