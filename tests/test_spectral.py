import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen

from sct_jax import spectral

EPS = float(np.finfo(np.float32).eps)
ORTHONORMAL = 4e-6
FAN_IN, FAN_OUT, RANK = 12, 9, 4

composite_update_norm = jax.jit(spectral.composite_update_norm)


def orthonormal(*shape, seed=0):
    return reference.signed_qr(np.random.default_rng(seed).normal(size=shape))


def factors64(layers=(), s=(2.0, 1.5, 0.7, 0.1), seed=0):
    """(u, s, v) in float64."""
    rank = len(s)
    return (
        orthonormal(*layers, FAN_IN, rank, seed=seed),
        np.broadcast_to(np.asarray(s, np.float64), (*layers, rank)).copy(),
        orthonormal(*layers, FAN_OUT, rank, seed=seed + 1),
    )


def factors(layers=(), **kwargs):
    return as_factors(factors64(layers, **kwargs))


def as_factors(usv):
    return spectral.SpectralFactors(*(jnp.asarray(x, jnp.float32) for x in usv))


def weights(layers=()):
    """One weight of every kind, with its dense float64 form."""
    w = factors(layers)
    dense = reference.dense(*w)
    root = np.sqrt(reference.float64(w.s))[..., None, :]
    a, b = (jnp.asarray(x * root, jnp.float32) for x in (w.u, w.v))
    return {
        "spectral": (w, dense),
        "low_rank": (spectral.LowRankFactors(a, b), dense),
        "dense": (jnp.asarray(dense, jnp.float32), dense),
    }


KINDS = ("spectral", "low_rank", "dense")


# --- forward ---------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_linear_is_the_product_with_the_dense_matrix(kind, batch):
    w, dense = weights()[kind]
    x = np.random.default_rng(3).normal(size=(*batch, FAN_IN)).astype(np.float32)
    found = spectral.linear(jnp.asarray(x), w)
    assert found.shape == (*batch, FAN_OUT)
    # Two sums of 12 and 4 terms of size up to ||x|| max|s|.
    atol = 4 * EPS * np.sqrt(FAN_IN) * np.linalg.norm(x, axis=-1).max() * 2
    np.testing.assert_allclose(found, reference.float64(x) @ dense, atol=atol)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_flattening_rows_changes_no_result(kind, batch):
    w, _ = weights()[kind]
    x = jnp.asarray(np.random.default_rng(3).normal(size=(*batch, FAN_IN)), jnp.float32)
    expected = spectral.linear(x, w)
    found = spectral.linear(x, w, flatten_rows=True)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=64 * EPS)
    flat = jax.make_jaxpr(lambda x: spectral.linear(x, w, flatten_rows=True))(x)
    axes = {
        equation.invars[0].aval.ndim
        for equation in reference.equations(flat)
        if equation.primitive.name == "dot_general"
    }
    assert axes == {2}


@pytest.mark.parametrize("kind", KINDS)
def test_linear_computes_in_the_dtype_of_x_and_keeps_float32_factors(kind):
    w, dense = weights()[kind]
    x = jax.random.normal(jax.random.key(0), (5, FAN_IN)).astype(jnp.bfloat16)
    found = spectral.linear(x, w)
    assert found.dtype == jnp.bfloat16
    expected = reference.float64(x.astype(jnp.float32)) @ dense
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    atol = eps * np.sqrt(FAN_IN) * np.max(np.linalg.norm(expected, axis=-1))
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=atol)
    grads = jax.grad(lambda w: spectral.linear(x, w).astype(jnp.float32).sum())(w)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert {p.dtype for p in jax.tree.leaves(w)} == {jnp.dtype("float32")}


def integers(dtype):
    x = np.random.default_rng(3).integers(0, 2, size=(2, 5, FAN_IN))
    return (x * (1 if dtype == "bool" else 100)).astype(dtype)


@pytest.mark.parametrize("flatten_rows", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "int32"])
def test_linear_of_integers_is_that_of_a_dense_layer(dtype, kind, flatten_rows):
    w, dense = weights()[kind]
    x = integers(dtype)
    layer = linen.Dense(FAN_OUT, use_bias=False)
    with jax.numpy_dtype_promotion("standard"):
        params = {"params": {"kernel": jnp.asarray(dense, jnp.float32)}}
        expected = layer.apply(params, jnp.asarray(x))
    linear = jax.jit(spectral.linear, static_argnames="flatten_rows")
    found = linear(jnp.asarray(x), w, flatten_rows=flatten_rows)
    assert found.dtype == expected.dtype == jnp.float32
    atol = 4 * EPS * np.sqrt(FAN_IN) * 100 * 2 * np.sqrt(FAN_IN)
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    assert np.max(np.abs(found)) > 0.5


