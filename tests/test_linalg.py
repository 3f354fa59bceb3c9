import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sct_jax import linalg

EPS = float(np.finfo(np.float32).eps)

# One compilation per shape, for the whole module.
newton_schulz = jax.jit(linalg.newton_schulz, static_argnames=("steps", "coefficients"))
inverse_cholesky = jax.jit(linalg.inverse_cholesky)
power_iteration = jax.jit(linalg.power_iteration, static_argnames="steps")


def matrix_with(sigma, shape, seed=0):
    """A float32 matrix (*L, n, m) with the given singular values."""
    *layers, n, m = shape
    rng = np.random.default_rng(seed)
    k = len(sigma)
    u = np.linalg.qr(rng.normal(size=(*layers, n, k)))[0]
    v = np.linalg.qr(rng.normal(size=(*layers, m, k)))[0]
    return np.asarray((u * np.asarray(sigma)) @ v.swapaxes(-1, -2), np.float32)


def positive_definite(eigenvalues, layers=3, seed=0):
    rng = np.random.default_rng(seed)
    k = len(eigenvalues)
    q = np.linalg.qr(rng.normal(size=(layers, k, k)))[0]
    return np.asarray((q * np.asarray(eigenvalues)) @ q.swapaxes(-1, -2), np.float32)


@pytest.mark.parametrize("shape", [(12, 4), (4, 12), (5, 5), (2, 3, 12, 4)])
@pytest.mark.parametrize("steps", [1, 5])
def test_newton_schulz_is_its_polynomial_of_the_singular_values(shape, steps):
    a, b, c = linalg.QUINTIC
    sigma = [3.0, 1.0, 0.3, 0.1]
    x = matrix_with(sigma, shape)

    def polynomial(sigma):
        sigma = sigma / np.linalg.norm(sigma, axis=-1, keepdims=True)
        for _ in range(steps):
            sigma = a * sigma + b * sigma**3 + c * sigma**5
        return sigma

    expected = reference.matrix_polynomial(x, polynomial)
    found = newton_schulz(jnp.asarray(x), steps=steps)
    # A step multiplies the error of small singular values by a = 3.4 at most.
    np.testing.assert_allclose(found, expected, atol=4 * EPS * a**steps)


def test_quintic_brings_singular_values_into_its_band():
    # Relative to the Frobenius norm these are 1 down to 1e-3.
    x = matrix_with([1.0, 0.3, 0.1, 0.03, 0.01, 1e-3], (16, 6))
    sigma = np.linalg.svd(newton_schulz(jnp.asarray(x)), compute_uv=False)
    assert sigma.max() < 1.5
    assert sigma.min() > 0.5 * 3.4445**5 * 1e-3  # at least the linear growth, damped


@pytest.mark.parametrize("shape", [(12, 4), (4, 12), (2, 12, 4)])
def test_cubic_converges_to_the_polar_factor(shape):
    condition = 10.0
    x = matrix_with(np.geomspace(1, 1 / condition, 4), shape)
    found = newton_schulz(jnp.asarray(x), steps=20, coefficients=linalg.CUBIC)
    # Rounding of the Gram matrix is amplified by the condition number.
    atol = 4 * EPS * condition * np.sqrt(4)
    np.testing.assert_allclose(found, reference.polar(x), atol=atol)


@pytest.mark.parametrize("size", [1e-30, 1e30, 3e38])
def test_newton_schulz_does_not_see_the_size_of_its_input(size):
    x = matrix_with([3.0, 1.0, 0.3, 0.1], (12, 4))
    x = x / np.max(np.abs(x))
    found = newton_schulz(jnp.asarray(x * np.float32(size)))
    expected = newton_schulz(jnp.asarray(x))
    np.testing.assert_allclose(found, expected, atol=4 * EPS * 3.4445**5)


def test_newton_schulz_of_zero_is_zero():
    found = newton_schulz(jnp.zeros((6, 3)))
    np.testing.assert_array_equal(found, np.zeros((6, 3)))


