import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sct_jax import errors, linalg, optimizers, spectral
from sct_jax.training import optimizer_config

EPS = float(np.finfo(np.float32).eps)
CHAINS = optimizer_config.CHAINS
each_chain = pytest.mark.parametrize("name", CHAINS)

config = functools.partial(optimizer_config.Sct, peak_learning_rate=0.1)


@functools.cache
def factors():
    return spectral.init(jax.random.key(0), 12, 9, 4, orthonormal=False)


def params_for(name):
    """A factorised weight of the kind that the chain takes, and dense arrays."""
    w = factors()
    if name in optimizer_config.LOW_RANK_CHAINS:
        w = spectral.to_low_rank(w)
    return {"w": w, "table": jnp.ones((5, 3)), "norm": jnp.ones(3)}


def two_steps(tx, params):
    """Both updates: the first is the same for every b1 and b2."""
    state, step, found = tx.init(params), jax.jit(tx.update), []
    for size in (3, 2):
        grads = jax.tree.map(lambda x, size=size: jnp.sin(size * x), params)
        updates, state = step(grads, state, params)
        found.append(updates)
    return found


# --- schedules -------------------------------------------------------------------


def learning_rates(config, num_steps, counts=None):
    schedule = config.learning_rate(num_steps)
    counts = range(num_steps) if counts is None else counts
    return np.array([float(schedule(count)) for count in counts])


@pytest.mark.parametrize("schedule", optimizer_config.SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 4])
def test_warmup_is_linear_never_zero_and_reaches_the_peak(schedule, warmup_steps):
    found = learning_rates(config(schedule=schedule, warmup_steps=warmup_steps), 20)
    ramp = 0.1 * np.arange(1, warmup_steps + 1) / max(warmup_steps, 1)
    np.testing.assert_allclose(found[:warmup_steps], ramp, rtol=4 * EPS)
    np.testing.assert_allclose(found[warmup_steps], 0.1, rtol=4 * EPS)
    assert np.all(found > 0)
    assert np.all(found <= 0.1 * (1 + 4 * EPS))


def test_the_constant_learning_rate_stays():
    found = learning_rates(config(schedule="constant"), 20, [0, 7, 19, 1000])
    np.testing.assert_allclose(found, 0.1, rtol=4 * EPS)


@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_the_cosine_ends_at_its_final_ratio(ratio):
    found = learning_rates(
        config(warmup_steps=4, final_rate_ratio=ratio), 20, range(21)
    )
    t = np.arange(17) / 16
    expected = 0.1 * (ratio + (1 - ratio) * (1 + np.cos(np.pi * t)) / 2)
    np.testing.assert_allclose(found[4:], expected, atol=0.1 * 8 * EPS)
    after = learning_rates(config(final_rate_ratio=0.1), 20, [500])
    assert after == pytest.approx(0.01)


def test_wsd_is_stable_then_falls_linearly():
    found = learning_rates(
        config(schedule="wsd", warmup_steps=4, decay_ratio=0.25), 20, range(21)
    )
    np.testing.assert_allclose(found[4:16], 0.1, rtol=4 * EPS)
    expected = np.linspace(0.1, 0.01, 6)
    np.testing.assert_allclose(found[15:], expected, atol=0.1 * 8 * EPS)


def test_a_long_warmup_shortens_the_decay_of_wsd():
    shortened = config(
        schedule="wsd", warmup_steps=4, decay_ratio=0.8, final_rate_ratio=0.1
    )
    found = learning_rates(shortened, 10, range(4, 11))
    np.testing.assert_allclose(found, np.linspace(0.1, 0.01, 7), rtol=1e-5)


@pytest.mark.parametrize("schedule", optimizer_config.SCHEDULES)
@pytest.mark.parametrize(("warmup_steps", "num_steps"), [(0, 1), (5, 5), (9, 5)])
def test_runs_shorter_than_their_warmup_have_finite_learning_rates(
    schedule, warmup_steps, num_steps
):
    short = config(schedule=schedule, warmup_steps=warmup_steps)
    found = learning_rates(short, num_steps)
    assert np.all(np.isfinite(found))
    assert np.all(found > 0)


# --- chains ----------------------------------------------------------------------


@each_chain
def test_fields_are_keywords_of_the_chain_with_the_same_defaults(name):
    kind = CHAINS[name]
    keywords = inspect.signature(getattr(optimizers, name)).parameters
    fields = {f.name: f.default for f in dataclasses.fields(kind)}
    own = {name: fields[name] for name in optimizer_config.own_fields(kind)}
    masks = {"decay_mask", "matrix_mask"} & set(keywords)
    assert set(own) == set(keywords) - {"learning_rate"} - masks
    assert own == {name: keywords[name].default for name in own}
    assert kind.takes_matrix_mask == ("matrix_mask" in keywords)


