import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from sct_jax import errors, optimizers, rank, spectral, transforms

EPS = float(np.finfo(np.float32).eps)
CONFIG = rank.AdaptiveRankConfig(
    energy=0.9, floor=2, multiple=4, headroom=0.0, hysteresis=0.0
)


def factors(fan_in, fan_out, s, seed=0):
    """Orthonormal factors with these singular values (*layers, R)."""
    s = jnp.asarray(s, jnp.float32)
    rng = np.random.default_rng(seed)
    u, v = (
        jnp.asarray(
            reference.signed_qr(rng.normal(size=(*s.shape[:-1], n, s.shape[-1])))
        )
        for n in (fan_in, fan_out)
    )
    return spectral.SpectralFactors(u.astype(s.dtype), s, v.astype(s.dtype))


@functools.cache
def params():
    """A stack of two layers, a single weight, and a dense leaf."""
    falling, flat = np.geomspace(1, 1e-3, 12), np.linspace(1.0, 0.8, 12)
    # Unsorted and of both signs, as training leaves them.
    order = np.random.default_rng(0).permutation(12)
    stack = (np.stack([falling, flat]) * np.resize([1.0, -1.0], 12))[:, order]
    return {
        "layers": {"q": factors(20, 16, stack), "norm": jnp.ones((2, 20))},
        "embedding": factors(14, 18, np.linspace(1.2, 0.4, 8), seed=1),
    }


RATE = 1e-3
TSVD = optimizers.tsvd(RATE)
# One compilation per shape, for the whole module.
init, update = jax.jit(TSVD.init), jax.jit(TSVD.update)


