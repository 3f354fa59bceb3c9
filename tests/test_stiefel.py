import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from sct_jax import stiefel

EPS = float(np.finfo(np.float32).eps)
ORTHONORMAL = 4e-6  # what the docstrings promise: 32 eps
METHODS = ("qr", "cholesky_qr", "polar")
QR_METHODS = ("qr", "cholesky_qr")
SHAPES = [(12, 1), (12, 4), (6, 6), (2, 3, 9, 4)]

# Compiled once per method and shape, for the whole module.
retract = {m: functools.partial(stiefel.retract, method=m) for m in METHODS}


def point(shape, seed=0):
    """A point of the manifold, in float64."""
    return reference.signed_qr(np.random.default_rng(seed).normal(size=shape))


def tangent(x, seed=1):
    """A tangent vector at x with columns of norm about 1, in float64."""
    z = np.random.default_rng(seed).normal(size=x.shape) / np.sqrt(x.shape[-2])
    a = x.swapaxes(-1, -2) @ z
    return z - x @ (a + a.swapaxes(-1, -2)) / 2


def with_condition(condition, shape, seed=0):
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.normal(size=shape))[0]
    v = np.linalg.qr(rng.normal(size=(*shape[:-2], shape[-1], shape[-1])))[0]
    sigma = np.geomspace(1, 1 / condition, shape[-1])
    return np.asarray((u * sigma) @ v.swapaxes(-1, -2), np.float32)


def as_float32(x):
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_point_of_the_manifold_stays(method, shape):
    x = point(shape)
    # Rounding x to float32 moves x.T x by eps; sums have R terms.
    atol = 4 * EPS * np.sqrt(shape[-1])
    np.testing.assert_allclose(retract[method](as_float32(x)), x, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e-3, 0.3, 10.0])
def test_the_result_is_orthonormal_and_spans_the_same_space(method, shape, size):
    x = as_float32(point(shape) + size * tangent(point(shape)))
    found = reference.float64(retract[method](x))
    assert reference.orthonormality_error(found) < ORTHONORMAL
    rest = x - found @ (found.swapaxes(-1, -2) @ reference.float64(x))
    assert np.max(np.abs(rest)) < 8 * EPS * np.max(np.abs(x)) * np.sqrt(shape[-1])


@pytest.mark.parametrize("method", METHODS)
def test_the_derivative_along_a_tangent_vector_is_that_vector(method):
    x = point((2, 3, 9, 4))
    z = tangent(x)
    _, found = jax.jvp(retract[method], (as_float32(x),), (as_float32(z),))
    # z has norm about 1 per column; sums of R terms through a handful of products.
    np.testing.assert_allclose(found, z, atol=16 * EPS * np.sqrt(4))


@pytest.mark.parametrize("condition", [1.1, 10.0, 1e3, 1e5])
@pytest.mark.parametrize("method", METHODS)
def test_matches_float64_as_well_as_the_condition_number_allows(method, condition):
    # Both factors are Lipschitz with about cond(x) / ||x||; 1e5 eps is already 1 %.
    for shape in [(12, 4), (2, 3, 9, 4)]:
        x = with_condition(condition, shape)
        expected = reference.RETRACTIONS[method](x)
        found = retract[method](jnp.asarray(x))
        atol = 4 * EPS * condition * np.sqrt(shape[-1])
        np.testing.assert_allclose(found, expected, atol=atol)
        assert reference.orthonormality_error(found) < ORTHONORMAL


@pytest.mark.parametrize("method", QR_METHODS)
def test_r_is_upper_triangular_with_a_positive_diagonal(method):
    x = with_condition(10.0, (2, 3, 9, 4)) * 5
    q = reference.float64(retract[method](jnp.asarray(x)))
    r = q.swapaxes(-1, -2) @ x
    assert np.all(np.diagonal(r, axis1=-2, axis2=-1) > 0)
    assert np.max(np.abs(np.tril(r, -1))) < 4 * EPS * 5 * 10 * np.sqrt(4)


def test_polar_is_the_nearest_point_and_does_not_depend_on_the_basis():
    x = with_condition(3.0, (12, 4))
    basis = point((4, 4), seed=5)
    q = retract["polar"](jnp.asarray(x))
    turned = retract["polar"](as_float32(x @ basis))
    np.testing.assert_allclose(turned, q @ basis, atol=8 * EPS * 3 * np.sqrt(4))
    for other in QR_METHODS:
        further = np.linalg.norm(retract[other](jnp.asarray(x)) - x)
        assert np.linalg.norm(q - x) < further


