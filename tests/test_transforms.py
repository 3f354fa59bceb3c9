import functools

import hypothesis
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
import reference
from hypothesis import strategies

from sct_jax import spectral, stiefel, transforms
from sct_jax.transforms import _clipping

EPS = float(np.finfo(np.float32).eps)
ORTHONORMAL = 4e-6
METHODS = stiefel.RETRACTION_NAMES

# Two weights share a stack of Gram matrices, the third has a rank of its own.
SHAPES = {"a": ((2,), 12, 9, 4), "b": ((), 9, 12, 4), "c": ((), 8, 6, 2)}


def point(shape, seed):
    return reference.signed_qr(np.random.default_rng(seed).normal(size=shape))


@functools.cache
def params64(seed=0, spread=10.0):
    tree = {}
    for i, (name, (layers, fan_in, fan_out, rank)) in enumerate(SHAPES.items()):
        s = np.geomspace(2, 2 / spread, rank) * np.resize([1, -1, 1], rank)
        tree[name] = spectral.SpectralFactors(
            point((*layers, fan_in, rank), seed + 10 * i),
            np.broadcast_to(s, (*layers, rank)),
            point((*layers, fan_out, rank), seed + 10 * i + 1),
        )
    return tree


def as_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def params32(**kwargs):
    return as_float32(params64(**kwargs))


def mixed_params():
    """Factors of both kinds and dense arrays of every number of axes."""
    rng = np.random.default_rng(5)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "w": params32()["a"],
        "low": spectral.LowRankFactors(normal(7, 3), normal(5, 3)),
        "dense": normal(6, 5),
        "norm": normal(6),
    }


def noise_like(tree, size, seed=0):
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    noise = [jnp.asarray(size * rng.normal(size=x.shape), x.dtype) for x in leaves]
    return jax.tree.unflatten(treedef, noise)


def assert_trees_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def run(tx, params, *updates, **extra):
    """The transformed updates, one after another, at fixed params."""
    step = jax.jit(tx.update)
    state = tx.init(params)
    results = []
    for update in updates:
        found, state = step(update, state, params, **extra)
        results.append(found)
    return results[-1] if len(results) == 1 else results


# --- clip_by_composite_spectral_norm ---------------------------------------------


@functools.cache
def compiled_step(method):
    """From (params, updates, max_norm) to clipped, then to retracted updates."""

    @jax.jit
    def step(params, updates, max_norm):
        clip = transforms.clip_by_composite_spectral_norm(max_norm, retraction=method)
        clipped = run(clip, params, updates)
        return clipped, run(transforms.retract_to_stiefel(method), params, clipped)

    return step


def clip_and_apply(method, params, updates, max_norm):
    """Returns clipped updates and new params."""
    clipped, applied = compiled_step(method)(params, updates, jnp.float32(max_norm))
    return clipped, optax.apply_updates(params, applied)


def retraction_update(method, updates, params):
    """Returns retracted updates that are too small to be clipped."""
    clipped, retracted = compiled_step(method)(params, updates, jnp.float32(1e30))
    assert_trees_equal(clipped, updates)
    return retracted


def adversarial_update(kind, size, p, rng):
    """A float64 update of one weight that stresses some part of the clip."""
    du, ds, dv = (rng.normal(size=x.shape) for x in p)
    layers, rank = p.s.shape[:-1], p.s.shape[-1]
    zero = jax.tree.map(np.zeros_like, p)
    if kind == "random":
        d = p._replace(u=du, s=ds, v=dv)
    elif kind == "rank one":
        d = p._replace(u=du[..., :1] + 0 * du, s=0 * ds, v=dv[..., :1] + 0 * dv)
    elif kind == "sign":
        d = p._replace(u=np.sign(du), s=np.sign(ds), v=np.sign(dv))
    elif kind == "vertical":
        a = rng.normal(size=(*layers, rank, rank))
        d = p._replace(u=p.u @ a, s=0 * ds, v=p.v @ a.swapaxes(-1, -2))
    elif kind == "co-rotation":
        a = rng.normal(size=(*layers, rank, rank))
        a = a - a.swapaxes(-1, -2)
        d = p._replace(u=p.u @ a, s=0 * ds, v=p.v @ a)
    elif kind == "collapse":  # at size 1 both factors vanish
        d = p._replace(u=-p.u, s=0 * ds, v=-p.v)
    elif kind == "swap":  # at size 1 the first two columns become one
        d = zero._replace(u=np.concatenate([0 * p.u[..., :-1], p.u[..., :1]], -1))
    elif kind == "only s":
        d = zero._replace(s=ds)
    elif kind == "only u":
        d = zero._replace(u=du)
    else:
        d = zero
    return jax.tree.map(lambda x: size * x, d)