def train(tree, steps=3, state=None, *, init=init, update=update):
    state = init(tree) if state is None else state
    for step in range(steps):
        leaves, treedef = jax.tree.flatten(tree)
        rng = np.random.default_rng(step)
        grads = [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves]
        updates, state = update(jax.tree.unflatten(treedef, grads), state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree, state


@functools.cache
def trained():
    return train(params())


def energy_rank(s, tau):
    squares = np.sort(np.asarray(s, np.float64) ** 2)[::-1]
    return 1 + int(np.argmax(np.cumsum(squares) >= tau * squares.sum() * (1 - 1e-12)))


@functools.partial(jax.jit, static_argnames="ranks")
def jitted_resize(tree, state, active, key, *, ranks):
    return rank.resize(tree, state, active=active, ranks=dict(ranks), key=key)


def resized(tree, state, active, ranks, seed=0):
    key, ranks = jax.random.key(seed), tuple(ranks.items())
    return jitted_resize(tree, state, active, key, ranks=ranks)


# The stack shrinks, with inactive columns in both layers; the embedding grows.
ACTIVE = {"layers/q": np.array([3, 5]), "embedding": np.array(12)}
RANKS = {"layers/q": 8, "embedding": 12}


@functools.cache
def changed():
    return resized(*trained(), ACTIVE, RANKS)


@functools.cache
def trained_after_a_change():
    tree, state = changed()
    return train(tree, steps=5, state=state)


# --- Decisions -------------------------------------------------------------------


def test_a_layer_uses_as_many_columns_as_hold_the_energy():
    tree, state = trained()
    found = rank.weights(tree, state)
    assert set(found) == {"layers/q", "embedding"}
    assert found["layers/q"].fans == (20, 16)
    active = rank.decide(found, CONFIG)
    for name, w in found.items():
        layers = np.atleast_2d(w.s)
        expected = [max(energy_rank(s, 0.9), 2) for s in layers]
        np.testing.assert_array_equal(np.atleast_1d(active[name]), expected)
    assert active["layers/q"][0] < 6 < active["layers/q"][1]
    assert rank.stored_rank(found["layers/q"], active["layers/q"], CONFIG) == 12
    assert rank.stored_rank(found["layers/q"], np.array([3, 5]), CONFIG) == 8


def weight(s, active=None, fans=(20, 16)):
    s = np.asarray(s, np.float32)
    active = s.shape[-1] if active is None else active
    return {"w": rank.WeightInfo(fans, s, np.full(s.shape[:-1], active))}


@pytest.mark.parametrize(
    ("changes", "s", "expected"),
    [
        ({}, [3, 0, 0, 0, 0, 0], 2),  # the floor
        ({"floor": 4}, [3, 0, 0, 0, 0, 0], 4),
        ({"floor": 99}, [3, 0, 0, 0, 0, 0], 16),  # never more than min(I, O)
        ({}, [1] * 10, 9),
        ({"headroom": 0.25}, [1] * 10, 12),  # grows beyond the ten of the store
        ({"headroom": 9.0}, [1] * 10, 16),
        ({"headroom": 9.0, "max_rank": 11}, [1] * 10, 11),
        ({"hysteresis": 0.1}, [1] * 10, 10),  # nine is not less enough
        ({"hysteresis": 0.05}, [1] * 10, 9),
        ({"hysteresis": 0.1, "max_rank": 9}, [1] * 10, 9),  # nor may ten stay
        ({"energy": 1.0}, [1] * 10, 10),
        ({}, [0] * 6, 2),
    ],
)
def test_floor_headroom_limit_and_hysteresis(changes, s, expected):
    config = dataclasses.replace(CONFIG, **changes)
    assert rank.decide(weight(s), config)["w"] == expected


def test_columns_not_in_use_may_come_back():
    """Six of eight columns are active, and the layer needs all six plus headroom."""
    config = dataclasses.replace(CONFIG, headroom=0.2, energy=0.99)
    found = weight([1] * 6 + [0] * 2, active=6)
    assert rank.decide(found, config)["w"] == 8


def test_a_neutral_budget_moves_rank_to_where_the_energy_is():
    config = dataclasses.replace(CONFIG, budget_neutral=True, multiple=1, headroom=0.25)
    flat, falling = np.ones(8), np.geomspace(1, 1e-3, 8)
    found = {
        "flat": rank.WeightInfo((20, 16), flat, np.array(8)),
        "falling": rank.WeightInfo((20, 16), falling, np.array(8)),
    }
    budget = sum(w.parameters(w.rank) for w in found.values())
    assert budget == 2 * 8 * 37
    active = rank.decide(found, config, budget=budget)
    assert active["flat"] == 10
    assert 2 <= active["falling"] <= 6
    cost = sum(w.parameters(int(active[name])) for name, w in found.items())
    assert cost <= budget


def test_a_budget_below_the_floors_moves_nothing():
    config = dataclasses.replace(CONFIG, budget_neutral=True, floor=8)
    found = weight(np.ones(8))
    assert rank.decide(found, config, budget=10)["w"] == 8


def test_a_neutral_budget_must_be_given():
    config = dataclasses.replace(CONFIG, budget_neutral=True)
    with pytest.raises(ValueError, match="needs a budget"):
        rank.decide(weight([1.0, 2.0]), config)


def test_decisions_are_taken_after_warmup_at_intervals():
    config = rank.AdaptiveRankConfig(energy=0.9, every=10, warmup_steps=20)
    assert [step for step in range(60) if config.decides_at(step)] == [30, 40, 50]
    assert not any(rank.AdaptiveRankConfig().decides_at(step) for step in range(1000))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"energy": 0.0}, "energy"),
        ({"energy": 1.5}, "energy"),
        ({"every": 0}, "every"),
        ({"floor": 0}, "floor"),
        ({"multiple": 0}, "multiple"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"max_rank": 3}, "max_rank"),
        ({"headroom": -0.1}, "headroom"),
        ({"hysteresis": 1.0}, "hysteresis"),
        ({"energy": None, "budget_neutral": True}, "budget_neutral"),
    ],
    ids=str,
)
def test_validate_names_the_field(changes, field):
    config = rank.AdaptiveRankConfig(**({"energy": 0.9} | changes))
    with pytest.raises(errors.UserError, match=rf"^adaptive_rank\.{field}: "):
        config.validate()


def test_fields_without_energy_are_unused():
    config = rank.AdaptiveRankConfig(floor=8, headroom=0.2)
    fields = [sentence.partition(":")[0] for sentence in config.unused_fields()]
    assert fields == ["adaptive_rank.floor", "adaptive_rank.headroom"]
    assert not dataclasses.replace(config, energy=0.9).unused_fields()


# --- resize ----------------------------------------------------------------------