@functools.cache
def degenerate(name):
    x = np.array(np.random.default_rng(0).normal(size=(12, 4)), np.float32)
    if name == "zero column":
        x[:, 2] = 0
    elif name == "zero first column":
        x[:, 0] = 0
    elif name == "repeated column":
        x[:, 3] = x[:, 0]
    elif name == "opposite column":
        x[:, 3] = -7 * x[:, 1]
    elif name == "nearly repeated column":
        x[:, 3] = x[:, 0] * np.float32(1 + 3e-7)
    elif name == "huge column":
        x[:, 1] = x[:, 1] * np.float32(1e30)
    elif name == "tiny column":
        x[:, 1] = x[:, 1] * np.float32(1e-30)
    elif name == "largest finite column":
        x[:, 1] = np.finfo(np.float32).max
    elif name == "all zero":
        x = 0 * x
    elif name == "all equal":
        x = 0 * x + 1
    elif name == "rank one":
        x = np.outer(x[:, 0], x[0]).astype(np.float32)
    elif name == "null rows":
        x[3:] = 0
    elif name == "square singular":
        x = np.ones((6, 6), np.float32) + np.diag([0, 0, 0, 1, 1, 1]).astype(np.float32)
    elif name == "square zero":
        x = np.zeros((6, 6), np.float32)
    return x


DEGENERATE = (
    "zero column",
    "zero first column",
    "repeated column",
    "opposite column",
    "nearly repeated column",
    "huge column",
    "tiny column",
    "largest finite column",
    "all zero",
    "all equal",
    "rank one",
    "null rows",
    "square singular",
    "square zero",
)


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("method", METHODS)
def test_a_degenerate_matrix_still_gives_orthonormal_columns(method, name):
    x = degenerate(name)
    found = np.asarray(retract[method](jnp.asarray(x)))
    assert np.all(np.isfinite(found))
    assert reference.orthonormality_error(found) < ORTHONORMAL


@pytest.mark.parametrize("size", [1e-30, 3e-19, 1e-18, 1e-12, 1e12, 1e30, 3e38])
@pytest.mark.parametrize("method", METHODS)
def test_the_result_does_not_depend_on_the_size_of_the_matrix(method, size):
    """Squares of entries of 3e-19 are not zero, but have lost digits."""
    x = with_condition(2.0, (12, 4))
    x = x / np.max(np.abs(x))
    found = retract[method](jnp.asarray(x * np.float32(size)))
    atol = 4 * EPS * 2 * np.sqrt(4)
    np.testing.assert_allclose(found, reference.RETRACTIONS[method](x), atol=atol)


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e35])
@pytest.mark.parametrize("method", QR_METHODS)
def test_the_size_of_single_columns_does_not_matter(method, size):
    x = with_condition(2.0, (12, 4))
    x = x / np.max(np.abs(x)) * np.float32([1, size, 1, 1 / size])
    expected = reference.signed_qr(with_condition(2.0, (12, 4)))
    atol = 4 * EPS * 2 * np.sqrt(4)
    np.testing.assert_allclose(retract[method](jnp.asarray(x)), expected, atol=atol)


@pytest.mark.parametrize("name", ["huge column", "tiny column", "repeated column"])
def test_the_guard_keeps_every_independent_column_of_the_qr_factor(name):
    x = reference.float64(degenerate(name))
    x = x / np.linalg.norm(x, axis=0)
    count = 3 if name == "repeated column" else 4
    expected = reference.signed_qr(x[:, :count])
    condition = np.linalg.cond(x[:, :count])
    for method in QR_METHODS:
        found = retract[method](jnp.asarray(degenerate(name)))[:, :count]
        atol = 4 * EPS * condition * np.sqrt(4)
        np.testing.assert_allclose(found, expected, atol=atol)


def test_polar_of_a_huge_column_is_still_the_polar_factor():
    # 1e3 apart, not 1e30, as the small singular values must survive in float32.
    x = np.array(degenerate("huge column"))
    x[:, 1] *= np.float32(1e-30)
    x[:, 1] *= np.float32(1e3)
    found = retract["polar"](jnp.asarray(x))
    condition = np.linalg.cond(x)
    atol = 4 * EPS * condition * np.sqrt(4)
    np.testing.assert_allclose(found, reference.polar(x), atol=atol)


# --- derivatives -----------------------------------------------------------------