@pytest.mark.parametrize("kind", ["spectral", "low_rank"])
def test_each_half_of_linear_takes_integers(kind):
    w, _ = weights()[kind]
    x, h = integers("int32"), integers("uint8")[..., :RANK]
    for half, argument in ((spectral.contract, x), (spectral.expand, h)):
        expected = half(jnp.asarray(argument, jnp.float32), w)
        np.testing.assert_array_equal(half(jnp.asarray(argument), w), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_linear_computes_in_every_inexact_dtype(dtype, kind):
    w, dense = weights()[kind]
    x = jnp.asarray(np.random.default_rng(3).normal(size=(5, FAN_IN)), dtype)
    found = spectral.linear(x, w)
    assert found.dtype == dtype
    wide = np.asarray(x.astype(jnp.complex64 if dtype == "complex64" else jnp.float32))
    atol = float(jnp.finfo(dtype).eps) * FAN_IN * 2 * np.linalg.norm(wide, axis=-1)
    np.testing.assert_allclose(
        np.asarray(found, np.complex128), wide @ dense, rtol=0, atol=np.max(atol)
    )


def test_linear_takes_numpy_arrays_and_lower_precision_factors():
    w = jax.tree.map(lambda x: x.astype(jnp.bfloat16), factors())
    x = np.ones((3, FAN_IN), np.int32)
    assert spectral.linear(x, w).dtype == jnp.bfloat16
    with jax.enable_x64():
        wide = np.random.default_rng(0).normal(size=(3, FAN_IN))
        found = spectral.linear(wide, factors())
        assert found.dtype == jnp.float64
        expected = wide @ reference.dense(*factors())
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


def test_a_complex_matrix_keeps_its_imaginary_part():
    w = jnp.asarray([[1 + 2j, 0], [0, 3j]], jnp.complex64)
    with jax.numpy_dtype_promotion("standard"):
        found = spectral.linear(jnp.ones(2), w)
    np.testing.assert_array_equal(found, [1 + 2j, 3j])


@pytest.mark.parametrize("kind", KINDS)
def test_no_rank_is_promoted(kind):
    w, _ = weights()[kind]
    with jax.numpy_rank_promotion("raise"):
        spectral.linear(jnp.ones((2, 5, FAN_IN)), w)
        spectral.lookup(jnp.zeros((2, 5), jnp.int32), w)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_linear_match_those_through_the_dense_matrix(kind):
    w, dense = weights()[kind]
    rng = np.random.default_rng(4)
    x, y_bar = rng.normal(size=(5, FAN_IN)), rng.normal(size=(5, FAN_OUT))
    _, pullback = jax.vjp(spectral.linear, jnp.asarray(x, jnp.float32), w)
    x_bar, w_bar = pullback(jnp.asarray(y_bar, jnp.float32))
    g = x.T @ y_bar  # the gradient of the dense matrix
    w = reference.float64(w)
    if kind == "spectral":
        expected = (
            g @ w.v * w.s,
            np.sum(w.u * (g @ w.v), axis=0),
            g.T @ w.u * w.s,
        )
    elif kind == "low_rank":
        expected = (g @ w.b, g.T @ w.a)
    else:
        expected = (g,)
    atol = 8 * EPS * np.sqrt(FAN_IN) * np.linalg.norm(g) * 2
    for found, wanted in zip(jax.tree.leaves(w_bar), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=atol)
    np.testing.assert_allclose(x_bar, y_bar @ dense.T, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_maps_over_layers(kind):
    w, dense = weights((3,))[kind]
    x = np.random.default_rng(3).normal(size=(3, 5, FAN_IN)).astype(np.float32)
    found = jax.vmap(spectral.linear)(jnp.asarray(x), w)
    atol = 8 * EPS * np.sqrt(FAN_IN) * np.linalg.norm(x, axis=-1).max()
    np.testing.assert_allclose(found, reference.float64(x) @ dense, atol=atol)


@pytest.mark.parametrize("ids", [2, [0, 11, 3], [[1, 1], [5, 0], [2, 7]]])
@pytest.mark.parametrize("kind", KINDS)
def test_lookup_returns_rows(kind, ids):
    w, dense = weights()[kind]
    found = spectral.lookup(jnp.asarray(ids), w)
    atol = 4 * EPS * np.sqrt(RANK) * 2
    np.testing.assert_allclose(found, dense[np.asarray(ids)], atol=atol)


@pytest.mark.parametrize("layers", [(), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_to_dense_and_transpose(kind, layers):
    w, dense = weights(layers)[kind]
    atol = 4 * EPS * np.sqrt(RANK) * 2
    np.testing.assert_allclose(spectral.to_dense(w), dense, atol=atol)
    turned = spectral.to_dense(spectral.transpose(w))
    np.testing.assert_allclose(turned, dense.swapaxes(-1, -2), atol=atol)
    assert type(spectral.transpose(w)) is type(w) or kind == "dense"


def test_to_low_rank_keeps_the_product_and_splits_s_evenly():
    w = factors((2,), s=(2.0, -1.5, 0.0, 0.1))
    low = spectral.to_low_rank(w)
    atol = 4 * EPS * np.sqrt(RANK) * 2
    found = np.asarray(low.a) @ np.asarray(low.b).swapaxes(-1, -2)
    np.testing.assert_allclose(found, reference.dense(*w), atol=atol)
    sizes = [np.linalg.norm(x, axis=-2) for x in low]
    np.testing.assert_allclose(sizes[0], sizes[1], rtol=8 * EPS)


def test_to_low_rank_has_a_finite_derivative_where_s_is_zero():
    w = factors(s=(2.0, -1.5, 0.0, 0.5))
    total = lambda w: sum(jnp.sum(jnp.square(x)) for x in spectral.to_low_rank(w))
    gradient = jax.grad(total)(w)
    # The sum of squares is 2 |s|.
    np.testing.assert_allclose(gradient.s, [2, -2, 0, 2], rtol=16 * EPS)
    assert all(np.all(np.isfinite(x)) for x in gradient)


# --- factor tuples ---------------------------------------------------------------


def test_factors_are_named_tuples_and_pytree_nodes():
    w = factors()
    u, s, v = w
    assert (u is w.u, s is w.s, v is w.v) == (True, True, True)
    assert w._replace(s=s * 2).s[0] == 2 * s[0]
    doubled = jax.tree.map(lambda x: 2 * x, w)
    assert isinstance(doubled, spectral.SpectralFactors)
    a, b = spectral.LowRankFactors(u, v)
    assert (a is u, b is v) == (True, True)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(w)]
    assert [jax.tree_util.keystr(path) for path in paths] == [".u", ".s", ".v"]


def test_is_factors_makes_a_weight_one_leaf():
    low = spectral.LowRankFactors(jnp.ones((3, 2)), jnp.ones((4, 2)))
    tree = {"w": factors(), "low": low, "dense": jnp.ones(3), "pair": (1.0, 2.0)}
    leaves = jax.tree.leaves(tree, is_leaf=spectral.is_factors)
    assert sum(map(spectral.is_factors, leaves)) == 2
    assert sum(map(spectral.is_spectral, leaves)) == 1
    assert len(leaves) == 5
    seen = jax.tree.map(
        lambda p, q: type(p) is type(q), tree, tree, is_leaf=spectral.is_factors
    )
    assert seen == {"w": True, "low": True, "dense": True, "pair": (True, True)}


# --- from_dense and energy -------------------------------------------------------


@pytest.mark.parametrize("layers", [(), (2, 3)])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_from_dense_loses_exactly_the_tail(layers, rank):
    w = np.random.default_rng(0).normal(size=(*layers, FAN_IN, FAN_OUT))
    found = spectral.from_dense(jnp.asarray(w, jnp.float32), rank=rank)
    assert found.u.shape == (*layers, FAN_IN, rank)
    assert found.v.shape == (*layers, FAN_OUT, rank)
    sigma = np.linalg.svd(w, compute_uv=False)
    atol = 16 * EPS * sigma.max()
    np.testing.assert_allclose(found.s, sigma[..., :rank], atol=atol)
    rest = np.linalg.norm(w - reference.dense(*found), axis=(-2, -1))
    tail = np.sqrt(np.sum(sigma[..., rank:] ** 2, axis=-1))
    np.testing.assert_allclose(rest, tail, atol=atol * np.sqrt(FAN_OUT))
    assert reference.orthonormality_error(found.u) < ORTHONORMAL
    assert reference.orthonormality_error(found.v) < ORTHONORMAL


def test_from_dense_keeps_everything_by_default():
    w = np.random.default_rng(0).normal(size=(FAN_OUT, FAN_IN)).astype(np.float32)
    found = spectral.from_dense(jnp.asarray(w))
    assert found.s.shape == (FAN_OUT,)
    atol = 16 * EPS * np.linalg.norm(w, 2)
    np.testing.assert_allclose(reference.dense(*found), w, atol=atol)


def test_from_dense_keeps_the_energy_that_the_neediest_layer_needs():
    u, _, v = factors64((2,))
    s = np.array([[3.0, 1.0, 0.1, 0.1], [1.0, 1.0, 1.0, 0.1]])
    w = jnp.asarray(reference.dense(u, s, v), jnp.float32)
    # 9.0 of 10.02 in the first layer, 3.0 of 3.01 in the second.
    assert spectral.from_dense(w[0], energy=0.89).s.shape == (1,)
    assert spectral.from_dense(w[0], energy=0.95).s.shape == (2,)
    assert spectral.from_dense(w, energy=0.95).s.shape == (2, 3)
    assert spectral.from_dense(w[0], energy=1.0).s.shape[-1] >= 4


def test_from_dense_of_bfloat16_gives_float32_factors():
    w = jax.random.normal(jax.random.key(0), (FAN_IN, FAN_OUT)).astype(jnp.bfloat16)
    found = spectral.from_dense(w, rank=FAN_OUT)
    assert {x.dtype for x in found} == {jnp.dtype("float32")}
    exact = reference.float64(w.astype(jnp.float32))
    atol = 16 * EPS * np.linalg.norm(exact, 2)
    np.testing.assert_allclose(reference.dense(*found), exact, atol=atol)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"rank": 2, "energy": 0.5}, "rank and energy"),
        ({"rank": 0}, "rank"),
        ({"rank": 5}, "rank"),
        ({"rank": -1}, "rank"),
        ({"energy": 0.0}, "energy"),
        ({"energy": 1.01}, "energy"),
        ({"energy": float("nan")}, "energy"),
    ],
)
def test_from_dense_refuses(arguments, field):
    with pytest.raises(ValueError, match=f"^{field}"):
        spectral.from_dense(jnp.ones((6, 4)), **arguments)


