"""Changes of rank and the loss, for any tree, state, spectrum and mask."""

import dataclasses
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference
from hypothesis import strategies as st

from sct_jax import losses, optimizers, rank, spectral, transforms

EPS = float(np.finfo(np.float32).eps)
FAN_IN = FAN_OUT = 6  # equal, as every shape compiles anew

quick = hypothesis.settings(derandomize=True, deadline=None, max_examples=15)


class Moments(NamedTuple):
    mu: Any
    nu: Any


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight to draw, and what to change it to."""

    s: tuple[float, ...]
    stacked: bool
    ranks: tuple[int, int, int]  # stored, active in the first layer, in the second


ENTRIES = st.sampled_from([0.0, 1.0, -1.0, 2.0, 0.5, -1e-20, 3e19])
NAMES = st.sampled_from(["mu", "nu", "count", "kernel", "columns"])


@st.composite
def weights(draw):
    s = draw(st.lists(ENTRIES, min_size=4, max_size=4))
    s = s[: draw(st.sampled_from([1, 4]))]
    stored = draw(st.sampled_from([2, 6]))
    active = st.integers(1, stored)
    return Weight(tuple(s), draw(st.booleans()), (stored, draw(active), draw(active)))


TREES = st.recursive(
    weights() | st.just("dense"),
    lambda below: (
        st.dictionaries(NAMES, below, min_size=1, max_size=3)
        | st.tuples(below, below)
        | st.builds(Moments, below, below)
    ),
    max_leaves=4,
).filter(lambda tree: any(map(is_weight, jax.tree.leaves(tree, is_leaf=is_weight))))

ADAM = (optax.ScaleByAdamState, transforms.StiefelMuonState)
FREEZE = transforms.freeze_inactive_columns()
STATES = st.sampled_from(
    [
        optimizers.tsvd(1e-3),
        optimizers.tsvd(1e-3, moment_dtype="bfloat16"),
        optax.MultiSteps(optimizers.tsvd(1e-3), 2),
        optax.chain(
            optax.partition(
                {True: transforms.scale_by_stiefel_muon(), False: optax.adam(1e-3)},
                lambda tree: jax.tree.map(
                    spectral.is_spectral, tree, is_leaf=spectral.is_factors
                ),
            ),
            FREEZE,
        ),
    ]
)


def is_weight(x):
    return isinstance(x, Weight)


def build(tree):
    """Parameters, with weights drawn in the order of the tree."""
    specs, treedef = jax.tree.flatten(tree, is_leaf=is_weight)
    rng = np.random.default_rng(0)

    def weight(spec):
        layers, r = (2,) if spec.stacked else (), len(spec.s)
        u, v = (
            reference.signed_qr(rng.normal(size=(*layers, n, r)))
            for n in (FAN_IN, FAN_OUT)
        )
        s = np.stack([spec.s, spec.s[::-1]]) if spec.stacked else np.array(spec.s)
        return spectral.SpectralFactors(
            *(jnp.asarray(x, jnp.float32) for x in (u, s, v))
        )

    return treedef.unflatten(
        [weight(x) if is_weight(x) else jnp.ones((3, 2)) for x in specs]
    )


def build_state(tx, params):
    """A state of random moments, none of them zero."""
    rng = np.random.default_rng(1)

    def fill(x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jnp.asarray(rng.uniform(0.5, 1, size=x.shape), x.dtype)

    return jax.tree.map(fill, tx.init(params))


def owners(tx, tree):
    """Per leaf of the state, the number of the weight that it belongs to, or None.

    Read from shapes that differ between all weights, never from names.
    """
    specs, treedef = jax.tree.flatten(tree, is_leaf=is_weight)

    def tagged(i, spec):
        if not is_weight(spec):
            return jax.ShapeDtypeStruct((3, 2), jnp.float32)
        layers = (2,) if spec.stacked else ()
        tag = 100 + i
        shapes = [(*layers, 1000, tag), (*layers, tag), (*layers, 2000, tag)]
        return spectral.SpectralFactors(
            *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        )

    tags = treedef.unflatten([tagged(i, spec) for i, spec in enumerate(specs)])
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, tags))
    columns = [(0, *leaf.shape)[-1] for leaf in leaves]
    return [tag - 100 if tag >= 100 else None for tag in columns]


def roles(state):
    """Per leaf of the state, whether it is a second moment."""

    def of(node, second):
        return jax.tree.map(lambda _: second, node)

    def mark(node):
        if isinstance(node, ADAM):
            return node._replace(
                count=False, mu=of(node.mu, False), nu=of(node.nu, True)
            )
        return False

    marked = jax.tree.map(mark, state, is_leaf=lambda x: isinstance(x, ADAM))
    return jax.tree.leaves(marked)


def layers_of(x, s):
    """The matrices, or rows, of x per layer of s."""
    return np.asarray(x) if np.ndim(s) > 1 else np.asarray(x)[None]


def check_columns(old, new, s, spec, *, second):
    """One array of moments of one weight, before and after its change."""
    stored, *active = spec.ranks
    pairs = zip(layers_of(old, s), layers_of(new, s), strict=True)
    for layer, (x, y) in enumerate(pairs):
        order = np.argsort(-np.abs(layers_of(s, s)[layer]), kind="stable")
        in_use = active[layer]
        if x.dtype == bool:
            np.testing.assert_array_equal(y, np.arange(stored) < in_use)
            continue
        kept = x[..., order][..., :in_use]
        width = kept.shape[-1]
        np.testing.assert_array_equal(y[..., :width], kept)
        fresh, unused = y[..., width:in_use], y[..., in_use:]
        np.testing.assert_array_equal(unused, 0)
        if second:
            mean = np.mean(x[..., order][..., :stored].astype(np.float64), -1)
            expected = np.broadcast_to(mean[..., None], fresh.shape)
            rounding = float(jnp.finfo(x.dtype).eps)
            fresh = fresh.astype(np.float64)
            np.testing.assert_allclose(fresh, expected, rtol=4 * rounding)
        else:
            np.testing.assert_array_equal(fresh, 0)


@quick
@hypothesis.given(TREES, STATES, st.data())
def test_a_change_of_some_weights(tree, tx, data):
    """Only they change; columns and their moments move together; W loses the least."""
    specs = jax.tree.leaves(tree, is_leaf=is_weight)
    params = build(tree)
    state = build_state(tx, params)
    names = iter(rank.weights(params, state))
    named = {next(names): i for i, spec in enumerate(specs) if is_weight(spec)}
    chosen = data.draw(st.sets(st.sampled_from(sorted(named)), min_size=1))
    active = {}
    for name in chosen:
        spec = specs[named[name]]
        active[name] = np.array(spec.ranks[1:] if spec.stacked else spec.ranks[1])
    ranks = {name: specs[named[name]].ranks[0] for name in chosen}
    new, after = rank.resize(
        params, state, active=active, ranks=ranks, key=jax.random.key(0)
    )

    changed = {named[name] for name in chosen}
    is_node = spectral.is_factors
    olds, news = (jax.tree.leaves(x, is_leaf=is_node) for x in (params, new))
    for i, (old, w) in enumerate(zip(olds, news, strict=True)):
        if i not in changed:
            assert jax.tree.leaves(w) == jax.tree.leaves(old)
            continue
        stored, *counts = specs[i].ranks
        for layer, s in enumerate(layers_of(old.s, old.s)):
            order = np.argsort(-np.abs(s), kind="stable")[:stored]
            u, v = (layers_of(x, old.s)[layer][:, order] for x in (old.u, old.v))
            found = [layers_of(x, old.s)[layer] for x in w]
            assert all(np.all(np.isfinite(x)) for x in found)
            np.testing.assert_array_equal(found[0][:, : len(order)], u)
            np.testing.assert_array_equal(found[2][:, : len(order)], v)
            expected = np.zeros(stored, np.float32)
            expected[: len(order)] = s[order]
            expected[counts[layer] :] = 0
            np.testing.assert_array_equal(found[1], expected)
        for x in (w.u, w.v):
            assert reference.orthonormality_error(x) < 4e-6

    fresh = jax.eval_shape(tx.init, new)
    assert jax.tree.structure(after) == jax.tree.structure(fresh)
    leaves = zip(
        *(jax.tree.leaves(x) for x in (state, after, fresh)),
        owners(tx, tree),
        roles(state),
        strict=True,
    )
    for old, x, like, owner, second in leaves:
        assert (x.shape, x.dtype) == (like.shape, like.dtype)
        if owner not in changed:
            np.testing.assert_array_equal(x, old)
            continue
        check_columns(old, x, olds[owner].s, specs[owner], second=second)


@quick
@hypothesis.given(weights(), STATES)
def test_growing_and_shrinking_back_only_sorts(spec, tx):
    params = {"w": build(spec)}
    state = build_state(tx, params)
    stored, layers = len(spec.s), (2,) if spec.stacked else ()
    sort = lambda tree, state, rank_: rank.resize(
        tree,
        state,
        active={"w": np.full(layers, rank_)},
        ranks={"w": rank_},
        key=jax.random.key(0),
    )
    expected = sort(params, state, stored)
    found = sort(*sort(params, state, 6), stored)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


CONFIGS = st.builds(
    rank.AdaptiveRankConfig,
    energy=st.sampled_from([0.3, 0.9, 1.0]),
    floor=st.sampled_from([1, 2, 9]),
    max_rank=st.sampled_from([None, 9]),
    multiple=st.sampled_from([1, 4]),
    headroom=st.sampled_from([0.0, 0.5, 1e6]),
    hysteresis=st.sampled_from([0.0, 0.5]),
    budget_neutral=st.booleans(),
)


@quick
@hypothesis.given(TREES, CONFIGS, st.integers(1, 2000))
def test_a_decision_can_always_be_carried_out(tree, config, budget):
    config.validate()
    params = build(tree)
    state = optimizers.tsvd(1e-3).init(params)
    found = rank.weights(params, state)
    change = rank.next_change(params, state, config, budget=budget)
    if change is None:
        return
    after = jax.eval_shape(
        lambda active: rank.resize(
            params, state, active=active, ranks=change.ranks, key=jax.random.key(0)
        ),
        change.active,
    )
    assert rank.stored_ranks(after[0]) == change.ranks
    cost = rank.num_parameters(after[0])
    assert cost <= budget or not config.budget_neutral
    for name, w in found.items():
        active, limit = change.active[name], min(FAN_IN, FAN_OUT)
        assert np.all((active >= 1) & (active <= change.ranks[name]))
        assert change.ranks[name] <= limit
        if config.budget_neutral:
            continue
        squares = np.sort(np.square(np.asarray(w.s, np.float64)), axis=-1)[..., ::-1]
        total = np.sum(squares, -1)
        kept = np.sum(np.where(np.arange(w.rank) < active[..., None], squares, 0), -1)
        assert np.all(kept >= config.energy * total * (1 - 1e-5))
        floor = min(config.floor, limit)
        assert np.all((active >= floor) | (active == w.active))


# --- the loss -----------------------------------------------------------------------

VOCAB = 5
LOSS = jax.jit(
    jax.value_and_grad(losses.next_token_cross_entropy), static_argnames="z_loss"
)


@quick
@hypothesis.given(
    st.lists(
        st.tuples(
            st.sampled_from([-100, -1, 0, 1, 4]),
            st.sampled_from([0, 1, 3]),
            st.sampled_from([np.nan, np.inf, 1e30]),
        ),
        min_size=6,
        max_size=6,
    ),
    st.sampled_from([None, "float32", "bfloat16", "int8", "bool"]),
    st.sampled_from([0.0, 0.1]),
    st.integers(0, 99),
)
def test_the_loss_is_that_of_the_positions_that_count(positions, dtype, z_loss, seed):
    targets = np.array([target for target, *_ in positions], np.int32)
    weights = np.array([weight for _, weight, _ in positions], np.float32)
    spoilt = np.array([value for *_, value in positions], np.float32)
    if dtype is None:
        weights, mask = np.ones(6), None
    else:
        mask = jnp.asarray(weights, dtype)
        weights = np.asarray(mask, np.float64)
    counts = (targets >= 0) & (weights > 0)
    logits = np.random.default_rng(seed).normal(scale=3, size=(6, VOCAB))
    logits = np.where(counts[:, None], logits, spoilt[:, None]).astype(np.float32)
    value, grad = LOSS(logits, targets, mask=mask, z_loss=z_loss)
    kept = logits[counts], targets[counts]
    expected = reference.next_token_cross_entropy(*kept, weights[counts], z_loss)
    np.testing.assert_allclose(value, expected, rtol=16 * EPS)
    np.testing.assert_array_equal(grad[~counts], 0)
    assert np.all(np.isfinite(grad))
    if counts.any():
        shares = weights[counts] / weights[counts].sum()
        wide = kept[0].astype(np.float64)
        p = np.exp(wide - wide.max(-1, keepdims=True))
        log_z = np.log(p.sum(-1, keepdims=True)) + wide.max(-1, keepdims=True)
        p /= p.sum(-1, keepdims=True)
        slope = p * (1 + 2 * z_loss * log_z) - np.eye(VOCAB)[kept[1]]
        slope *= shares[:, None]
        np.testing.assert_allclose(grad[counts], slope, rtol=1e-4, atol=1e-6)