@functools.cache
def compiled_derivatives(method):
    """From (x, direction, weight) to the value, both derivatives, and the gradient."""

    @jax.jit
    def derivatives(x, direction, weight):
        fn = lambda x: jnp.sum(weight * stiefel.retract(x, method=method))
        value, gradient = jax.value_and_grad(fn)(x)
        _, forward = jax.jvp(fn, (x,), (direction,))
        return value, (forward, jnp.sum(gradient * direction)), gradient

    return derivatives


def assert_slope(found, at, x, direction, step=1e-6):
    """Against the central difference of `at` in float64."""
    slope = (at(x + step * direction) - at(x - step * direction)) / (2 * step)
    # Rounding over the step, and the step squared.
    np.testing.assert_allclose(found, [slope] * len(found), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(2, 7, 3), (5, 5)])
@pytest.mark.parametrize("method", METHODS)
def test_derivatives_match_finite_differences(method, shape):
    rng = np.random.default_rng(0)
    derivatives = compiled_derivatives(method)
    with jax.enable_x64():
        x, direction, weight = (jnp.asarray(rng.normal(size=shape)) for _ in range(3))
        _, found, _ = derivatives(x, direction, weight)
        at = lambda x: derivatives(x, direction, weight)[0]
        assert_slope(found, at, x, direction)


@pytest.mark.parametrize("method", ["cholesky_qr", "polar"])
def test_second_derivatives_match_finite_differences(method):
    rng = np.random.default_rng(0)

    @jax.jit
    def derivatives(x, direction, weight):
        fn = lambda x: jnp.sum(weight * stiefel.retract(x, method=method)) ** 2
        slope = lambda x: jnp.sum(direction * jax.grad(fn)(x))
        return slope(x), jnp.sum(direction * jax.grad(slope)(x))

    with jax.enable_x64():
        x, direction, weight = (jnp.asarray(rng.normal(size=(6, 3))) for _ in range(3))
        _, found = derivatives(x, direction, weight)
        at = lambda x: derivatives(x, direction, weight)[0]
        assert_slope([found], at, x, direction)


def test_derivatives_are_those_of_the_library():
    rng = np.random.default_rng(0)

    @jax.jit
    def library(x, direction):
        def positive(x):
            q, r = jnp.linalg.qr(x)
            return q * jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[..., None, :]

        return jax.jvp(positive, (x,), (direction,))[1]

    with jax.enable_x64():
        x, direction = (jnp.asarray(rng.normal(size=(2, 7, 3))) for _ in range(2))
        expected = library(x, direction)
        for method in QR_METHODS:
            ours = jax.jit(lambda x, d, m=method: jax.jvp(retract[m], (x,), (d,))[1])
            np.testing.assert_allclose(ours(x, direction), expected, atol=1e-12)


@pytest.mark.parametrize("method", ["cholesky_qr", "polar"])
def test_derivatives_are_mapped_and_of_a_whole_tree(method):
    rng = np.random.default_rng(0)
    x = {
        name: as_float32(rng.normal(size=(2, 5, k))) for name, k in (("a", 2), ("b", 4))
    }
    loss = lambda x: sum(
        jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(retract[method](x))
    )
    found = jax.jit(jax.vmap(jax.grad(loss)))(x)
    together = jax.jit(jax.grad(loss))(x)
    for name in x:
        np.testing.assert_allclose(found[name], together[name], rtol=1e-4, atol=1e-5)
        assert np.max(np.abs(together[name])) > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_a_derivative_is_tangent_whatever_the_size_of_a_column(method):
    sizes = [1e12] if method == "polar" else [1, 1e12, 1, 1e-12]
    x = with_condition(2.0, (12, 4)) * np.float32(sizes)
    direction = x * np.cos(np.arange(48.0)).reshape(12, 4).astype(np.float32)
    jvp = jax.jit(lambda x, d: jax.jvp(retract[method], (x,), (d,)))
    q, dq = jvp(jnp.asarray(x), jnp.asarray(direction))
    skew = reference.float64(q).T @ reference.float64(dq)
    np.testing.assert_allclose(skew + skew.T, 0, atol=64 * EPS)
    assert 0.1 < np.max(np.abs(dq)) < 10


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("method", METHODS)
def test_derivatives_of_a_degenerate_matrix_are_finite(method, name):
    x = jnp.asarray(degenerate(name))
    weight = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)
    _, _, gradient = compiled_derivatives(method)(x, weight, weight)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("method", METHODS)
