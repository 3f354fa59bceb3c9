import functools
import inspect
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
import reference
from flax.training import train_state as flax_train_state

from sct_jax import optimizers, spectral, transforms

EPS = float(np.finfo(np.float32).eps)
ORTHONORMAL = 4e-6
NUM_STEPS = 10

CHAINS = ("sct", "tsvd", "stiefel_muon", "spectron", "adamw", "muon")


def start(seed=0):
    """A float64 tree as `reference.sct` takes it, of every kind of weight."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)
    return {
        "stack": {
            "u": reference.signed_qr(normal(2, 12, 4)),
            "s": np.broadcast_to([2.0, -1.0, 0.5, 0.1], (2, 4)),
            "v": reference.signed_qr(normal(2, 9, 4)),
        },
        "low": {"a": normal(7, 3), "b": normal(5, 3)},
        "matrix": {"w": normal(6, 5)},
        "norm": {"w": normal(6)},
    }


def as_params(tree):
    """The same tree with the weights of sct_jax."""
    tree = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)

    def weight(arrays):
        if "u" in arrays:
            return spectral.SpectralFactors(**arrays)
        return spectral.LowRankFactors(**arrays) if "a" in arrays else arrays["w"]

    return {name: weight(arrays) for name, arrays in tree.items()}


def as_reference(params):
    return {
        name: reference.float64(w._asdict() if spectral.is_factors(w) else {"w": w})
        for name, w in params.items()
    }


def gradient(step, tree):
    """Noise plus a term by which every step depends on the one before."""
    rng = np.random.default_rng(100 + step)
    leaves, treedef = jax.tree.flatten(tree)
    noisy = [rng.normal(size=x.shape) + 0.3 * x for x in leaves]
    return jax.tree.unflatten(treedef, noisy)


def assert_close(found, expected, atol):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=atol), found, expected
    )


def run(tx, num_steps=NUM_STEPS):
    """The params after each step, as float64 trees."""
    params = as_params(start())
    update = jax.jit(
        lambda grads, state, params: (
            lambda updates, state: (optax.apply_updates(params, updates), state)
        )(*tx.update(grads, state, params))
    )
    state = tx.init(params)
    history = []
    for step in range(num_steps):
        grads = as_params(gradient(step, as_reference(params)))
        params, state = update(grads, state, params)
        history.append(as_reference(params))
    return history


@pytest.mark.parametrize(
    ("rates", "options"),
    [
        ([1e-2] * NUM_STEPS, {}),
        ([1e-2] * NUM_STEPS, {"b1": 0.8, "b2": 0.95, "eps": 1e-3}),
        (
            [1e-2] * NUM_STEPS,
            {
                "weight_decay": 0.1,
                "singular_value_lr_multiplier": 3.0,
                "dense_lr_multiplier": 0.2,
                "base_width": 3,
            },
        ),
        (list(np.linspace(1e-3, 1e-2, NUM_STEPS)), {"weight_decay": 0.1}),
    ],
    ids=["algorithm 1", "moments", "multipliers", "schedule"],
)
def test_ten_steps_match_float64(rates, options):
    values = jnp.asarray(rates, jnp.float32)
    rate = rates[0] if len(set(rates)) == 1 else lambda count: values[count]
    retraction = "qr" if options else "cholesky_qr"  # the same map
    found = run(optimizers.sct(rate, retraction=retraction, **options))
    expected = reference.sct(start(), gradient, rates, **options)
    for step, (x, y) in enumerate(zip(found, expected, strict=True), start=1):
        # Each step, of size below 3, rounds to float32.
        atol = 1e-5 * step / NUM_STEPS + 4 * EPS
        assert_close(x, y, atol)


def test_tsvd_is_sct_while_all_columns_are_active():
    options = {
        "weight_decay": 0.1,
        "singular_value_lr_multiplier": 2.0,
        "retraction": "qr",
    }
    for found, expected in zip(
        run(optimizers.tsvd(0.01, **options), 4),
        run(optimizers.sct(0.01, **options), 4),
        strict=True,
    ):
        assert_close(found, expected, atol=20 * EPS)  # two programs, fused differently


@pytest.mark.parametrize("retraction", ["qr", "cholesky_qr", "polar"])
def test_factors_stay_orthonormal_and_updates_stay_bounded(retraction):
    max_norm = 0.05
    tx = optimizers.sct(0.1, max_update_norm=max_norm, retraction=retraction)
    history = [as_reference(as_params(start())), *run(tx, 4)]
    for old, new in itertools.pairwise(history):
        assert reference.orthonormality_error(new["stack"]["u"]) < ORTHONORMAL
        assert reference.orthonormality_error(new["stack"]["v"]) < ORTHONORMAL
        norm = reference.composite_update_norm(
            *([w["stack"][kind] for kind in "usv"] for w in (old, new))
        )
        floor = 16 * EPS * 2 * np.sqrt(4)
        assert np.all(norm <= max_norm * 1.01 + floor)
        assert np.all(norm > 0.5 * max_norm)


@pytest.mark.parametrize(
    "chain",
    [
        functools.partial(
            optimizers.sct, weight_decay=0.1, tangent_projection="displacement"
        ),
        optimizers.tsvd,
        optimizers.stiefel_muon,
        functools.partial(optimizers.stiefel_muon, coordinates="svd"),
    ],
    ids=["sct", "tsvd", "stiefel_muon", "svd coordinates"],
)
def test_no_retraction_leaves_the_rest_of_the_chain(chain):
    """Bitwise, and the factors leave the manifold."""
    free = chain(0.03, retraction="none")
    composed = optax.chain(free, transforms.retract_to_stiefel("qr"))
    found, expected = run(composed, 3), run(chain(0.03, retraction="qr"), 3)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    last = run(free, 3)[-1]["stack"]
    assert reference.orthonormality_error(last["u"]) > 1e-4
    assert reference.orthonormality_error(last["v"]) > 1e-4


def test_dense_leaves_get_adamw_whether_clipped_or_not():
    rates = [1e-2] * 3
    tx = optimizers.sct(1e-2, weight_decay=0.1, max_update_norm=1e-3, retraction="qr")
    expected = reference.sct(start(), gradient, rates, weight_decay=0.1)
    for x, y in zip(run(tx, 3), expected, strict=True):
        for name in ("matrix", "norm", "low"):
            for kind in y[name]:
                found = x[name][kind]
                np.testing.assert_allclose(found, y[name][kind], atol=1e-5)


def test_a_dense_tree_gets_the_adamw_of_optax():
    rng = np.random.default_rng(0)
    params = {
        "matrix": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32),
        "norm": jnp.asarray(rng.normal(size=6), jnp.float32),
    }
    ours = optimizers.sct(1e-2, weight_decay=0.1)
    theirs = optax.adamw(1e-2, weight_decay=0.1, mask={"matrix": True, "norm": False})
    results = []
    for tx in (ours, theirs):
        state, p = tx.init(params), params
        for step in range(3):
            grads = jax.tree.map(lambda x: jnp.cos(x + step), p)  # noqa: B023
            updates, state = tx.update(grads, state, p)
            p = optax.apply_updates(p, updates)
        results.append(p)
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_decays_by_axes():
    mask = optimizers.decays_by_axes(as_params(start()))
    assert mask["stack"] == spectral.SpectralFactors(False, True, False)
    assert mask["low"] == spectral.LowRankFactors(True, True)
    assert mask["matrix"] is True
    assert mask["norm"] is False


def test_a_decay_mask_replaces_the_rule():
    params = as_params(start())
    tx = optimizers.sct(
        0.1,
        weight_decay=0.5,
        retraction="none",
        decay_mask=lambda p: jax.tree.map(lambda x: x.ndim == 1, p),
    )
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["norm"], -0.05 * params["norm"], rtol=4 * EPS)
    np.testing.assert_array_equal(updates["matrix"], np.zeros((6, 5)))
    np.testing.assert_array_equal(updates["stack"].s, np.zeros((2, 4)))


@pytest.mark.parametrize(
    "tx",
    [optimizers.sct(1e-2, max_update_norm=1e-2), optimizers.stiefel_muon(1e-2)],
    ids=["clip", "stiefel_muon"],
)
def test_a_chain_is_mapped_over_seeds(tx):
    """Each seed gets the update that it has alone, also where one needs a guard."""
    seeds = [as_params(start(seed)) for seed in range(3)]
    flat = seeds[1]["stack"].u.at[0, :, 1].set(seeds[1]["stack"].u[0, :, 0])
    seeds[1]["stack"] = seeds[1]["stack"]._replace(u=flat)
    grads = [as_params(gradient(seed, start())) for seed in range(3)]
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    together, alone = jax.jit(jax.vmap(tx.update)), jax.jit(tx.update)
    states = jax.vmap(tx.init)(stack(seeds))
    found, _ = together(stack(grads), states, stack(seeds))
    for number, (params, grad) in enumerate(zip(seeds, grads, strict=True)):
        wanted, _ = alone(grad, tx.init(params), params)
        own = jax.tree.map(lambda x, number=number: x[number], found)
        assert_close(own, wanted, atol=64 * EPS)


@pytest.mark.parametrize("as_tree", [True, False])
def test_masks_are_trees_or_functions(as_tree):
    params = {"a": jnp.ones((4, 3)), "b": jnp.ones((3, 3))}
    mask = {"a": True, "b": False}
    given = mask if as_tree else lambda params: mask
    tx = optimizers.muon(0.1, weight_decay=0.5, decay_mask=given, matrix_mask=given)
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["a"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], 0)


def test_a_mask_that_was_injected_is_refused():
    everything = lambda params: jax.tree.map(lambda _: True, params)
    params = as_params(start())
    tx = optax.inject_hyperparams(optimizers.sct)(
        1e-2, weight_decay=0.1, decay_mask=everything
    )
    with pytest.raises(ValueError, match="name decay_mask in its static_args"):
        tx.init(params)
    tx = optax.inject_hyperparams(optimizers.sct, static_args=("decay_mask",))(
        1e-2, weight_decay=0.1, decay_mask=everything
    )
    tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_complex_leaves_are_refused_by_name(moment_dtype):
    params = {"phase": jnp.ones(3, jnp.complex64)}
    with pytest.raises(ValueError, match="phase is complex"):
        optimizers.sct(1e-2, moment_dtype=moment_dtype).init(params)


def test_python_numbers_are_trained_as_by_optax():
    params = {"scale": 2.0, "w": jnp.ones((2, 2))}
    grads = {"scale": jnp.float32(3.0), "w": jnp.ones((2, 2))}
    ours, theirs = optimizers.adamw(0.1), optax.adamw(0.1, weight_decay=0.0)
    found, _ = ours.update(grads, ours.init(params), params)
    wanted, _ = theirs.update(grads, theirs.init(params), params)
    assert float(found["scale"]) == pytest.approx(float(wanted["scale"]))


@pytest.mark.parametrize(
    "static",
    [
        (),
        tuple(inspect.signature(optimizers.sct).parameters)[1:],
    ],
    ids=["all", "learning rate"],
)
def test_hyperparameters_may_be_injected(static):
    params = as_params(start())
    tx = optax.inject_hyperparams(optimizers.sct, static_args=static)(
        learning_rate=1e-2, retraction="qr"
    )
    state, update = tx.init(params), jax.jit(tx.update)
    grads = as_params(gradient(0, start()))
    state = optax.tree.set(state, learning_rate=jnp.float32(2e-2))
    updates, state = update(grads, state, params)
    np.testing.assert_allclose(np.abs(updates["matrix"]), 2e-2, rtol=1e-4)
    state = optax.tree.set(state, learning_rate=jnp.float32(0.0))
    updates, state = update(grads, state, params)
    np.testing.assert_array_equal(updates["matrix"], np.zeros((6, 5)))


@pytest.mark.parametrize(
    "tx",
    [
        optimizers.sct(1e-3, max_update_norm=1e-3),
        optimizers.sct(1e-3, retraction="svd"),
        optimizers.sct(1e-3, retraction="polar"),
        optimizers.sct(1e-3, moment_dtype="bfloat16", retraction="none"),
        optimizers.tsvd(1e-3, retraction_every=2),
        optimizers.stiefel_muon(1e-3, coordinates="svd", retraction="none"),
    ],
    ids=["clip", "svd", "polar", "bfloat16", "lazy", "svd coordinates"],
)
def test_without_jit_the_second_update_compiles_nothing(tx):
    compiled = []

    def count(event, seconds, **_):
        del seconds
        compiled.append(event == "/jax/core/compile/backend_compile_duration")

    params = as_params(start())
    grads = as_params(gradient(0, as_reference(params)))
    _, state = tx.update(grads, tx.init(params), params)
    jax.block_until_ready(state)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        jax.block_until_ready(tx.update(grads, state, params))
        assert sum(compiled) == 0
        jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
        assert sum(compiled) >= 1  # the listener works
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def test_in_the_train_state_of_flax_linen():
    u, s, v = as_params(start())["stack"]
    params = {"kernel": spectral.SpectralFactors(u[0], s[0], v[0]), "bias": jnp.ones(9)}
    x = jax.random.normal(jax.random.key(0), (5, 12))
    y = jax.random.normal(jax.random.key(1), (5, 9))

    def apply(variables, x):
        w = variables["params"]
        return spectral.linear(x, w["kernel"]) + w["bias"]

    state = flax_train_state.TrainState.create(
        apply_fn=apply,
        params=params,
        tx=optimizers.sct(3e-2, max_update_norm=1.0, retraction="qr"),
    )

    @jax.jit
    def step(state):
        def loss_fn(params):
            return jnp.mean(jnp.square(state.apply_fn({"params": params}, x) - y))

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    first = None
    for _ in range(20):
        state, loss = step(state)
        first = loss if first is None else first
    assert state.step == 20
    assert loss < 0.7 * first
    assert spectral.orthonormality_error(state.params) < ORTHONORMAL


def params_for(name):
    """The weights of `start` that a chain accepts."""
    params = as_params(start())
    if name in ("spectron", "adamw", "muon"):
        del params["stack"]
    if name == "muon":
        del params["low"]
    return params


@pytest.mark.parametrize("name", CHAINS)
def test_a_new_state_may_be_donated(name):
    """No array occurs twice in it."""
    tx = getattr(optimizers, name)(1e-3)
    state = tx.init(params_for(name))  # outside of a jit, which would copy arrays
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 0, state), donate_argnums=0)
    jax.block_until_ready(step(state))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("sct", {}),
        ("sct", {"moment_dtype": "bfloat16"}),
        ("tsvd", {}),
        ("stiefel_muon", {}),
        ("spectron", {}),
        ("adamw", {}),
        ("adamw", {"moment_dtype": "bfloat16"}),
    ],
)
def test_gradients_of_lower_precision_do_not_round_the_update(name, fields):
    params, chain = params_for(name), getattr(optimizers, name)
    if "retraction" in inspect.signature(chain).parameters:
        fields = fields | {"retraction": "qr"}
    tx = chain(1e-3, **fields)
    grads = jax.tree.map(lambda p: jnp.sin(7 * p).astype(jnp.bfloat16), params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    if "moment_dtype" not in fields:
        in_full = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        expected, _ = jax.jit(tx.update)(in_full, tx.init(params), params)
        assert_close(updates, expected, atol=4 * EPS)


def test_muon_decays_by_its_mask():
    params = {"matrix": jnp.ones((5, 3)), "other": jnp.ones((5, 3))}
    only = lambda params: {name: name == "other" for name in params}
    tx = optimizers.muon(0.1, weight_decay=0.5, decay_mask=only)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_array_equal(updates["matrix"], 0)
    np.testing.assert_allclose(updates["other"], -0.05, rtol=4 * EPS)


def test_muon_is_the_muon_of_optax_on_matrices_and_adamw_elsewhere():
    params = {"matrix": jnp.sin(jnp.arange(30.0)).reshape(2, 5, 3), "norm": jnp.ones(4)}
    tx = optimizers.muon(0.02, dense_lr_multiplier=0.5, weight_decay=0.1)
    updates, _ = tx.update(params, tx.init(params), params)
    for layer in range(2):
        w = params["matrix"][layer]
        other = optax.contrib.muon(0.02, weight_decay=0.1)
        expected, _ = other.update(w, other.init(w), w)
        np.testing.assert_allclose(updates["matrix"][layer], expected, atol=1e-5)
    np.testing.assert_allclose(updates["norm"], -0.01, rtol=1e-4)
    only_norms = lambda params: {"matrix": False, "norm": False}
    tx = optimizers.muon(0.02, matrix_mask=only_norms)
    updates, _ = tx.update(params, tx.init(params), params)
    nonzero = np.abs(params["matrix"]) > 1e-3
    np.testing.assert_allclose(np.abs(updates["matrix"])[nonzero], 0.02, rtol=1e-3)


def test_adamw_multiplies_the_learning_rate_outside_matrices():
    factors = spectral.LowRankFactors(jnp.ones((5, 2)), jnp.ones((3, 2)))
    params = {"w": factors, "table": jnp.ones((4, 3)), "norm": jnp.ones(4)}
    size = lambda update: float(jnp.max(jnp.abs(update)))

    def sizes(**fields):
        tx = optimizers.adamw(0.02, **fields)
        updates, _ = tx.update(params, tx.init(params), params)
        return jax.tree.map(size, updates)

    plain, slower = sizes(), sizes(dense_lr_multiplier=0.5)
    assert jax.tree.leaves(plain) == pytest.approx([0.02] * 4, rel=1e-5)
    assert slower == plain | {"norm": pytest.approx(plain["norm"] / 2)}
    in_layers = lambda params: (
        jax.tree.map(lambda _: False, params)
        | {"w": spectral.LowRankFactors(True, True)}
    )
    tables = sizes(dense_lr_multiplier=0.5, matrix_mask=in_layers)
    assert tables == slower | {"table": pytest.approx(plain["table"] / 2)}


@pytest.mark.parametrize("name", ["spectron", "adamw", "muon"])
def test_chains_without_a_retraction_refuse_spectral_factors(name):
    with pytest.raises(ValueError, match="orthonormal"):
        getattr(optimizers, name)(1e-3).init(as_params(start()))


@pytest.mark.parametrize(
    ("name", "fields", "word"),
    [
        ("sct", {"retraction": "lossless"}, "retraction"),
        ("sct", {"moment_dtype": "float16"}, "float16"),
        ("sct", {"tangent_projection": "both"}, "both"),
        ("stiefel_muon", {"tangent_projection": "both"}, "both"),
        ("stiefel_muon", {"coordinates": "svdd"}, "coordinates"),
        ("sct", {"retraction": "none", "max_update_norm": 0.1}, "max_update_norm"),
        ("tsvd", {"retraction": "none", "max_update_norm": 0.1}, "max_update_norm"),
        (
            "stiefel_muon",
            {"retraction": "none", "max_update_norm": 0.1},
            "max_update_norm",
        ),
        ("tsvd", {"retraction": "none", "retraction_every": 2}, "lazy"),
        ("tsvd", {"retraction": "none", "retraction_tolerance": 1e-3}, "lazy"),
        ("tsvd", {"max_update_norm": 0.5, "retraction_every": 2}, "lazy"),
        ("tsvd", {"max_update_norm": 0.5, "retraction_tolerance": 1e-3}, "lazy"),
        ("tsvd", {"retraction": "svd", "retraction_every": 2}, "retraction"),
    ],
)
def test_refusals(name, fields, word):
    with pytest.raises(ValueError, match=word):
        getattr(optimizers, name)(1e-3, **fields)


# --- hyperparameters without a meaning ----------------------------------------------

NAN, INFINITY = float("nan"), float("inf")
NOT_NUMBERS = ("0.1", True, [0.1], 1j)
# By kind: the names, a value that is accepted, and values that are not.
HYPERPARAMETERS = (
    (("b1", "b2", "momentum"), 0.0, (1.0, 1.5, -0.1, 0.99999999999)),
    (("learning_rate",), 0.0, (-1e-3, 1e300, -1e300)),
    (("eps", "weight_decay", "max_rotation"), 0.0, (-1.0, 1e39)),
    (("singular_value_lr_multiplier", "dense_lr_multiplier"), 0.0, (-1.0, 1e39)),
    (("max_update_norm", "retraction_tolerance"), 0.1, (0.0, -1.0, 1e39, 1e-46)),
    (("base_width",), 64, (0, -64)),
    (("retraction_every",), 2, (0, -1, 2.5)),
)


CASES = [
    pytest.param(chain, name, good, bad, id=f"{chain} {name}")
    for chain in CHAINS
    for names, good, bad in HYPERPARAMETERS
    for name in names
    if name in inspect.signature(getattr(optimizers, chain)).parameters
]


@pytest.fixture
def unchecked():
    """Without the type checker of the tests, which a user does not have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def build(chain, **hyperparams):
    return getattr(optimizers, chain)(**({"learning_rate": 1e-3} | hyperparams))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("chain", "name", "good", "bad"), CASES)
