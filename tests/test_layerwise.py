"""The layerwise step against the fused one, for every chain with local rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import samples

from sct_jax import errors, model, sharding, spectral
from sct_jax.training import config, layerwise, optimizer_config, overrides
from sct_jax.training import state as state_lib
from sct_jax.training import step as step_lib

EPS = float(np.finfo(np.float32).eps)
SMALL = dataclasses.replace(samples.SMALL, scan_layers=False)
LOW_RANK = dataclasses.replace(SMALL, factors="low_rank")
DENSE = dataclasses.replace(SMALL, spectral=())
# Two matrices as factors, the others dense: fewer functions to compile.
TWO_LOW_RANK = dataclasses.replace(LOW_RANK, spectral=("q", "down"))
LEARNING_RATE = 0.01
# Rounding of moments, inverse root and retraction over three steps. Adam's epsilon is
# far above the rounding of a gradient.
CLOSE = 256 * EPS * LEARNING_RATE + 16 * EPS


def draw_batch(rows=2, length=6, vocab_size=64):
    ids = np.random.default_rng(0).integers(vocab_size, size=(rows, length + 1))
    ids = jnp.asarray(ids, jnp.int32)
    segments = jnp.cumsum(ids[:, :-1] == 0, axis=1, dtype=jnp.int32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:], "segment_ids": segments}


def build(optimizer=None, shape=SMALL, placement=sharding.UNPLACED):
    """Returns the chain, and the layerwise step."""
    optimizer = optimizer or chain()
    tx = optimizer.build(
        10, decay_mask=model.decay_mask, matrix_mask=model.hidden_matrices
    )
    return tx, layerwise.make_train_step(
        layerwise.stack_of(shape, placement), tx, placement=placement
    )


def chain(kind=optimizer_config.Sct, **fields):
    fields = {"eps": 1e-3, "schedule": "constant"} | fields
    return kind(peak_learning_rate=LEARNING_RATE, **fields)


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
    "svd": (chain(retraction="svd", max_update_norm=0.02), SMALL),
    "transport": (chain(transport_moments=True, tangent_projection="gradient"), SMALL),
    "lazy": (chain(optimizer_config.Tsvd, retraction_every=2), SMALL),
    "stiefel_muon": (chain(optimizer_config.StiefelMuon), SMALL),
    "spectron": (chain(optimizer_config.Spectron), LOW_RANK),
    "two low rank": (chain(optimizer_config.Spectron), TWO_LOW_RANK),
    "adamw": (chain(optimizer_config.AdamW, weight_decay=0.1), LOW_RANK),
    "muon": (chain(optimizer_config.Muon), DENSE),
}


# The others compile for half a minute each. This one has factors and dense matrices.
FAST = ("two low rank",)


@pytest.mark.parametrize(
    "name",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CHAINS],
)
def test_the_step_is_the_fused_one(name):
    optimizer, shape = CHAINS[name]
    tx, step = build(optimizer, shape)
    init = jax.jit(lambda key: state_lib.init(key, shape, tx))
    fused = jax.jit(step_lib.make_train_step(shape, tx))
    state, expected = step.init(jax.random.key(0)), init(jax.random.key(0))
    assert_close(state, expected, 16 * EPS)
    batch = draw_batch()
    for _ in range(3):
        # From the same state each time, to compare single steps.
        state = jax.tree.map(jnp.copy, expected)
        state, metrics = step(state, batch, True)
        expected, wanted = fused(expected, batch, jnp.array(True))
        assert_close(state.params, expected.params, CLOSE)
        assert_close(state.opt_state, expected.opt_state, CLOSE)
        assert int(state.step) == int(expected.step)
        assert metrics.keys() == wanted.keys()
        for key in wanted:
            slack = 4e-6 if key == "orthonormality_error" else 1e-4 * wanted[key]
            assert abs(metrics[key] - wanted[key]) <= slack, key


def test_any_remat_takes_the_same_step(monkeypatch):
    """Also with more tokens than the "full" one computes at a time."""
    monkeypatch.setattr(model, "MLP_TOKENS", 4)
    optimizer, shape = CHAINS["two low rank"]
    losses = []
    for remat in ("none", "full"):
        _, step = build(optimizer, dataclasses.replace(shape, remat=remat))
        state = step.init(jax.random.key(0))
        losses.append([])
        for _ in range(2):
            state, metrics = step(state, draw_batch(), True)
            losses[-1].append(float(metrics["loss"]))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("rows", [1, layerwise._FEW_ROWS, layerwise._FEW_ROWS + 1])
@pytest.mark.parametrize("shape", [SMALL, LOW_RANK], ids=["spectral", "low_rank"])
def test_a_known_bottleneck_has_the_gradient_of_linear(rows, shape):
    rng = np.random.default_rng(0)
    u, s, v, x, dy = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((12, 5), (5,), (20, 5), (rows, 12), (rows, 20))
    )
    w = spectral.SpectralFactors(u, s, v)
    if shape is LOW_RANK:
        w = spectral.LowRankFactors(u, v)
    h = spectral.contract(x, w)
    y, pull_back = jax.vjp(spectral.linear, x, w)
    found_y, found = jax.vjp(lambda x, w: layerwise._expand_known(x, w, h), x, w)
    np.testing.assert_array_equal(found_y, y)
    # Sums of up to 20 products of numbers of order 1, twice.
    assert_close(found(dy), pull_back(dy), 256 * EPS)


@pytest.mark.slow
def test_bfloat16_moments_take_the_same_step():
    tx, step = build(chain(moment_dtype="bfloat16"))
    fused = jax.jit(step_lib.make_train_step(SMALL, tx))
    expected = step.init(jax.random.key(0))
    state, batch = jax.tree.map(jnp.copy, expected), draw_batch()
    for _ in range(3):
        state, _ = step(state, batch, False)
        expected, _ = fused(expected, batch, jnp.array(False))
    # Gradients that differ by rounding may round a moment to the other neighbour.
    assert_close(state.params, expected.params, 3 * LEARNING_RATE * 2**-6)


@pytest.fixture(scope="module")
def dense_step():
    """A step that compiles fast."""
    return build(chain(optimizer_config.AdamW), DENSE)[1]


def compiled_functions(step):
    """How many there are: of each pass, and of the update."""
    passes = ("_forward", "_block_grads", "_head_grads", "_embed_grads")
    updates = sum(update._cache_size() for update in step._updates.values())
    return [getattr(step, name)._cache_size() for name in passes], updates


def test_the_state_is_donated_and_nothing_compiles_twice(dense_step):
    state, batch = dense_step.init(jax.random.key(0)), draw_batch()
    found = []
    for _ in range(2):
        before = state
        state, _ = dense_step(state, batch, False)
        jax.block_until_ready(state)
        assert all(x.is_deleted() for x in jax.tree.leaves(before.params))
        found.append(compiled_functions(dense_step))
    assert found[0] == found[1]
    # Head and embedding, and one function per shape of matrix, not per layer.
    assert found[0][1] <= len(model.BLOCK_MATRICES) + 2


def test_nothing_compiles_twice_on_a_mesh():
    mesh = sharding.MeshConfig(data=1, fsdp=2, tensor=2).build(4)
    _, step = build(
        chain(optimizer_config.AdamW), DENSE, placement=sharding.Placement(mesh)
    )
    state = step.init(jax.random.key(0))
    places = sharding.shardings(state, mesh)
    state, found = jax.device_put(state, places), []
    rows = jax.sharding.NamedSharding(mesh, sharding.BATCH)
    batch = jax.device_put(draw_batch(), rows)
    for _ in range(2):
        state, _ = step(state, batch, False)
        found.append(compiled_functions(step))
    assert found[0] == found[1]
    passes, updates = found[0]
    assert passes == [1, 1, 1, 1]
    assert updates <= len(model.BLOCK_MATRICES) + 2


def test_fewer_layers_are_the_first_ones(dense_step):
    full = dense_step.init(jax.random.key(3))
    small = dense_step.init(jax.random.key(3), num_layers=1)
    assert len(small.params["layers"]) == 1
    assert_close(small.params["layers"][0], full.params["layers"][0], 0)


@pytest.mark.parametrize(
    ("sizes", "flattened"), [(None, True), ({"fsdp": 1}, True), ({"fsdp": 8}, False)]
)
def test_rows_are_joined_on_one_device_alone(monkeypatch, sizes, flattened):
    """In the dense matrices of a layer, and in the head."""
    seen = set()

    def linear(x, w, *, flatten_rows, constrain):
        seen.add((w.shape, flatten_rows))
        return x @ w

    monkeypatch.setattr(spectral, "linear", linear)
    placement = sharding.UNPLACED
    if sizes:
        mesh = sharding.MeshConfig(**sizes).build(sizes["fsdp"])
        placement = sharding.Placement(mesh)
    step = layerwise.make_train_step(
        layerwise.stack_of(DENSE), optax.sgd(1.0), placement=placement
    )
    params = jax.eval_shape(step.init, jax.random.key(0)).params
    x, batch = jnp.ones((2, 6, DENSE.d_model)), draw_batch()
    jax.eval_shape(step._forward_fn, params["layers"][0], x, batch)
    ends = {name: params[name] for name in ("embedding", "final_norm")}
    jax.eval_shape(step._head_grads_fn, ends, {}, x, batch)
    shapes = {(32, 32), (32, 16), (32, 48), (48, 32), (32, 64)}
    assert seen == {(shape, flattened) for shape in shapes}


@pytest.mark.slow
def test_eight_devices_take_the_step_of_one():
    batch = draw_batch(rows=8)
    _, single = build()
    expected, wanted = single(single.init(jax.random.key(0)), batch, True)
    mesh = sharding.MeshConfig(data=2, fsdp=2, tensor=2).build()
    _, step = build(placement=sharding.Placement(mesh))
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
        experiment = overrides.override(experiment, name, value)
    with pytest.raises(errors.UserError, match=f"^{field}: .*layerwise"):
        experiment.validate()