def test_shrinking_loses_what_eckart_and_young_say():
    tree, state = trained()
    active = {"layers/q": np.array([3, 7])}
    new, _ = resized(tree, state, active, {"layers/q": 8})
    old, w = tree["layers"]["q"], new["layers"]["q"]
    assert w.u.shape == (2, 20, 8)
    for layer, kept in enumerate([3, 7]):
        before = reference.dense(*(x[layer] for x in old))
        after = reference.dense(*(x[layer] for x in w))
        lost = np.sort(np.abs(np.asarray(old.s[layer])))[::-1][kept:]
        error = np.linalg.norm(before - after)
        assert error == pytest.approx(np.linalg.norm(lost), rel=1e-5)
        assert np.count_nonzero(w.s[layer]) == kept
        assert np.all(np.diff(np.abs(w.s[layer])) <= 0)
    for x in (w.u, w.v):
        assert reference.orthonormality_error(x) < 4e-6
    untouched = jax.tree.map(np.array_equal, new["embedding"], tree["embedding"])
    assert all(untouched)


def test_growing_keeps_w_exactly():
    (tree, state), (new, _) = trained(), changed()
    old, w = tree["embedding"], new["embedding"]
    assert w.u.shape == (14, 12)
    order = np.argsort(-np.abs(np.asarray(old.s)))
    np.testing.assert_array_equal(w.u[:, :8], np.asarray(old.u)[:, order])
    np.testing.assert_array_equal(w.s[:8], np.asarray(old.s)[order])
    np.testing.assert_array_equal(w.s[8:], 0)
    for x in (w.u, w.v):
        assert reference.orthonormality_error(x) < 4e-6
    other, _ = resized(tree, state, ACTIVE, RANKS, seed=1)
    assert not np.allclose(other["embedding"].u[:, 8:], w.u[:, 8:])


def test_a_full_rank_can_be_reached():
    tree, state = trained()
    new, _ = resized(tree, state, {"embedding": np.array(14)}, {"embedding": 14})
    for x in (new["embedding"].u, new["embedding"].v):
        assert reference.orthonormality_error(x) < 4e-6


STIEFEL_MUON = optax.chain(
    transforms.scale_by_stiefel_muon(),
    optax.scale(-0.01),
    transforms.freeze_inactive_columns(),
    transforms.retract_to_stiefel(),
)


@pytest.mark.parametrize("tx", [TSVD, STIEFEL_MUON], ids=["tsvd", "stiefel muon"])
def test_moments_follow_their_columns(tx):
    if tx is TSVD:
        (tree, state), (new, new_state) = trained(), changed()
    else:
        tree, state = train(params(), init=tx.init, update=jax.jit(tx.update))
        new, new_state = resized(tree, state, ACTIVE, RANKS)
    mu, new_mu = (optax.tree.get(x, "mu") for x in (state, new_state))
    for layer, kept in enumerate([3, 5]):
        order = np.argsort(-np.abs(np.asarray(tree["layers"]["q"].s[layer])))
        u = np.asarray(mu["layers"]["q"].u[layer])[:, order[:kept]]
        s = np.asarray(mu["layers"]["q"].s[layer])[order[:kept]]
        np.testing.assert_array_equal(new_mu["layers"]["q"].u[layer, :, :kept], u)
        np.testing.assert_array_equal(new_mu["layers"]["q"].s[layer, :kept], s)
        np.testing.assert_array_equal(new_mu["layers"]["q"].u[layer, :, kept:], 0)
    nu = optax.tree.get(new_state, "nu")
    old = optax.tree.get(state, "nu")["embedding"].s
    np.testing.assert_allclose(sorted(nu["embedding"].s[:8]), sorted(old))
    np.testing.assert_allclose(nu["embedding"].s[8:], np.mean(old), rtol=1e-6)
    np.testing.assert_array_equal(new_mu["embedding"].s[8:], 0)
    # The state has the shapes of a fresh one.
    fresh = jax.eval_shape(tx.init, new)
    assert jax.tree.map(jnp.shape, new_state) == jax.tree.map(jnp.shape, fresh)
    assert jax.tree.structure(new_state) == jax.tree.structure(fresh)