def energy_rank_by_hand(s, energy):
    squares = np.sort(np.asarray(s, np.float64) ** 2)[::-1]
    for k in range(1, len(squares) + 1):
        if np.sum(squares[:k]) >= energy * np.sum(squares):
            return k
    return len(squares)


@pytest.mark.parametrize(
    "s", [(4.0, 2.0, 1.0, 0.5), (-1.0, 0.5, 4.0, -2.0), (0.0, 3.0, 0.0, -3.0)]
)
@pytest.mark.parametrize("energy", [0.1, 0.5, 0.76, 0.9, 0.95, 0.99, 1.0])
def test_energy_rank_of_unsorted_values_of_either_sign(s, energy):
    found = jax.jit(spectral.energy_rank)(jnp.asarray(s), energy)
    assert found == energy_rank_by_hand(s, energy)
    assert found.dtype == jnp.int32


def test_energy_rank_is_reached_exactly_at_a_threshold():
    # Shares of s^2 in exact binary numbers.
    equal = jnp.asarray([2.0, -2.0, 2.0, 2.0])
    for k in range(1, 5):
        assert spectral.energy_rank(equal, k / 4) == k
        assert spectral.energy_rank(equal, k / 4 - 0.01) == k
    assert spectral.energy_rank(equal, 0.51) == 3