def test_newton_schulz_keeps_a_low_precision_dtype_but_computes_in_float32():
    x = jnp.asarray(matrix_with([3.0, 1.0, 0.3, 0.1], (12, 4)), jnp.bfloat16)
    found = newton_schulz(x)
    assert found.dtype == jnp.bfloat16
    expected = newton_schulz(x.astype(jnp.float32))
    np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))


def test_inverse_cholesky_inverts_the_lower_factor():
    g = positive_definite(np.geomspace(1, 0.1, 5))
    l = reference.float64(inverse_cholesky(jnp.asarray(g)))
    np.testing.assert_array_equal(np.triu(l, 1), 0)
    eye = np.broadcast_to(np.eye(5), g.shape)
    # cond(g) = 10, five terms a sum.
    atol = 10 * EPS * np.sqrt(5)
    np.testing.assert_allclose(l @ g @ l.swapaxes(-1, -2), eye, atol=atol)


@pytest.mark.parametrize("size", [5, 16, 33, 130])
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.8], ids=["identity", "near", "far"])
def test_inverse_cholesky_by_halves_of_every_size(size, spread):
    rng = np.random.default_rng(size)
    q = reference.signed_qr(rng.normal(size=(2, size, size)))
    values = 1 + spread * np.linspace(-1, 1, size)
    g = np.asarray((q * values) @ q.swapaxes(-1, -2), np.float32)
    expected = np.linalg.inv(np.linalg.cholesky(np.float64(g)))
    condition = (1 + spread) / (1 - spread)
    atol = 8 * EPS * condition**1.5 * np.sqrt(size)
    for fn in (inverse_cholesky, jax.jit(linalg.eliminate)):
        found = fn(jnp.asarray(g))
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
        np.testing.assert_array_equal(np.triu(found, 1), 0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 24])
@pytest.mark.parametrize("kind", ["near", "random", "zero", "ties", "deficient"])
def test_jacobi_svd_decomposes_every_square_matrix(size, kind):
    rng = np.random.default_rng(size)
    m = rng.normal(size=(3, size, size))
    if kind == "near":
        m = np.diag(np.linspace(2, 1, size) * np.resize([1, -1], size)) + 0.01 * m
    elif kind == "ties":
        m = np.eye(size) + 1e-3 * m
    elif kind == "zero":
        m = 0 * m
    elif kind == "deficient":
        m[:, :, size // 2 :] = 0
    p, s, z = reference.float64(jax.jit(linalg.jacobi_svd)(jnp.asarray(m, jnp.float32)))
    # Every entry is turned size - 1 times a sweep, in at most about six sweeps.
    atol = 2 * EPS * np.sqrt(6 * size)
    scale = max(np.max(np.abs(m)) * np.sqrt(size), 1)
    for x in (p, z):
        eye = np.broadcast_to(np.eye(size), x.shape)
        np.testing.assert_allclose(x.swapaxes(-1, -2) @ x, eye, rtol=0, atol=2 * atol)
    product = (p * s[:, None, :]) @ z.swapaxes(-1, -2)
    np.testing.assert_allclose(product, m, rtol=0, atol=2 * atol * scale)
    values = np.sort(np.abs(s), axis=-1)[:, ::-1]
    expected = np.linalg.svd(m, compute_uv=False)
    np.testing.assert_allclose(values, expected, rtol=0, atol=2 * atol * scale)
    if kind == "near":  # the order is kept: every column has most of its norm in place
        assert np.min(np.square(np.diagonal(p, axis1=-2, axis2=-1))) > 0.5


@pytest.mark.parametrize("size", [1e-33, 1e-25, 1e25, 1e38])
def test_jacobi_svd_does_not_see_the_size_of_its_input(size):
    m = np.random.default_rng(0).normal(size=(2, 5, 5)).astype(np.float32)
    m = m / np.max(np.abs(m))
    found = reference.float64(linalg.jacobi_svd(jnp.asarray(m * np.float32(size))))
    expected = reference.float64(linalg.jacobi_svd(jnp.asarray(m)))
    atol = 4 * EPS * np.sqrt(6 * 5)
    for x, y, unit in zip(found, expected, (1, np.float32(size), 1), strict=True):
        np.testing.assert_allclose(x / unit, y, rtol=0, atol=atol)


@pytest.mark.parametrize("size", [3e-38, 1e-13, 1.0, 3e12, 1e19, 3e38])
def test_a_range_divisor_lets_numbers_be_squared_and_is_1_if_they_can_be(size):
    x = jnp.asarray([size, -size / 2, 0.0])
    divisor = linalg.range_divisor(jnp.max(jnp.abs(x)))
    squares = np.square(np.asarray(x / divisor))
    assert 1e-25 < np.max(squares) < 1e26
    np.testing.assert_allclose(squares / np.max(squares), [1, 0.25, 0], rtol=8 * EPS)
    assert (divisor == 1) == (2.0**-42 <= size <= 2.0**42)
    assert linalg.range_divisor(jnp.zeros([])) == 1
    assert linalg.range_divisor(jnp.float32(jnp.nan)) == 1


@pytest.mark.parametrize("size", [1e-33, 1e-25, 1.0, 1e25, 3e37])
def test_column_norms_of_every_size(size):
    x = np.random.default_rng(0).normal(size=(2, 6, 3)) / 4 * [1, size, 0]
    x = np.asarray(x, np.float32)
    found = linalg.column_norms(jnp.asarray(x))
    expected = np.linalg.norm(np.float64(x), axis=-2, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=8 * EPS)


def test_norms_have_no_nan_in_their_derivatives():
    for norm in (linalg.frobenius_norm, linalg.column_norms):
        grad = jax.grad(lambda x, norm=norm: jnp.sum(norm(x)))
        np.testing.assert_array_equal(grad(jnp.zeros((4, 3))), 0)
        x = np.array([[3.0, 0.0], [4.0, 0.0]], np.float32)
        np.testing.assert_allclose(grad(jnp.asarray(x)), x / 5, rtol=4 * EPS)


@pytest.mark.parametrize("low", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e4])
def test_inverse_sqrt_matches_an_eigendecomposition(low, size):
    g = positive_definite(size * np.geomspace(1, low, 5))
    values, vectors = np.linalg.eigh(reference.float64(g))
    expected = (vectors / np.sqrt(values)[:, None, :]) @ vectors.swapaxes(-1, -2)
    found = linalg.inverse_sqrt(jnp.asarray(g))
    # Relative to its own largest value 1 / sqrt(low): rounding times cond(g).
    atol = 4 * EPS * np.sqrt(5) / low / np.sqrt(low * size)
    np.testing.assert_allclose(found, expected, atol=atol)