CHANGED = {
    "sct": {
        "b1": 0.8,
        "b2": 0.95,
        "eps": 1e-3,
        "weight_decay": 0.1,
        "singular_value_lr_multiplier": 3.0,
        "dense_lr_multiplier": 0.2,
        "base_width": 3,
        "retraction": "none",
        "tangent_projection": "displacement",
        "transport_moments": True,
    },
    "tsvd": {"retraction": "qr", "retraction_every": 2, "moment_dtype": "bfloat16"},
    "stiefel_muon": {"retraction": "none", "coordinates": "svd", "max_rotation": 1e-3},
    "spectron": {"nesterov": True, "shape_factor": True, "momentum": 0.5},
    "adamw": {"moment_dtype": "bfloat16", "dense_lr_multiplier": 0.5},
    "muon": {"nesterov": False, "momentum": 0.5, "b2": 0.5},
}


def assert_close(found, expected, *, learning_rate):
    # The quintic multiplies rounding by a^5.
    atol = learning_rate * linalg.QUINTIC[0] ** 5 * EPS
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol),
        found,
        expected,
    )


@each_chain
def test_fields_reach_the_chain(name):
    params, chain = params_for(name), getattr(optimizers, name)
    built = CHAINS[name](schedule="constant", **CHANGED[name]).build(10)
    expected = two_steps(chain(1e-3, **CHANGED[name]), params)
    found = two_steps(built, params)
    # A rate that is a constant may be rounded otherwise than one of a schedule.
    assert_close(found, expected, learning_rate=1e-3)


@each_chain
def test_keywords_replace_fields_and_may_be_injected(name):
    params, kind = params_for(name), CHAINS[name]
    fixed = {"retraction": "none"} if hasattr(kind, "retraction") else {}
    config = kind(b2=0.5, **fixed)

    @optax.inject_hyperparams
    def injected(learning_rate, b2):
        return config.chain(learning_rate, b2=b2)

    found = two_steps(injected(learning_rate=0.02, b2=0.7), params)
    wanted = dataclasses.replace(config, b2=0.7).chain(0.02)
    assert_close(found, two_steps(wanted, params), learning_rate=0.02)


def test_build_clips_the_global_norm_of_gradients_first():
    params = {"w": jnp.zeros((2, 2))}
    # With eps = 1 the size of a gradient shows: g / (g + 1) at the first step.
    tx = config(schedule="constant", grad_clip=1.0, eps=1.0).build(5)
    updates, _ = tx.update({"w": jnp.full((2, 2), 50.0)}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.1 * 0.5 / 1.5, rtol=1e-5)


def test_build_passes_the_decay_mask():
    params = {"w": jnp.ones((2, 2))}
    grads = {"w": jnp.zeros((2, 2))}
    for decays in (True, False):
        tx = config(schedule="constant", weight_decay=0.5).build(
            5,
            decay_mask=lambda p: {"w": decays},  # noqa: B023
        )
        updates, _ = tx.update(grads, tx.init(params), params)
        np.testing.assert_allclose(updates["w"], -0.05 * decays, rtol=4 * EPS)


@each_chain
def test_build_passes_the_matrix_mask_to_chains_that_have_one(name):
    params = {"table": jnp.ones((4, 3)), "matrix": jnp.ones((4, 3))}
    only = lambda params: {name: name == "matrix" for name in params}
    fields = {"dense_lr_multiplier": 0.5, "schedule": "constant"}
    tx = CHAINS[name](**fields).build(5, matrix_mask=only)
    updates, _ = tx.update(params, tx.init(params), params)
    differ = not np.allclose(updates["table"], updates["matrix"], rtol=1e-3)
    assert differ == CHAINS[name].takes_matrix_mask