def test_energy_rank_of_all_energy_is_reached_in_spite_of_rounding():
    s = jnp.asarray([1.0, 1e-4, 1e-5, 0.0])
    assert spectral.energy_rank(s, 1.0) <= 4
    s = jax.random.normal(jax.random.key(0), (64,))
    assert spectral.energy_rank(s, 1.0) == 64


def test_energy_rank_of_bfloat16_is_that_of_the_same_numbers():
    s = jnp.linspace(1, 2, 512).astype(jnp.bfloat16)
    found = spectral.energy_rank(s, 0.95)
    assert found == spectral.energy_rank(s.astype(jnp.float32), 0.95)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_energy_rank_does_not_see_the_size(size):
    s = size * jnp.asarray([[1.0, 3.0, 2.0], [1.0, 0.0, 0.0]])
    expected = [1, 1] if size == 0 else [2, 1]
    np.testing.assert_array_equal(spectral.energy_rank(s, 0.9), expected)


# --- init ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "layers"),
    [
        ((12, 9, 4), ()),
        ((12, 9, 4), (2, 3)),
        ((9, 12, 9), ()),
        ((8, 8, 8), ()),
        ((7, 5, 1), ()),
    ],
)
def test_init_is_orthonormal(shape, layers):
    w = spectral.init(jax.random.key(0), *shape, layers=layers)
    fan_in, fan_out, rank = shape
    assert w.u.shape == (*layers, fan_in, rank)
    assert w.s.shape == (*layers, rank)
    assert w.v.shape == (*layers, fan_out, rank)
    assert reference.orthonormality_error(w.u) < ORTHONORMAL
    assert reference.orthonormality_error(w.v) < ORTHONORMAL
    assert np.all(np.diff(w.s) < 0)
    assert np.all(np.asarray(w.s) > 0)