KINDS = (
    "random",
    "rank one",
    "sign",
    "vertical",
    "co-rotation",
    "collapse",
    "swap",
    "only s",
    "only u",
    "zero",
)


def absolute_floor(*factors):
    """16 eps max|s| sqrt(R), the rounding of a float32 W of norm max|s|."""
    peak = max(np.max(np.abs(w.s)) for w in factors)
    return 16 * EPS * peak * np.sqrt(factors[0].s.shape[-1])


@pytest.mark.parametrize("method", METHODS)
@hypothesis.settings(deadline=None, derandomize=True, max_examples=25, database=None)
@hypothesis.given(
    kinds=strategies.tuples(*[strategies.sampled_from(KINDS)] * 3),
    sizes=strategies.tuples(
        *[strategies.sampled_from([1e-30, 1e-3, 0.03, 0.3, 1.0, 10.0, 1e4, 1e30])] * 3
    ),
    max_norm=strategies.sampled_from([1e-3, 1e-2, 0.1, 1.0, 100.0]),
    seed=strategies.integers(0, 3),
)
def test_the_applied_update_keeps_the_bound(method, kinds, sizes, max_norm, seed):
    rng = np.random.default_rng(seed)
    old = params64(seed=seed)
    wanted = {
        name: adversarial_update(kind, size, old[name], rng)
        for (name, kind, size) in zip(SHAPES, kinds, sizes, strict=True)
    }
    old, wanted = as_float32(old), as_float32(wanted)
    clipped, new = clip_and_apply(method, old, wanted, max_norm)
    for name in SHAPES:
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(new[name]))
        norm = reference.composite_update_norm(old[name], new[name])
        floor = absolute_floor(old[name], new[name])
        assert np.all(norm <= max_norm * 1.01 + floor), name
        # One scale per layer keeps the direction.
        scales = [
            np.asarray(c)[np.asarray(d) != 0] / np.asarray(d)[np.asarray(d) != 0]
            for c, d in zip(clipped[name], wanted[name], strict=True)
        ]
        assert all(np.all((s >= 0) & (s <= 1)) for s in scales), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 0.03, 0.3])
def test_an_update_within_the_bound_is_unchanged_beside_clipped_ones(
    method, kind, size
):
    """Bitwise, beside updates that are clipped hard."""
    rng = np.random.default_rng(1)
    old = params64()
    wanted = {
        "a": adversarial_update(kind, size, old["a"], rng),
        "b": adversarial_update("collapse", 1.0, old["b"], rng),
        "c": adversarial_update("random", 1e30, old["c"], rng),
    }
    old, wanted = as_float32(old), as_float32(wanted)
    moved = jax.tree.map(lambda p, d: np.asarray(p, np.float64) + d, old, wanted)["a"]
    retract = reference.RETRACTIONS[method]
    target = (retract(moved.u), moved.s, retract(moved.v))
    norm = reference.composite_update_norm(old["a"], target)
    # Leave room for the float32 error of the search and the Frobenius bound.
    max_norm = 1.02 * np.max(norm) + 4 * absolute_floor(old["a"])
    clipped, _ = clip_and_apply(method, old, wanted, max_norm)
    assert_trees_equal(clipped["a"], wanted["a"])