@pytest.mark.parametrize("inverse", [inverse_cholesky, linalg.inverse_sqrt])
@pytest.mark.parametrize("condition", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("factor", [-0.5, -1.0, -3.0, np.nan])
def test_only_the_indefinite_matrix_of_a_stack_becomes_nan(inverse, condition, factor):
    g = positive_definite(np.geomspace(1, 1 / condition, 4))
    bad = np.where(np.arange(3) == 1, factor, 1).astype(np.float32)
    found = inverse(jnp.asarray(g * bad[:, None, None]))
    assert np.isnan(found[1]).any()
    good = np.array([0, 2])
    alone = inverse(jnp.asarray(g[good]))
    # The same sums in another order, for a result as large as sqrt(condition).
    atol = 4 * EPS * condition**1.5
    np.testing.assert_allclose(found[good], alone, atol=atol)


@pytest.mark.parametrize(
    "inverse", [inverse_cholesky, linalg.inverse_sqrt], ids=["cholesky", "sqrt"]
)
def test_float64_is_inverted_to_its_own_rounding(inverse):
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(2, 20, 20)))[0]
    # Newton's iteration would stop at 1e-7 here, where float32 is at rounding.
    g = (q * np.linspace(0.9, 1.1, 20)) @ q.swapaxes(-1, -2)
    with jax.enable_x64():
        z = np.asarray(inverse(jnp.asarray(g)))
    assert z.dtype == np.float64
    eye = np.broadcast_to(np.eye(20), g.shape)
    np.testing.assert_allclose(z @ g @ z.swapaxes(-1, -2), eye, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30, 1.5e38])