def init_s(*shape, **options):
    """Singular values alone, without the retraction of u and v."""
    w = spectral.init(jax.random.key(0), *shape, orthonormal=False, **options)
    return np.asarray(w.s)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 128), (40, 40)])
def test_init_has_the_singular_values_of_a_gaussian_matrix(shape):
    size = min(shape)
    s = init_s(*shape, size)
    expected = reference.gaussian_singular_values(*shape, draws=200)
    error = (s - expected) / expected[0]
    # Quantiles leave out fluctuations, O(1 / size), with a factor of .25 measured in
    # the bulk; at the edge the Tracy-Widom shift is O(size^(-2/3)).
    assert np.max(np.abs(error)) < size ** (-2 / 3)
    assert np.max(np.abs(error[4:-4])) < 0.4 / size
    # A rank off by half a place would move the mean by about .4 / size.
    assert abs(np.mean(error[4:-4])) < 0.15 / size


def test_init_has_the_frobenius_norm_of_a_gaussian_matrix():
    s = init_s(96, 64, 64)
    # E ||W||^2 = O; a midpoint rule with 64 points, and an integrable edge.
    np.testing.assert_allclose(np.sum(np.square(s)), 64, rtol=0.1 / 64)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_init_can_be_rescaled_to_the_dense_frobenius_norm(scale):
    s = init_s(12, 20, 3, scale=scale, rescale=True)
    expected = scale * np.sqrt(20)
    np.testing.assert_allclose(np.linalg.norm(s), expected, rtol=4 * EPS)
    ratio = s / init_s(12, 20, 3)
    np.testing.assert_allclose(ratio, ratio[0], rtol=4 * EPS)


def test_init_scales_only_s():
    one = spectral.init(jax.random.key(0), 12, 9, 4)
    half = spectral.init(jax.random.key(0), 12, 9, 4, scale=0.5)
    np.testing.assert_array_equal(half.u, one.u)
    np.testing.assert_array_equal(half.v, one.v)
    np.testing.assert_array_equal(half.s, one.s / 2)


@pytest.mark.parametrize("rescale", [True, False])
def test_init_of_scale_zero_is_zero(rescale):
    w = spectral.init(jax.random.key(0), 12, 9, 4, scale=0.0, rescale=rescale)
    np.testing.assert_array_equal(w.s, np.zeros(4))
    assert reference.orthonormality_error(w.u) < ORTHONORMAL


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("scale", [-1.0, np.nan, np.inf, 1e39, 1e300])
def test_init_refuses_a_scale_without_meaning(scale, rescale):
    with pytest.raises(ValueError, match=r"^scale"):
        spectral.init(
            jax.random.key(0), 12, 9, 4, scale=scale, rescale=rescale, orthonormal=False
        )


def test_init_layers_and_keys_are_independent():
    a, b = (
        spectral.init(jax.random.key(seed), 12, 9, 4, layers=(2, 3)) for seed in (0, 1)
    )
    rows = lambda x: x[..., :9, :].reshape(-1, 9, 4)
    points = [x for w in (a, b) for side in (w.u, w.v) for x in rows(side)]
    for i, x in enumerate(points):
        for y in points[:i]:
            assert np.max(np.abs(x - y)) > 0.1


def test_the_norm_of_a_change_in_bfloat16_is_that_of_the_same_numbers():
    old = spectral.init(jax.random.key(0), 12, 9, 4, dtype=jnp.bfloat16)
    new = old._replace(s=old.s.at[3].add(2**-6))
    moved = float(new.s[3]) - float(old.s[3])
    assert moved > 0
    for other, norm in ((old, 0.0), (new, moved)):
        found = composite_update_norm(old, other)
        assert found.dtype == jnp.float32
        # Columns in bfloat16 have lengths that differ from 1 by its rounding.
        assert float(found) == pytest.approx(norm, rel=2**-6, abs=1e-6)


