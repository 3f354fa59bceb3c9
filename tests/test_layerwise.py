"""The layerwise step against the ordinary one, for every chain with local rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sct_jax import errors, model, optimizers, sharding, spectral
from sct_jax.training import config, layerwise
from sct_jax.training import state as state_lib
from sct_jax.training import step as step_lib

EPS = float(np.finfo(np.float32).eps)
SMALL = model.ModelConfig(
    d_model=32,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=64,
    rank=4,
    spectral=model.BLOCK_MATRICES,
    scan_layers=False,
)
LOW_RANK = dataclasses.replace(SMALL, factors="low_rank")
DENSE = dataclasses.replace(SMALL, spectral=())
RATE = 0.01
# Of b1 and b2 sums, an inverse root and a retraction, over three steps of rate RATE,
# with Adam's epsilon far above the rounding of a gradient.
CLOSE = 256 * EPS * RATE + 16 * EPS


def draw_batch(rows=2, length=6, vocab_size=64):
    ids = np.random.default_rng(0).integers(vocab_size, size=(rows, length + 1))
    ids = jnp.asarray(ids, jnp.int32)
    segments = jnp.cumsum(ids[:, :-1] == 0, axis=1, dtype=jnp.int32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:], "segment_ids": segments}


def build(optimizer=None, shape=SMALL, mesh=None):
    """The chain, and the layerwise step."""
    optimizer = optimizer or chain()
    tx = optimizer.build(
        10, decay_mask=model.decay_mask, matrix_mask=model.hidden_matrices
    )
    return tx, layerwise.make_train_step(layerwise.stack_of(shape), tx, mesh=mesh)


def chain(**fields):
    fields = {"eps": 1e-3, "schedule": "constant"} | fields
    return optimizers.OptimizerConfig(peak_learning_rate=RATE, **fields)


def assert_close(found, wanted, tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        x, y = (np.asarray(a, np.float64) for a in (x, y))
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


CHAINS = {
    "sct": (chain(), SMALL),
    "rates": (chain(singular_value_lr_multiplier=3.0, dense_lr_multiplier=0.5), SMALL),
    "clip": (
        chain(max_update_norm=0.02, weight_decay=0.1),
        dataclasses.replace(SMALL, tie_embeddings=False),
    ),
    "all spectral": (
        chain(),
        dataclasses.replace(SMALL, tie_embeddings=False, spectral=model.MATRICES),
    ),
    "tied and spectral": (
        chain(),
        dataclasses.replace(SMALL, spectral=(*model.BLOCK_MATRICES, "embedding")),
    ),
    "some dense": (chain(), dataclasses.replace(SMALL, spectral=model.MLP)),
    "ranks": (
        chain(),
        dataclasses.replace(SMALL, ranks=model.MatrixRanks(q=3, down=7)),
    ),
    "lossless": (chain(retraction="lossless", max_update_norm=0.02), SMALL),
    "transport": (chain(transport_moments=True, tangent_projection="gradient"), SMALL),
    "lazy": (chain(name="tsvd", retraction_every=2), SMALL),
    "stiefel_muon": (chain(name="stiefel_muon"), SMALL),
    "spectron": (chain(name="spectron"), LOW_RANK),
    "adamw": (chain(name="adamw", weight_decay=0.1), LOW_RANK),
    "muon": (chain(name="muon"), DENSE),
}


# Each compiles for half a minute; these two cover factors and dense matrices.
FAST = ("spectron", "muon")


@pytest.mark.parametrize(
    "name",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CHAINS],
)
def test_the_step_is_the_ordinary_one(name):
    optimizer, shape = CHAINS[name]
    tx, step = build(optimizer, shape)
    draw = jax.jit(lambda key: state_lib.init(key, shape, tx))
    ordinary = jax.jit(step_lib.make_train_step(shape, tx))
    state, expected = step.init(jax.random.key(0)), draw(jax.random.key(0))
    assert_close(state, expected, 16 * EPS)
    batch = draw_batch()
    for _ in range(3):
        # From the same state each time: what is compared is one step.
        state = jax.tree.map(jnp.copy, expected)
        state, metrics = step(state, batch, True)
        expected, wanted = ordinary(expected, batch, jnp.array(True))
        assert_close(state.params, expected.params, CLOSE)
        assert_close(state.opt_state, expected.opt_state, CLOSE)
        assert int(state.step) == int(expected.step)
        assert metrics.keys() == wanted.keys()
        for key in wanted:
            slack = 4e-6 if key == "orthonormality_error" else 1e-4 * wanted[key]
            assert abs(metrics[key] - wanted[key]) <= slack, key


@pytest.mark.parametrize("rows", [1, layerwise._FEW_ROWS, layerwise._FEW_ROWS + 1])
@pytest.mark.parametrize("shape", [SMALL, LOW_RANK], ids=["spectral", "low_rank"])
def test_a_known_bottleneck_has_the_gradient_of_linear(rows, shape):
    w = spectral.init(jax.random.key(0), 12, 20, 5)
    if shape is LOW_RANK:
        w = spectral.to_low_rank(w)
    x, dy = (
        jax.random.normal(jax.random.key(1), (rows, 12)),
        jax.random.normal(jax.random.key(2), (rows, 20)),
    )
    h = spectral.contract(x, w)
    y, pull_back = jax.vjp(spectral.linear, x, w)
    found_y, found = jax.vjp(lambda x, w: layerwise._expand_known(x, w, h), x, w)
    np.testing.assert_array_equal(found_y, y)
    # Sums of up to 20 products of numbers of size 1.
    assert_close(found(dy), pull_back(dy), 64 * EPS)


@pytest.mark.slow
def test_bfloat16_moments_take_the_same_step():
    tx, step = build(chain(moment_dtype="bfloat16"))
    ordinary = jax.jit(step_lib.make_train_step(SMALL, tx))
    expected = step.init(jax.random.key(0))
    state, batch = jax.tree.map(jnp.copy, expected), draw_batch()
    for _ in range(3):
        state, _ = step(state, batch, False)
        expected, _ = ordinary(expected, batch, jnp.array(False))
    # A gradient that differs by rounding may round a moment to the other neighbour.
    assert_close(state.params, expected.params, 3 * RATE * 2**-6)


def test_the_state_is_donated_and_nothing_compiles_twice():
    _, step = build()
    state, batch = step.init(jax.random.key(0)), draw_batch()
    compiled = ("_forward", "_block_grads", "_update", "_leave_grads", "_enter_grads")
    sizes = []
    for _ in range(2):
        before = state
        state, _ = step(state, batch, False)
        jax.block_until_ready(state)
        assert all(x.is_deleted() for x in jax.tree.leaves(before.params))
        sizes.append([getattr(step, name)._cache_size() for name in compiled])
    assert sizes[0] == sizes[1]
    # One function for the ends, one per matrix, whatever the number of layers.
    assert sizes[0][2] <= len(model.BLOCK_MATRICES) + 2


def test_fewer_layers_are_the_first_ones():
    _, step = build()
    whole = step.init(jax.random.key(3))
    small = step.init(jax.random.key(3), num_layers=1)
    assert len(small.params["layers"]) == 1
    assert_close(small.params["layers"][0], whole.params["layers"][0], 0)


@pytest.mark.slow
def test_eight_devices_take_the_step_of_one():
    batch = draw_batch(rows=8)
    _, single = build()
    expected, wanted = single(single.init(jax.random.key(0)), batch, True)
    mesh = sharding.MeshConfig(data=2, fsdp=2, tensor=2).build()
    _, step = build(mesh=mesh)
    state = step.init(jax.random.key(0))
    places = sharding.shardings(state, mesh)
    state = jax.device_put(state, places)
    rows = jax.sharding.NamedSharding(mesh, sharding.BATCH)
    state, metrics = step(state, jax.device_put(batch, rows), True)
    assert_close(state.params, expected.params, 4 * CLOSE)
    assert abs(metrics["loss"] - wanted["loss"]) <= 64 * EPS * wanted["loss"]
    for leaf, place in zip(
        jax.tree.leaves((state.params, state.opt_state)),
        jax.tree.leaves((places.params, places.opt_state)),
        strict=True,
    ):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"optimizer.grad_clip": "1.0"}, "optimizer.grad_clip"),
        (
            {"optimizer.name": "tsvd", "optimizer.retraction_tolerance": "1e-3"},
            "optimizer.retraction_tolerance",
        ),
        ({"model.scan_layers": "true"}, "model.scan_layers"),
        ({"data.num_microbatches": "2"}, "data.num_microbatches"),
    ],
)
def test_what_is_not_local_is_refused(changes, field):
    experiment = config.ExperimentConfig(step="layerwise", model=SMALL)
    experiment.validate()
    for name, value in changes.items():
        experiment = config.override(experiment, name, value)
    with pytest.raises(errors.UserError, match=f"^{field}: .*layerwise"):
        experiment.validate()
