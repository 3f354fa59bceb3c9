"""Factorised weights W = u diag(s) v.T and W = a b.T; training never forms W.

Block-spectral weights chain two block diagonals of such factors, for more rank at the
same cost. A weight maps fan_in I to fan_out O: y = x @ W. Leading axes of every factor
are layers. A factor tuple is one node of the parameter tree. Gradient transformations
see all factors of a weight together with

    jax.tree.map(f, params, updates, is_leaf=spectral.is_factors)
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Inexact, Int, PRNGKeyArray, Shaped

from sct_jax import linalg, stiefel

T = TypeVar("T")  # any pytree


class SpectralFactors(NamedTuple):
    """W = u @ diag(s) @ v.T with orthonormal columns in u and v.

    Training neither sorts s nor keeps it positive.

    References:
      Kohlberger et al., Spectral Compact Training, arXiv 2604.00733, 2026, section 3
    """

    u: Float[Array, "*layers I R"]
    s: Float[Array, "*layers R"]
    v: Float[Array, "*layers O R"]


class LowRankFactors(NamedTuple):
    """W = a @ b.T with unconstrained factors, as in Spectron.

    References:
      Spectron, arXiv 2602.12429, 2026, section 3
    """

    a: Float[Array, "*layers I R"]
    b: Float[Array, "*layers O R"]


class BlockSpectralFactors(NamedTuple):
    """W = blkdiag(u) P blkdiag(diag(s) v.T) with orthonormal columns in every u_b, v_b.

    P shuffles the bottleneck like a Monarch matrix. The B R numbers of a row of
    x @ blkdiag(u), read as B x R (block of the input, column), are transposed,
    flattened, and read again as B x R (block of the output, column). So column r of u_i
    meets column q of s_j and v_j where r B + i = j R + q.

    W has rank B R, at the parameters and FLOPs of rank R in `SpectralFactors`. Both
    block diagonals have orthonormal columns, so |s| are its singular values. Each block
    of the output reads R / B columns of each block of the input; if R is not a multiple
    of B, one more of some of them.

    `Deviation:` Monarch matrices have square blocks without any constraint.

    References:
      Dao et al., Monarch: expressive structured matrices for efficient and accurate
      training, arXiv 2204.00595, 2022, section 3.1
    """

    u: Float[Array, "*layers B I_B R"]  # I_B = I / B
    s: Float[Array, "*layers B R"]
    v: Float[Array, "*layers B O_B R"]  # O_B = O / B


_Factors = SpectralFactors | BlockSpectralFactors | LowRankFactors
Weight = Array | SpectralFactors | BlockSpectralFactors | LowRankFactors


def is_factors(
    x: Any,
) -> TypeGuard[SpectralFactors | BlockSpectralFactors | LowRankFactors]:
    """Returns whether x is a factor tuple. Use as `is_leaf` in `jax.tree.map`."""
    return isinstance(x, _Factors)


def is_spectral(x: Any) -> TypeGuard[SpectralFactors | BlockSpectralFactors]:
    """Returns whether x is a factor tuple with orthonormal u and v, in blocks or not.

    Blocks are one more leading axis for whatever treats u, s and v apart.
    """
    return isinstance(x, SpectralFactors | BlockSpectralFactors)


def is_blocks(x: Any) -> TypeGuard[BlockSpectralFactors]:
    """Returns whether x is a `BlockSpectralFactors`."""
    return isinstance(x, BlockSpectralFactors)


def linear(
    x: Shaped[ArrayLike, "... I"],
    w: Weight,
    *,
    flatten_rows: bool = False,
    constrain: Callable[[Array], Array] | None = None,
) -> Inexact[Array, "... O"]:
    """Returns x @ W in the dtype of x, at 2 R (I + O) FLOPs per row for factors.

    The factors keep their own dtype (float32 master copies) and are cast here.

    Args:
      x: activations; their dtype is the compute dtype. Integers and booleans are
        computed in the dtype of W.
      w: a dense array (I, O) or factors without layer axes.
      flatten_rows: whether to multiply x as a matrix with a single axis of rows. Set
        this on one device: for gradients over several axes of rows, XLA on CPU
        transposes the activations. Leave it unset if rows may be sharded: joining
        sharded axes moves activations between devices.
      constrain: places the bottleneck x @ u on a mesh, where XLA is to choose if None;
        see `sharding.Placement`.
    """
    x = _as_activations(x, w)
    rows = x.reshape(-1, x.shape[-1]) if flatten_rows else x
    if is_factors(w):
        h = contract(rows, w)
        y = expand(constrain(h) if constrain else h, w)
    else:
        y = rows @ jnp.asarray(w, x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def contract(
    x: Shaped[ArrayLike, "*N I"],
    w: SpectralFactors | BlockSpectralFactors | LowRankFactors,
) -> Inexact[Array, "*N R"]:
    """Returns the low-rank bottleneck x @ u or x @ a, the input of `expand`.

    Blocks have B R numbers per row: block by block of the output, and within each block
    of the output, block by block of the input that it reads.
    """
    x = _as_activations(x, w)
    if not isinstance(w, BlockSpectralFactors):
        return linalg.thin_product(x, w[0].astype(x.dtype))
    blocks, _, rank = w.u.shape
    # Products of separate blocks: XLA on CPU transposes the operands of a batched one,
    # and takes twice as long.
    columns = [
        jnp.split(
            linalg.thin_product(x_i, u_i),
            [-((i - j * rank) // blocks) for j in range(1, blocks)],
            axis=-1,
        )
        for i, (x_i, u_i) in enumerate(
            zip(
                jnp.split(x, blocks, axis=-1),
                jnp.unstack(w.u.astype(x.dtype)),
                strict=True,
            )
        )
    ]
    return jnp.concatenate(
        [parts[j] for j in range(blocks) for parts in columns], axis=-1
    )


def expand(
    h: Shaped[ArrayLike, "*N R"],
    w: SpectralFactors | BlockSpectralFactors | LowRankFactors,
) -> Inexact[Array, "*N O"]:
    """Returns h diag(s) v.T or h b.T: `linear` is `expand(contract(x, w), w)`."""
    h = _as_activations(h, w)
    if isinstance(w, BlockSpectralFactors):
        # There are more numbers in h than in v, so s multiplies v.
        scaled = w.v.astype(h.dtype) * w.s.astype(h.dtype)[:, None, :]
        products = [
            linalg.thin_product(h_j, _by_input_block(v_j, j, len(w.s)).T)
            for j, (h_j, v_j) in enumerate(
                zip(
                    jnp.split(h, len(w.s), axis=-1),
                    jnp.unstack(scaled),
                    strict=True,
                )
            )
        ]
        return jnp.concatenate(products, axis=-1)
    if isinstance(w, SpectralFactors):
        h = h * _as_row(w.s.astype(h.dtype), h.ndim)
    return linalg.thin_product(h, w[-1].astype(h.dtype).T)


def _by_input_block(
    v: Float[Array, "O_B R"], j: int, blocks: int
) -> Float[Array, "O_B R"]:
    """Sorts the columns of v_j by the block of the input that they meet."""
    rank = v.shape[-1]
    firsts = [(i - j * rank) % blocks for i in range(blocks)]
    return jnp.concatenate(
        [
            jax.lax.slice_in_dim(v, min(first, rank), rank, stride=blocks, axis=1)
            for first in firsts
        ],
        axis=1,
    )


def _as_activations(x: Shaped[ArrayLike, "*N"], w: Weight) -> Inexact[Array, "*N"]:
    """Casts x to a dtype in which the product with w has a meaning, if need be."""
    x, params = jnp.asarray(x), jax.tree.leaves(w)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        dtype = jnp.result_type(*params)
        inexact = jnp.issubdtype(dtype, jnp.inexact)
        return x.astype(dtype if inexact else jnp.float32)
    if any(jnp.iscomplexobj(param) for param in params):
        return x.astype(jnp.result_type(x, *params))
    return x


def _as_row(s: Inexact[Array, " R"], ndim: int) -> Inexact[Array, "*ones R"]:
    """Adds leading axes of size 1, so that no rank is promoted."""
    return jnp.expand_dims(s, tuple(range(ndim - 1)))


def lookup(ids: Int[Array, "..."], w: Weight) -> Float[Array, "... O"]:
    """Returns the rows `ids` of W (I, O) in the dtype of w, at 2 R O FLOPs per row.

    Raises:
      TypeError: for blocks, in which a row belongs to a single block of the input.
    """
    if isinstance(w, BlockSpectralFactors):
        raise TypeError(
            "lookup takes no BlockSpectralFactors, whose rows have rank R / B in each "
            "block of the output: keep the embedding plain"
        )
    if isinstance(w, SpectralFactors):
        rows = w.u[ids]
        return (rows * _as_row(w.s, rows.ndim)) @ w.v.T
    if isinstance(w, LowRankFactors):
        return w.a[ids] @ w.b.T
    return w[ids]


def transpose(w: Weight) -> Weight:
    """Returns W.T; factors are swapped without any computation.

    In blocks, columns are reordered too, and R must be a multiple of B: the inverse of
    another shuffle need not be a shuffle.

    Raises:
      ValueError: for R that is no multiple of B.
    """
    if isinstance(w, BlockSpectralFactors):
        blocks, rank = w.s.shape[-2:]
        check_even(blocks, rank)
        # Columns of u_i are (j, k), those of v_j are (k, i), for k below R / B.
        s, v = (swap_column_axes(x, rank // blocks) for x in (feeding_s(w.s), w.u))
        return BlockSpectralFactors(swap_column_axes(w.v, blocks), s, v)
    if isinstance(w, SpectralFactors):
        return SpectralFactors(w.v, w.s, w.u)
    if isinstance(w, LowRankFactors):
        return LowRankFactors(w.b, w.a)
    return jnp.swapaxes(w, -1, -2)


def to_dense(w: Weight) -> Float[Array, "*layers I O"]:
    """Returns W as a dense array, for tests, analysis and export."""
    if isinstance(w, BlockSpectralFactors):
        blocks = w.s.shape[-2]
        columns = _shuffle(_block_diagonal(w.u), blocks)
        rows = linalg.transpose(_block_diagonal(w.v))
        return linalg.matmul(columns * w.s.reshape(*w.s.shape[:-2], 1, -1), rows)
    if isinstance(w, SpectralFactors):
        return linalg.matmul(w.u * w.s[..., None, :], linalg.transpose(w.v))
    if isinstance(w, LowRankFactors):
        return linalg.matmul(w.a, linalg.transpose(w.b))
    return w


def _block_diagonal(x: Float[Array, "*L B n R"]) -> Float[Array, "*L Bn BR"]:
    blocks, n, rank = x.shape[-3:]
    eye = jnp.eye(blocks, dtype=x.dtype)[:, None, :, None]
    wide = jnp.expand_dims(x, -2) * eye
    return wide.reshape(*x.shape[:-3], blocks * n, blocks * rank)


def _shuffle(h: Float[Array, "*N BR"], blocks: int) -> Float[Array, "*N BR"]:
    """Returns h P: columns by block of the input, sorted by block of the output."""
    return swap_column_axes(h, h.shape[-1] // blocks)


def swap_column_axes(x: Float[Array, "*N nm"], m: int) -> Float[Array, "*N nm"]:
    """Reads the last axis as n x m, and transposes it."""
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // m, m)
    return linalg.transpose(pairs).reshape(x.shape)


def feeding_s(s: Float[Array, "*L B R"]) -> Float[Array, "*L B R"]:
    """Returns the s that column r of u_i meets, for every i and r; see `fed_s`."""
    blocks, rank = s.shape[-2:]
    return linalg.transpose(s.reshape(*s.shape[:-2], rank, blocks))


def fed_s(s: Float[Array, "*L B R"]) -> Float[Array, "*L B R"]:
    """Returns s by block of the output from s by block of the input.

    The inverse of `feeding_s`.
    """
    return linalg.transpose(s).reshape(s.shape)


def check_even(blocks: int, rank: int) -> None:
    """Raises ValueError unless all pairs of blocks share equally many columns."""
    if rank % blocks:
        raise ValueError(f"rank {rank} must be a multiple of the {blocks} blocks")


def to_low_rank(w: SpectralFactors) -> LowRankFactors:
    """Returns a = u sqrt|s| and b = v sign(s) sqrt|s|, which have the same product.

    The derivative by s counts as 0 where s is 0.

    References:
      Spectron, arXiv 2602.12429, 2026 (initialisation)
    """
    root = linalg.safe_sqrt(jnp.abs(w.s))[..., None, :]
    return LowRankFactors(w.u * root, w.v * root * jnp.sign(w.s)[..., None, :])


def energy_rank(
    s: Float[Array, "*layers R"], energy: float | Float[Array, ""]
) -> Int[Array, "*layers"]:
    """Returns the smallest k such that the k largest s^2 reach `energy` of their sum.

    Values may be unsorted and of either sign. If all are zero, the result is 1. Works
    under jit.

    References:
      TSVD, arXiv 2605.28573, 2026 (energy criterion)
    """
    reached = cumulative_energy(s)
    # Using the last partial sum as the total ensures that energy = 1 is reached.
    enough = reached >= energy * reached[..., -1:]
    return jnp.argmax(enough, axis=-1) + 1


def cumulative_energy(s: Float[Array, "*layers R"]) -> Float[Array, "*layers R"]:
    """Returns the sums of the k largest s^2, k = 1..R, in units of the largest."""
    s = linalg.as_float32(s)
    peak = jnp.max(jnp.abs(s), axis=-1, keepdims=True)
    squares = -jnp.sort(-jnp.square(s / linalg.safe_divisor(peak)), axis=-1)
    return jnp.cumsum(squares, axis=-1)


def from_dense(
    w: Float[Array, "*layers I O"],
    *,
    rank: int | None = None,
    energy: float | None = None,
    second_moment: Float[Array, "*layers M M"] | None = None,
) -> SpectralFactors:
    """Returns the best approximation W' of w of rank R, s descending.

    Best in Frobenius norm, ||w - W'||_F. With `second_moment` the outputs are closest
    instead: E ||x @ w - x @ W'||^2 is the least that rank R allows, for inputs x with
    that moment. The rank is full by default.

    Args:
      w: dense weight or a stack of dense weights.
      rank: number of singular values to keep.
      energy: alternative to `rank`: fraction of the sum of s^2 to keep, in (0, 1]; with
        `second_moment`, of E ||x @ w||^2. All layers of a stack get the largest rank
        that any of them needs. Does not work under jit.
      second_moment: (*layers, I, I), the mean of x.T x over inputs x or any multiple of
        it; positive semidefinite, of any rank. See `compression.Inputs`.

    Raises:
      ValueError: if both `rank` and `energy` are given, for a rank outside
        1..min(I, O), for an energy outside (0, 1], and for a second moment of another
        shape or, outside jit, with a NaN or an infinity.

    References:
      Eckart, Young, The approximation of one matrix by another of lower rank, 1936
      Wang et al., SVD-LLM, arXiv 2403.07378, 2024, section 3 (whitening by inputs).
      `Deviation:` the paper divides by a Cholesky factor of the moment, which has to be
      regular. Here W' = w Q Q.T with the leading right singular vectors Q of
      sqrt(moment) w: the same matrix, without a division.
    """
    if rank is not None and energy is not None:
        raise ValueError("rank and energy exclude each other: give only one")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    full = min(w.shape[-2:])
    if rank is not None and not 1 <= rank <= full:
        raise ValueError(f"rank must be in 1..{full} for shape {w.shape}, got {rank}")
    w = linalg.as_float32(w)
    seen = w
    if second_moment is not None:
        seen = linalg.matmul(square_root(second_moment, w.shape[-2]), w)
    u, s, vt = jnp.linalg.svd(seen, full_matrices=False)
    if energy is not None:
        rank = int(jnp.max(energy_rank(s, energy)))
    rank = rank or full
    v = linalg.transpose(vt)[..., :rank]
    if second_moment is None:
        return SpectralFactors(u[..., :rank], s[..., :rank], v)
    u, s, turn = jnp.linalg.svd(linalg.matmul(w, v), full_matrices=False)
    return SpectralFactors(u, s, linalg.matmul(v, linalg.transpose(turn)))


def truncate(
    w: Weight,
    rank: int,
    *,
    second_moment: Float[Array, "*layers M M"] | None = None,
) -> SpectralFactors:
    """Returns `from_dense` of W without forming it: the best approximation of rank R.

    Args:
      w: dense weight, or factors of any rank, orthonormal or not.
      rank: number of singular values to keep, at most the rank of the factors.
      second_moment: see `from_dense`.

    Raises:
      ValueError: see `from_dense`.
      TypeError: for blocks, which `blocks.from_dense` makes of dense weights.
    """
    if not isinstance(w, _Factors):
        return from_dense(w, rank=rank, second_moment=second_moment)
    left, v = _left_and_basis(w)
    small = from_dense(left, rank=rank, second_moment=second_moment)
    return small._replace(v=linalg.matmul(v, small.v))


def singular_values(
    w: Weight, *, second_moment: Float[Array, "*layers M M"] | None = None
) -> Float[Array, "*layers K"]:
    """Returns the singular values of W, descending: min(I, O) of them, or R of factors.

    With `second_moment`, returns the singular values of sqrt(moment) W. Their squares
    are what each rank of `from_dense` adds to E ||x @ W||^2.

    Args:
      w: dense weight, or factors, orthonormal or not.
      second_moment: see `from_dense`.

    Raises:
      ValueError: see `from_dense`.
      TypeError: for blocks, where they are |s| without a second moment.
    """
    left = (
        linalg.as_float32(w) if not isinstance(w, _Factors) else _left_and_basis(w)[0]
    )
    if second_moment is not None:
        root = square_root(second_moment, left.shape[-2])
        left = linalg.matmul(root, left)
    return jnp.linalg.svd(left, compute_uv=False)


def _left_and_basis(
    w: SpectralFactors | BlockSpectralFactors | LowRankFactors,
) -> tuple[Float[Array, "*layers I R"], Float[Array, "*layers O R"]]:
    """The x and v of W = x v.T with orthonormal v, so that x decides what is best."""
    if isinstance(w, BlockSpectralFactors):
        raise TypeError(
            "BlockSpectralFactors cannot be truncated, as the shuffle depends on the "
            "rank: use plain factors, or blocks.from_dense of a dense weight"
        )
    left = w.u * w.s[..., None, :] if isinstance(w, SpectralFactors) else w.a
    # v may have left the manifold: some retractions are lazy, or none.
    v, mixed = jnp.linalg.qr(linalg.as_float32(w[-1]))
    return linalg.matmul(left, linalg.transpose(mixed)), v


_DAMPING = 1e-6
"""Weight of directions that no input has, relative to the mean over directions."""


def square_root(
    moment: Float[Array, "*layers M M"], fan_in: int
) -> Float[Array, "*layers M M"]:
    """Returns c with c.T c = moment, a little damped; moments may be singular.

    Args:
      moment: see `from_dense`.
      fan_in: M that the weight has.

    Raises:
      ValueError: see `from_dense`.
    """
    if moment.shape[-2:] != (fan_in, fan_in):
        raise ValueError(
            f"second_moment must have shape (..., {fan_in}, {fan_in}), as the weight "
            f"has {fan_in} inputs; got {moment.shape}"
        )
    if not isinstance(moment, jax.core.Tracer) and not jnp.all(jnp.isfinite(moment)):
        raise ValueError("second_moment has a NaN or an infinity")
    moment = linalg.as_float32(moment)
    mean = jnp.mean(jnp.diagonal(moment, axis1=-2, axis2=-1), axis=-1)
    unit = linalg.safe_divisor(mean)[..., None]
    squares, directions = jnp.linalg.eigh(moment / unit[..., None])
    roots = jnp.sqrt(unit) * jnp.sqrt(jnp.maximum(squares, 0) + _DAMPING)
    return roots[..., :, None] * linalg.transpose(directions)


def init(
    key: PRNGKeyArray,
    fan_in: int,
    fan_out: int,
    rank: int,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    layers: Sequence[int] = (),
    scale: float = 1.0,
    rescale: bool = False,
    orthonormal: bool = True,
) -> SpectralFactors:
    """Initialises factors like the top-R SVD of a Gaussian matrix N(0, scale^2 / I).

    The singular vectors of a Gaussian matrix are uniform and independent of its
    singular values. So u and v are samples from the Haar distribution, and s are
    quantiles of the Marchenko-Pastur law. Nothing dense is sampled or decomposed.

    `Deviation:` the SCT reference starts from s = 1. For SmolLM2-1.7B that is 8-16
    times too small, and equal values lose R (R - 1) / 2 directions of the tangent
    space. Quantiles omit the fluctuation of a sample, O(1 / min(I, O)).

    Args:
      key: random key.
      fan_in: I.
      fan_out: O.
      rank: R.
      dtype: dtype of the factors.
      layers: leading axes; layers are independent.
      scale: multiplies the standard deviation 1 / sqrt(I) of the dense matrix. If 0, s
        and W are 0.
      rescale: whether to scale s so that W has the Frobenius norm of the dense matrix.
      orthonormal: whether to retract u and v. If False they are Gaussian, and one
        `retract` can later batch the weights of a whole model.

    Raises:
      ValueError: for a rank outside 1..min(fan_in, fan_out), and for a scale that is
        negative, not finite, or too large for the dtype.
    """
    if not 1 <= rank <= min(fan_in, fan_out):
        raise ValueError(
            f"rank must be in 1..{min(fan_in, fan_out)} for shape "
            f"({fan_in}, {fan_out}), got {rank}"
        )
    layers = tuple(layers)
    key_u, key_v = jax.random.split(key)
    s = initial_spectrum(fan_in, fan_out, rank, dtype, scale, rescale)
    drawn = SpectralFactors(
        jax.random.normal(key_u, (*layers, fan_in, rank), dtype),
        jnp.broadcast_to(jnp.asarray(s, dtype), (*layers, rank)),
        jax.random.normal(key_v, (*layers, fan_out, rank), dtype),
    )
    return retract(drawn) if orthonormal else drawn


def retract(tree: T, *, method: str = "cholesky_qr") -> T:
    """Retracts u and v of all SpectralFactors in a tree to the Stiefel manifold.

    All factors share the batched factorisations of `stiefel.retract`.

    Args:
      tree: any pytree; other leaves do not change.
      method: as in `stiefel.retract`.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_factors)
    factors = {i: (w.u, w.v) for i, w in enumerate(leaves) if is_spectral(w)}
    for i, (u, v) in stiefel.retract(factors, method=method).items():
        leaves[i] = leaves[i]._replace(u=u, v=v)
    return jax.tree.unflatten(treedef, leaves)