def test_a_hyperparameter_without_a_meaning_is_refused_by_name(chain, name, good, bad):
    build(chain, **{name: good})
    build(chain, **{name: jnp.asarray(good)})
    for value in (*bad, NAN, INFINITY, -INFINITY, *NOT_NUMBERS, jnp.ones(2)):
        with pytest.raises(ValueError, match=rf"^{name} must be "):
            build(chain, **{name: value})
    for value in (*bad, NAN, INFINITY):
        for as_array in (np.asarray, jnp.asarray):
            if np.isfinite(value) and np.isinf(np.float64(as_array(value))):
                continue
            with pytest.raises(ValueError, match=rf"^{name} must be "):
                build(chain, **{name: as_array(value)})


def test_every_hyperparameter_of_every_chain_is_checked():
    """What is no number is a choice, a flag or a mask."""
    others = "retraction moment_dtype tangent_projection coordinates decay_mask"
    checked = {name for names, *_ in HYPERPARAMETERS for name in names}
    checked |= {"nesterov", "shape_factor", "transport_moments"}
    for chain in CHAINS:
        parameters = inspect.signature(getattr(optimizers, chain)).parameters
        assert set(parameters) - checked <= {*others.split(), "matrix_mask"}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("chain", "name"),
    [
        ("sct", "transport_moments"),
        ("stiefel_muon", "nesterov"),
        ("spectron", "nesterov"),
        ("spectron", "shape_factor"),
        ("muon", "nesterov"),
    ],
)
def test_a_flag_is_true_or_false(chain, name):
    for value in ("false", 1, None):
        with pytest.raises(ValueError, match=rf"^{name} must be True or False"):
            build(chain, **{name: value})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("chain", CHAINS)
