"""Geometry of the Stiefel manifold St(n, R): matrices with orthonormal columns.

A point is an array x (*L, n, R) with n >= R and x.T @ x = I in the last two axes.
Functions of a pytree stack the Gram matrices of all its arrays. The factorisations of
hundreds of factors are then at most four batched calls.

Retractions have derivatives in both modes, by closed forms. Columns that are null or
dependent have none; they count as constants, so that derivatives are finite.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Scalar

from sct_jax import linalg

T = TypeVar("T")  # a pytree of arrays (*L, n, R)

# One pass of CholeskyQR has an error of about eps * cond(x)^2. Above this estimate of
# cond(x)^2, which is exact for orthogonal columns, the guard takes over.
MAX_SQUARED_CONDITION = 30.0

# Most loops that the guards of a tree take.
_GUARDS = 8

# A column, or a singular value, of smaller relative size is rounding: in units of eps.
_LEAST_RESOLVED = 32.0


def orthonormality_error(x: Float[Array, "*L n R"]) -> Scalar:
    """Returns max |x.T @ x - I| over all entries and layers.

    Infinite if it overflows; NaN only for a NaN or an infinity in x.
    """
    x = linalg.as_float32(x)
    g = linalg.gram(x)
    error = jnp.max(jnp.abs(g - _identity(g)))
    # Overflowing products of both signs add up to NaN, overflowing squares do not.
    squares = jnp.max(jnp.diagonal(g, axis1=-2, axis2=-1))
    return jnp.where(jnp.isnan(error) & ~jnp.isnan(squares), jnp.inf, error)


def random_point(
    key: PRNGKeyArray,
    n: int,
    rank: int,
    *,
    layers: tuple[int, ...] = (),
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Float[Array, "*L n R"]:
    """Samples from the uniform (Haar) distribution on St(n, rank).

    The sample is Q in the QR decomposition of a Gaussian matrix, where R has a positive
    diagonal.
    """
    x = jax.random.normal(key, (*layers, n, rank), jnp.float32)
    if jnp.finfo(dtype).bits > 32:
        x = x.astype(dtype)
    return cholesky_qr_retraction(x).astype(dtype)


def tangent_projection(
    x: Float[Array, "*L n R"], g: Float[Array, "*L n R"]
) -> Float[Array, "*L n R"]:
    """Returns g - x sym(x.T g), the orthogonal projection of g to the tangent space.

    Ensures x.T @ z + z.T @ x = 0 for the result z, up to rounding, and a finite z for
    finite x and g. Columns of x with entries beyond 1e12 count by their direction.

    References:
      Absil, Mahony, Sepulchre, Optimization Algorithms on Matrix Manifolds, 2008, eq.
      3.35
    """
    divisor = linalg.range_divisor(jnp.max(jnp.abs(x), axis=-2))
    # Divide coefficients, not x, which would copy it.
    a = linalg.gram(x, g) / divisor[..., None]
    a = jnp.where(jnp.isfinite(a), a, 0)
    coefficients = 0.5 * (a + linalg.transpose(a)) / divisor[..., None]
    return g - linalg.matmul(x, coefficients)


@jax.custom_jvp
@jax.jit
def qr_retraction(x: T) -> T:
    """Returns Q from Householder QR, x = Q R, where R has a positive diagonal.

    A zero diagonal entry counts as positive, so rank-deficient x still gives
    orthonormal columns. Matrices are factorised one after another, since concurrent
    batched calls deadlock in jaxlib up to 0.11 on a CPU with few threads.

    QR needs whole matrices. On a mesh they are gathered, and under Explicit axes JAX
    refuses sharded rows. The other retractions do not move the factors.

    Args:
      x: pytree of arrays (*L, n, R), n >= R.

    Raises:
      ValueError: if n < R.

    References:
      Kohlberger et al., Spectral Compact Training, arXiv 2604.00733, Algorithm 1
    """

    def one(x: Array) -> Array:
        q, r = jnp.linalg.qr(x)
        return q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0).astype(q.dtype)[None]

    def each(x: Array) -> Array:
        _check_tall(x)
        matrices = _scale_columns(linalg.as_float32(x))
        matrices = matrices.reshape(-1, *x.shape[-2:])
        return jax.lax.map(one, matrices).reshape(x.shape).astype(x.dtype)

    return jax.tree.map(each, x)


@jax.custom_jvp
@jax.jit  # so that eager callers compile its branches once
def cholesky_qr_retraction(x: T) -> T:
    """Returns the Q of `qr_retraction`, using matrix products only.

    With G = x.T x = L L.T the result is x L^-T, at 4 R FLOPs per entry of x. One pass
    is accurate to rounding if x is nearly orthonormal, as after an optimizer step. If
    the estimate of cond(x)^2 exceeds `MAX_SQUARED_CONDITION`, a guard takes over. It
    scales the columns, runs several passes of shifted CholeskyQR, and replaces null
    columns by fixed pseudo-random directions.

    Ensures an orthonormality error below 4e-6 if columns moved independently, and below
    3e-5 for every finite x. The estimate is smaller than cond(x)^2 if, for example, all
    columns share a direction. NaN in x gives NaN.

    Args:
      x: pytree of arrays (*L, n, R), n >= R. Arrays of lower precision are computed in
        float32 and cast back.

    Raises:
      ValueError: if n < R.

    References:
      Fukaya et al., Shifted Cholesky QR for computing the QR factorization of
      ill-conditioned matrices, SIAM J. Sci. Comput. 42, 2020
    """
    return _retract_guarded(
        x, linalg.inverse_cholesky, linalg.transpose, lambda _, qs: qs
    )


@jax.custom_jvp
@jax.jit
def polar_retraction(x: T) -> T:
    """Returns x (x.T x)^(-1/2), the nearest point of the manifold in Frobenius norm.

    Newton-Schulz iteration with the convergent cubic on the Gram matrix, as accurate as
    `cholesky_qr_retraction`. If columns are linearly dependent, the nearest point is
    not unique; those columns are then completed as in `cholesky_qr_retraction`.

    Args:
      x: pytree of arrays (*L, n, R), n >= R.

    Raises:
      ValueError: if n < R.
    """
    return _retract_guarded(
        x,
        linalg.inverse_sqrt,
        lambda z: z,
        _polar_of_qr,
    )


def _define_jvp(retraction: Any, derivative: Callable) -> None:
    """Defines the derivative of a retraction of trees."""

    @retraction.defjvp
    def jvp(primals, tangents):
        q = retraction(*primals)
        arrays, treedef = jax.tree.flatten(q)
        x, dx, wide = (
            [linalg.as_float32(array) for array in jax.tree.leaves(tree)]
            for tree in (*primals, *tangents, arrays)
        )
        dq = derivative(x, wide, dx)
        dq = [d.astype(array.dtype) for d, array in zip(dq, arrays, strict=True)]
        return q, jax.tree.unflatten(treedef, dq)


def _derivative_of_qr(
    xs: list[Array], qs: list[Array], dxs: list[Array]
) -> list[Array]:
    """Returns dq = a + q (omega - q.T a) with a = dx r^-1.

    omega is the skew matrix with the lower triangle of q.T a, as q.T dq is skew and dr
    is upper triangular. Scaling a column does not change q, so they are scaled to 1.
    """
    sizes = [linalg.column_norms(x) for x in xs]
    xs, dxs = (
        [x / linalg.safe_divisor(size) for x, size in zip(arrays, sizes, strict=True)]
        for arrays in (xs, dxs)
    )
    rs = [jnp.triu(linalg.gram(q, x)) for q, x in zip(qs, xs, strict=True)]
    resolved = [_above_rounding(jnp.diagonal(r, axis1=-2, axis2=-1), 1.0) for r in rs]
    resolved = [known[..., None, :] for known in resolved]
    inverses = linalg.map_batched(
        linalg.inverse_upper,
        [
            jnp.where(known, r, _identity(r))
            for r, known in zip(rs, resolved, strict=True)
        ],
        fill=1.0,
    )
    results = []
    for q, dx, known, inverse in zip(qs, dxs, resolved, inverses, strict=True):
        a = linalg.matmul(jnp.where(known, dx, 0), inverse)
        along = linalg.gram(q, a)
        lower = jnp.tril(along, -1)
        omega = lower - linalg.transpose(lower)
        results.append(a + linalg.matmul(q, omega - along))
    return results


def _derivative_of_polar(
    xs: list[Array], qs: list[Array], dxs: list[Array]
) -> list[Array]:
    """Returns dq = q omega + (dx - q q.T dx) p^-1 for x = q p.

    The skew omega solves p omega + omega p = q.T dx - dx.T q.
    """
    peaks = [jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True) for x in xs]
    xs, dxs = (
        [x / linalg.safe_divisor(peak) for x, peak in zip(arrays, peaks, strict=True)]
        for arrays in (xs, dxs)
    )
    ps = [linalg.gram(q, x) for q, x in zip(qs, xs, strict=True)]
    ps = [0.5 * (p + linalg.transpose(p)) for p in ps]
    bases = linalg.map_batched(
        linalg.jacobi_svd, [jax.lax.stop_gradient(p) for p in ps], fill=0.0
    )
    results = []
    for p, q, dx, (basis, values, _) in zip(ps, qs, dxs, bases, strict=True):
        values = jnp.abs(values)
        largest = jnp.max(values, axis=-1, keepdims=True)
        values = jnp.where(_above_rounding(values, largest), values, 0)
        sums = values[..., :, None] + values[..., None, :]
        along = linalg.gram(q, dx)

        def solve_skew(_, b, basis=basis, sums=sums):
            turned = linalg.matmul(linalg.gram(basis, b), basis)
            turned = jnp.where(sums > 0, turned / linalg.safe_divisor(sums), 0)
            return linalg.matmul(linalg.matmul(basis, turned), linalg.transpose(basis))

        def solve_normal(_, b, basis=basis, values=values):
            turned = linalg.matmul(b, basis) / linalg.safe_divisor(values)[..., None, :]
            turned = jnp.where(values[..., None, :] > 0, turned, 0)
            return linalg.matmul(turned, linalg.transpose(basis))

        omega = jax.lax.custom_linear_solve(
            lambda w, p=p: linalg.matmul(p, w) + linalg.matmul(w, p),
            along - linalg.transpose(along),
            solve_skew,
            symmetric=True,
        )
        normal = jax.lax.custom_linear_solve(
            lambda y, p=p: linalg.matmul(y, p),
            dx - linalg.matmul(q, along),
            solve_normal,
            symmetric=True,
        )
        results.append(linalg.matmul(q, omega) + normal)
    return results


_define_jvp(qr_retraction, _derivative_of_qr)
_define_jvp(cholesky_qr_retraction, _derivative_of_qr)
_define_jvp(polar_retraction, _derivative_of_polar)


_RETRACTIONS: dict[str, Callable] = {
    "qr": qr_retraction,
    "cholesky_qr": cholesky_qr_retraction,
    "polar": polar_retraction,
}


RETRACTION_NAMES = tuple(_RETRACTIONS)


def retract(x: T, *, method: str = "cholesky_qr") -> T:
    """Returns the retraction of x to the Stiefel manifold.

    Args:
      x: pytree of arrays (*L, n, R), n >= R.
      method: "qr", "cholesky_qr" (the same map, batched) or "polar".

    Raises:
      ValueError: for an unknown method, or if n < R.
    """
    return _retraction(method)(x)


def check_method(method: str) -> None:
    """Raises ValueError unless `method` names a retraction."""
    _retraction(method)


def retraction_matrices(
    grams: Sequence[Float[Array, "..."]], *, method: str
) -> list[Float[Array, "..."]]:
    """Returns, for each Gram matrix x.T x, the z with R(x) = x z.

    `clip_by_composite_spectral_norm` uses these to find its scale without reading the
    factors. NaN where a Gram matrix is not positive definite.

    Args:
      grams: arrays (*L, R, R).
      method: as in `retract`; "qr" and "cholesky_qr" share one z.

    Raises:
      ValueError: for an unknown method.
    """
    check_method(method)
    if method == "polar":
        return linalg.map_batched(linalg.inverse_sqrt, grams, fill=1.0)
    inverses = linalg.map_batched(linalg.inverse_cholesky, grams, fill=1.0)
    return [linalg.transpose(l) for l in inverses]


def _retraction(method: str) -> Callable:
    if method not in _RETRACTIONS:
        raise ValueError(
            f"unknown retraction {method!r}: choose one of {', '.join(_RETRACTIONS)}"
        )
    return _RETRACTIONS[method]


def _identity(g: Float[Array, "*L k k"]) -> Float[Array, "*L k k"]:
    return jnp.broadcast_to(jnp.eye(g.shape[-1], dtype=g.dtype), g.shape)


def _above_rounding(
    size: Float[Array, "*L k"], largest: float | Float[Array, "*L 1"]
) -> Bool[Array, "*L k"]:
    """Returns whether sizes exceed what rounding makes of zero."""
    eps = jnp.finfo(size.dtype).eps
    return size > _LEAST_RESOLVED * eps * largest


def _check_tall(x: Float[Array, "*L n R"]) -> None:
    if x.ndim < 2 or x.shape[-2] < x.shape[-1]:
        raise ValueError(
            "a point of the Stiefel manifold has at least as many rows as columns, got "
            f"shape {x.shape}"
        )


def _scale_columns(x: Float[Array, "*L n R"]) -> Float[Array, "*L n R"]:
    """Scales columns to norm 1 without overflow; null columns stay null."""
    peak = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
    x = x / linalg.safe_divisor(peak)
    norm = jnp.linalg.norm(x, axis=-2, keepdims=True)
    return x / linalg.safe_divisor(norm)


def _retract_guarded(
    x: T,
    inverse_factor: Callable[[Array], Array],
    as_right_factor: Callable[[Array], Array],
    finish: Callable[[list[Array], list[Array]], list[Array]],
) -> T:
    """Returns x z with z from the Gram matrix, or the guard's result if that fails.

    Args:
      x: pytree of arrays (*L, n, R).
      inverse_factor: maps stacked Gram matrices (N, R, R) to their inverse factors.
      as_right_factor: maps an inverse factor to z.
      finish: maps some x and their Q factors from the guard to the results.
    """
    arrays, treedef = jax.tree.flatten(x)
    if not arrays:
        return x
    for array in arrays:
        _check_tall(array)
    xs = [linalg.as_float32(array) for array in arrays]
    grams = [linalg.gram(array) for array in xs]
    inverses = linalg.map_batched(inverse_factor, grams, fill=1.0)
    trusted = jnp.array(True)
    for g, inverse in zip(grams, inverses, strict=True):
        # Both scales are 1 on the manifold.
        squares = jnp.diagonal(g, axis1=-2, axis2=-1)
        scale = jnp.max(squares, axis=-1)
        inverse_scale = jnp.max(jnp.sum(jnp.square(inverse), axis=-1), axis=-1)
        # NaN from a failed factorisation compares as False.
        trusted &= jnp.all(scale * inverse_scale < MAX_SQUARED_CONDITION)
        # Products of smaller entries lose digits, or vanish.
        float_info = jnp.finfo(g.dtype)
        trusted &= jnp.all(squares > float_info.tiny / float_info.eps**2)

    results = [
        linalg.matmul(array, as_right_factor(z))
        for array, z in zip(xs, inverses, strict=True)
    ]
    # Parts, because memory holds all that a loop reads and returns; few, because each
    # takes time to compile.
    size = math.ceil(len(xs) / _GUARDS)
    parts = [slice(start, start + size) for start in range(0, len(xs), size)]
    results = [
        r for part in parts for r in _guard(xs[part], results[part], trusted, finish)
    ]
    results = [r.astype(a.dtype) for r, a in zip(results, arrays, strict=True)]
    return jax.tree.unflatten(treedef, results)


def _guard(
    xs: list[Array],
    results: list[Array],
    trusted: Bool[Array, ""],
    finish: Callable[[list[Array], list[Array]], list[Array]],
) -> list[Array]:
    """Returns results that are trusted as they are, else those of the guard."""
    # A loop of zero or one iteration, because `lax.cond` would copy every factor.
    _, results = jax.lax.while_loop(
        lambda carry: ~carry[0],
        # `carry[0] | True` varies over the same shard_map axes as carry[0].
        lambda carry: (carry[0] | True, finish(xs, _shifted_cholesky_qr(xs))),
        (trusted, results),
    )
    return results


def _shifted_cholesky_qr(xs: list[Array]) -> list[Array]:
    """Returns the Q factors of any finite matrices, by shifted CholeskyQR.

    If a column depends on earlier ones with relative residual r, a shifted pass leaves
    residual r / shift. Two passes thus recover every residual that float32 can tell
    from zero. The third pass replaces columns that are still dependent, since they
    carry no information. Two more shifted passes and one without shift follow.
    """
    replacing, last = 2, 5

    def one_pass(index: Array, xs: list[Array]) -> list[Array]:
        xs = [_scale_columns(x) for x in xs]
        grams = [linalg.gram(x) for x in xs]
        shifts = [
            jnp.where(index == last, 0.0, 4 * jnp.finfo(g.dtype).eps).astype(g.dtype)
            for g in grams
        ]
        inverses = linalg.map_batched(
            linalg.eliminate,
            [
                g + (shift * g.shape[-1]) * _identity(g)
                for g, shift in zip(grams, shifts, strict=True)
            ],
            fill=1.0,
        )
        return [
            # 1 / diag(L^-1) is the norm of each column's part orthogonal to earlier
            # columns.
            jnp.where(
                index == replacing,
                _replace_columns(x, 1 / jnp.diagonal(l, axis1=-2, axis2=-1) < 0.03),
                linalg.matmul(x, linalg.transpose(l)),
            )
            for x, l in zip(xs, inverses, strict=True)
        ]

    xs = [_scale_columns(x) for x in xs]
    xs = [_replace_columns(x, jnp.max(jnp.abs(x), axis=-2) == 0) for x in xs]
    # A loop instead of six copies: the guard rarely runs but is always compiled.
    return jax.lax.fori_loop(0, last + 1, one_pass, xs)


def _replace_columns(
    x: Float[Array, "*L n R"], null: Bool[Array, "*L R"]
) -> Float[Array, "*L n R"]:
    """Replaces columns marked in `null` by fixed pseudo-random unit columns."""
    sharding = jax.typeof(x).sharding
    rows = None
    if AxisType.Explicit in sharding.mesh.axis_types:
        rows = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[-2:]))
    fresh = jax.random.normal(
        jax.random.key(0), x.shape[-2:], x.dtype, out_sharding=rows
    )
    fresh = fresh / jnp.linalg.norm(fresh, axis=-2, keepdims=True)
    return jnp.where(null[..., None, :], jnp.broadcast_to(fresh, x.shape), x)


def _polar_of_qr(xs: list[Array], qs: list[Array]) -> list[Array]:
    """Returns the polar factors of x = q r as q msign(r), by the cubic on r."""
    xs = [linalg.scale_by_max(x) for x in xs]
    rs = [linalg.gram(q, x) for q, x in zip(qs, xs, strict=True)]

    def sign(r: Array) -> Array:
        eye = _identity(r)
        r = linalg.scale_by_max(r)
        norm = linalg.frobenius_norm(r)[..., None, None]
        r = r / linalg.safe_divisor(norm)

        def improve(_, z):
            g = linalg.gram(z)
            return linalg.matmul(z, 1.5 * eye - 0.5 * g)

        # A singular value of 1e-7 grows by 1.5 per step: 40 steps to reach 1.
        return jax.lax.fori_loop(0, 48, improve, r)

    signs = linalg.map_batched(sign, rs, fill=1.0)
    # Dependent columns leave null directions, which the last retraction completes.
    points = [linalg.matmul(q, z) for q, z in zip(qs, signs, strict=True)]
    return _shifted_cholesky_qr_if_needed(points)


def _shifted_cholesky_qr_if_needed(xs: list[Array]) -> list[Array]:
    errors = [orthonormality_error(x).astype(jnp.float32) for x in xs]
    finished = jnp.max(jnp.stack(errors)) < 1e-5
    return jax.lax.cond(finished, lambda xs: xs, _shifted_cholesky_qr, xs)