def test_columns_not_in_use_stay_at_zero_in_training():
    (tree, _), (after, state) = changed(), trained_after_a_change()
    for layer, kept in enumerate([3, 5]):
        s = np.asarray(after["layers"]["q"].s[layer])
        np.testing.assert_array_equal(s[kept:], 0)
        assert np.all(s[:kept] != np.asarray(tree["layers"]["q"].s[layer, :kept]))
    for x in (after["layers"]["q"].u, after["layers"]["q"].v):
        assert reference.orthonormality_error(x) < 4e-6
    np.testing.assert_array_equal(rank.weights(after, state)["layers/q"].active, [3, 5])


def test_new_columns_learn():
    after, _ = trained_after_a_change()
    assert np.all(after["embedding"].s[8:] != 0)


def test_first_steps_of_new_columns_are_no_longer_than_the_rate():
    tree, state = train(params(), steps=200)
    tree, state = resized(tree, state, ACTIVE, RANKS)
    longest = 0.0
    for _ in range(30):  # the same gradients each time: Adam's longest steps
        after, state = train(tree, steps=1, state=state)
        change = after["embedding"].s - tree["embedding"].s
        longest = max(longest, float(np.max(np.abs(change[8:]))))
        tree = after
    assert 0.3 * RATE < longest < 2 * RATE


def test_nothing_changes_where_all_columns_are_in_use():
    tree, state = trained()
    same = {name: w.rank for name, w in rank.weights(tree, state).items()}
    active = {"layers/q": np.full(2, 12), "embedding": np.array(8)}
    new, new_state = resized(tree, state, active, same)
    np.testing.assert_allclose(
        reference.dense(*new["layers"]["q"]),
        reference.dense(*tree["layers"]["q"]),
        rtol=0,
        atol=20 * EPS,
    )
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


class Net(NamedTuple):
    kernel: spectral.SpectralFactors
    bias: jax.Array


@pytest.mark.parametrize("root", ["attributes", "a weight"])
def test_params_may_be_of_any_kind(root):
    w = factors(16, 24, np.geomspace(1, 1e-3, 8))
    tree = Net(w, jnp.ones(24)) if root == "attributes" else w
    tree, state = train(tree)
    change = rank.next_change(tree, state, CONFIG)
    assert change is not None
    (stored,) = change.ranks.values()
    assert stored < 8
    tree, state = resized(tree, state, *change)
    for moment in ("mu", "nu"):
        of_factors = optax.tree.get(state, moment)
        assert {x.shape[-1] for x in jax.tree.leaves(of_factors)} <= {stored, 24}
    jax.eval_shape(update, tree, state, tree)


@pytest.mark.parametrize(
    ("active", "ranks", "field"),
    [
        ({"embeding": 4}, {"embeding": 4}, "ranks: .*embedding"),
        ({}, {"embedding": 4}, "ranks: embedding .*active"),
        ({"embedding": 4}, {}, "ranks: embedding .*ranks"),
        ({"embedding": 20}, {"embedding": 20}, r"ranks\.embedding: 20 .*14"),
        ({"embedding": 4}, {"embedding": 0}, r"ranks\.embedding: 0 .*1\.\.14"),
        ({"embedding": 4}, {"embedding": True}, r"ranks\.embedding: True .*integer"),
        ({"embedding": 4.0}, {"embedding": 4}, r"active\.embedding: .*integers"),
        ({"layers/q": 4}, {"layers/q": 4}, r"active\.layers/q: .*shape \(2,\)"),
    ],
    ids=str,
)
def test_a_resize_that_cannot_be_is_refused(active, ranks, field):
    tree, state = trained()
    with pytest.raises(errors.UserError, match=f"^{field}"):
        resized(tree, state, active, ranks)


@pytest.mark.parametrize("active", [[0, 4], [-1, 4], [3, 9]], ids=str)
def test_a_number_of_columns_that_cannot_be_is_refused(active):
    change = {"active": {"layers/q": np.array(active)}, "ranks": {"layers/q": 8}}
    with pytest.raises(errors.UserError, match=r"^active\.layers/q: .* in 1\.\.8"):
        rank.resize(*trained(), **change, key=jax.random.key(0))


@pytest.mark.parametrize("stored", [0, 99])
def test_a_recorded_rank_that_cannot_be_is_refused(stored):
    tree = params()
    with pytest.raises(errors.UserError, match=rf"^ranks\.embedding: {stored} .*14"):
        rank.with_ranks(tree, {"embedding": stored}, params=tree)