@pytest.mark.parametrize("method", METHODS)
def test_the_clip_uses_most_of_the_bound(method):
    old, max_norm = params32(), 0.05
    wanted = noise_like(old, 0.1)
    _, new = clip_and_apply(method, old, wanted, max_norm)
    for name in SHAPES:
        norm = reference.composite_update_norm(old[name], new[name])
        assert np.all(norm > 0.9 * max_norm), name


@pytest.mark.parametrize("method", METHODS)
def test_layers_are_clipped_on_their_own(method):
    old = params32()
    wanted = jax.tree.map(lambda x: 0.01 * x, noise_like(old, 1.0))
    second = jnp.asarray([1.0, 20.0])
    wanted["a"] = jax.tree.map(
        lambda x: x * second.reshape((2,) + (1,) * (x.ndim - 1)), wanted["a"]
    )
    clipped, _ = clip_and_apply(method, old, wanted, 0.3)
    np.testing.assert_array_equal(clipped["a"].u[0], wanted["a"].u[0])
    ratio = np.asarray(clipped["a"].u[1] / wanted["a"].u[1])
    assert np.all(ratio < 0.9)
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=4 * EPS)
    assert_trees_equal(clipped["b"], wanted["b"])


@pytest.mark.parametrize("max_norm", [0.05, 100.0])  # 100 exceeds ||W'|| + ||W||
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["u", "s", "v"])
@pytest.mark.parametrize("method", METHODS)
def test_a_value_that_is_not_finite_stops_its_own_weight_only(
    method, part, value, max_norm
):
    old = params32()
    wanted = noise_like(old, 0.1)
    expected, _ = clip_and_apply(method, old, wanted, max_norm)
    x = getattr(wanted["b"], part)
    bad = wanted | {"b": wanted["b"]._replace(**{part: x.at[(0,) * x.ndim].set(value)})}
    clipped, new = clip_and_apply(method, old, bad, max_norm)
    assert_trees_equal(clipped["b"], jax.tree.map(jnp.zeros_like, old["b"]))
    # The weight that becomes zero is the only change to the shared search.
    for name in ("a", "c"):
        for found, x in zip(clipped[name], expected[name], strict=True):
            np.testing.assert_allclose(found, x, rtol=1e-3)
    moved = reference.composite_update_norm(old["b"], new["b"])
    assert moved <= absolute_floor(old["b"])


@pytest.mark.parametrize(
    ("size", "power"),
    [(0.1, 1), (0.31, 1), (5.0, 1), (1e20, 1), (5.0, 0.5), (5.0, 3), (500.0, 2)],
)
def test_the_search_ends_at_all_of_a_step_or_near_the_bound(size, power):
    bound = jnp.float32(0.3)
    unit = jnp.asarray([1.0, 4.0])
    norm_at = lambda c: size * c**power
    found = _clipping.largest_admissible(
        norm_at, unit, unit / 2, bound=bound, accepted=bound * 1.001
    )
    norms = norm_at(found)
    assert np.all(norms <= 0.3 * 1.002)
    assert np.all((norms >= 0.9 * 0.3) | (found == unit))


@pytest.mark.parametrize("size", [1e30, 5e37, 1.8e38, 3e38])
@pytest.mark.parametrize("method", METHODS)
def test_a_huge_step_of_s_keeps_the_bound(method, size):
    old = params32()
    wanted = noise_like(old, 0.1)
    huge = wanted | {"b": wanted["b"]._replace(s=wanted["b"].s.at[0].set(size))}
    _, new = clip_and_apply(method, old, huge, 0.3)
    moved = reference.composite_update_norm(old["b"], new["b"])
    assert moved <= 0.3 * 1.01 + absolute_floor(old["b"])