def test_only_some_hyperparameters_may_be_schedules_or_none(chain):
    schedule = optax.constant_schedule(0.1)
    build(chain, learning_rate=schedule, dense_lr_multiplier=schedule)
    for name, value in (("eps", schedule), ("eps", None), ("learning_rate", None)):
        with pytest.raises(ValueError, match=rf"^{name} must be a number"):
            build(chain, **{name: value})


def test_tracers_pass_and_injected_values_are_checked():
    params = params_for("sct")
    tx = optax.inject_hyperparams(optimizers.sct)(1e-3, max_update_norm=0.1)
    state = tx.init(params)
    bad = optax.tree.set(state, max_update_norm=jnp.float32(NAN))
    jax.eval_shape(tx.update, params, bad, params)
    with pytest.raises(ValueError, match=r"^max_update_norm must be"):
        tx.update(params, bad, params)


# --- weights that are split ---------------------------------------------------------

CONSTRAINED = {
    "sct": lambda: optimizers.sct(1e-2),
    "clip": lambda: optimizers.sct(1e-2, max_update_norm=0.1),
    "svd": lambda: optimizers.sct(1e-2, retraction="svd"),
    "transport": lambda: optimizers.sct(
        1e-2, transport_moments=True, retraction="none"
    ),
    "projection": lambda: optimizers.sct(
        1e-2, tangent_projection="gradient", retraction="none"
    ),
    "tsvd": lambda: optimizers.tsvd(1e-2),
    "lazy": lambda: optimizers.tsvd(1e-2, retraction_every=2),
    "frozen columns": lambda: optimizers.tsvd(1e-2, retraction="none"),
    "stiefel_muon": lambda: optimizers.stiefel_muon(1e-2),
    "free stiefel_muon": lambda: optimizers.stiefel_muon(1e-2, retraction="none"),
    "limit": lambda: transforms.limit_rotation(0.1),
}