@pytest.mark.parametrize("squarings", [0, 8, 20])
def test_spectral_radius_bound_stays_between_gelfands_bounds(size, squarings):
    eigenvalues = [1.0, 0.999, 0.99, 0.5, 0.1, 0.0]
    m = positive_definite(eigenvalues)
    found = linalg.spectral_radius_bound(
        jnp.asarray(m * np.float32(size)), squarings=squarings
    )
    ratio = reference.float64(found) / size
    # Relative rounding of every norm, weighted 1, 1/2, 1/4, ..., and of every partial
    # sum of logarithms.
    slack = 16 * EPS * np.sqrt(6) + (squarings + 2) * EPS / 2 * abs(np.log(size))
    assert np.all(ratio >= 1 - slack)
    assert np.all(ratio <= 6 ** (0.5 / 2**squarings) * (1 + slack))


def test_spectral_radius_bound_of_zero_is_zero():
    stack = jnp.stack([jnp.zeros((3, 3)), jnp.eye(3)])
    found = linalg.spectral_radius_bound(stack, squarings=20)
    np.testing.assert_allclose(found, [0, 1], atol=1e-5)


def test_the_derivative_of_the_spectral_radius():
    """y.T dm x / y.T x, of a matrix that is not symmetric."""
    rng = np.random.default_rng(0)
    radius = lambda m: linalg.spectral_radius_bound(m, squarings=20)
    with jax.enable_x64():
        left, right, dm = (jnp.asarray(rng.normal(size=(3, 6, 6))) for _ in range(3))
        m = linalg.gram(left) @ linalg.gram(right)
        gradient = jax.jit(jax.grad(lambda m: jnp.sum(radius(m))))(m)
        _, tangent = jax.jvp(radius, (m,), (dm,))
        at_zero = jax.grad(lambda m: jnp.sum(radius(m)))(0 * m)
    for i in range(3):
        values, x = np.linalg.eig(np.asarray(m[i]))
        y = np.linalg.inv(x).T
        top = np.argmax(np.abs(values))
        expected = np.real(np.outer(y[:, top], x[:, top]))
        np.testing.assert_allclose(gradient[i], expected, rtol=0, atol=1e-6)
        slope = np.sum(expected * np.asarray(dm[i]))
        np.testing.assert_allclose(tangent[i], slope, atol=1e-5)
    np.testing.assert_array_equal(at_zero, 0)


def test_the_derivative_of_equal_radii_is_their_mean():
    gradient = jax.grad(
        lambda m: jnp.sum(linalg.spectral_radius_bound(m, squarings=20))
    )(jnp.diag(jnp.asarray([2.0, 2.0, 1.0]))[None])
    np.testing.assert_allclose(gradient[0], np.diag([0.5, 0.5, 0]), atol=4 * EPS)


@pytest.mark.parametrize("size", [1, 2, 5, 33])
def test_inverse_upper_and_its_derivative(size):
    rng = np.random.default_rng(size)
    r = np.linalg.qr(rng.normal(size=(2, size + 4, size)))[1]
    with jax.enable_x64():
        found, pullback = jax.vjp(linalg.inverse_upper, jnp.asarray(r))
        weight = rng.normal(size=r.shape)
        (gradient,) = pullback(jnp.asarray(weight))
    expected = np.linalg.inv(r)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)
    np.testing.assert_array_equal(np.tril(found, -1), 0)
    turned = expected.swapaxes(-1, -2)
    np.testing.assert_allclose(gradient, -turned @ weight @ turned, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [1e-33, 1e-25, 1e25, 1e37])
def test_power_iteration_does_not_see_the_size_of_its_input(size):
    x = jnp.asarray(matrix_with([2.0, 1.0, 0.5], (3, 10, 6)))
    vector = jax.random.normal(jax.random.key(0), (3, 6))
    norm, improved = power_iteration(x * size, vector * size)
    expected = power_iteration(x, vector)
    np.testing.assert_allclose(norm / np.float32(size), expected[0], rtol=16 * EPS)
    np.testing.assert_allclose(improved, expected[1], rtol=0, atol=16 * EPS)