def test_init_in_bfloat16():
    w = spectral.init(jax.random.key(0), 12, 9, 4, dtype=jnp.bfloat16)
    assert {x.dtype for x in w} == {jnp.dtype("bfloat16")}
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    assert reference.orthonormality_error(w.u.astype(jnp.float32)) < eps


@pytest.mark.parametrize("rank", [0, -1, 10])
def test_init_refuses_a_rank_that_does_not_fit(rank):
    with pytest.raises(ValueError, match=rf"^rank .*1\.\.9.*\(12, 9\).*{rank}$"):
        spectral.init(jax.random.key(0), 12, 9, rank)


def test_init_is_the_retraction_of_a_gaussian():
    drawn = spectral.init(jax.random.key(0), 12, 9, 4, layers=(2, 3), orthonormal=False)
    w = spectral.init(jax.random.key(0), 12, 9, 4, layers=(2, 3))
    np.testing.assert_array_equal(drawn.s, w.s)
    condition = np.linalg.cond(drawn.u).max()
    expected = reference.signed_qr(drawn.u)
    np.testing.assert_allclose(w.u, expected, atol=4 * EPS * condition * 2)


@pytest.mark.parametrize("method", ["qr", "cholesky_qr", "polar"])
def test_retract_changes_the_spectral_factors_of_a_tree_alone(method):
    w = jax.tree.map(lambda x: x * 1.5, factors())
    low = spectral.LowRankFactors(jnp.ones((3, 2)), jnp.ones((4, 2)))
    tree = {"w": w, "rest": [low, jnp.ones((3, 3))], "none": None}
    found = spectral.retract(tree, method=method)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    np.testing.assert_array_equal(found["w"].s, w.s)
    for x, y in ((found["w"].u, w.u), (found["w"].v, w.v)):
        expected = reference.RETRACTIONS[method](y)
        np.testing.assert_allclose(x, expected, atol=8 * EPS * np.sqrt(RANK))
    jax.tree.map(np.testing.assert_array_equal, found["rest"], tree["rest"])


# --- the norm of the composite update --------------------------------------------


def absolute_floor(s):
    return 16 * EPS * np.max(np.abs(s)) * np.sqrt(np.shape(s)[-1])


def check_norm(old, new, rtol=1e-5):
    """Against the dense difference of the very float32 factors."""
    found = composite_update_norm(old, new)
    expected = reference.composite_update_norm(old, new)
    atol = absolute_floor(np.stack([old.s, new.s]))
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("layers", [(), (2, 3)])
@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
def test_composite_update_norm_at_every_size_of_update(layers, size):
    rng = np.random.default_rng(7)
    old = factors64(layers)
    moved = [x + size * rng.normal(size=x.shape) for x in old]
    new = (reference.signed_qr(moved[0]), moved[1], reference.signed_qr(moved[2]))
    check_norm(as_factors(old), as_factors(new))


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("largest", [1.2, 2.0, 4.0, 12.0])
def test_composite_update_norm_of_factors_that_are_free(largest, size):
    """As without a retraction, where columns grow and are no longer orthogonal."""
    rng = np.random.default_rng(3)
    u, s, v = factors64()
    mix = np.linalg.qr(rng.normal(size=(u.shape[-1],) * 2))[0]
    spread = mix * np.geomspace(0.3, largest, u.shape[-1])
    old = (u @ spread, s, v @ spread[::-1])
    new = tuple(x + size * rng.normal(size=x.shape) / np.sqrt(len(x)) for x in old)
    check_norm(as_factors(old), as_factors(new), rtol=2e-3)


@pytest.mark.parametrize("part", ["u", "s", "v"])
def test_composite_update_norm_sees_every_component(part):
    old = factors()
    x = getattr(old, part)
    noise = jax.random.normal(jax.random.key(0), x.shape)
    check_norm(old, old._replace(**{part: x + 0.1 * noise}))


def test_composite_update_norm_needs_no_orthonormal_new_factors():
    old = factors()
    check_norm(old, jax.tree.map(lambda x: x + 0.3 * jnp.ones_like(x), old))