def test_every_product_of_a_derivative_is_of_the_highest_precision(method):
    x = jnp.ones((2, 9, 4))
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(retract[method](x))))
    assert set(reference.matmul_precisions(gradient, x)) == {reference.HIGHEST}
    assert reference.factorisations(jax.make_jaxpr(gradient)(x)) == (
        {"qr"} if method == "qr" else set()
    )


# --- dtypes ----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_float64_is_orthonormal_to_its_own_rounding(method):
    with jax.enable_x64():
        for size in (0.01, 30.0):  # one pass, and the guard
            x = point((2, 9, 4)) + size * tangent(point((2, 9, 4)))
            x = x * np.array([1, 1, 1, size])
            found = np.asarray(stiefel.retract(jnp.asarray(x), method=method))
            assert found.dtype == np.float64
            assert reference.orthonormality_error(found) < 1e-14
            expected = reference.RETRACTIONS[method](x)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_a_tree_may_mix_dtypes(method):
    tree = {name: point((9, 4)) + 0.05 for name in "abc"}
    dtypes = {"a": "float64", "b": "float32", "c": "float16"}
    with jax.enable_x64():
        tree = {name: jnp.asarray(x, dtypes[name]) for name, x in tree.items()}
        found = retract[method](tree)
        for name, dtype in dtypes.items():
            assert found[name].dtype == dtype
            eps = float(jnp.finfo(dtype).eps)
            error = reference.orthonormality_error(found[name])
            assert error < max(32 * min(eps, EPS), 2 * eps)


@pytest.mark.parametrize("method", METHODS)
def test_nan_spoils_only_its_own_layer(method):
    x = point((2, 3, 9, 4))
    x[1, 2, 0, 0] = np.nan
    found = np.array(retract[method](as_float32(x)))
    assert np.isnan(found[1, 2]).any()
    found[1, 2] = x[1, 2] = 0
    atol = 4 * EPS * np.sqrt(4)
    np.testing.assert_allclose(found, x, atol=atol)


def tree_of_points():
    """Five sizes, one more than `linalg.MAX_STACKS`, so that some are padded."""
    shapes = {"a": (12, 4), "b": (2, 9, 4), "c": (7, 2), "d": [(8, 3), (9, 5), (6, 6)]}
    return jax.tree.map(point, shapes, is_leaf=lambda x: isinstance(x, tuple))


def check_retraction(method, x, found):
    atol = 8 * EPS * np.linalg.cond(x).max() * np.sqrt(6)
    np.testing.assert_allclose(found, reference.RETRACTIONS[method](x), atol=atol)


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["one pass", "guard"])
@pytest.mark.parametrize("method", METHODS)
def test_a_pytree_is_retracted_array_by_array(method, scale):
    tree = jax.tree.map(lambda x: x + 0.05 * scale / 100, tree_of_points())
    tree["a"] *= np.geomspace(1, scale, 4)  # one badly scaled array sends all to it
    found = retract[method](jax.tree.map(as_float32, tree))
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    jax.tree.map(functools.partial(check_retraction, method), tree, found)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("method", METHODS)
def test_nan_spoils_only_its_own_factor(method, value):
    tree = jax.tree.map(lambda x: 2 * x + 0.05, tree_of_points())
    tree["b"][1, 5, 1] = value
    found = retract[method](jax.tree.map(as_float32, tree))
    assert np.isnan(found.pop("b")).any()
    del tree["b"]
    assert (
        max(map(reference.orthonormality_error, jax.tree.leaves(found))) < ORTHONORMAL
    )
    jax.tree.map(functools.partial(check_retraction, method), tree, found)


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_tree_is_returned(method):
    assert stiefel.retract({"a": ()}, method=method) == {"a": ()}


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_is_computed_in_float32_and_cast_back(method):
    x = as_float32(point((12, 4)) + 0.1).astype(jnp.bfloat16)
    found = retract[method](x)
    assert found.dtype == jnp.bfloat16
    expected = reference.RETRACTIONS[method](x.astype(jnp.float32))
    # Half a unit in the last place of entries below 1.
    atol = float(jnp.finfo(jnp.bfloat16).eps) / 2
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=atol)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_fewer_rows_than_columns_are_refused(method, shape):
    with pytest.raises(ValueError, match="rows"):
        stiefel.retract(jnp.ones(shape), method=method)