def test_the_layer_beside_a_nan_still_moves():
    old = params32()
    wanted = noise_like(old, 0.1)
    wanted["a"] = wanted["a"]._replace(u=wanted["a"].u.at[0, 3, 1].set(jnp.nan))
    clipped, _ = clip_and_apply("cholesky_qr", old, wanted, 0.05)
    np.testing.assert_array_equal(clipped["a"].v[0], jnp.zeros((9, 4)))
    assert np.max(np.abs(clipped["a"].v[1])) > 0


def test_max_norm_may_be_a_schedule():
    old = params32()
    wanted = noise_like(old, 0.1)
    schedule = lambda count: jnp.where(count < 1, 0.05, 0.025)
    tx = transforms.clip_by_composite_spectral_norm(schedule)
    found = run(tx, old["c"], *[wanted["c"]] * 3)
    for update, max_norm in zip(found, [0.05, 0.025, 0.025], strict=True):
        expected, _ = clip_and_apply("cholesky_qr", old, wanted, max_norm)
        np.testing.assert_allclose(update.u, expected["c"].u, rtol=1e-3)


def test_a_huge_column_hides_no_other_column():
    """In units of the largest entry of u, squares of other entries would be zero."""
    old = params64()
    wanted = jax.tree.map(np.zeros_like, old)
    du = 0.3 * np.random.default_rng(0).normal(size=old["b"].u.shape)
    du[:, 1] = 1e25 * old["b"].u[:, 1]  # only scales a column
    wanted["b"] = wanted["b"]._replace(u=du)
    old, wanted = as_float32(old), as_float32(wanted)
    clipped, new = clip_and_apply("cholesky_qr", old, wanted, 0.05)
    moved = reference.composite_update_norm(old["b"], new["b"])
    assert moved <= 1.01 * 0.05
    assert np.max(np.abs(clipped["b"].u[:, 0])) > 0


def test_a_weight_that_a_cheap_bound_decides_is_not_searched():
    """max_norm exceeds ||W'|| + ||W||, so even a huge update passes, bitwise."""
    old = params32()
    wanted = jax.tree.map(lambda x: 1e15 * x, noise_like(old, 1.0))
    wanted["a"] = wanted["a"]._replace(s=0 * wanted["a"].s)
    clipped, _ = clip_and_apply("cholesky_qr", old, wanted, 5.0)
    assert_trees_equal(clipped["a"], wanted["a"])
    assert np.max(np.abs(clipped["b"].u)) < np.max(np.abs(wanted["b"].u))


def test_derivatives_take_the_scale_as_constant():
    old = params32()["c"]
    wanted = noise_like(old, 1.0)
    tx = transforms.clip_by_composite_spectral_norm(0.05)

    def moved(size):
        d = jax.tree.map(lambda x: size * x, wanted)
        return jnp.sum(tx.update(d, tx.init(old), old)[0].u)

    value, slope = jax.jit(jax.value_and_grad(moved))(1.0)
    assert float(slope) == pytest.approx(float(value), rel=1e-4)
    assert abs(float(value)) < 0.5 * abs(float(jnp.sum(wanted.u)))


@pytest.mark.parametrize("method", METHODS)
def test_every_product_of_the_clip_is_of_the_highest_precision(method):
    old = params32()
    tx = transforms.clip_by_composite_spectral_norm(0.1, retraction=method)
    precisions = reference.matmul_precisions(lambda d: run(tx, old, d), old)
    assert precisions
    assert set(precisions) == {reference.HIGHEST}


# --- retract_to_stiefel ----------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1e-3, 0.3])
def test_params_and_updates_add_up_to_the_retraction(method, size):
    old = params32()
    wanted = noise_like(old, size)
    found = retraction_update(method, wanted, old)
    new = optax.apply_updates(old, found)
    for name in SHAPES:
        moved = jax.tree.map(
            lambda p, d: reference.float64(p) + reference.float64(d),
            old[name],
            wanted[name],
        )
        np.testing.assert_array_equal(found[name].s, wanted[name].s)
        for x, y in ((new[name].u, moved.u), (new[name].v, moved.v)):
            assert reference.orthonormality_error(x) < ORTHONORMAL
            condition = np.linalg.cond(y).max()
            expected = reference.RETRACTIONS[method](y)
            np.testing.assert_allclose(x, expected, atol=8 * EPS * condition * 2)