@pytest.mark.parametrize(
    "call",
    [
        rank.weights,
        lambda tree, state: resized(
            tree, state, {"embedding": np.array(4)}, {"embedding": 4}
        ),
    ],
    ids=["weights", "resize"],
)
def test_a_state_without_active_columns_is_refused(call):
    tree = params()
    state = jax.eval_shape(optimizers.sct(RATE).init, tree)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    with pytest.raises(errors.UserError, match=r"^optimizer\.name: .*freeze_inactive"):
        call(tree, state)


# --- Which entry of a state belongs to which weight ---------------------------------


def of_kernels(name):
    """Two weights called kernel, one of them below another name."""
    return lambda v, w: {"kernel": v, name: {"kernel": w}}


class Moments(NamedTuple):
    mu: object
    nu: object


class Pair(NamedTuple):
    first: object
    second: object


# Trees of two weights whose names occur in states, and the same with names that do not.
TREES = {
    "mu": (of_kernels("mu"), lambda v, w: {"a": v, "b": {"c": w}}),
    "nu": (of_kernels("nu"), lambda v, w: {"a": v, "b": {"c": w}}),
    "columns": (
        lambda v, w: {"columns": {"w": v}, "w": w},
        lambda v, w: {"a": {"b": v}, "c": w},
    ),
    "twice": (
        lambda v, w: {"mu": {"mu": v, "nu": w}},
        lambda v, w: {"a": {"b": v, "c": w}},
    ),
    "side by side": (
        lambda v, w: {"mu": v, "nu": w, "z": jnp.ones(3)},
        lambda v, w: {"a": v, "b": w, "z": jnp.ones(3)},
    ),
    "count": (
        lambda v, w: {"count": jnp.ones(3), "inner_state": [v, {"0": w}]},
        lambda v, w: {"a": jnp.ones(3), "b": [v, {"c": w}]},
    ),
    "attributes": (Moments, Pair),
    "attributes of weights": (
        lambda v, w: Moments(mu={"u": v}, nu={"active": w}),
        lambda v, w: Pair({"a": v}, {"b": w}),
    ),
}

FREEZE = transforms.freeze_inactive_columns()
WITH_LOW_PRECISION = optimizers.tsvd(RATE, moment_dtype="bfloat16")
TRANSPORTED = optax.chain(transforms.transport_moments(optax.scale_by_adam()), FREEZE)
SECOND = lambda tree: jax.tree.map(
    lambda w: w is weights_of(tree)[1], tree, is_leaf=spectral.is_factors
)


def weights_of(tree):
    leaves = jax.tree.leaves(tree, is_leaf=spectral.is_factors)
    return [w for w in leaves if spectral.is_spectral(w)]


STATES = {
    "tsvd": TSVD,
    "bfloat16": WITH_LOW_PRECISION,
    "stiefel muon": STIEFEL_MUON,
    "transport": TRANSPORTED,
    "svd": optimizers.tsvd(RATE, retraction="svd"),
    "masked": optax.chain(optax.masked(optax.scale_by_adam(), SECOND), FREEZE),
    "partition": optax.partition(
        {True: TSVD, False: optax.chain(optax.sgd(RATE, momentum=0.9), FREEZE)}, SECOND
    ),
    "accumulated": optax.MultiSteps(TSVD, 2),
    "injected": optax.inject_hyperparams(optimizers.tsvd)(RATE, retraction_every=2),
    "if finite": optax.apply_if_finite(TSVD, 3),
    "moments of moments": optax.named_chain(("mu", TSVD), ("nu", optax.trace(0.9))),
}


def drawn(tx, tree):
    """A state of random positive moments."""
    leaves, treedef = jax.tree.flatten(tx.init(tree))
    rng = np.random.default_rng(0)
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.unflatten(
        treedef,
        [
            jnp.asarray(rng.uniform(size=x.shape), x.dtype) if floating(x) else x
            for x in leaves
        ],
    )


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("tree", ["mu", "attributes"])
def test_names_decide_nothing_in_any_state(state, tree):
    check_that_names_decide_nothing(tree, STATES[state])


