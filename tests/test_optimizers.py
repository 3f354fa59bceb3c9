import dataclasses
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax.training import train_state as flax_train_state

from sct_jax import errors, optimizers, spectral

EPS = float(np.finfo(np.float32).eps)
ORTHONORMAL = 4e-6
NUM_STEPS = 10


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
    """The same tree as sct_jax holds it."""
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
    """Noise, and a pull that makes every step depend on the one before."""
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
        ([1e-2] * NUM_STEPS, {"weight_decay": 0.3}),
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
    ids=["algorithm 1", "moments", "decay", "rates", "schedule"],
)
def test_ten_steps_match_float64(rates, options):
    values = jnp.asarray(rates, jnp.float32)
    rate = rates[0] if len(set(rates)) == 1 else lambda count: values[count]
    found = run(optimizers.sct(rate, **options))
    expected = reference.sct(start(), gradient, rates, **options)
    for step, (x, y) in enumerate(zip(found, expected, strict=True), start=1):
        # Rounding to float32 in each step, in a sum of steps of size below 3.
        atol = 1e-5 * step / NUM_STEPS + 4 * EPS
        assert_close(x, y, atol)


def test_tsvd_is_sct_while_all_columns_are_in_use():
    options = {"weight_decay": 0.1, "singular_value_lr_multiplier": 2.0}
    for found, expected in zip(
        run(optimizers.tsvd(0.01, **options)),
        run(optimizers.sct(0.01, **options)),
        strict=True,
    ):
        assert_close(found, expected, atol=20 * EPS)  # two programs, fused apart


@pytest.mark.parametrize("retraction", ["qr", "cholesky_qr", "polar"])
def test_factors_stay_orthonormal_and_moves_stay_bounded(retraction):
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


def test_dense_leaves_get_adamw_whether_clipped_or_not():
    rates = [1e-2] * 3
    tx = optimizers.sct(1e-2, weight_decay=0.1, max_update_norm=1e-3)
    expected = reference.sct(start(), gradient, rates, weight_decay=0.1)
    for x, y in zip(run(tx, 3), expected, strict=True):
        for name in ("matrix", "norm", "low"):
            for kind in y[name]:
                found = x[name][kind]
                np.testing.assert_allclose(found, y[name][kind], atol=1e-5)


def test_a_dense_tree_is_optaxs_adamw():
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
        decay_mask=lambda p: jax.tree.map(lambda x: x.ndim == 1, p),
    )
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["norm"], -0.05 * params["norm"], rtol=4 * EPS)
    np.testing.assert_array_equal(updates["matrix"], np.zeros((6, 5)))
    np.testing.assert_array_equal(updates["stack"].s, np.zeros((2, 4)))


@pytest.mark.parametrize(
    "static",
    [
        (),
        tuple(inspect.signature(optimizers.sct).parameters)[1:],
    ],
    ids=["all rates", "learning rate alone"],
)
def test_hyperparameters_may_be_injected(static):
    params = as_params(start())
    tx = optax.inject_hyperparams(optimizers.sct, static_args=static)(
        learning_rate=1e-2
    )
    state, update = tx.init(params), jax.jit(tx.update)
    grads = as_params(gradient(0, start()))
    state = optax.tree.set(state, learning_rate=jnp.float32(2e-2))
    updates, state = update(grads, state, params)
    np.testing.assert_allclose(np.abs(updates["matrix"]), 2e-2, rtol=1e-4)
    state = optax.tree.set(state, learning_rate=jnp.float32(0.0))
    updates, state = update(grads, state, params)
    np.testing.assert_array_equal(updates["matrix"], np.zeros((6, 5)))


def test_the_second_step_does_not_compile_again():
    params = as_params(start())
    tx = optimizers.OptimizerConfig(
        max_update_norm=0.05, weight_decay=0.1, warmup_steps=2, grad_clip=1.0
    ).build(10)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(None)
        updates, state = tx.update(params, state, params, loss=jnp.ones([]))
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert len(traces) == 1
    count = optax.tree.get(
        state, "count", filtering=lambda path, _: "Adam" in str(path[-1])
    )
    assert count == 3


@pytest.mark.parametrize(
    "tx",
    [
        optimizers.sct(1e-3, max_update_norm=1e-3),
        optimizers.sct(1e-3, retraction="lossless"),
        optimizers.sct(1e-3, retraction="polar"),
        optimizers.sct(1e-3, moment_dtype="bfloat16"),
        optimizers.tsvd(1e-3, retraction_every=2),
        optimizers.stiefel_muon(1e-3, coordinates="svd"),
    ],
    ids=["clip", "lossless", "polar", "bfloat16", "lazy", "svd coordinates"],
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
        assert sum(compiled) >= 1  # it would have been seen
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
        tx=optimizers.sct(3e-2, max_update_norm=1.0),
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


# --- OptimizerConfig -------------------------------------------------------------


def config(**changes):
    return optimizers.OptimizerConfig(peak_learning_rate=0.1, **changes)


def rates(config, num_steps, counts=None):
    schedule = config.learning_rate(num_steps)
    counts = range(num_steps) if counts is None else counts
    return np.array([float(schedule(count)) for count in counts])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 4])