def test_power_iteration_approaches_the_norm_from_below():
    x = jnp.asarray(matrix_with([2.0, 1.0, 0.5], (3, 10, 6)))
    vector = jax.random.normal(jax.random.key(0), (3, 6))
    estimates = []
    for _ in range(12):
        norm, vector = power_iteration(x, vector)
        estimates.append(np.asarray(norm))
    assert np.all(np.diff(estimates, axis=0) >= -4 * EPS)
    assert np.all(estimates[0] < 2)
    # The error falls by (1/2)^4 a step: at rounding after twelve.
    np.testing.assert_allclose(estimates[-1], 2.0, rtol=8 * EPS)
    v = np.linalg.svd(x)[2][:, 0]
    turned = np.abs(np.sum(v * np.asarray(vector), -1))
    np.testing.assert_allclose(turned, 1.0, rtol=8 * EPS)


def test_power_iteration_takes_several_steps_at_once():
    x = jnp.asarray(matrix_with([2.0, 1.0, 0.5], (10, 6)))
    once = twice = jax.random.normal(jax.random.key(0), (6,))
    _, twice = power_iteration(x, twice, steps=2)
    for _ in range(2):
        norm, once = power_iteration(x, once)
    assert norm.shape == ()
    np.testing.assert_allclose(once, twice, atol=4 * EPS)


def test_a_nan_ends_no_other_matrix_of_a_jacobi_svd():
    m = np.array([[[1.0, 0.5], [0.2, 2.0]], [[np.nan, 0.0], [0.0, 1.0]]])
    p, s, z = linalg.jacobi_svd(jnp.asarray(m, jnp.float32))
    p, s, z = (np.asarray(x) for x in (p, s, z))
    whole = (p[0] * s[0]) @ z[0].T
    np.testing.assert_allclose(whole, m[0], atol=1e-6)
    np.testing.assert_allclose(
        np.sort(np.abs(s[0])), np.linalg.svd(m[0], compute_uv=False)[::-1], rtol=1e-5
    )


@pytest.mark.parametrize("zero", ["matrix", "vector"])
def test_power_iteration_of_zero_is_zero(zero):
    x, vector = jnp.ones((5, 3)), jnp.ones(3)
    x, vector = (x * 0, vector) if zero == "matrix" else (x, vector * 0)
    norm, improved = power_iteration(x, vector)
    assert norm == 0
    kept = np.zeros(3) if zero == "vector" else np.full(3, 3**-0.5)
    np.testing.assert_allclose(improved, kept, rtol=1e-6)