def test_the_second_step_does_not_compile_again():
    params = params_for("sct")
    tx = optimizer_config.Sct(
        max_update_norm=0.05,
        weight_decay=0.1,
        warmup_steps=2,
        grad_clip=1.0,
        retraction="qr",
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


def test_another_chain_keeps_the_fields_that_both_have():
    base = optimizer_config.Sct(
        peak_learning_rate=0.3, schedule="wsd", b1=0.8, b2=0.9, retraction="polar"
    )
    muon = base.to(optimizer_config.StiefelMuon, nesterov=False)
    assert muon == optimizer_config.StiefelMuon(
        peak_learning_rate=0.3,
        schedule="wsd",
        b1=0.8,
        b2=0.9,
        retraction="polar",
        nesterov=False,
    )
    assert base.to(optimizer_config.Spectron).name == "spectron"


# --- validation ------------------------------------------------------------------


@each_chain
def test_the_defaults_are_valid(name):
    config = CHAINS[name]()
    config.validate()
    assert config.name == name
    assert config.unused_fields() == []


def test_the_name_is_fixed_by_the_class():
    with pytest.raises(TypeError, match="name"):
        optimizer_config.Sct(name="tsvd")  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("sct", "schedule", "linear"),
        ("sct", "retraction", "lossless"),
        ("sct", "moment_dtype", "float16"),
        ("sct", "peak_learning_rate", 0.0),
        ("sct", "peak_learning_rate", float("nan")),
        ("sct", "max_update_norm", 0.0),
        ("sct", "grad_clip", -1.0),
        ("sct", "eps", 0.0),
        ("sct", "weight_decay", -0.1),
        ("sct", "weight_decay", float("nan")),
        ("sct", "singular_value_lr_multiplier", -1.0),
        ("sct", "dense_lr_multiplier", -1.0),
        ("sct", "b1", 1.0),
        ("sct", "b2", -0.1),
        ("sct", "final_rate_ratio", 1.5),
        ("sct", "decay_ratio", -0.5),
        ("sct", "warmup_steps", -1),
        ("sct", "base_width", 0),
        ("sct", "tangent_projection", "gradients"),
        ("stiefel_muon", "momentum", 1.0),
        ("stiefel_muon", "max_rotation", 0.0),
        ("stiefel_muon", "coordinates", "svdd"),
        ("tsvd", "retraction_every", 0),
        ("tsvd", "retraction_tolerance", 0.0),
    ],
)
def test_validate_names_the_field(name, field, value):
    with pytest.raises(errors.UserError, match=rf"^optimizer\.{field}: "):
        CHAINS[name](**{field: value}).validate()


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (optimizer_config.Sct(schedule="cosin"), "'cosine'"),
        (optimizer_config.Sct(b2=1.0), ">= 0 and < 1"),
        (
            optimizer_config.Sct(retraction="none", max_update_norm=0.5),
            "max_update_norm",
        ),
        (optimizer_config.Tsvd(max_update_norm=0.5, retraction_tolerance=1e-3), "lazy"),
        (optimizer_config.Tsvd(retraction="none", retraction_every=2), "lazy"),
    ],
    ids=["nearest choice", "bounds", "clip without retraction", "lazy", "lazy, none"],
)
def test_refusals_say_what_is_allowed(bad, word):
    with pytest.raises(errors.UserError, match=word):
        bad.validate()


@pytest.mark.parametrize(
    ("used", "unused", "field"),
    [
        (
            optimizer_config.Sct(schedule="wsd", decay_ratio=0.5),
            optimizer_config.Sct(decay_ratio=0.5),
            "decay_ratio",
        ),
        (
            optimizer_config.Sct(final_rate_ratio=0.5),
            optimizer_config.Sct(schedule="constant", final_rate_ratio=0.5),
            "final_rate_ratio",
        ),
        (
            optimizer_config.StiefelMuon(coordinates="svd", max_rotation=0.5),
            optimizer_config.StiefelMuon(max_rotation=0.5),
            "max_rotation",
        ),
    ],
)
def test_unused_fields_are_named(used, unused, field):
    assert used.unused_fields() == []
    (sentence,) = unused.unused_fields()
    assert field in sentence


def test_from_fields_accepts_fields_of_other_chains_at_their_defaults():
    found = optimizer_config.from_fields(
        {"name": "adamw", "b1": 0.8, "retraction": "cholesky_qr", "momentum": 0.95}
    )
    assert found == optimizer_config.AdamW(b1=0.8)


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
def test_from_fields_refuses_fields_of_other_chains(name, field, value):
    with pytest.raises(errors.UserError, match=rf"^optimizer\.{field}: .* no effect"):
        optimizer_config.from_fields({"name": name, field: value})


@pytest.mark.parametrize(
    ("values", "word"), [({"name": "adam"}, "name"), ({"momentun": 0.9}, "momentum")]
)
def test_from_fields_refuses_unknown_names(values, word):
    with pytest.raises(errors.UserError, match=word):
        optimizer_config.from_fields(values)
