import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from sct_jax import optimizers, spectral, stiefel, transforms

EPS = float(np.finfo(np.float32).eps)
RATE = 0.02
TRANSPORT = transforms.transport_moments(optax.scale_by_adam())


def weight(seed=0, layers=()):
    rng = np.random.default_rng(seed)
    point = lambda n: reference.signed_qr(rng.normal(size=(*layers, n, 4)))
    s = np.broadcast_to([2.0, -1.2, 0.7, 0.3], (*layers, 4))
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32),
        spectral.SpectralFactors(point(14), s, point(11)),
    )


def noise(w, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), w)


def first_update(tx, updates, params):
    return jax.jit(tx.update)(updates, tx.init(params), params)[0]


# --- project_to_tangent ----------------------------------------------------------


def test_projected_updates_are_tangent_and_the_rest_passes():
    params = {"w": weight(layers=(2,)), "dense": jnp.ones((3, 2))}
    updates = noise(params, 0)
    found = first_update(transforms.project_to_tangent(), updates, params)
    for name in ("u", "v"):
        x, d = (np.asarray(getattr(t["w"], name), np.float64) for t in (params, found))
        skew = x.swapaxes(-1, -2) @ d
        assert np.max(np.abs(skew + skew.swapaxes(-1, -2))) < 50 * EPS
        given = np.asarray(getattr(updates["w"], name), np.float64)
        # The normal part is x times a symmetric matrix, orthogonal to the tangent part.
        assert abs(np.sum((given - d) * d)) < 1e-4
    np.testing.assert_array_equal(found["w"].s, updates["w"].s)
    np.testing.assert_array_equal(found["dense"], updates["dense"])


@pytest.mark.parametrize("option", optimizers.TANGENT_PROJECTIONS)
def test_sct_projects_the_gradient_or_the_displacement(option):
    """The first displacement of u, against the formula."""
    w = weight()
    grads = noise(w, 1)
    tx = optimizers.sct(RATE, tangent_projection=option, retraction="qr")
    updates = first_update(tx, grads, w)

    def project(x, d):
        a = x.T @ d
        return d - x @ (a + a.T) / 2

    u, g = reference.float64((w.u, grads.u))
    if option == "gradient":
        g = project(u, g)
    step = -RATE * g / (np.abs(g) + 1e-8)
    if option == "displacement":
        step = project(u, step)
    expected = reference.signed_qr(u + step)
    np.testing.assert_allclose(w.u + updates.u, expected, rtol=0, atol=20 * EPS)


@pytest.mark.parametrize("option", optimizers.TANGENT_PROJECTIONS)
def test_stiefel_muon_projects_the_gradient_or_the_displacement(option):
    w = weight()
    grads = noise(w, 1)
    project = transforms.project_to_tangent()
    muon = transforms.scale_by_stiefel_muon()
    rate = optax.scale_by_learning_rate(RATE)
    parts = [project, muon, rate] if option == "gradient" else [muon, rate, project]
    ours = functools.partial(optimizers.stiefel_muon, RATE, retraction="none")
    found, expected, plain = (
        first_update(tx, grads, w)
        for tx in (ours(tangent_projection=option), optax.chain(*parts), ours())
    )
    for x, y, unlike in zip(found, expected, plain, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=20 * EPS)
        if x.ndim == 2:  # s has no tangent space
            assert np.abs(x - unlike).max() > 0.01 * RATE


# --- transport_moments -----------------------------------------------------------


def test_moments_are_tangent_where_they_are_used():
    w = weight()
    inner = optax.trace(0.9)  # its state has no field named mu: left alone
    tx = transforms.transport_moments(
        optax.chain(optax.scale_by_adam(), inner, transforms.retract_to_stiefel("qr"))
    )
    state, update = tx.init(w), jax.jit(tx.update)
    for step in range(3):
        updates, state = update(noise(w, step), state, w)
        w = optax.apply_updates(w, jax.tree.map(lambda x: 0.1 * x, updates))
        w = spectral.retract(w, method="qr")
    before = optax.tree.get(state, "mu")
    _, after = update(jax.tree.map(jnp.zeros_like, w), state, w)
    mu = optax.tree.get(after, "mu")
    for x, old, new in ((w.u, before.u, mu.u), (w.v, before.v, mu.v)):
        expected = 0.9 * stiefel.tangent_projection(x, old)
        np.testing.assert_allclose(new, expected, rtol=0, atol=20 * EPS)
        assert not np.allclose(new, 0.9 * old, atol=1e-3)
    np.testing.assert_allclose(mu.s, 0.9 * before.s, rtol=1e-6)


# --- retract_by_svd --------------------------------------------------------------
# Outside of a jit, so that tests share the compiled SVD.


def test_the_whole_product_is_kept():
    w = weight(layers=(3,))
    d = jax.tree.map(lambda x: 0.3 * x, noise(w, 1))
    tx = transforms.retract_by_svd(optax.identity())
    updates, _ = tx.update({"w": d}, tx.init({"w": w}), {"w": w})
    new = optax.apply_updates(w, updates["w"])
    wanted = reference.dense(*jax.tree.map(lambda x, dx: x + dx, w, d))
    scale = np.max(np.abs(wanted))
    np.testing.assert_allclose(
        reference.dense(*new), wanted, rtol=0, atol=100 * EPS * scale
    )
    for x in (new.u, new.v):
        assert reference.orthonormality_error(x) < 4e-6
    s = np.asarray(new.s)
    assert np.all(s >= 0)
    assert np.all(np.diff(s, axis=-1) <= 0)