def test_bfloat16_factors_stay_bfloat16_and_near_the_manifold():
    old = {"w": params32()["a"]}
    old = jax.tree.map(lambda x: x.astype(jnp.bfloat16), old)
    found = run(transforms.retract_to_stiefel("qr"), old, noise_like(old, 0.1))
    new = optax.apply_updates(old, found)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    for w in new.values():
        # Two roundings of entries below 1: of the update and of the sum.
        error = reference.orthonormality_error(w.u.astype(jnp.float32))
        assert error < 2 * float(jnp.finfo(jnp.bfloat16).eps)


@pytest.mark.parametrize(
    "tx",
    [
        transforms.retract_to_stiefel("qr"),
        transforms.clip_by_composite_spectral_norm(1e-3, retraction="qr"),
    ],
    ids=["retract", "clip"],
)
def test_other_leaves_pass_bitwise(tx):
    params = mixed_params()
    wanted = noise_like(params, 10.0)
    found = run(tx, params, wanted)
    for name in ("low", "dense", "norm"):
        assert_trees_equal(found[name], wanted[name])
    assert np.max(np.abs(found["w"].u - wanted["w"].u)) > 1e-3
    rest = {name: params[name] for name in ("low", "dense", "norm")}
    assert_trees_equal(run(tx, rest, rest), rest)


def test_retraction_may_be_due_every_so_many_steps():
    params = params32()
    wanted = noise_like(params, 0.1)
    found = run(transforms.retract_to_stiefel("qr", every=3), params, *[wanted] * 6)
    always = retraction_update("qr", wanted, params)
    for step, update in enumerate(found, start=1):
        expected = always if step % 3 == 0 else wanted
        for name in SHAPES:
            for x, y in zip(update[name], expected[name], strict=True):
                np.testing.assert_allclose(x, y, atol=4 * EPS)


@pytest.mark.parametrize("every", [1, 5])
def test_retraction_may_wait_for_a_tolerance(every):
    params, tolerance = {"w": params32()["a"]}, 1e-2
    tx = transforms.retract_to_stiefel("qr", every=every, tolerance=tolerance)
    small, large = noise_like(params, 1e-4), noise_like(params, 0.1)
    found = run(tx, params, small, large, small)
    error = lambda d: float(
        spectral.orthonormality_error(optax.apply_updates(params, d))
    )
    assert error(small) < tolerance < error(large)
    for kept in (found[0], found[2]):
        np.testing.assert_allclose(kept["w"].u, small["w"].u, atol=4 * EPS)
    assert error(found[1]) < ORTHONORMAL


def test_lazy_retraction_never_passes_its_tolerance_over_many_steps():
    params, tolerance = {"w": params32()["a"]}, 1e-2
    tx = transforms.retract_to_stiefel(tolerance=tolerance)
    state, update = tx.init(params), jax.jit(tx.update)
    errors = []
    for seed in range(12):
        updates, state = update(noise_like(params, 1e-3, seed), state, params)
        params = optax.apply_updates(params, updates)
        errors.append(float(spectral.orthonormality_error(params)))
    assert max(errors) <= tolerance + ORTHONORMAL
    assert max(errors) > 10 * ORTHONORMAL  # it did wait


def test_a_retraction_on_tolerance_sees_factors_whose_products_overflow():
    params = {"w": params32()["a"]}
    huge = jax.tree.map(lambda x: 1e30 * x, noise_like(params, 1.0))
    tx = transforms.retract_to_stiefel("qr", tolerance=1e-2)
    new = optax.apply_updates(params, run(tx, params, huge))
    assert reference.orthonormality_error(new["w"].u) < ORTHONORMAL


# --- refusals --------------------------------------------------------------------


def without_params(tx):
    params = params32()
    return lambda: tx.update(params, tx.init(params))


