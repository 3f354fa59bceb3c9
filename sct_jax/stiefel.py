"""Geometry of the Stiefel manifold St(n, R): matrices with orthonormal columns.

A point is x of shape (*L, n, R) with x.T @ x = I in its last two axes, n >= R. Wherever
an argument is called a pytree, all its arrays are treated together: their Gram matrices
are stacked over the whole model, so that the small factorisations of hundreds of
factors are at most four batched calls.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Scalar

from sct_jax import linalg

T = TypeVar("T")  # a pytree of arrays (*L, n, R)

# One pass of CholeskyQR loses about eps * cond(x)^2. Above this estimate of cond(x)^2,
# which is exact for columns that are orthogonal, the guard takes over.
MAX_SQUARED_CONDITION = 30.0


def orthonormality_error(x: Float[Array, "*L n R"]) -> Scalar:
    """Returns max |x.T @ x - I| over all entries and layers."""
    x = linalg.as_float32(x)
    g = linalg.gram(x)
    return jnp.max(jnp.abs(g - jnp.eye(g.shape[-1], dtype=g.dtype)))


def random_point(
    key: PRNGKeyArray,
    n: int,
    rank: int,
    *,
    layers: tuple[int, ...] = (),
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Float[Array, "*L n R"]:
    """Returns a point drawn from the uniform (Haar) distribution on St(n, rank).

    The Q of a Gaussian matrix by the QR decomposition with positive diagonal.
    """
    x = jax.random.normal(key, (*layers, n, rank), jnp.float32)
    return cholesky_qr_retraction(x).astype(dtype)


def tangent_projection(
    x: Float[Array, "*L n R"], g: Float[Array, "*L n R"]
) -> Float[Array, "*L n R"]:
    """Returns g - x sym(x.T g), the projection of g on the tangent space at x.

    Ensures x.T @ z + z.T @ x = 0 for the result z, to rounding.

    References:
      Absil, Mahony, Sepulchre, Optimization Algorithms on Matrix Manifolds, 2008, eq.
      3.35
    """
    a = linalg.gram(x, g)
    return g - linalg.matmul(x, 0.5 * (a + linalg.transpose(a)))


@jax.jit
def qr_retraction(x: T) -> T:
    """Returns the Q of x = Q R with positive diagonal of R, by Householder reflections.

    A zero on the diagonal counts as positive, so a rank-deficient x still gives
    orthonormal columns. One LAPACK call per matrix, one after another: batched ones,
    side by side on a CPU with few threads, deadlock in jaxlib up to 0.11. It takes
    whole matrices: on a mesh they are gathered, and under Explicit axes JAX refuses
    rows that are sharded. The other retractions leave them where they are.

    References:
      Kohlberger et al., Spectral Compact Training, arXiv 2604.00733, Algorithm 1
    """

    def one(x: Array) -> Array:
        q, r = jnp.linalg.qr(x)
        return q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0)

    def each(x: Array) -> Array:
        _check_tall(x)
        matrices = _scale_columns(linalg.as_float32(x))
        matrices = matrices.reshape(-1, *x.shape[-2:])
        return jax.lax.map(one, matrices).reshape(x.shape).astype(x.dtype)

    return jax.tree.map(each, x)


@jax.jit  # for those who call it outside of one: its branches compile once
def cholesky_qr_retraction(x: T) -> T:
    """Returns the same Q as `qr_retraction`, by matrix products alone.

    With G = x.T x = L L.T the result is x L^-T: 4 R FLOPs per entry of x. One pass is
    accurate to rounding while x is near orthonormal, as it is after an optimizer step.
    Where cond(x)^2 is beyond `MAX_SQUARED_CONDITION`, a guard takes over: scaled
    columns, shifted CholeskyQR with further passes, and fixed pseudo-random directions
    in the place of null columns.

    Ensures an orthonormality error below 4e-6 where columns have moved apart from each
    other, and below 3e-5 for every finite x: where all share a direction, say, what
    the guard looks at is less than cond(x)^2. NaN for a NaN in x.

    Args:
      x: pytree of arrays (*L, n, R), n >= R; low-precision arrays are computed in
        float32 and cast back.

    Raises:
      ValueError: where n < R.

    References:
      Fukaya et al., Shifted Cholesky QR for computing the QR factorization of
      ill-conditioned matrices, SIAM J. Sci. Comput. 42, 2020
    """
    return _retract_guarded(x, linalg.inverse_cholesky, linalg.transpose, lambda xs: xs)


@jax.jit
def polar_retraction(x: T) -> T:
    """Returns x (x.T x)^(-1/2), the nearest point of the manifold in Frobenius norm.

    By the convergent cubic of Newton and Schulz on the Gram matrix, to the accuracy of
    `cholesky_qr_retraction`. An x with linearly dependent columns has no unique answer:
    those columns are completed to an orthonormal set as there.

    Args:
      x: pytree of arrays (*L, n, R), n >= R.

    Raises:
      ValueError: where n < R.
    """
    leaves = jax.tree.leaves(x)
    return _retract_guarded(
        x,
        linalg.inverse_sqrt,
        lambda z: z,
        lambda qs: _polar_of_qr([linalg.as_float32(leaf) for leaf in leaves], qs),
    )


_RETRACTIONS: dict[str, Callable] = {
    "qr": qr_retraction,
    "cholesky_qr": cholesky_qr_retraction,
    "polar": polar_retraction,
}


RETRACTION_NAMES = tuple(_RETRACTIONS)


def retract(x: T, *, method: str = "cholesky_qr") -> T:
    """Returns the point of the manifold that `method` assigns to x.

    Args:
      x: pytree of arrays (*L, n, R).
      method: "qr", "cholesky_qr" (the same map, batched) or "polar".

    Raises:
      ValueError: for another method.
    """
    return _retraction(method)(x)


def check_method(method: str) -> None:
    """Raises ValueError unless `method` names a retraction."""
    _retraction(method)


def retraction_matrices(
    grams: Sequence[Float[Array, "..."]], *, method: str
) -> list[Float[Array, "..."]]:
    """Returns for each Gram matrix x.T x the matrix z for which R(x) = x z.

    What a retraction does, in the small space: `clip_by_composite_spectral_norm` finds
    its scale there, without touching a factor. NaN where a matrix is not definite.
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