def initial_spectrum(
    fan_in: int,
    fan_out: int,
    rank: int,
    dtype: jax.typing.DTypeLike,
    scale: float,
    rescale: bool,
) -> np.ndarray:
    """Returns the R largest singular values of N(0, scale^2 / I), descending.

    Arguments as in `init`.

    Raises:
      ValueError: for a scale that `init` refuses.
    """
    if not isinstance(scale, jax.core.Tracer) and not 0 <= scale < math.inf:
        raise ValueError(f"scale must be finite and at least 0, got {scale}")
    with np.errstate(over="ignore", invalid="ignore"):
        s = _gaussian_singular_values(fan_in, fan_out, rank) * scale / math.sqrt(fan_in)
        if rescale:
            s = s * scale * math.sqrt(fan_out) / (np.linalg.norm(s) or 1.0)
    if isinstance(s, np.ndarray) and not np.max(s) <= jnp.finfo(dtype).max:
        raise ValueError(f"scale {scale} makes s too large for {jnp.dtype(dtype)}")
    return s


def _gaussian_singular_values(fan_in: int, fan_out: int, rank: int) -> np.ndarray:
    """Returns the largest quantiles of the singular values of a Gaussian, descending.

    For Gaussian G (m, n) with m <= n, the eigenvalues of G G.T / n follow the
    Marchenko-Pastur law on [(1 - r)^2, (1 + r)^2] with r = sqrt(m / n).
    """
    m, n = sorted((fan_in, fan_out))
    ratio = m / n
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # Substituting x = middle - radius cos(t) removes the square-root edges of the
    # density, and for a square matrix also its singularity at zero.
    t = np.linspace(0, np.pi, 8193)
    t = (t[1:] + t[:-1]) / 2
    x = (low + high) / 2 - (high - low) / 2 * np.cos(t)
    mass = np.cumsum(np.sin(t) ** 2 / x)
    quantiles = (np.arange(m - rank, m) + 0.5) / m
    return np.sqrt(n * np.interp(quantiles, mass / mass[-1], x))[::-1]