@pytest.mark.parametrize(
    "call",
    [
        lambda: stiefel.retract(jnp.ones((4, 2)), method="SVD"),
        lambda: stiefel.check_method("SVD"),
        lambda: stiefel.retraction_matrices([jnp.eye(2)], method="SVD"),
    ],
    ids=["retract", "check_method", "retraction_matrices"],
)
def test_an_unknown_method_is_refused(call):
    with pytest.raises(ValueError, match="SVD"):
        call()


def test_check_method_accepts_every_name():
    for method in METHODS:
        stiefel.check_method(method)
    assert set(stiefel.RETRACTION_NAMES) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_retraction_matrices_do_in_the_small_space_what_the_retraction_does(method):
    xs = [with_condition(3.0, shape) for shape in [(12, 4), (2, 3, 9, 4)]]
    grams = [jnp.asarray(x.swapaxes(-1, -2) @ x) for x in xs]
    matrices = jax.jit(functools.partial(stiefel.retraction_matrices, method=method))
    for x, z in zip(xs, matrices(grams), strict=True):
        atol = 4 * EPS * 9 * np.sqrt(4)  # a Gram matrix squares the condition number
        np.testing.assert_allclose(x @ z, reference.RETRACTIONS[method](x), atol=atol)


@pytest.mark.parametrize("shape", [(12, 4), (6, 6), (2, 3, 9, 4)])
def test_tangent_projection(shape):
    x = point(shape)
    g = np.random.default_rng(3).normal(size=shape)
    project = lambda g: reference.float64(
        stiefel.tangent_projection(as_float32(x), as_float32(g))
    )
    z = project(g)
    a = x.swapaxes(-1, -2) @ z
    atol = 4 * EPS * np.sqrt(shape[-2]) * np.max(np.abs(g))
    np.testing.assert_allclose(a + a.swapaxes(-1, -2), np.zeros_like(a), atol=atol)
    np.testing.assert_allclose(project(z), z, atol=atol)  # a projection
    # Orthogonal: what is taken away is normal to every tangent vector.
    inner = np.sum((g - z) * tangent(x, seed=4))
    assert abs(inner) < atol * np.sqrt(g.size)
    np.testing.assert_allclose(project(tangent(x)), tangent(x), atol=atol)


@pytest.mark.parametrize("size", [1e13, 1e30, 3e38])
def test_the_tangent_projection_at_a_huge_column_is_finite(size):
    """A point with such a column is not orthonormal, but will be retracted."""
    x, g = point((12, 4)), np.random.default_rng(3).normal(size=(12, 4))
    x = x * [1, size, 1, 1] / np.max(np.abs(x))
    z = stiefel.tangent_projection(as_float32(x), as_float32(g))
    assert np.max(np.abs(z)) < 100
    huge = g * [1, 1, size / np.max(np.abs(g)) / 4, 1]
    z = stiefel.tangent_projection(as_float32(point((12, 4))), as_float32(huge))
    assert np.all(np.isfinite(z))
    a = point((12, 4)).T @ (np.float64(z) / size)
    np.testing.assert_allclose(a + a.T, 0, atol=8 * EPS)


@pytest.mark.parametrize("value", [1e30, np.nan, np.inf])
def test_orthonormality_error_is_nan_only_for_a_nan(value):
    x = point((12, 4))
    x[:, 1] = 1e30 * np.sign(x[:, 1])
    x[:, 2] = 1e30 * np.sign(x[:, 2])  # products of both signs overflow
    x[0, 1] = value
    found = stiefel.orthonormality_error(as_float32(x))
    assert np.isinf(found) if np.isfinite(value) else not np.isfinite(found)


def test_orthonormality_error_is_the_largest_over_layers():
    x = point((2, 3, 9, 4))
    x[1, 0, :, 2] *= 1.01
    found = stiefel.orthonormality_error(as_float32(x))
    assert found.shape == ()
    np.testing.assert_allclose(found, 1.01**2 - 1, atol=4 * EPS * 2)