NO_NUMBER = (float("nan"), float("inf"), -1e-3, 1e39, "0.1", 1j, [0.1, 0.2])
DECAY = (*NO_NUMBER, 1.0, 1.5)
ADAM = {"b1": DECAY, "b2": DECAY, "eps": NO_NUMBER}
STEPS = (*NO_NUMBER, 2.5)
REFUSED = {
    transforms.clip_by_composite_spectral_norm: {"max_norm": (*NO_NUMBER, 0.0)},
    transforms.retract_to_stiefel: {
        "every": (*STEPS, 0),
        "tolerance": (*NO_NUMBER, 0.0),
    },
    transforms.scale_components: {
        "uv": NO_NUMBER,
        "s": NO_NUMBER,
        "dense": NO_NUMBER,
        "base_width": (*NO_NUMBER, 0),
    },
    transforms.limit_rotation: {"max_rotation": NO_NUMBER},
    transforms.scale_by_spectron: {"b1": DECAY, "newton_schulz_steps": STEPS},
    transforms.scale_by_stiefel_muon: {
        "b1": DECAY,
        "s_b1": DECAY,
        "s_b2": DECAY,
        "eps": NO_NUMBER,
        "newton_schulz_steps": STEPS,
    },
    transforms.scale_by_low_precision_adam: ADAM,
    functools.partial(transforms.scale_by_adam, b1=0.9, b2=0.99, eps=1e-8): ADAM,
}