@pytest.mark.parametrize("tree", [tree for tree in TREES if tree != "mu"])
def test_names_decide_nothing_in_any_tree(tree):
    check_that_names_decide_nothing(tree, TSVD)


def check_that_names_decide_nothing(tree, tx):
    """One of two weights shrinks or grows, and all is as under harmless names."""
    pair = [factors(9, 7, [1.0, -3.0, 2.0, 0.5], seed) for seed in range(2)]
    for changed, (active, stored) in enumerate([(2, 3), (6, 6)]):
        results = []
        for build in TREES[tree]:
            tree_of_two = build(*pair)
            before = drawn(tx, tree_of_two)
            name = list(rank.weights(tree_of_two, before))[changed]
            new, after = rank.resize(
                tree_of_two,
                before,
                active={name: np.array(active)},
                ranks={name: stored},
                key=jax.random.key(0),
            )
            found = weights_of(new)
            assert found[changed].s.shape == (stored,)
            assert found[1 - changed] is pair[1 - changed]
            fresh = jax.eval_shape(tx.init, new)
            assert jax.tree.structure(after) == jax.tree.structure(fresh)
            assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, fresh)
            abstract = rank.with_ranks(
                jax.eval_shape(lambda: (tree_of_two, before)),  # noqa: B023
                {name: stored},
                params=tree_of_two,
            )
            assert jax.tree.map(jnp.shape, abstract[1]) == jax.tree.map(
                jnp.shape, after
            )
            results.append(jax.tree.leaves((new, after)))
        jax.tree.map(np.testing.assert_array_equal, *results)


def test_moments_of_a_weight_below_mu_follow_its_columns():
    v, w = (factors(9, 7, [1.0, -3.0, 2.0, 0.5], seed) for seed in range(2))
    tree = {"kernel": v, "mu": {"kernel": w}}
    state = drawn(TSVD, tree)
    _, after = rank.resize(
        tree,
        state,
        active={"mu/kernel": np.array(2)},
        ranks={"mu/kernel": 3},
        key=jax.random.key(0),
    )
    assert_equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    for moment in ("mu", "nu"):
        old, new = getattr(state[0], moment), getattr(after[0], moment)
        assert_equal(new["kernel"], old["kernel"])
        old, new = old["mu"]["kernel"], new["mu"]["kernel"]
        np.testing.assert_array_equal(new.u[:, :2], old.u[:, [1, 2]])
        np.testing.assert_array_equal(new.u[:, 2], 0)
        np.testing.assert_array_equal(new.s, [old.s[1], old.s[2], 0])


def test_a_dense_chain_of_other_weights_stays():
    """Spectron on low-rank factors beside spectral ones, which another chain trains."""
    w = factors(9, 7, [1.0, -3.0, 2.0, 0.5])
    tree = {"low": spectral.to_low_rank(w), "w": w, "norm": jnp.ones(9)}
    tx = optax.partition(
        {"low": optimizers.spectron(RATE), "w": TSVD, "norm": optax.adam(RATE)},
        {name: name for name in tree},
    )
    state = drawn(tx, tree)
    change = {"active": {"w": np.array(2)}, "ranks": {"w": 2}}
    new, after = rank.resize(tree, state, **change, key=jax.random.key(0))
    assert new["w"].s.shape == (2,)
    for label in ("low", "norm"):
        jax.tree.map(
            np.testing.assert_array_equal,
            after.inner_states[label],
            state.inner_states[label],
        )
    moments = optax.tree.get_all_with_path(after.inner_states["w"], "mu")
    assert {x.shape[-1] for x in jax.tree.leaves(moments[0][1])} == {2}


def test_entries_of_no_weight_are_refused():
    """The state of other parameters, and one whose arrays are not those of columns."""
    w = factors(9, 7, [1.0, -3.0, 2.0, 0.5])
    change = {"active": {"w": np.array(2)}, "ranks": {"w": 2}, "key": jax.random.key(0)}
    state = TSVD.init({"w": w})
    strange = (state, optax.scale_by_adam().init({"other": w}))
    with pytest.raises(
        errors.UserError, match=r"^opt_state: 1\.mu/other belongs to no"
    ):
        rank.resize({"w": w}, strange, **change)
    adafactor = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    tx = optax.chain(adafactor, FREEZE)
    with pytest.raises(errors.UserError, match=r"^opt_state: .* for w in v_row"):
        rank.resize({"w": w}, tx.init({"w": w}), **change)
    # Below that size it keeps whole moments, and arrays of one entry.
    tx = optax.chain(optax.scale_by_factored_rms(), FREEZE)
    new, after = rank.resize({"w": w}, tx.init({"w": w}), **change)
    fresh = jax.eval_shape(tx.init, new)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, fresh)