def composite_update_norm(old: Weight, new: Weight) -> Float[Array, "*layers"]:
    """Returns ||W' - W||_2 per layer at O((I + O) R^2) FLOPs, without forming W.

    For SpectralFactors, with u' = u P + E (likewise for v), the identity

        W' - W = [u, E_u] (C_u diag(s') C_v.T - diag(s) (+) 0) [v, E_v].T,  C = [P; I],

    holds for any P. The subtraction happens in a 2R x 2R matrix. With P = u.T u' the
    error is about 1e-5 relative plus eps max|s| absolute for orthonormal u and v, even
    if these co-rotate. Under lazy retraction, where |u.T u - I| = d for `old`, add
    sqrt(eps) d^2 max|s|. Columns that are far from orthonormal keep P = I, with the
    error of LowRankFactors. Large and small factors are scaled first.

    For LowRankFactors, W' - W = [a' - a, a] [b', b' - b].T. The absolute error is about
    sqrt(eps) max_i(||a'_i - a_i|| ||b_i|| + ||a_i|| ||b'_i - b_i||).

    For BlockSpectralFactors the result is an upper bound. With D_i, the entries of s
    that u_i feeds,

        ||W' - W||_2 <= max_i ||u'_i D'_i - u_i D_i||_2 max_j ||v'_j||_2
                        + max_i ||u_i||_2 max_j ||(v'_j - v_j) diag(s_j)||_2,

    as W' - W = (U' P S' - U P S) V'.T + U P S (V' - V).T for the block diagonals U and
    V', where P is a permutation. For orthonormal columns, whose norms are 1, it is
    exact where only u and s, or only v, changed.

    Differentiable: the derivative is p.T dW q for the singular vectors p and q of the
    norm, their mean where several are equally large, and 0 where W' = W.

    Args:
      old: factors of W.
      new: factors of W', of the same kind.

    Raises:
      TypeError: for dense arrays, or factors of different kinds.
    """
    return _norms([(old, new)])[0]