@pytest.fixture
def unchecked():
    """Without the type checker of the tests, which a user does not have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "field"), [(make, field) for make in REFUSED for field in REFUSED[make]]
)
def test_a_hyperparameter_without_meaning_is_refused_by_name(make, field):
    for value in REFUSED[make][field]:
        numbers = [value]
        if isinstance(value, float) and value != 1e39:  # infinite in float32
            numbers += [np.asarray(value), jnp.asarray(value)]
        for number in numbers:
            with pytest.raises(ValueError, match=rf"^{field} must be .*, got "):
                make(**{field: number})


@pytest.mark.usefixtures("unchecked")
def test_shares_of_a_step_are_not_negative():
    with pytest.raises(ValueError, match=r"^shares must be "):
        transforms.scale_by_stiefel_muon(shares=(0.4, -0.2, 0.4))


def test_tracers_and_schedules_are_not_read():
    params = {"w": params32()["c"]}

    def update(number):
        tx = optax.chain(
            transforms.scale_by_stiefel_muon(number, s_b1=number, eps=number),
            transforms.scale_components(uv=number, s=lambda count: number * count),
            transforms.limit_rotation(number),
            transforms.clip_by_composite_spectral_norm(number, retraction="qr"),
            transforms.retract_to_stiefel("qr", every=number, tolerance=number),
        )
        return tx.update(params, tx.init(params), params)[0]

    with jax.numpy_dtype_promotion("standard"):
        assert jax.eval_shape(update, jnp.float32(0.5)) == jax.eval_shape(
            lambda: params
        )


@pytest.mark.parametrize(
    ("refused", "word"),
    [
        (lambda: transforms.clip_by_composite_spectral_norm(0.0), "max_norm"),
        (lambda: transforms.clip_by_composite_spectral_norm(-1.0), "max_norm"),
        (
            lambda: transforms.clip_by_composite_spectral_norm(0.1, retraction="none"),
            "retraction",
        ),
        (lambda: transforms.retract_to_stiefel("svd"), "retraction"),
        (lambda: transforms.retract_to_stiefel(every=0), "every"),
        (lambda: transforms.retract_to_stiefel(tolerance=0.0), "tolerance"),
        (lambda: transforms.retract_to_stiefel(tolerance=-1e-3), "tolerance"),
        (without_params(transforms.retract_to_stiefel()), "params"),
        (without_params(transforms.clip_by_composite_spectral_norm(0.1)), "params"),
        (without_params(transforms.freeze_inactive_columns()), "params"),
        (without_params(transforms.project_to_tangent()), "params"),
        (without_params(transforms.retract_by_svd(optax.identity())), "params"),
        (without_params(transforms.transport_moments(optax.identity())), "params"),
        (without_params(transforms.scale_by_stiefel_muon()), "params"),
        (without_params(transforms.scale_by_spectron()), "params"),
        (lambda: transforms.scale_by_stiefel_muon(coordinates="svdd"), "coordinates"),
        (
            lambda: transforms.retract_by_svd(optax.identity(), moments="gradients"),
            "moments",
        ),
        (
            lambda: transforms.scale_by_adam(0.9, 0.99, 1e-8, moment_dtype="float16"),
            "float16",
        ),
    ],
)
def test_refusals(refused, word):
    with pytest.raises(ValueError, match=word):
        refused()


# --- moments in a state ----------------------------------------------------------


def test_moments_are_found_at_any_depth():
    params = mixed_params()
    labels = {"w": "factors", "low": "rest", "dense": "rest", "norm": "rest"}
    tx = optax.chain(
        optax.partition(
            {"factors": transforms.scale_by_stiefel_muon(), "rest": optax.adam(0.1)},
            labels,
        ),
        optax.trace(0.9),
    )
    state = tx.init(params)
    one_more = lambda tree: jax.tree.map(lambda x: x + 1, tree)

    def changed(after):
        pairs = map(jax.tree_util.tree_leaves_with_path, (state, after))
        return [
            jax.tree_util.keystr(path)
            for (path, x), (_, y) in zip(*pairs, strict=True)
            if np.any(x != y)
        ]

    firsts = changed(transforms.map_first_moments(state, params, one_more))
    seconds = changed(
        transforms.map_mirrors(
            state,
            params,
            lambda field, mirror: (
                one_more(mirror) if transforms.is_second_moment(field) else mirror
            ),
            is_entry=lambda x: isinstance(
                x, spectral.SpectralFactors | transforms.SecondMoment
            ),
        )
    )
    assert len(firsts) == len(jax.tree.leaves(params))
    assert all(".mu" in path for path in firsts)
    # u and v have no second moment.
    assert len(seconds) == len(firsts) - 2
    assert all(".nu" in path for path in seconds)


# --- scale_components ------------------------------------------------------------


def test_each_component_has_a_rate_of_its_own():
    params = mixed_params()
    tx = transforms.scale_components(uv=2.0, s=3.0, dense=5.0)
    found = run(tx, params, jax.tree.map(jnp.ones_like, params))
    expected = {
        "w": spectral.SpectralFactors(2.0, 3.0, 2.0),
        "low": spectral.LowRankFactors(2.0, 2.0),
        "dense": 5.0,
        "norm": 5.0,
    }
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, np.full(x.shape, y)),
        found,
        expected,
    )


def test_rates_may_be_schedules():
    params = mixed_params()
    tx = transforms.scale_components(s=lambda count: jnp.where(count < 1, 1.0, 0.5))
    first, second = run(tx, params, params, params)
    np.testing.assert_array_equal(first["w"].s, params["w"].s)
    np.testing.assert_array_equal(second["w"].s, params["w"].s / 2)
    np.testing.assert_array_equal(second["w"].u, params["w"].u)


def test_base_width_turns_columns_alike_at_every_width():
    params = mixed_params()
    tx = transforms.scale_components(uv=2.0, base_width=3)
    found = run(tx, params, jax.tree.map(jnp.ones_like, params))
    # u has 12 rows and v has 9.
    np.testing.assert_allclose(found["w"].u, 2 * np.sqrt(3 / 12), rtol=4 * EPS)
    np.testing.assert_allclose(found["w"].v, 2 * np.sqrt(3 / 9), rtol=4 * EPS)
    np.testing.assert_array_equal(found["w"].s, np.ones((2, 4)))
    np.testing.assert_array_equal(found["low"].a, np.full((7, 3), 2.0))
    np.testing.assert_array_equal(found["dense"], np.ones((6, 5)))


def test_scaling_keeps_dtypes():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), mixed_params())
    found = run(
        transforms.scale_components(s=0.5, dense=0.5, base_width=2), params, params
    )
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}


# --- beside the rest of optax ----------------------------------------------------


def full_chain():
    return optax.chain(
        transforms.scale_components(s=0.5, base_width=8),
        transforms.clip_by_composite_spectral_norm(0.05, retraction="qr"),
        transforms.retract_to_stiefel("qr"),  # compiles fastest
    )


def check_step(params, updates):
    """Orthonormal, and within the bound of `full_chain`."""
    new = optax.apply_updates(params, updates)
    old, new = params["w"], new["w"]
    assert reference.orthonormality_error(new.u) < ORTHONORMAL
    assert reference.orthonormality_error(new.v) < ORTHONORMAL
    norm = reference.composite_update_norm(old, new)
    assert np.all(norm <= 0.05 * 1.01 + absolute_floor(old, new))
    assert np.all(norm > 0.01)


def test_inside_masked_with_extra_arguments():
    params = mixed_params()
    wanted, one = noise_like(params, 0.1), jnp.ones([])
    mask = {"w": True, "low": True, "dense": False, "norm": True}
    tx = optax.masked(full_chain(), mask)
    updates = run(tx, params, wanted, loss=one, grad_norm=one)
    check_step(params, updates)
    np.testing.assert_array_equal(updates["dense"], wanted["dense"])
    # Factor tuples may be masked too.
    updates = run(optax.masked(full_chain(), mask | {"w": False}), params, wanted)
    assert_trees_equal(updates["w"], wanted["w"])


@pytest.mark.parametrize(
    "tx",
    [
        transforms.scale_components(s=0.5, base_width=8),
        transforms.clip_by_composite_spectral_norm(0.05),
        transforms.retract_to_stiefel(),
    ],
    ids=["scale", "clip", "retract"],
)
def test_inside_masked_with_a_mask_of_leaves(tx):
    """`optax.masked` then replaces u, s and v one by one."""
    params = mixed_params()
    wanted = noise_like(params, 0.1)
    mask = jax.tree.map(lambda _: False, params)
    assert_trees_equal(run(optax.masked(tx, mask), params, wanted), wanted)


def test_inside_inject_hyperparams():
    params = {"w": params32()["a"]}
    wanted = noise_like(params, 0.1)

    @optax.inject_hyperparams
    def clipped(max_norm):
        return optax.chain(
            transforms.clip_by_composite_spectral_norm(max_norm, retraction="qr"),
            transforms.retract_to_stiefel("qr"),
        )

    tx = clipped(max_norm=0.05)
    state, update = tx.init(params), jax.jit(tx.update)
    for max_norm in (0.05, 0.01):
        state = optax.tree.set(state, max_norm=jnp.float32(max_norm))
        updates, state = update(wanted, state, params)
        new = optax.apply_updates(params, updates)
        norm = reference.composite_update_norm(params["w"], new["w"])
        assert np.all(norm <= max_norm * 1.01 + absolute_floor(params["w"]))
        assert np.all(norm > 0.9 * max_norm)


def test_the_second_step_does_not_compile_again_and_counts_go_up():
    params = mixed_params()
    tx = optax.chain(
        transforms.scale_components(s=lambda count: jnp.where(count < 1, 1.0, 0.5)),
        transforms.clip_by_composite_spectral_norm(0.05, retraction="qr"),
        transforms.retract_to_stiefel("qr", every=2, tolerance=1e-2),
    )
    traces = []

    @jax.jit
    def step(params, state, updates):
        traces.append(None)
        updates, state = tx.update(updates, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for seed in range(3):
        params, state = step(params, state, noise_like(params, 0.1, seed))
    assert len(traces) == 1
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    counts = optax.tree.get_all_with_path(state, "count")
    assert [int(count) for _, count in counts] == [3, 3, 3]