def test_two_weights_of_one_name_are_refused():
    w = factors(9, 7, [1.0, -3.0, 2.0, 0.5])
    with pytest.raises(errors.UserError, match=r"^params: two weights are called a/b"):
        rank.stored_ranks({"a/b": w, "a": {"b": w}})


# --- Any spectrum, and any dtype ----------------------------------------------------


@pytest.mark.parametrize(
    "s",
    [[0, 0, 0, 0], [1, 1, 1, 1], [-1, 1, -1, 1], [0, -2, 0, 2], [1e-30, 0, 1e30, -1]],
    ids=str,
)
@pytest.mark.parametrize("new_rank", [2, 4, 6])
def test_zeros_signs_and_ties_give_no_nan(s, new_rank):
    tree = {"w": factors(9, 7, np.asarray(s, np.float32))}
    state = drawn(TSVD, tree)
    assert rank.decide(rank.weights(tree, state), CONFIG)["w"] in range(2, 5)
    change = {"active": {"w": np.array(new_rank)}, "ranks": {"w": new_rank}}
    new, after = rank.resize(tree, state, **change, key=jax.random.key(0))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((new, after)))
    assert reference.orthonormality_error(new["w"].u) < 4e-6
    kept = sorted(np.abs(np.asarray(s, np.float32)), reverse=True)[:new_rank]
    np.testing.assert_array_equal(np.abs(new["w"].s)[: len(kept)], kept)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_layer_that_is_not_finite_keeps_its_columns(bad):
    s = np.ones((2, 10), np.float32)
    s[1, 3] = bad
    assert rank.decide(weight(s), CONFIG)["w"].tolist() == [9, 10]


def test_an_endless_headroom_ends_at_the_limit():
    config = dataclasses.replace(CONFIG, headroom=1e30)
    assert rank.decide(weight([1] * 10), config)["w"] == 16


@pytest.mark.parametrize("wide", [False, True])
def test_dtypes_stay(wide):
    dtypes = ("float32", "float64") if wide else ("float32", "bfloat16")
    with jax.enable_x64(wide):
        names = {f"w{i}": dtype for i, dtype in enumerate(dtypes)}
        tree = {
            name: jax.tree.map(
                lambda x, dtype=dtype: jnp.asarray(x, dtype), factors(9, 7, [1.0, -3.0])
            )
            for name, dtype in names.items()
        }
        state = drawn(TSVD, tree)
        new, after = rank.resize(
            tree,
            state,
            active={name: np.array(4) for name in names},
            ranks=dict.fromkeys(names, 4),
            key=jax.random.key(0),
        )
        kinds = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
        assert kinds((new, after)) == kinds((tree, state))
        for w in new.values():
            limit = 2e-2 if w.u.dtype == jnp.bfloat16 else 4e-6
            assert reference.orthonormality_error(w.u.astype(jnp.float32)) < limit


def test_no_axis_is_added_by_itself():
    tree, state = trained()
    with jax.numpy_rank_promotion("raise"):
        assert rank.next_change(tree, state, CONFIG) is not None
        jax.eval_shape(
            functools.partial(rank.resize, ranks=RANKS),
            tree,
            state,
            active=ACTIVE,
            key=jax.random.key(0),
        )


def test_abstract_trees_take_the_ranks_of_a_record():
    old, new = trained(), changed()
    assert rank.stored_ranks(new[0]) == RANKS
    abstract = rank.with_ranks(jax.eval_shape(lambda: old), RANKS, params=old[0])
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, new)


def test_num_parameters_counts_factors_alone():
    tree = params()
    expected = 2 * 12 * (20 + 16 + 1) + 8 * (14 + 18 + 1)
    assert rank.num_parameters(tree) == expected
    assert rank.num_parameters(jax.eval_shape(lambda: tree)) == expected