def max_composite_update_norm(old: Any, new: Any) -> Float[Array, ""]:
    """Returns the largest ||W' - W||_2 over all factorised weights of two trees.

    Other leaves are ignored; without factors the result is 0. The weights share batched
    products.
    """
    olds, treedef = jax.tree.flatten(old, is_leaf=is_factors)
    news = treedef.flatten_up_to(new)
    pairs = [(o, n) for o, n in zip(olds, news, strict=True) if is_factors(o)]
    return jnp.max(jnp.stack([jnp.zeros([]), *map(jnp.max, _norms(pairs))]))


def orthonormality_error(tree: Any) -> Float[Array, ""]:
    """Returns max |x.T x - I| over all u and v of a tree, 0 if there are none."""
    factors = [w for w in jax.tree.leaves(tree, is_leaf=is_factors) if is_spectral(w)]
    errors = [stiefel.orthonormality_error(x) for w in factors for x in (w.u, w.v)]
    return jnp.max(jnp.stack([jnp.zeros([]), *errors]))


def halves(w: BlockSpectralFactors) -> tuple[SpectralFactors, SpectralFactors]:
    """Returns u_i D_i and diag(s_j) v_j.T as factors, with the blocks as a layer axis.

    W of orthonormal u and v changes by at most the sum of their changes. The first half
    changes with u and s, the second with v alone; see `composite_update_norm`.
    """
    rank = w.s.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(rank, dtype=w.s.dtype), (*w.s.shape, rank))
    return SpectralFactors(w.u, feeding_s(w.s), eye), SpectralFactors(eye, w.s, w.v)