def test_power_iteration_finds_what_was_zero_before():
    """As the second factor of a product that starts at zero."""
    vector = jnp.array([1.0, 2.0, 3.0])
    x = jax.random.normal(jax.random.key(0), (6, 3))
    for factor in (0 * x, jnp.full_like(x, jnp.nan)):
        _, kept = power_iteration(factor, vector)
        for _ in range(50):
            norm, kept = power_iteration(x, kept)
        assert float(norm) == pytest.approx(np.linalg.norm(x, 2), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize(
    ("steps", "coefficients", "most"),
    [(8, linalg.QUINTIC, 1.2), (13, linalg.QUINTIC, 1.2), (40, linalg.CUBIC, 1.0)],
)
def test_many_steps_of_newton_schulz_are_stable(rank, steps, coefficients, most):
    """Directions of size zero, as gradients have, do not grow from rounding."""
    x = matrix_with(np.linspace(1, 2, rank), (64, 16))
    found = newton_schulz(jnp.asarray(x), steps=steps, coefficients=coefficients)
    sigma = np.linalg.svd(np.asarray(found, np.float64), compute_uv=False)
    assert sigma[0] <= most + 64 * EPS and sigma[rank - 1] >= 0.6


def test_steps_beyond_a_gram_matrix_are_those_of_the_polynomial():
    x = matrix_with([1.0, 0.5, 0.1], (9, 3))
    sigma = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    values = sigma / np.linalg.norm(sigma)
    a, b, c = linalg.QUINTIC
    for _ in range(7):
        values = values * (a + b * values**2 + c * values**4)
    found = np.linalg.svd(newton_schulz(jnp.asarray(x), steps=7), compute_uv=False)
    np.testing.assert_allclose(found, -np.sort(-values), atol=1e-4)


@pytest.mark.parametrize("k", [3, 40])
def test_inverse_cholesky_of_a_mapped_axis_is_that_of_each(k):
    """Some are near the identity, others need elimination."""
    stacks = np.stack(
        [
            positive_definite(np.linspace(1, top, k), seed=i)
            for i, top in ((0, 1.1), (1, 90))
        ]
    )
    found = jax.jit(jax.vmap(linalg.inverse_cholesky))(jnp.asarray(stacks))
    for one, whole in zip(found, stacks, strict=True):
        wanted = np.linalg.inv(np.linalg.cholesky(whole.astype(np.float64)))
        np.testing.assert_allclose(one, wanted, atol=1e-4)


@pytest.mark.parametrize("sizes", [(3,), (2, 5, 3, 2), (1, 2, 3, 4, 5, 6, 7, 8, 9)])
def test_map_batched_gives_each_matrix_its_own_answer(sizes):
    rng = np.random.default_rng(0)
    layers = [(), (2,), (2, 3)]
    shapes = [(*layers[i % 3], k, k) for i, k in enumerate(sizes)]
    left, right = (
        [np.eye(s[-1]) + 0.1 * rng.random(s).astype(np.float32) for s in shapes]
        for _ in range(2)
    )
    calls = []

    def solve(a, b):
        calls.append(a.shape)
        return jnp.linalg.solve(a, b)

    as_arrays = lambda xs: [jnp.asarray(x, jnp.float32) for x in xs]
    found = jax.jit(functools.partial(linalg.map_batched, solve, fill=1.0))(
        as_arrays(left), as_arrays(right)
    )
    assert len(calls) <= 4
    for x, a, b in zip(found, left, right, strict=True):
        np.testing.assert_allclose(x, np.linalg.solve(a, b), atol=16 * EPS)


def test_map_batched_takes_functions_to_one_number():
    mats = [2 * jnp.eye(3), jnp.ones((2, 4, 4)), *(jnp.eye(k) for k in range(5, 9))]
    norm = lambda m: jnp.max(jnp.abs(m), axis=(-2, -1))
    found = jax.jit(functools.partial(linalg.map_batched, norm, fill=0.0))(mats)
    expected = [2.0, np.ones(2), 1.0, 1.0, 1.0, 1.0]
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)


def test_map_batched_takes_vectors_after_matrices():
    """They stand for diagonal matrices, and are padded as these are."""
    sizes = [(2, 3), (2,), (3, 1, 4), (5,), (6,)]
    vectors = [jnp.arange(1.0, 1.0 + np.prod(size)).reshape(size) for size in sizes]
    mats = [
        jnp.broadcast_to(jnp.eye(v.shape[-1]), (*v.shape, v.shape[-1])) for v in vectors
    ]
    fn = lambda m, v: (m * v[:, None, :], jnp.prod(v, -1))
    found = linalg.map_batched(fn, mats, vectors, fill=1.0)
    for (product, total), vector in zip(found, vectors, strict=True):
        np.testing.assert_array_equal(jnp.diagonal(product, axis1=-2, axis2=-1), vector)
        np.testing.assert_allclose(total, jnp.prod(vector, -1))


def test_map_batched_takes_empty_stacks():
    mats = [jnp.zeros((0, 3, 3)), jnp.eye(2), jnp.zeros((2, 0, 4, 4))]
    largest = lambda m: (m / jnp.max(jnp.abs(m)), jnp.max(m, axis=(-2, -1)))
    found = linalg.map_batched(largest, mats, fill=0.0)
    assert [pair[0].shape for pair in found] == [m.shape for m in mats]
    assert [pair[1].shape for pair in found] == [m.shape[:-2] for m in mats]