def test_the_factors_are_an_svd_with_signs_that_keep_u():
    w = weight()
    d = jax.tree.map(lambda x: 0.05 * x, noise(w, 2))
    tx = transforms.retract_by_svd(optax.identity())
    updates, _ = tx.update(d, tx.init(w), w)
    new = optax.apply_updates(w, updates)
    for x, y in zip(new, reference.lossless(*w, *d), strict=True):
        # The error of singular vectors is rounding over the gaps of s, here about .3.
        np.testing.assert_allclose(x, y, rtol=0, atol=100 * EPS / 0.3)


@pytest.mark.parametrize("moments", ["gradient", "whitened", None])
def test_first_moments_turn_with_the_basis(moments):
    """A constant gradient of W has moments that equal it in the new basis."""
    rng = np.random.default_rng(3)
    g = rng.normal(size=(14, 11))

    def gradient(w):
        u, s, v = reference.float64(w)
        whitened = moments == "whitened"
        parts = (
            g @ v * (1 if whitened else s),
            np.sum(u * (g @ v), axis=0),
            g.T @ u * (1 if whitened else s),
        )
        return spectral.SpectralFactors(*(jnp.asarray(x, jnp.float32) for x in parts))

    start = weight()
    if moments == "whitened":
        # Equal singular values let a small step rotate the basis by a large angle.
        turn = jnp.asarray(np.linalg.qr(rng.normal(size=(4, 4)))[0], jnp.float32)
        start = start._replace(s=jnp.ones(4), u=start.u @ turn, v=start.v @ turn)
        d = jax.tree.map(lambda x: 1e-3 * x, noise(start, 4))
    else:
        # The columns change places, and one changes its sign.
        start = start._replace(s=jnp.array([2.0, -1.2, 1.0, 0.8]))
        d = jax.tree.map(jnp.zeros_like, start)
        d = d._replace(s=jnp.array([-0.9, 0.0, 0.5, 0.5]))
    inner = optax.chain(optax.scale_by_adam(b1=0.5), optax.scale(0.0), _add(d))
    tx = transforms.retract_by_svd(inner, moments=moments)
    updates, state = tx.update(gradient(start), tx.init(start), start)
    new = optax.apply_updates(start, updates)
    # The first moment is half the gradient, less what the damping of 1 / s removes.
    stayed = jax.tree.map(lambda x: 0.5 * x, gradient(start))
    found, expected = optax.tree.get(state, "mu"), gradient(new)
    assert min(_errors(stayed, expected)) > 0.5
    if moments is None:
        np.testing.assert_array_equal(found.u, stayed.u)
        np.testing.assert_array_equal(found.v, stayed.v)
    else:
        bound = 0.02 if moments == "whitened" else 0.1
        assert max(_errors(found, expected)) < bound


def _errors(moments, gradient):
    """Relative errors of twice the moments of u and v."""
    return [
        np.linalg.norm(np.asarray(2 * x - y)) / np.linalg.norm(np.asarray(y))
        for x, y in ((moments.u, gradient.u), (moments.v, gradient.v))
    ]


def _add(d):
    return optax.stateless(lambda updates, params: jax.tree.map(jnp.add, updates, d))


def test_moments_of_masked_weights_and_other_leaves_stay():
    params = {"w": weight(), "dense": jnp.ones((3, 2))}
    tx = transforms.retract_by_svd(
        optax.partition(
            {"a": optax.adam(0.1), "b": optax.adam(0.1)},
            {"w": "a", "dense": "b"},
        )
    )
    updates, state = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["dense"], -0.1, rtol=1e-4)
    assert reference.orthonormality_error(params["w"].u + updates["w"].u) < 4e-6
    mus = optax.tree.get_all_with_path(state, "mu")
    np.testing.assert_allclose(mus[1][1]["dense"], 0.1, rtol=1e-5)


@pytest.mark.parametrize(
    "tx",
    [
        transforms.project_to_tangent(),
        TRANSPORT,
        transforms.retract_by_svd(optax.scale_by_adam(), moments="gradient"),
        transforms.retract_by_svd(optax.scale_by_adam(), moments="whitened"),
    ],
    ids=["projection", "transport", "svd", "svd, whitened"],
)
def test_every_product_is_of_the_highest_precision(tx):
    w = {"w": weight()}
    state = tx.init(w)
    precisions = reference.matmul_precisions(lambda d: tx.update(d, state, w), w)
    assert precisions
    assert set(precisions) == {reference.HIGHEST}


@pytest.mark.parametrize("size", [1e-3, 0.3, 30.0])
def test_the_clip_bounds_the_step_with_an_svd(size):
    w = weight(layers=(3,))
    bound = 0.05
    d = jax.tree.map(lambda x: size * x, noise(w, 5))
    tx = transforms.retract_by_svd(
        transforms.clip_by_composite_spectral_norm(bound, retraction="svd")
    )
    updates, _ = tx.update(d, tx.init(w), w)
    norms = reference.composite_update_norm(w, optax.apply_updates(w, updates))
    assert np.max(norms) < 1.01 * bound
    if size > 1e-3:
        assert np.min(norms) > 0.9 * bound