def _norms(pairs: list[tuple[Any, Any]]) -> list[Float[Array, "*layers"]]:
    """Returns the norm of every pair, or its bound; in blocks, of both halves."""
    parts: list[tuple[Any, Any]] = []
    for old, new in pairs:
        if is_blocks(old) and is_blocks(new):
            old_in, old_out = halves(old)
            parts.append((old_in, halves(new)[0]))
            parts.append((old_out, old_out._replace(v=new.v)))
        else:
            parts.append((old, new))
    found = iter(_plain_norms(parts))
    sides = [x for old, new in pairs if is_blocks(old) for x in (new.v, old.u)]
    largest = iter(_largest_values(sides))  # that multiply the changes of the halves
    half = lambda: jnp.max(next(found), axis=-1) * jnp.max(next(largest), axis=-1)
    return [half() + half() if is_blocks(old) else next(found) for old, _ in pairs]


def _largest_values(xs: list[Array]) -> list[Float[Array, "*layers"]]:
    """Returns ||x||_2 of each matrix."""

    def product(x: Array) -> tuple[Array, Array]:
        x = linalg.as_float32(x)
        size = linalg.range_divisor(jnp.max(jnp.abs(x), axis=(-2, -1)))
        return linalg.gram(x / size[..., None, None]), size

    return _norms_from([product(x) for x in xs])