def test_map_batched_stacks_each_dtype_apart():
    with jax.enable_x64():
        mats = [jnp.eye(3), 2 * jnp.ones((2, 3, 3)), jnp.eye(2)]
        mats = [m.astype(t) for m, t in zip(mats, ("f8", "f4", "f4"), strict=True)]
        found = linalg.map_batched(lambda m: (m, m[..., 0]), mats, fill=0.0)
        dtypes = [{x.dtype for x in pair} for pair in found]
    assert dtypes == [{m.dtype} for m in mats]
    for (whole, column), m in zip(found, mats, strict=True):
        np.testing.assert_array_equal(whole, m)
        np.testing.assert_array_equal(column, m[..., 0])


def test_gram_of_sharded_rows_is_replicated_on_explicit_axes():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    x = np.random.default_rng(0).normal(size=(2, 16, 3)).astype(np.float32)
    sharding = NamedSharding(mesh, PartitionSpec(None, "data", None))
    with jax.set_mesh(mesh):
        found = jax.jit(linalg.gram)(jax.device_put(x, sharding))
    assert found.sharding.is_fully_replicated
    expected = np.swapaxes(x, -1, -2).astype(np.float64) @ x
    np.testing.assert_allclose(found, expected, atol=16 * EPS * np.sqrt(16))


FUNCTIONS = {
    "matmul": lambda x: linalg.matmul(x, linalg.transpose(x)),
    "gram": linalg.gram,
    "inverse_sqrt": lambda x: linalg.inverse_sqrt(linalg.gram(x)),
    "newton_schulz": linalg.newton_schulz,
    "power_iteration": lambda x: linalg.power_iteration(x, x[..., 0, :]),
    "spectral_radius_bound": lambda x: linalg.spectral_radius_bound(
        linalg.gram(x), squarings=8
    ),
    "derivative of spectral_radius_bound": jax.grad(
        lambda x: jnp.sum(linalg.spectral_radius_bound(linalg.gram(x), squarings=8))
    ),
    "derivative of inverse_upper": jax.grad(
        lambda x: jnp.sum(linalg.inverse_upper(linalg.gram(x)))
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_product_is_of_the_highest_precision(name):
    precisions = reference.matmul_precisions(FUNCTIONS[name], jnp.ones((2, 6, 3)))
    assert precisions
    assert set(precisions) == {reference.HIGHEST}


@pytest.mark.parametrize("shape", [(30, 4), (4, 30), (5, 5)])
def test_thin_product_is_a_product_with_all_derivatives(shape):
    keys = jax.random.split(jax.random.key(0), 5)
    x, d_x = (jax.random.normal(key, (2, 3, shape[0])) for key in keys[:2])
    w, d_w = (jax.random.normal(key, shape) for key in keys[2:4])
    d_y = jax.random.normal(keys[4], (2, 3, shape[1]))
    plain = lambda x, w: x @ w
    for derivative in (
        lambda fn: jax.jvp(fn, (x, w), (d_x, d_w)),
        lambda fn: jax.vjp(fn, x, w)[1](d_y),
        lambda fn: jax.vjp(lambda w: fn(x, w), w)[1](d_y),
        lambda fn: jax.vjp(lambda x: fn(x, w), x)[1](d_y),
        lambda fn: jax.vjp(jax.vmap(fn, (0, None)), x, w)[1](d_y),
    ):
        chex.assert_trees_all_close(
            derivative(linalg.thin_product), derivative(plain), rtol=1e-5, atol=1e-5
        )


def test_the_gradient_of_a_thin_factor_has_its_short_side_first():
    def orders(shape, loss):
        w = jax.ShapeDtypeStruct(shape, jnp.float32)
        jaxpr = jax.make_jaxpr(jax.grad(loss))(w).jaxpr
        held = [e for e in jaxpr.eqns if e.primitive.name == "optimization_barrier"]
        return [e.outvars[0].aval.shape for e in held]

    x = jnp.ones((8, 30))
    tall = lambda w: jnp.sum(linalg.thin_product(x, w))
    wide = lambda w: jnp.sum(linalg.thin_product(x[:, :4], w))
    assert orders((30, 4), tall) == orders((4, 30), wide) == [(4, 30)]


def test_sum_of_outer_products():
    x, y = (jax.random.normal(jax.random.key(n), (6, n)) for n in (30, 4))
    np.testing.assert_allclose(linalg.sum_of_outer_products(x, y), x.T @ y, rtol=1e-5)