def _check_tall(x: Float[Array, "*L n R"]) -> None:
    if x.ndim < 2 or x.shape[-2] < x.shape[-1]:
        raise ValueError(
            "a point of the Stiefel manifold has at least as many rows as columns, got "
            f"shape {x.shape}"
        )


def _scale_columns(x: Float[Array, "*L n R"]) -> Float[Array, "*L n R"]:
    """Columns of norm 1; null columns stay null. Squares cannot overflow."""
    peak = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
    x = x / linalg.safe_divisor(peak)
    norm = jnp.linalg.norm(x, axis=-2, keepdims=True)
    return x / linalg.safe_divisor(norm)


def _retract_guarded(
    x: T,
    inverse_factor: Callable[[Array], Array],
    as_right_factor: Callable[[Array], Array],
    finish: Callable[[list[Array]], list[Array]],
) -> T:
    """X times a function of its Gram matrix, or the guard's answer where that fails.

    `inverse_factor` works on stacks of Gram matrices; `as_right_factor` turns its
    result into the z of x z; `finish` turns the guard's QR factors into the answer.
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
        # trace / R and the mean square of the inverse are both 1 on the manifold.
        scale = jnp.max(jnp.diagonal(g, axis1=-2, axis2=-1), axis=-1)
        inverse_scale = jnp.max(jnp.sum(jnp.square(inverse), axis=-1), axis=-1)
        # A NaN from a failed factorisation compares as False.
        trusted &= jnp.all(scale * inverse_scale < MAX_SQUARED_CONDITION)

    results = [
        linalg.matmul(array, as_right_factor(z))
        for array, z in zip(xs, inverses, strict=True)
    ]
    # A loop that hardly ever runs, not a branch: a conditional copies every factor.
    _, results = jax.lax.while_loop(
        lambda carry: ~carry[0],
        # As varied over the axes of a shard_map as what it replaces.
        lambda carry: (carry[0] | True, finish(_shifted_cholesky_qr(xs))),
        (trusted, results),
    )
    results = [r.astype(a.dtype) for r, a in zip(results, arrays, strict=True)]
    return jax.tree.unflatten(treedef, results)


def _shifted_cholesky_qr(xs: list[Array]) -> list[Array]:
    """QR factors of any finite matrices, by passes of shifted CholeskyQR.

    A column that depends on the earlier ones with relative residual r comes out of a
    shifted pass with residual r / shift, so two passes reach what float32 can tell from
    zero. What is still dependent after them carries no information and is replaced;
    two further passes and one without shift follow.
    """
    eps = jnp.finfo(jnp.float32).eps
    replacing, last = 2, 5

    def one_pass(index: Array, xs: list[Array]) -> list[Array]:
        xs = [_scale_columns(x) for x in xs]
        grams = [linalg.gram(x) for x in xs]
        shift = jnp.where(index == last, 0.0, 4 * eps)
        inverses = linalg.map_batched(
            linalg.eliminate,
            [
                g + (shift * g.shape[-1]) * jnp.eye(g.shape[-1], dtype=g.dtype)
                for g in grams
            ],
            fill=1.0,
        )
        return [
            # The diagonal of L^-1 is 1 over what a column has beyond the earlier ones.
            jnp.where(
                index == replacing,
                _replace_columns(x, 1 / jnp.diagonal(l, axis1=-2, axis2=-1) < 0.03),
                linalg.matmul(x, linalg.transpose(l)),
            )
            for x, l in zip(xs, inverses, strict=True)
        ]

    xs = [_scale_columns(x) for x in xs]
    xs = [_replace_columns(x, jnp.max(jnp.abs(x), axis=-2) == 0) for x in xs]
    # A loop, not six copies: the guard hardly ever runs but is always compiled.
    return jax.lax.fori_loop(0, last + 1, one_pass, xs)


def _replace_columns(
    x: Float[Array, "*L n R"], null: Bool[Array, "*L R"]
) -> Float[Array, "*L n R"]:
    """Fixed pseudo-random unit columns in the place of null ones."""
    sharding = jax.typeof(x).sharding
    rows = None
    if AxisType.Explicit in sharding.mesh.axis_types:
        rows = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[-2:]))
    fresh = jax.random.normal(
        jax.random.key(0), x.shape[-2:], x.dtype, out_sharding=rows
    )
    fresh = fresh / jnp.linalg.norm(fresh, axis=-2, keepdims=True)
    return jnp.where(null[..., None, :], fresh, x)


def _polar_of_qr(xs: list[Array], qs: list[Array]) -> list[Array]:
    """Polar factors of x = q r from q: q msign(r), by the cubic on the small r."""
    xs = [linalg.scale_by_max(x) for x in xs]
    rs = [linalg.gram(q, x) for q, x in zip(qs, xs, strict=True)]

    def sign(r: Array) -> Array:
        eye = jnp.eye(r.shape[-1], dtype=r.dtype)
        r = linalg.scale_by_max(r)
        norm = linalg.frobenius_norm(r)[..., None, None]
        r = r / linalg.safe_divisor(norm)

        def improve(_, z):
            g = linalg.gram(z)
            return linalg.matmul(z, 1.5 * eye - 0.5 * g)

        # A singular value of 1e-7 needs 40 steps of growth by 1.5.
        return jax.lax.fori_loop(0, 48, improve, r)

    signs = linalg.map_batched(sign, rs, fill=1.0)
    # Dependent columns leave null directions; the last retraction completes them.
    points = [linalg.matmul(q, z) for q, z in zip(qs, signs, strict=True)]
    return _shifted_cholesky_qr_if_needed(points)


def _shifted_cholesky_qr_if_needed(xs: list[Array]) -> list[Array]:
    errors = [orthonormality_error(x) for x in xs]
    finished = jnp.max(jnp.stack(errors)) < 1e-5
    return jax.lax.cond(finished, lambda xs: xs, _shifted_cholesky_qr, xs)