def _plain_norms(pairs: list[tuple[Any, Any]]) -> list[Float[Array, "*layers"]]:
    return _norms_from([_small_product(old, new) for old, new in pairs])


def _norms_from(products: list[tuple[Array, Array]]) -> list[Float[Array, "*layers"]]:
    """Returns c sqrt(radius(m)) for pairs of a matrix m and a size c."""
    radii = linalg.map_batched(
        lambda m: linalg.spectral_radius_bound(m, squarings=20),
        [product for product, _ in products],
        fill=0.0,
    )
    return [
        size * linalg.safe_sqrt(radius)
        for (_, size), radius in zip(products, radii, strict=True)
    ]


def _small_product(
    old: Weight, new: Weight
) -> tuple[Float[Array, "*layers R2 R2"], Float[Array, "*layers"]]:
    """Returns a 2R x 2R matrix m and a size c with ||W' - W||_2^2 = c^2 radius(m).

    m can be squared; c is 1 for factors of ordinary size.
    """
    old, new = jax.tree.map(linalg.as_float32, (old, new))
    if isinstance(old, SpectralFactors) and isinstance(new, SpectralFactors):
        p_u, x_u, e_u, sizes_u = _in_old_basis(old.u, new.u)
        p_v, x_v, e_v, sizes_v = _in_old_basis(old.v, new.v)
        s, new_s = (
            w.s * size_u * size_v
            for w, size_u, size_v in zip((old, new), sizes_u, sizes_v, strict=True)
        )
        peak = jnp.maximum(*(jnp.max(jnp.abs(x), axis=-1) for x in (s, new_s)))
        size = linalg.range_divisor(peak)
        k = small_space_difference(
            p_u, p_v, s / size[..., None], new_s / size[..., None]
        )
        g_u, g_v = (
            linalg.gram(jnp.concatenate([x, e], axis=-1))
            for x, e in ((x_u, e_u), (x_v, e_v))
        )
        return linalg.matmul(
            linalg.matmul(g_u, k),
            linalg.matmul(g_v, linalg.transpose(k)),
        ), size
    if isinstance(old, LowRankFactors) and isinstance(new, LowRankFactors):
        d_a, d_b = new.a - old.a, new.b - old.b
        left = jnp.concatenate([d_a, old.a], axis=-1)
        right = jnp.concatenate([new.b, d_b], axis=-1)
        balance = _balance(left, right)
        grams = linalg.gram(left * balance), linalg.gram(right / balance)
        peaks = [jnp.max(jnp.abs(g), axis=(-2, -1)) for g in grams]
        squares = [linalg.range_divisor(peak) for peak in peaks]
        g_l, g_r = (g / c[..., None, None] for g, c in zip(grams, squares, strict=True))
        size = jnp.sqrt(squares[0]) * jnp.sqrt(squares[1])
        return linalg.matmul(g_l, g_r), size
    raise TypeError(
        "composite_update_norm compares two weights with factors of the same kind, "
        f"got {type(old).__name__} and {type(new).__name__}"
    )