def test_warmup_is_linear_never_zero_and_reaches_the_peak(schedule, warmup_steps):
    found = rates(config(schedule=schedule, warmup_steps=warmup_steps), 20)
    ramp = 0.1 * np.arange(1, warmup_steps + 1) / max(warmup_steps, 1)
    np.testing.assert_allclose(found[:warmup_steps], ramp, rtol=4 * EPS)
    np.testing.assert_allclose(found[warmup_steps], 0.1, rtol=4 * EPS)
    assert np.all(found > 0)
    assert np.all(found <= 0.1 * (1 + 4 * EPS))


def test_the_constant_rate_stays():
    found = rates(config(schedule="constant"), 20, [0, 7, 19, 1000])
    np.testing.assert_allclose(found, 0.1, rtol=4 * EPS)


@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_the_cosine_ends_at_its_final_ratio(ratio):
    found = rates(config(warmup_steps=4, final_rate_ratio=ratio), 20, range(21))
    t = np.arange(17) / 16
    expected = 0.1 * (ratio + (1 - ratio) * (1 + np.cos(np.pi * t)) / 2)
    np.testing.assert_allclose(found[4:], expected, atol=0.1 * 8 * EPS)
    assert rates(config(final_rate_ratio=0.1), 20, [500]) == pytest.approx(0.01)


def test_wsd_falls_all_the_way_where_warmup_leaves_less_than_its_decay():
    shortened = config(
        schedule="wsd", warmup_steps=4, decay_ratio=0.8, final_rate_ratio=0.1
    )
    peak, low = shortened.peak_learning_rate, 0.1 * shortened.peak_learning_rate
    np.testing.assert_allclose(
        rates(shortened, 10, range(4, 11)), np.linspace(peak, low, 7), rtol=1e-5
    )


def test_wsd_is_stable_then_falls_linearly():
    found = rates(
        config(schedule="wsd", warmup_steps=4, decay_ratio=0.25), 20, range(21)
    )
    np.testing.assert_allclose(found[4:16], 0.1, rtol=4 * EPS)
    expected = np.linspace(0.1, 0.01, 6)
    np.testing.assert_allclose(found[15:], expected, atol=0.1 * 8 * EPS)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
@pytest.mark.parametrize(("warmup_steps", "num_steps"), [(0, 1), (5, 5), (9, 5)])
def test_runs_shorter_than_their_warmup_have_finite_rates(
    schedule, warmup_steps, num_steps
):
    found = rates(config(schedule=schedule, warmup_steps=warmup_steps), num_steps)
    assert np.all(np.isfinite(found))
    assert np.all(found > 0)


def test_build_is_sct_with_the_fields_of_the_config():
    fields = {
        "b1": 0.8,
        "b2": 0.95,
        "eps": 1e-3,
        "weight_decay": 0.1,
        "singular_value_lr_multiplier": 3.0,
        "dense_lr_multiplier": 0.2,
        "base_width": 3,
    }
    built = config(schedule="constant", **fields).build(NUM_STEPS)
    found = run(built, 3)
    expected = reference.sct(start(), gradient, [0.1] * 3, **fields)
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y, 1e-5)


def test_build_clips_the_global_norm_of_gradients_first():
    params = {"w": jnp.zeros((2, 2))}
    # With eps = 1 the size of a gradient shows: g / (g + 1) at the first step.
    tx = config(schedule="constant", grad_clip=1.0, eps=1.0).build(5)
    updates, _ = tx.update({"w": jnp.full((2, 2), 50.0)}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.1 * 0.5 / 1.5, rtol=1e-5)


def test_build_hands_the_decay_mask_on():
    params = {"w": jnp.ones((2, 2))}
    grads = {"w": jnp.zeros((2, 2))}
    for decays in (True, False):
        tx = config(schedule="constant", weight_decay=0.5).build(
            5,
            decay_mask=lambda p: {"w": decays},  # noqa: B023
        )
        updates, _ = tx.update(grads, tx.init(params), params)
        np.testing.assert_allclose(updates["w"], -0.05 * decays, rtol=4 * EPS)


