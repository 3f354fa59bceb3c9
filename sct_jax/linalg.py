"""Small dense linear algebra, built from matrix products.

Functions act on the last two axes and accept any leading axes, unless their signature
says (N, k, k). Products use `HIGHEST` precision: the bfloat16 and TF32 defaults of
accelerators destroy orthonormality. Functions with loops are jitted, so that eager
callers compile them once.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Inexact

T = TypeVar("T")  # a pytree of arrays

HIGHEST = jax.lax.Precision.HIGHEST

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Muon's quintic: five steps map singular values in (1e-3, 1] to about [.5, 1.5]."""

CUBIC = (1.5, -0.5, 0.0)
"""The convergent cubic: its fixed point is exactly 1."""

MAX_STACKS = 4
"""Maximum number of batched calls in `map_batched`."""


def _newton_ends(dtype: jnp.dtype) -> float:
    """Returns an error from which a quadratic step reaches rounding."""
    return 2e-4 if dtype == jnp.float32 else 1e-8


def matmul(x: Float[Array, "*#L n k"], y: Float[Array, "*#L k m"]) -> Array:
    """Returns x @ y in full float32 precision."""
    return jnp.matmul(x, y, precision=HIGHEST)


def einsum(
    axes: str, x: Array, y: Array, *, precision: jax.lax.Precision | None = None
) -> Float[Array, "..."]:
    """Returns the product of x and y over `axes`, with float32 sums and result."""
    return jnp.einsum(
        axes, x, y, precision=precision, preferred_element_type=jnp.float32
    )


def transpose(x: Float[Array, "*L n m"]) -> Float[Array, "*L m n"]:
    """Swaps the last two axes."""
    return jnp.swapaxes(x, -1, -2)