def _balance(
    left: Float[Array, "*L I R2"], right: Float[Array, "*L O R2"]
) -> Float[Array, "*L 1 R2"]:
    """Returns factors after which both columns of each rank-one term are equally long.

    The product of left * factor and right / factor does not change, so the factor
    counts as a constant.
    """
    size_l, size_r = linalg.column_norms(left), linalg.column_norms(right)
    vanishes = (size_l == 0) | (size_r == 0)
    ratio = jnp.where(vanishes, 1, size_r) / jnp.where(vanishes, 1, size_l)
    factor = jnp.where(
        (ratio > jnp.finfo(ratio.dtype).tiny) & jnp.isfinite(ratio),
        jnp.sqrt(ratio),
        jnp.sqrt(size_r) * jax.lax.rsqrt(linalg.safe_divisor(size_l)),
    )
    # The other column of a term that vanishes may be too large to square.
    alone = linalg.range_divisor(size_r) / linalg.range_divisor(size_l)
    return jax.lax.stop_gradient(jnp.where(vanishes, alone, factor))


def _in_old_basis(
    old: Float[Array, "*L n R"], new: Float[Array, "*L n R"]
) -> tuple[Array, Array, Array, tuple[Array, Array]]:
    """Returns p, x, e and sizes with new / sizes[1] = x p + e and x = old / sizes[0].

    The sizes (*L, R) are 1 for columns that can be squared. x.T e = 0 to rounding, also
    for an old that a lazy retraction left nearly orthonormal. Where it is not, e is
    the change of a column, unless subtracting what x explains makes it smaller.
    """
    size, new_size = (
        linalg.range_divisor(jnp.max(jnp.abs(x), axis=-2)) for x in (old, new)
    )
    alike = size == new_size
    p = jnp.where(alike[..., None], jnp.eye(old.shape[-1], dtype=old.dtype), 0)
    e = new / new_size[..., None, :] - jnp.where(alike, 1 / size, 0)[..., None, :] * old
    for _ in range(2):
        # Divide coefficients, not `old`, which would copy it.
        more = linalg.gram(old, e) / size[..., None]
        rest = e - linalg.matmul(old, more / size[..., None])
        smaller = linalg.column_norms(rest) <= 1.01 * linalg.column_norms(e)
        e = jnp.where(smaller, rest, e)
        p = p + jnp.where(smaller, more, 0)
    return p, old / size[..., None, :], e, (size, new_size)