def test_the_defaults_are_valid():
    optimizers.OptimizerConfig().validate()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "adam"),
        ("schedule", "linear"),
        ("retraction", "svd"),
        ("moment_dtype", "float16"),
        ("peak_learning_rate", 0.0),
        ("max_update_norm", 0.0),
        ("grad_clip", -1.0),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("singular_value_lr_multiplier", -1.0),
        ("dense_lr_multiplier", -1.0),
        ("b1", 1.0),
        ("b2", -0.1),
        ("final_rate_ratio", 1.5),
        ("decay_ratio", -0.5),
        ("warmup_steps", -1),
        ("base_width", 0),
        ("momentum", 1.0),
        ("retraction_every", 0),
        ("retraction_tolerance", 0.0),
        ("max_rotation", 0.0),
        ("coordinates", "svdd"),
        ("tangent_projection", "gradients"),
        ("peak_learning_rate", float("nan")),
        ("weight_decay", float("nan")),
    ],
)
def test_validate_names_the_field(field, value):
    bad = dataclasses.replace(optimizers.OptimizerConfig(), **{field: value})
    with pytest.raises(errors.UserError, match=rf"^optimizer\.{field}: "):
        bad.validate()


def test_validate_suggests_the_nearest_choice():
    bad = optimizers.OptimizerConfig(schedule="cosin")
    with pytest.raises(errors.UserError, match="did you mean 'cosine'"):
        bad.validate()


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("sct", "coordinates", "svd"),
        ("sct", "retraction_every", 4),
        ("adamw", "max_update_norm", 0.5),
        ("spectron", "retraction", "qr"),
        ("muon", "tangent_projection", "gradient"),
    ],
)
def test_a_field_that_the_chain_does_not_know_is_refused(name, field, value):
    bad = optimizers.OptimizerConfig(name=name, **{field: value})
    with pytest.raises(errors.UserError, match=rf"^optimizer\.{field}: has no effect"):
        bad.validate()


def test_a_clip_with_a_lazy_retraction_is_refused():
    bad = optimizers.OptimizerConfig(
        name="tsvd", max_update_norm=0.5, retraction_tolerance=1e-3
    )
    with pytest.raises(errors.UserError, match="needs a retraction on every step"):
        bad.validate()


def test_a_refusal_says_what_is_allowed():
    bad = optimizers.OptimizerConfig(b2=1.0)
    with pytest.raises(errors.UserError) as caught:
        bad.validate()
    assert str(caught.value) == "optimizer.b2: 1.0 must be >= 0 and < 1"


@pytest.mark.parametrize("name", optimizers.CHAINS)
def test_every_chain_is_built_from_its_fields(name):
    """With its defaults a config builds what the bare function does."""
    params = params_for(name)
    config = optimizers.OptimizerConfig(name=name, schedule="constant")
    config.validate()
    built, bare = config.build(10), optimizers.CHAINS[name](1e-3)
    states = [tx.init(params) for tx in (built, bare)]
    for size in (3, 2):  # the first step is the same for any b2
        grads = jax.tree.map(lambda x, size=size: jnp.sin(size * x), params)
        (found, left), (expected, right) = (
            tx.update(grads, state, params)
            for tx, state in zip((built, bare), states, strict=True)
        )
        assert_close(found, expected, atol=4 * EPS)
        states = [left, right]


def params_for(name):
    """Those of `start` that a chain takes."""
    params = as_params(start())
    if name in ("spectron", "adamw", "muon"):
        del params["stack"]
    if name == "muon":
        del params["low"]
    return params


@pytest.mark.parametrize("name", optimizers.CHAINS)
def test_a_new_state_may_be_donated(name):
    params, tx = params_for(name), optimizers.CHAINS[name](1e-3)
    state = tx.init(params)  # outside of a jit, which would make two of one array
    step = jax.jit(tx.update, donate_argnums=1)
    _, state = step(jax.tree.map(jnp.ones_like, params), state, params)
    jax.block_until_ready(state)


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["sct", "tsvd", "stiefel_muon", "spectron", "adamw"])
def test_gradients_of_less_precision_do_not_round_the_update(name, moment_dtype):
    params = params_for(name)
    known = inspect.signature(optimizers.CHAINS[name]).parameters
    fields = {"moment_dtype": moment_dtype} if "moment_dtype" in known else {}
    tx = optimizers.CHAINS[name](1e-3, **fields)
    grads = jax.tree.map(lambda p: jnp.sin(7 * p).astype(jnp.bfloat16), params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    if fields != {"moment_dtype": "bfloat16"}:
        in_full = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        expected, _ = jax.jit(tx.update)(in_full, tx.init(params), params)
        assert_close(updates, expected, atol=4 * EPS)


def test_muon_decays_what_the_mask_says():
    params = {"matrix": jnp.ones((5, 3)), "other": jnp.ones((5, 3))}
    only = lambda params: {name: name == "other" for name in params}
    tx = optimizers.muon(0.1, weight_decay=0.5, decay_mask=only)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_array_equal(updates["matrix"], 0)
    np.testing.assert_allclose(updates["other"], -0.05, rtol=4 * EPS)


def test_muon_is_that_of_optax_on_matrices_and_adamw_elsewhere():
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


def test_adamw_has_a_rate_for_what_is_no_matrix():
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
def test_rules_without_a_retraction_refuse_spectral_factors(name):
    with pytest.raises(ValueError, match="would not stay orthonormal"):
        optimizers.CHAINS[name](1e-3).init(as_params(start()))