def as_float32(x: Float[Array, "*L"]) -> Float[Array, "*L"]:
    """Casts arrays of lower precision to float32; returns others unchanged."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


@jax.custom_jvp
def thin_product(
    x: Inexact[Array, "*N k"], w: Inexact[Array, "k m"]
) -> Inexact[Array, "*N m"]:
    """Returns x @ w in the default precision, where w has a long and a short side.

    The gradient of w is computed with its short side first, like
    `sum_of_outer_products`.
    """
    return x @ w


@functools.partial(thin_product.defjvp, symbolic_zeros=True)
def _thin_product_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    y = x @ w
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(dx @ w)
    if not isinstance(dw, SymbolicZero):
        short_first = w.shape[0] <= w.shape[1]
        held = jax.lax.optimization_barrier(dw if short_first else dw.T)
        terms.append(x @ (held if short_first else held.T))
    return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)


def sum_of_outer_products(
    x: Inexact[Array, "N k"], y: Inexact[Array, "N m"]
) -> Inexact[Array, "k m"]:
    """Returns x.T @ y in the default precision, for y of few columns.

    XLA on CPU is up to 3 times faster with the few columns first, and does not keep
    that order unless it is held.
    """
    return jax.lax.optimization_barrier(y.T @ x).T


def gram(
    x: Float[Array, "*L n k"], y: Float[Array, "*L n m"] | None = None
) -> Float[Array, "*L k m"]:
    """Returns x.T @ y, where y defaults to x.

    Rows may be sharded. Devices then sum k x m partial products, and no factor is
    gathered. On a mesh with Explicit axes the result is replicated.
    """
    y = x if y is None else y
    sharding = jax.typeof(x).sharding
    out_sharding = None
    if AxisType.Explicit in sharding.mesh.axis_types:
        out_sharding = NamedSharding(sharding.mesh, PartitionSpec(*[None] * x.ndim))
    return jnp.einsum(
        "...nk,...nm->...km", x, y, precision=HIGHEST, out_sharding=out_sharding
    )


def frobenius_norm(x: Float[Array, "*L n m"]) -> Float[Array, "*L"]:
    """Returns the square root of the sum of squares over the last two axes."""
    return safe_sqrt(jnp.sum(jnp.square(x), axis=(-2, -1)))


def column_norms(x: Float[Array, "*L n m"]) -> Float[Array, "*L 1 m"]:
    """Returns the norm of every column, whatever its size."""
    peak = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
    divisor = range_divisor(peak)
    squares = jnp.sum(jnp.square(x / divisor), axis=-2, keepdims=True)
    return safe_sqrt(squares) * divisor


def safe_sqrt(x: Float[Array, "*L"]) -> Float[Array, "*L"]:
    """Returns the square root, with derivative 0 at 0."""
    zero = x == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def safe_divisor(size: Float[Array, "*L"]) -> Float[Array, "*L"]:
    """Replaces zeros by ones, so that a division by the result keeps zeros.

    Sizes above 1 / tiny are lowered to it, by a factor of 4 at most: XLA multiplies by
    reciprocals, and theirs would be subnormal and count as zero.
    """
    largest = 1 / float(jnp.finfo(size.dtype).tiny)
    return jnp.where(size > largest, largest, jnp.where(size > 0, size, 1))


def range_divisor(peak: Float[Array, "*L"]) -> Float[Array, "*L"]:
    """Returns a divisor by which numbers up to `peak` can be squared and summed.

    It is exactly 1 where they can be as they are. The derivative is zero.
    """
    third = jnp.finfo(peak.dtype).maxexp // 3
    ordinary = (peak >= 2.0**-third) & (peak <= 2.0**third) | jnp.isnan(peak)
    return jax.lax.stop_gradient(jnp.where(ordinary, 1, safe_divisor(peak)))


def scale_by_max(x: Float[Array, "*L n m"]) -> Float[Array, "*L n m"]:
    """Divides each matrix by its largest absolute entry, so that squares are finite."""
    peak = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    return x / safe_divisor(peak)


def map_batched(
    fn: Callable[..., Any],
    *operands: Sequence[Float[Array, "..."]],
    fill: float,
) -> list[Any]:
    """Applies `fn` to lists of square matrices in at most `MAX_STACKS` batched calls.

    Matrices of equal size are stacked. If there are more than `MAX_STACKS` sizes,
    similar sizes are padded to the largest of them, with `fill` on the diagonal. A
    batched call replaces hundreds of small kernels and compiles quickly. Matrices of
    another dtype are stacked apart.

    Requires that `fn` does not mix the padding with the rest of the matrix. Results
    then equal the unpadded ones.

    Args:
      fn: maps stacks (N, K, K) or (N, K), one per operand, to a pytree of arrays
        (N, K, K), (N, K) or (N,).
      *operands: lists of matrices (*L, k, k), and after the first also of vectors
        (*L, k), which stand for diagonal matrices. Their i-th have equal shapes.
      fill: diagonal of the padding: 1 for factorisations, 0 for norms.

    Returns:
      One pytree of arrays (*L, k, k), (*L, k) or (*L,) per matrix, in order.
    """
    first = operands[0]
    if not first:
        return []
    results: list[Any] = [None] * len(first)
    for dtype in sorted({m.dtype for m in first}, key=str):
        alike = [i for i, m in enumerate(first) if m.dtype == dtype]
        sizes = sorted({first[i].shape[-1] for i in alike})
        per_stack = math.ceil(len(sizes) / MAX_STACKS)
        for start in range(0, len(sizes), per_stack):
            members = sizes[start : start + per_stack]
            indices = [i for i in alike if first[i].shape[-1] in members]
            stacks = [
                jnp.concatenate(
                    [_pad(arrays[i], first[i].ndim, members[-1], fill) for i in indices]
                )
                for arrays in operands
            ]
            stacked, offset = fn(*stacks) if len(stacks[0]) else _empty(fn, stacks), 0
            for i in indices:
                layers, k = first[i].shape[:-2], first[i].shape[-1]
                own = slice(offset, offset + math.prod(layers))
                results[i] = jax.tree.map(lambda x: _cut(x, own, layers, k), stacked)  # noqa: B023
                offset = own.stop
    return results


def _empty(fn: Callable[..., Any], stacks: Sequence[Array]) -> Any:
    """The result of `fn` for empty stacks, on which functions such as `max` fail."""
    one = [jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for x in stacks]
    return jax.tree.map(
        lambda x: jnp.zeros((0, *x.shape[1:]), x.dtype), jax.eval_shape(fn, *one)
    )


def _cut(stacked: Array, own: slice, layers: tuple[int, ...], k: int) -> Array:
    x = stacked[(own, *[slice(k)] * (stacked.ndim - 1))]
    return x.reshape(layers + x.shape[1:])


def _pad(
    x: Float[Array, "..."], axes_of_matrices: int, size: int, fill: float
) -> Float[Array, "N ..."]:
    """A stack of matrices, or of vectors, which have an axis less."""
    k, axes = x.shape[-1], 2 - (axes_of_matrices - x.ndim)
    x = x.reshape((-1, *[k] * axes))
    if k == size:
        return x
    if axes == 1:
        return jnp.pad(x, ((0, 0), (0, size - k)), constant_values=fill)
    x = jnp.pad(x, ((0, 0), (0, size - k), (0, size - k)))
    diagonal = jnp.where(jnp.arange(size) < k, 0, fill)
    return x + jnp.diag(diagonal).astype(x.dtype)[None]


def inverse_cholesky(g: Float[Array, "N k k"]) -> Float[Array, "N k k"]:
    """Returns L^-1 with g = L @ L.T; NaN where g is not positive definite.

    Gram matrices are near the identity after an optimizer step. There the inverse
    follows by recursive halving,

        L^-1 = [M_1, 0; -M_2 C.T M_1, M_2],

    with C = M_1 g_12, where M_1 and M_2 are the inverse factors of g_11 and of
    g_22 - C.T C. Newton's iteration inverts the smallest blocks. If it does not
    converge for the whole stack, `eliminate` takes over.

    Library factorisations are slow on accelerators. In jaxlib up to 0.11 they also
    deadlock when several run concurrently on a CPU with few threads, for example on
    several devices of one host.
    """
    # Smaller blocks are not cheaper, and more blocks take long to compile.
    block = max(16, math.ceil(g.shape[-1] / 8))
    m, error = _inverse_by_halves(g, block)
    return jax.lax.cond(error < _newton_ends(g.dtype), lambda g: m, eliminate, g)


def _inverse_by_halves(g: Float[Array, "N k k"], block: int) -> tuple[Array, Array]:
    """Returns L^-1 and the largest error of any block before its last step."""
    k = g.shape[-1]
    if k <= block:
        return _inverse_by_newton(g)
    half = k // 2
    m_1, error_1 = _inverse_by_halves(g[:, :half, :half], block)
    c = matmul(m_1, g[:, :half, half:])
    rest = g[:, half:, half:] - matmul(transpose(c), c)
    m_2, error_2 = _inverse_by_halves(rest, block)
    corner = -matmul(matmul(m_2, transpose(c)), m_1)
    upper = jnp.pad(m_1, ((0, 0), (0, 0), (0, k - half)))
    lower = jnp.concatenate([corner, m_2], axis=-1)
    m = jnp.concatenate([upper, lower], axis=-2)
    # A NaN from either half must propagate.
    return m, jnp.where(error_1 >= error_2, error_1, error_2 + 0 * error_1)


def _inverse_by_newton(g: Float[Array, "N k k"]) -> tuple[Array, Array]:
    """Returns L^-1 and the error before the last step; converges quadratically.

    With E = M g M.T - I, one step is M <- M - (tril(E, -1) + diag(E) / 2) M.
    """
    eye = jnp.eye(g.shape[-1], dtype=g.dtype)[None]
    half_lower = jnp.tril(jnp.ones_like(eye), -1) + 0.5 * eye
    ends = _newton_ends(g.dtype)

    def improve(carry):
        m, _, step = carry
        e = matmul(matmul(m, g), transpose(m)) - eye
        error = jnp.max(frobenius_norm(e))
        return m - matmul(half_lower * e, m), error, step + 1

    def unfinished(carry):
        _, error, step = carry
        # Growth of the error ends the loop too.
        return (error >= ends) & (error < 2.0) & (step < 10)

    e = g - eye
    start = (eye - half_lower * e, jnp.max(frobenius_norm(e)), jnp.array(0))
    m, error, _ = jax.lax.while_loop(unfinished, improve, start)
    return m, error


def eliminate(g: Float[Array, "N k k"]) -> Float[Array, "N k k"]:
    """Returns L^-1 like `inverse_cholesky`, for g far from the identity.

    Gaussian elimination of [g, I], column by column: slow to run, quick to compile.
    """
    k = g.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(k, dtype=g.dtype), g.shape)

    def clear(j, rows):
        pivot_row = jax.lax.dynamic_index_in_dim(rows, j, axis=1)
        column = jax.lax.dynamic_index_in_dim(rows, j, axis=2)
        pivot = jax.lax.dynamic_index_in_dim(pivot_row, j, axis=2)
        below = (jnp.arange(k) > j)[None, :, None]
        return rows - jnp.where(below, column / pivot, 0) * pivot_row

    rows = jax.lax.fori_loop(0, k, clear, jnp.concatenate([g, eye], axis=-1))
    pivots = jnp.diagonal(rows[..., :k], axis1=-2, axis2=-1)
    # Pivots that are not positive give NaN, including zero.
    scale = jnp.where(pivots > 0, jax.lax.rsqrt(jnp.abs(pivots)), jnp.nan)
    return rows[..., k:] * scale[..., None]


@functools.partial(jax.jit, static_argnames="max_steps")
def inverse_sqrt(
    g: Float[Array, "N k k"], *, max_steps: int = 60
) -> Float[Array, "N k k"]:
    """Returns g^(-1/2) for symmetric g; NaN where g is not positive definite.

    Newton-Schulz iteration with the convergent cubic, Z <- Z (3 I - Z g Z) / 2. The
    error e = ||Z g Z - I||_F converges quadratically: one step leaves at most 3/4 e^2.
    So the loop ends at e < 1e-3, well above rounding, and one more step follows. In
    float64 it ends at 1e-8.
    """
    ends = 1e-3 if g.dtype == jnp.float32 else 1e-8
    eye = jnp.eye(g.shape[-1], dtype=g.dtype)[None]
    # Eigenvalues below 3 converge; the absolute row sums bound the largest one.
    scale = jnp.maximum(jnp.max(jnp.sum(jnp.abs(g), -1), -1) / 1.5, 1.0)
    scale = scale[:, None, None]
    g = g / scale

    def improve(z):
        # Recomputed from g in each step, so that rounding does not accumulate.
        residual = matmul(transpose(z), matmul(g, z))
        return matmul(z, CUBIC[0] * eye + CUBIC[1] * residual), residual

    def unfinished(carry):
        _, residual, step = carry
        # NaN compares as False: a failed matrix does not keep the loop running.
        open_ones = frobenius_norm(residual - eye) >= ends
        return jnp.any(open_ones) & (step < max_steps)

    z, residual = improve(jnp.broadcast_to(eye, g.shape))
    z, residual, _ = jax.lax.while_loop(
        unfinished,
        lambda carry: (*improve(carry[0]), carry[2] + 1),
        (z, residual, jnp.array(0)),
    )
    converged = frobenius_norm(residual - eye)[:, None, None] < ends
    return jnp.where(converged, z / jnp.sqrt(scale), jnp.nan)


@functools.partial(jax.jit, static_argnames="max_sweeps")
def jacobi_svd(
    m: Float[Array, "N k k"], *, max_sweeps: int = 12
) -> tuple[Float[Array, "N k k"], Float[Array, "N k"], Float[Array, "N k k"]]:
    """Returns p, s, z with m = p diag(s) z.T and orthogonal p and z.

    Kogbetliantz' two-sided Jacobi method. Each round applies k / 2 disjoint rotations
    in tournament order; a sweep costs 12 k^3 FLOPs. The values s may be negative and
    unsorted. For nearly diagonal m, p and z are near the identity and few sweeps
    suffice.

    Library decompositions deadlock in jaxlib up to 0.11 when several run concurrently
    on a CPU with few threads.

    References:
      Brent, Luk, Van Loan, Computation of the singular value decomposition using
      mesh-connected processors, J. VLSI Comput. Syst. 1, 1985
    """
    k = m.shape[-1]
    if k == 1:
        one = jnp.ones_like(m)
        return one, m[..., 0], one
    # Odd sizes get a row and a column of zeros, which never mix with the others.
    m = jnp.pad(m, ((0, 0), (0, k % 2), (0, k % 2)))
    size = m.shape[-1]
    half = size // 2
    order = [0, half, *range(1, half - 1), *range(half + 1, size), half - 1]
    order = jnp.array(order if half > 1 else [0, 1])
    eye = jnp.eye(size, dtype=m.dtype)[None]
    divisor = range_divisor(jnp.max(jnp.abs(m), axis=(-2, -1)))
    m = m / divisor[:, None, None]

    def rotate_columns(x, angle):
        """Rotates each column pair (i, i + half) by its own angle."""
        c, s = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
        left, right = x[..., :half], x[..., half:]
        turned = jnp.concatenate([c * left + s * right, c * right - s * left], axis=-1)
        return turned[..., order]

    def one_round(_, carry):
        m, p, z = carry
        diagonal = lambda x: jnp.diagonal(x, axis1=-2, axis2=-1)
        a, b = diagonal(m[:, :half, :half]), diagonal(m[:, :half, half:])
        c, d = diagonal(m[:, half:, :half]), diagonal(m[:, half:, half:])
        both = jnp.arctan2(c + b, a - d)
        apart = jnp.arctan2(c - b, a + d)
        left, right = (apart + both) / 2, (both - apart) / 2
        # Choose the smallest angles that zero both off-diagonal entries. A shift of
        # one angle by pi flips signs in s; a shift of both by pi / 2 permutes s.
        left = left - jnp.pi * jnp.round(left / jnp.pi)
        swap = jnp.where(jnp.abs(left) > jnp.pi / 4, jnp.sign(left) * jnp.pi / 2, 0)
        left, right = left - swap, right - swap
        right = right - jnp.pi * jnp.round(right / jnp.pi)
        m = rotate_columns(transpose(rotate_columns(transpose(m), left)), right)
        return m, rotate_columns(p, left), rotate_columns(z, right)

    def off_diagonal(m):
        return frobenius_norm(m * (1 - eye)) / safe_divisor(frobenius_norm(m))

    def unfinished(carry):
        m, _, _, sweeps = carry
        # NaN compares as False: a matrix with a NaN does not affect the others.
        left = jnp.any(off_diagonal(m) > 2 * jnp.finfo(m.dtype).eps)
        return left & (sweeps < max_sweeps)

    def sweep(carry):
        m, p, z, sweeps = carry
        # A full tournament restores the original order.
        m, p, z = jax.lax.fori_loop(0, size - 1, one_round, (m, p, z))
        return m, p, z, sweeps + 1

    # Inside shard_map, start must vary over the same axes as m.
    start = jnp.where(m == m, eye, eye)
    m, p, z, _ = jax.lax.while_loop(unfinished, sweep, (m, start, start, jnp.array(0)))
    s = jnp.diagonal(m, axis1=-2, axis2=-1) * divisor[:, None]
    return p[:, :k, :k], s[:, :k], z[:, :k, :k]


def newton_schulz(
    x: T,
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = QUINTIC,
) -> T:
    """Approximates msign(x) = x (x.T x)^(-1/2), the nearest isometry to x.

    One step is X <- X (a I + b G + c G^2) with G = X.T X. The polynomials commute, so
    five steps at a time run on the small Gram matrix, and x is multiplied once. For
    n >> m this costs 4 n m^2 FLOPs, where the iteration on x costs 4 n m^2 per step.
    The small products of a whole tree are a few batched calls. More steps would let the
    rounding of G grow, by a^2 each, where x has directions of size zero.

    `Deviation:` reference implementations iterate on x itself, in bfloat16.

    Args:
      x: pytree of arrays (*L, n, m).
      steps: number of iterations.
      coefficients: (a, b, c), for example `QUINTIC` or `CUBIC`.

    References:
      Jordan et al., Muon: an optimizer for hidden layers, 2024,
      https://kellerjordan.github.io/posts/muon
    """
    leaves, treedef = jax.tree.flatten(x)
    wide = [leaf.shape[-2] < leaf.shape[-1] for leaf in leaves]
    talls = []
    for leaf, is_wide in zip(leaves, wide, strict=True):
        tall = scale_by_max(as_float32(transpose(leaf) if is_wide else leaf))
        talls.append(tall / safe_divisor(frobenius_norm(tall)[..., None, None]))
    for done in range(0, steps, _STEPS_PER_GRAM):
        products = map_batched(
            functools.partial(
                _polynomial,
                steps=min(_STEPS_PER_GRAM, steps - done),
                coefficients=coefficients,
            ),
            [gram(tall) for tall in talls],
            fill=0.0,
        )
        talls = [matmul(x, p) for x, p in zip(talls, products, strict=True)]
    results = [
        (transpose(x) if is_wide else x).astype(leaf.dtype)
        for leaf, x, is_wide in zip(leaves, talls, wide, strict=True)
    ]
    return jax.tree.unflatten(treedef, results)


_STEPS_PER_GRAM = 5


def _polynomial(
    g: Float[Array, "N k k"], steps: int, coefficients: tuple[float, float, float]
) -> Float[Array, "N k k"]:
    """Returns the polynomial P with x P the last iterate, for x.T x = g."""
    a, b, c = coefficients
    eye = jnp.eye(g.shape[-1], dtype=g.dtype)[None]
    product = jnp.broadcast_to(eye, g.shape)
    for step in range(steps):
        p = a * eye + b * g
        if c:
            p = p + c * matmul(g, g)
        product = matmul(product, p) if step else p
        if step + 1 < steps:
            g = matmul(matmul(p, g), p)
    return product


def power_iteration(
    x: Float[Array, "*L n m"], vector: Float[Array, "*L m"], *, steps: int = 1
) -> tuple[Float[Array, "*L"], Float[Array, "*L m"]]:
    """Returns a lower bound of ||x||_2 and an improved right singular vector.

    During training, warm-start from the vector of the previous update: one step then
    tracks a slowly changing x. If x is zero or contains NaN, the direction of the
    vector is kept for later updates. A zero x gives a norm of 0.
    """

    def normalise(y, otherwise):
        norm = column_norms(y)
        return jnp.where(norm > 0, y / safe_divisor(norm), otherwise)

    vector = vector[..., None]
    vector = normalise(vector, vector)
    for _ in range(steps):
        left = matmul(x, vector)
        # Its size does not matter, but a product with x may overflow.
        left = left / range_divisor(jnp.max(jnp.abs(left), axis=-2, keepdims=True))
        vector = normalise(gram(x, left), vector)
    norm = column_norms(matmul(x, vector))
    return norm[..., 0, 0], vector[..., 0]


@functools.partial(jax.jit, static_argnames="squarings")
def spectral_radius_bound(
    m: Float[Array, "N k k"],
    *,
    squarings: int,
    threshold: Float[Array, " N"] | None = None,
) -> Float[Array, " N"]:
    """Returns ||m^p||_F^(1/p) with p = 2**squarings, at least the spectral radius.

    For symmetric m the bound is at most k^(1/2p) times the radius (Gelfand's formula).
    For k = 256 it is 1 % too large after 8 squarings, and 5e-6 after 20.

    The derivative is y.T dm x / y.T x for the eigenvectors y and x of the radius, their
    mean where several are equally large, and 0 for zero m.

    Args:
      m: real matrices. With a threshold, each must be a product of two positive
        semidefinite matrices. Their traces bound the radius from below:
        trace(m^2p) <= k radius^2p.
      squarings: maximum number of squarings.
      threshold: optional early stop. The loop ends once every radius is known to a
        tenth and every bound is on the same side of its threshold as the radius.
    """
    return _gelfand(m, threshold, squarings)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _gelfand(
    m: Float[Array, "N k k"], threshold: Float[Array, " N"] | None, squarings: int
) -> Float[Array, " N"]:
    tiny = jnp.finfo(m.dtype).tiny
    k = m.shape[-1]
    # Rounding error of sum(m * m.T) for ||m||_F = 1.
    rounding = 16 * k * jnp.finfo(m.dtype).eps

    def log(peak, norm):
        return jnp.log(jnp.maximum(peak, tiny)) + jnp.log(jnp.maximum(norm, tiny))

    def square(carry):
        m, total, weight, steps, settled = carry
        m, peak, norm = _normalise(matmul(m, m))
        weight = weight / 2
        # Frozen once settled, so that results do not depend on the rest of the stack.
        total = jnp.where(settled, total, total + weight * log(peak, norm))
        return m, total, weight, steps + 1, settled | settles(m, total, weight)

    def settles(m, total, weight):
        if threshold is None:
            return jnp.zeros(total.shape, bool)
        trace = jnp.sum(m * transpose(m), axis=(-2, -1)) - rounding
        # A trace lost in rounding makes the ratio tiny, which never settles.
        log_ratio = 0.5 * weight * jnp.log(jnp.maximum(trace, tiny) / k)
        upper, lower = jnp.exp(total), jnp.exp(total + log_ratio)
        decided = (upper <= threshold) | (lower > threshold)
        # NaN never settles otherwise.
        return (decided & (log_ratio > -math.log(1.1))) | zero | jnp.isnan(total)

    m, peak, norm = _normalise(m)
    zero = peak == 0
    total, one = log(peak, norm), jnp.ones([], m.dtype)
    _, total, *_ = jax.lax.while_loop(
        lambda carry: ~jnp.all(carry[-1]) & (carry[-2] < squarings),
        square,
        (m, total, one, jnp.array(0), settles(m, total, one)),
    )
    return jnp.where(zero, 0, jnp.exp(total))


@_gelfand.defjvp
def _gelfand_jvp(squarings, primals, tangents):
    m, threshold = primals
    # m^p / trace(m^p) tends to x y.T / y.T x.
    power = jax.lax.fori_loop(
        0, squarings, lambda _, m: _normalise(matmul(m, m))[0], _normalise(m)[0]
    )
    trace = jnp.trace(power, axis1=-2, axis2=-1)[:, None, None]
    projector = power / jnp.where(trace == 0, 1, trace)
    tangent = jnp.sum(transpose(projector) * tangents[0], axis=(-2, -1))
    return _gelfand(m, threshold, squarings), tangent


def _normalise(m: Float[Array, "N k k"]) -> tuple[Array, Array, Array]:
    """Returns m / (peak norm) of Frobenius norm 1, or zero, and both divisors."""
    peak = jnp.max(jnp.abs(m), axis=(-2, -1))
    peak = jnp.minimum(peak, 1 / float(jnp.finfo(m.dtype).tiny))
    m = m / safe_divisor(peak)[:, None, None]
    norm = frobenius_norm(m)
    return m / safe_divisor(norm)[:, None, None], peak, norm


@jax.custom_jvp
def inverse_upper(r: Float[Array, "N k k"]) -> Float[Array, "N k k"]:
    """Returns the inverse of upper triangular matrices, by back substitution."""
    k = r.shape[-1]
    eye = jnp.eye(k, dtype=r.dtype)[None]

    def solve_row(step, x):
        j = k - 1 - step
        row = jax.lax.dynamic_index_in_dim(r, j, axis=1)
        pivot = jax.lax.dynamic_index_in_dim(row, j, axis=2)
        unit = jax.lax.dynamic_index_in_dim(eye, j, axis=1)
        solved = (unit - matmul(row, x)) / pivot
        return jax.lax.dynamic_update_index_in_dim(x, solved, j, axis=1)

    return jax.lax.fori_loop(0, k, solve_row, 0 * r)


@inverse_upper.defjvp
def _inverse_upper_jvp(primals, tangents):
    x = inverse_upper(*primals)
    return x, -matmul(matmul(x, tangents[0]), x)