def test_orthonormality_error_of_bfloat16_is_taken_in_float32():
    x = as_float32(point((12, 4))).astype(jnp.bfloat16)
    expected = reference.orthonormality_error(x.astype(jnp.float32))
    found = stiefel.orthonormality_error(x)
    np.testing.assert_allclose(found, expected, atol=4 * EPS * 2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_random_points_lie_on_the_manifold(dtype):
    x = stiefel.random_point(jax.random.key(0), 9, 4, layers=(2, 3), dtype=dtype)
    assert x.shape == (2, 3, 9, 4)
    assert x.dtype == dtype
    # A bfloat16 entry is off by half a unit: two such factors, a column of norm 1.
    atol = ORTHONORMAL if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
    assert reference.orthonormality_error(x.astype(jnp.float32)) < atol


def test_random_points_have_the_moments_of_the_uniform_distribution():
    n, rank, draws = 5, 3, 4096
    x = reference.float64(
        stiefel.random_point(jax.random.key(0), n, rank, layers=(draws,))
    )
    # Entries have variance 1 / n, and kurtosis 3 n / (n + 2); five standard errors.
    error = 5 / np.sqrt(draws)
    np.testing.assert_allclose(x.mean(0), np.zeros((n, rank)), atol=error / np.sqrt(n))
    projector = np.mean(x @ x.swapaxes(-1, -2), axis=0)
    spread = np.sqrt(rank) * np.sqrt(2) / n
    np.testing.assert_allclose(projector, rank / n * np.eye(n), atol=error * spread)
    fourth = 3 / (n * (n + 2))
    spread = np.sqrt(105 / (n * (n + 2) * (n + 4) * (n + 6)))
    np.testing.assert_allclose(np.mean(x**4, axis=0), fourth, atol=error * spread)


def test_random_points_depend_on_the_key_and_on_the_layer():
    a, b = (
        stiefel.random_point(jax.random.key(seed), 9, 4, layers=(2, 3))
        for seed in (0, 1)
    )
    assert np.max(np.abs(a - b)) > 0.1
    assert np.max(np.abs(a[0] - a[1])) > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_every_product_is_of_the_highest_precision(method):
    tree = {"a": jnp.ones((2, 9, 4)), "b": jnp.ones((7, 3))}
    precisions = reference.matmul_precisions(retract[method], tree)
    assert set(precisions) == (set() if method == "qr" else {reference.HIGHEST})


def test_the_tangent_projection_is_of_the_highest_precision():
    x = jnp.ones((9, 4))
    precisions = reference.matmul_precisions(stiefel.tangent_projection, x, x)
    assert set(precisions) == {reference.HIGHEST}


@pytest.mark.parametrize("method", ["cholesky_qr", "polar"])
def test_no_factorisation_of_a_library_runs(method):
    """Concurrent ones deadlock jaxlib on two cores, see below."""
    tree = {"a": jnp.ones((2, 9, 4)), "b": jnp.ones((7, 3))}
    assert not reference.factorisations(jax.make_jaxpr(retract[method])(tree))
    assert reference.factorisations(jax.make_jaxpr(retract["qr"])(tree)) == {"qr"}


NO_HANG = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from sct_jax import spectral, stiefel, transforms

ranks, num_runs = eval(sys.argv[1]), int(sys.argv[2])
rng = np.random.default_rng(0)

def factor(fan, rank):
    x = np.linalg.qr(rng.normal(size=(3, fan, rank)))[0]
    return jnp.asarray(1.01 * x, jnp.float32)

params = {
    str(rank): spectral.SpectralFactors(
        factor(48, rank), jnp.ones((3, rank)), factor(44, rank)
    )
    for rank in ranks
}
retract = jax.jit(spectral.retract)
for _ in range(num_runs):
    points = jax.block_until_ready(retract(params))
assert spectral.orthonormality_error(points) < 4e-6
print("retracted", flush=True)

tx = optax.chain(
    transforms.clip_by_composite_spectral_norm(1e-2),
    transforms.retract_to_stiefel(),
)

@jax.jit
def step(params, state):
    grads = jax.tree.map(lambda p: 0.1 * p + 0.1, params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

state = tx.init(points)
for _ in range(num_runs // 5):
    points, state = jax.block_until_ready(step(points, state))
assert spectral.orthonormality_error(points) < 4e-6
print("stepped")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "num_runs", "limit"),
    [
        # Sixteen factors of eight ranks: enough for the deadlock, quick to compile.
        pytest.param("range(5, 41, 5)", 400, 280, id="8 ranks"),
        pytest.param(
            "range(1, 41)", 50, 1500, id="40 ranks", marks=pytest.mark.timeout(1600)
        ),
    ],
)
def test_factors_of_many_ranks_do_not_hang(ranks, num_runs, limit):
    """Concurrent factorisations inside one jit deadlock jaxlib on two cores."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    found = subprocess.run(
        [sys.executable, "-c", NO_HANG, ranks, str(num_runs)],
        env=env | {"JAX_PLATFORMS": "cpu"},
        timeout=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    expected = (0, "retracted\nstepped\n")
    assert (found.returncode, found.stdout) == expected, found.stderr