def mask_of(params, **kept):
    """A mask of all leaves but the parts of `stack` that are named False."""
    mask = jax.tree.map(lambda _: True, params)
    parts = {part: kept.get(part, True) for part in "usv"}
    return mask | {"stack": spectral.SpectralFactors(**parts)}


def in_multi_transform(tx, mask):
    labels = jax.tree.map(lambda keep: "tx" if keep else "rest", mask)
    return optax.multi_transform({"tx": tx, "rest": optax.adam(1e-2)}, labels)


@pytest.mark.parametrize("wrap", [optax.masked, in_multi_transform])
@pytest.mark.parametrize("chain", CONSTRAINED)
def test_a_split_weight_is_refused_at_init(chain, wrap):
    params = {"block": params_for("sct")}
    tx = CONSTRAINED[chain]()
    for removed in ("u", "s", "v", "us"):
        mask = mask_of(params["block"], **dict.fromkeys(removed, False))
        with pytest.raises(ValueError, match=r"^block/stack is split: .* as a whole"):
            wrap(tx, {"block": mask}).init(params)


@pytest.mark.parametrize("wrap", [optax.masked, in_multi_transform])
@pytest.mark.parametrize("chain", CONSTRAINED)
def test_a_weight_may_be_masked_as_a_whole(chain, wrap):
    params = params_for("sct")
    tx = CONSTRAINED[chain]()
    by_leaves = mask_of(params, u=False, s=False, v=False)
    for mask in (by_leaves, by_leaves | {"stack": False}):
        wrapped = wrap(tx, mask)
        state = wrapped.init(params)
        updates, _ = jax.eval_shape(wrapped.update, params, state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.parametrize("chain", [*CONSTRAINED, "spectron"])
def test_a_flat_vector_is_refused_at_init(chain):
    name = chain if chain in CHAINS else "sct"
    tx = optimizers.spectron(1e-2) if chain == "spectron" else CONSTRAINED[chain]()
    with pytest.raises(ValueError, match=r"optax\.flatten"):
        optax.flatten(tx).init(params_for(name))
    dense = {"norm": jnp.ones(3)}
    tx.init(dense)
    # Rules for single entries may be flattened alone.
    parts = (optax.flatten(optax.scale_by_adam()), transforms.retract_to_stiefel())
    optax.chain(*parts).init(params_for(name))


def test_split_low_rank_factors_are_refused_where_both_matter():
    params = params_for("spectron")
    mask = jax.tree.map(lambda _: True, params)
    mask["low"] = spectral.LowRankFactors(True, False)
    with pytest.raises(ValueError, match=r"^low is split: .* removed b and"):
        optax.masked(optimizers.spectron(1e-2), mask).init(params)
    optax.masked(optimizers.adamw(1e-2), mask).init(params)


@pytest.mark.parametrize("name", ["spectron", "adamw", "muon"])
def test_chains_without_a_retraction_train_what_is_left(name):
    """Spectral factors are another chain's, and masked leaf by leaf."""
    params = as_params(start())
    if name == "muon":
        del params["low"]
    labels = jax.tree.map(lambda _: "rest", params)
    labels["stack"] = spectral.SpectralFactors(*["factors"] * 3)
    tx = optax.multi_transform(
        {"rest": getattr(optimizers, name)(1e-2), "factors": optimizers.sct(1e-2)},
        labels,
    )
    jax.eval_shape(tx.update, params, tx.init(params), params)
    labels["stack"] = spectral.SpectralFactors("factors", "rest", "factors")
    with pytest.raises(ValueError, match=r"stack is split|would not stay orthonormal"):
        tx.init(params)


# --- dtypes, ranks and names --------------------------------------------------------

VARIANTS = [
    ("sct", {"max_update_norm": 0.1, "retraction": "polar", "weight_decay": 0.1}),
    ("sct", {"tangent_projection": "gradient", "transport_moments": True}),
    ("sct", {"moment_dtype": "bfloat16", "base_width": 8, "retraction": "none"}),
    ("tsvd", {"retraction_every": 2, "retraction_tolerance": 1e-3}),
    ("tsvd", {"max_update_norm": 0.1, "retraction": "svd", "weight_decay": 0.1}),
    ("stiefel_muon", {"max_update_norm": 0.1, "weight_decay": 0.1}),
    ("stiefel_muon", {"coordinates": "svd", "retraction": "svd"}),
    ("spectron", {"nesterov": True, "shape_factor": True, "weight_decay": 0.1}),
    ("adamw", {"weight_decay": 0.1, "dense_lr_multiplier": 0.5}),
    ("muon", {"weight_decay": 0.1, "dense_lr_multiplier": 0.5}),
]


@pytest.mark.parametrize(("name", "fields"), VARIANTS, ids=str)
def test_no_axis_is_added_by_itself(name, fields):
    params = params_for(name)
    tx = getattr(optimizers, name)(1e-2, **fields)
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(tx.update, params, tx.init(params), params)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("name", "fields"), VARIANTS, ids=str)
def test_dtypes_stay(name, fields, mixed):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), params_for(name))
        params = {"wide": wide} | ({"narrow": params_for(name)} if mixed else {})
        tx = getattr(optimizers, name)(1e-2, **fields)
        state = tx.init(params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        assert kinds(after) == kinds(state)
        assert kinds(updates) == kinds(params)


class Plain(NamedTuple):
    a: object
    b: object


class LikeAState(NamedTuple):
    mu: object
    nu: object


@pytest.mark.parametrize(
    "chain",
    [
        functools.partial(optimizers.tsvd, retraction="svd"),
        functools.partial(optimizers.sct, transport_moments=True, retraction="qr"),
        functools.partial(optimizers.stiefel_muon, coordinates="svd", retraction="svd"),
    ],
    ids=["tsvd", "sct", "stiefel_muon"],
)
def test_names_of_parameters_decide_nothing(chain):
    weights = params_for("sct")
    tx, results = chain(1e-2), []
    for kind in (Plain, LikeAState):
        params = kind(weights["stack"], {"mu": weights["matrix"]})
        state = tx.init(params)
        for _ in range(2):
            updates, state = jax.jit(tx.update)(params, state, params)
            params = optax.apply_updates(params, updates)
        results.append(jax.tree.leaves((params, state)))
    jax.tree.map(np.testing.assert_array_equal, *results)