def split_along(
    x: Float[Array, "*L n R"], y: Float[Array, "*L n C"]
) -> tuple[Float[Array, "*L R C"], Float[Array, "*L n C"]]:
    """Returns p and e with y = x p + e, where x.T e = 0 for orthonormal x."""
    p = linalg.gram(x, y)
    return p, y - linalg.matmul(x, p)


def small_space_difference(
    c_u: Float[Array, "*L R R"],
    c_v: Float[Array, "*L R R"],
    old_s: Float[Array, "*L R"],
    new_s: Float[Array, "*L R"],
    t_u: Float[Array, "*L R R"] | None = None,
    t_v: Float[Array, "*L R R"] | None = None,
) -> Float[Array, "*L R2 R2"]:
    """Returns K with W' - W = [u, E_u] K [v, E_v].T.

    Args:
      c_u: coefficients of u' along u.
      c_v: coefficients of v' along v.
      old_s: s.
      new_s: s'.
      t_u: coefficients of u' along E_u. Defaults to the identity.
      t_v: coefficients of v' along E_v. Defaults to the identity.
    """
    rank = old_s.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(rank, dtype=c_u.dtype), c_u.shape)
    wide_eye = jnp.broadcast_to(
        jnp.eye(2 * rank, dtype=c_u.dtype), (*c_u.shape[:-2], 2 * rank, 2 * rank)
    )
    left = jnp.concatenate([c_u, eye if t_u is None else t_u], axis=-2)
    right = jnp.concatenate([c_v, eye if t_v is None else t_v], axis=-2)
    k = linalg.matmul(left * new_s[..., None, :], linalg.transpose(right))
    padded = jnp.concatenate([old_s, jnp.zeros_like(old_s)], axis=-1)
    return k - padded[..., None] * wide_eye


def small_space_product(
    k: Float[Array, "*L R2 R2"],
    g_u: Float[Array, "*L R R"],
    g_v: Float[Array, "*L R R"],
) -> Float[Array, "*L R2 R2"]:
    """Returns a matrix with spectral radius ||[u, E_u] K [v, E_v].T||_2^2.

    The matrix is G_u K G_v K.T with G = I (+) g.

    Args:
      k: K, from `small_space_difference`.
      g_u: E_u.T @ E_u.
      g_v: E_v.T @ E_v.
    """
    rank = g_u.shape[-1]

    def weigh(g, k):
        lower = linalg.matmul(g, k[..., rank:, :])
        return jnp.concatenate([k[..., :rank, :], lower], axis=-2)

    return linalg.matmul(weigh(g_u, k), weigh(g_v, linalg.transpose(k)))