@pytest.mark.parametrize("drift", [1e-4, 1e-3, 1e-2])
def test_composite_update_norm_needs_no_orthonormal_old_factors(drift):
    # Those that are lazily retracted are not; they move by less than they are off.
    old = jax.tree.map(lambda x: x + drift * jnp.ones_like(x), factors())
    noise = jax.random.normal(jax.random.key(0), old.u.shape)
    check_norm(old, old._replace(u=old.u + 0.1 * drift * noise))
    assert composite_update_norm(old, old) <= absolute_floor(old.s)


def test_composite_update_norm_of_unlike_signs_and_zeros():
    old = factors(s=(2.0, -1.5, 0.0, -0.1))
    check_norm(old, old._replace(s=-old.s))
    check_norm(old, factors(s=(0.0, 0.0, 0.0, 0.0), seed=5))


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3])
def test_co_rotation_of_nearly_equal_singular_values_moves_w_little(spread):
    s = 1 + spread * np.array([3.0, 1.0, -1.0, -3.0])
    u, s, v = factors64(s=s)
    turn = orthonormal(RANK, RANK, seed=9)
    check_norm(as_factors((u, s, v)), as_factors((u @ turn, s, v @ turn)))


def test_identical_factors_are_at_distance_zero_to_rounding():
    w = factors((3,))
    found = composite_update_norm(w, w)
    assert np.all(np.asarray(found) <= absolute_floor(w.s))


@pytest.mark.parametrize("size", [1e-33, 1e-20, 1e-13, 1e13, 1e20, 1e36])
@pytest.mark.parametrize("kind", ["spectral", "low_rank"])
def test_composite_update_norm_does_not_see_the_size_of_a_weight(kind, size):
    old = weights((2,))[kind][0]
    rng = np.random.default_rng(7)
    new = jax.tree.map(
        lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), old
    )
    scaled = [
        w._replace(s=w.s * size) if kind == "spectral" else w._replace(b=w.b * size)
        for w in (old, new)
    ]
    expected = composite_update_norm(old, new)
    found = composite_update_norm(*scaled) / np.float32(size)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-13, 1e13, 1e30])
def test_composite_update_norm_does_not_see_the_size_of_a_column(size):
    """Which s may undo."""
    old = factors()
    rng = np.random.default_rng(7)
    new = jax.tree.map(
        lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), old
    )
    expected = composite_update_norm(old, new)
    column = jnp.asarray([1, size, 1, 1], jnp.float32)
    for scaled in (
        [w._replace(u=w.u * column[None], s=w.s / column) for w in (old, new)],
        [old, new._replace(v=new.v * column[None], s=new.s / column)],
    ):
        found = composite_update_norm(*scaled)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_low_rank_columns_of_every_size_may_be_unbalanced():
    old = weights()["low_rank"][0]
    new = old._replace(a=old.a * 1.5)
    expected = composite_update_norm(old, new)
    for size in (1e-30, 1e30):
        uneven = [w._replace(a=w.a * size, b=w.b / size) for w in (old, new)]
        np.testing.assert_allclose(composite_update_norm(*uneven), expected, rtol=1e-5)
        alone = [w._replace(a=w.a * size, b=w.b * 0) for w in (old, new)]
        assert composite_update_norm(*alone) == 0


@pytest.mark.parametrize("kind", ["spectral", "low_rank"])
def test_the_derivative_of_the_norm_is_that_of_the_dense_difference(kind):
    """p.T dW q with the singular vectors p and q of W' - W."""
    old = weights((2,))[kind][0]
    rng = np.random.default_rng(7)
    norms = spectral.composite_update_norm

    @jax.jit
    def derivatives(old, new, direction):
        total = lambda new: jnp.sum(norms(old, new))
        _, forward = jax.jvp(total, (new,), (direction,))
        gradient = jax.grad(total)(new)
        mapped = jax.vmap(lambda o, n: jax.grad(norms, argnums=1)(o, n))(old, new)
        return forward, gradient, mapped

    with jax.enable_x64():
        old = jax.tree.map(lambda x: x.astype(jnp.float64), old)
        noise = [
            jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), old)
            for _ in range(2)
        ]
        new, direction = jax.tree.map(lambda x, d: x + 0.1 * d, old, noise[0]), noise[1]
        forward, gradient, mapped = derivatives(old, new, direction)
        slope = 0.0
        for i in range(2):
            o, n, d = (
                jax.tree.map(lambda x, i=i: x[i], w) for w in (old, new, direction)
            )
            dense, moved = (np.asarray(spectral.to_dense(w)) for w in (o, n))
            _, tangent = jax.jvp(spectral.to_dense, (n,), (d,))
            p, _, q = np.linalg.svd(moved - dense)
            slope += p[:, 0] @ np.asarray(tangent) @ q[0]
        backward = sum(
            np.sum(np.asarray(g) * np.asarray(d))
            for g, d in zip(gradient, direction, strict=True)
        )
    np.testing.assert_allclose([forward, backward], [slope] * 2, rtol=2e-6)
    for x, y in zip(gradient, mapped, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["spectral", "low_rank"])
def test_the_derivative_of_the_norm_is_finite_at_zeros_and_ties(kind):
    gradient = jax.jit(
        jax.grad(lambda pair: jnp.sum(spectral.composite_update_norm(*pair)))
    )
    tied = factors(s=(1.0, 1.0, -1.0, 0.0))
    grown = tied._replace(s=tied.s * 1.5)
    for pair in ((tied, tied), (tied, grown), (tied, tied._replace(s=0 * tied.s))):
        if kind == "low_rank":
            pair = tuple(map(spectral.to_low_rank, pair))
        found = gradient(pair)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))


@pytest.mark.parametrize("size", [1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("layers", [(), (3,)])
def test_composite_update_norm_of_low_rank_factors(layers, size):
    old = weights(layers)["low_rank"][0]
    rng = np.random.default_rng(7)
    new = jax.tree.map(
        lambda x: x + jnp.asarray(size * rng.normal(size=x.shape), jnp.float32), old
    )
    before, after = (
        reference.float64(w.a) @ reference.float64(w.b).swapaxes(-1, -2)
        for w in (old, new)
    )
    expected = reference.spectral_norm(after - before)
    found = composite_update_norm(old, new)
    # Squares of the singular values are taken: half of the digits at worst.
    atol = np.sqrt(EPS) * size * np.sqrt(2)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=atol)
    np.testing.assert_array_equal(composite_update_norm(old, old), np.zeros(layers))


def test_low_rank_factors_of_very_unlike_sizes_are_balanced():
    old = weights()["low_rank"][0]
    new = old._replace(a=old.a * 1.01)
    uneven = [w._replace(a=w.a * 1e6, b=w.b * 1e-6) for w in (old, new)]
    expected = composite_update_norm(old, new)
    np.testing.assert_allclose(composite_update_norm(*uneven), expected, rtol=1e-3)


def test_composite_update_norm_refuses_arrays_and_factors_of_two_kinds():
    w, x = factors(), jnp.ones((3, 3))
    for old, new in ((w, spectral.to_low_rank(w)), (x, x)):
        names = f"{type(old).__name__} and {type(new).__name__}"
        with pytest.raises(TypeError, match=names):
            spectral.composite_update_norm(old, new)


def test_the_largest_norm_and_error_of_a_tree():
    small, large = factors(), factors((2,), seed=4)
    low = weights()["low_rank"][0]
    old = {"a": small, "b": {"c": large, "d": low}, "e": jnp.ones((3, 3))}
    new = {
        "a": small._replace(s=small.s + 0.1),
        "b": {"c": large._replace(s=large.s - 0.3), "d": low},
        "e": 1e6 * jnp.ones((3, 3)),
    }
    found = jax.jit(spectral.max_composite_update_norm)(old, new)
    assert found.shape == ()
    np.testing.assert_allclose(found, 0.3, rtol=1e-5)

    stretched = new | {"a": small._replace(v=small.v * 1.01)}
    found = spectral.orthonormality_error(stretched)
    np.testing.assert_allclose(found, 1.01**2 - 1, atol=8 * EPS)
    assert spectral.orthonormality_error(new) < ORTHONORMAL


def test_trees_without_factors_are_at_zero():
    tree = {"a": jnp.ones((3, 3)), "b": ()}
    assert spectral.max_composite_update_norm(tree, tree) == 0
    assert spectral.orthonormality_error(tree) == 0


@pytest.mark.parametrize("kind", ["spectral", "low_rank"])
def test_every_product_of_the_norm_is_of_the_highest_precision(kind):
    w = weights((2,))[kind][0]
    precisions = reference.matmul_precisions(spectral.composite_update_norm, w, w)
    assert precisions
    assert set(precisions) == {reference.HIGHEST}


@pytest.mark.parametrize("kind", ["spectral", "low_rank"])
def test_to_dense_is_of_the_highest_precision(kind):
    w = weights()[kind][0]
    precisions = reference.matmul_precisions(spectral.to_dense, w)
    assert set(precisions) == {reference.HIGHEST}
