"""One trainer: its state, its step, evaluation, changes of rank, on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from samples import SHAPE

from sct_jax import data, errors, model, rank, sharding, spectral
from sct_jax.training import config as config_lib
from sct_jax.training import optimizer_config, trainer
from sct_jax.training import state as state_lib
from sct_jax.training import step as step_lib

CONFIG = config_lib.ExperimentConfig(
    model=SHAPE,
    data=data.DataConfig(batch_size=8, seq_len=8),
    optimizer=optimizer_config.Sct(peak_learning_rate=0.01),
)


def mesh_of(num_devices=1, **axes):
    return sharding.MeshConfig(**axes).build(num_devices)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda: rng.integers(0, SHAPE.vocab_size, (8, 8), np.int32)
    return {
        "inputs": draw(),
        "targets": draw(),
        "segment_ids": np.ones((8, 8), np.int32),
    }


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def one():
    return trainer.Trainer(CONFIG, mesh_of())


def test_a_step_is_the_pure_step_compiled_once(one):
    key = jax.random.key(0)
    state = one.init(key)
    assert_equal(state, jax.jit(lambda key: state_lib.init(key, SHAPE, one.tx))(key))
    bare = step_lib.make_train_step(
        one.model,
        one.tx,
        linear_at=lambda _: functools.partial(spectral.linear, flatten_rows=True),
        guard=CONFIG.optimizer.guard,
    )
    # Compiled for the same placement: another one may fuse and round differently.
    shardings = jax.tree.map(lambda x: x.sharding, state)
    expected, metrics = jax.jit(
        bare, donate_argnums=0, out_shardings=(shardings, None)
    )(jax.tree.map(jnp.copy, state), one.place(batch()), jnp.array(True))
    assert one.compile(state) > 0
    assert one.compile(state) == 0
    found, values = one.step(state, batch(), diagnose=True)
    assert_equal(found, expected)
    assert_equal(values, metrics)
    _, values = one.step(found, batch(1), diagnose=False)
    assert values["composite_update_norm"] == 0 < values["loss"]
    assert len(one._compiled) == 1


def test_the_abstract_state_has_shapes_and_shardings(one):
    state = one.init(jax.random.key(0))
    described = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    assert described == one.abstract_state
    assert one.abstract_at({"ranks": {"layers/q": 2}}) is one.abstract_state


def test_eight_devices_train_like_one(one):
    eight = trainer.Trainer(CONFIG, mesh_of(8, data=2, fsdp=2, tensor=2))
    states = [run.init(jax.random.key(0)) for run in (one, eight)]
    losses = []
    for seed in range(2):
        results = [
            run.step(state, batch(seed), diagnose=True)
            for run, state in zip((one, eight), states, strict=True)
        ]
        states = [state for state, _ in results]
        losses.append([float(values["loss"]) for _, values in results])
    np.testing.assert_allclose(*np.transpose(losses), rtol=1e-4)
    for leaf, wanted in zip(
        jax.tree.leaves(states[1]), jax.tree.leaves(eight.abstract_state), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


@pytest.mark.parametrize(
    "axes", [{"data": 4}, {"data": 2, "fsdp": 2}, {"data": 2, "tensor": 2}], ids=str
)
def test_micro_batches_on_replicas_train_like_one_batch(one, axes):
    """Whatever tokens each replica has in each micro-batch, even none."""
    config = dataclasses.replace(
        CONFIG, data=dataclasses.replace(CONFIG.data, num_microbatches=2)
    )
    runs = one, trainer.Trainer(config, mesh_of(4, **axes))
    states = [run.init(jax.random.key(0)) for run in runs]
    for seed in range(2):
        drawn = batch(seed)
        drawn["targets"][:2] = -1
        drawn["targets"][4, 3:] = -1
        found = [
            run.step(state, drawn, diagnose=True)
            for run, state in zip(runs, states, strict=True)
        ]
        states = [state for state, _ in found]
        for name in ("loss", "grad_norm", "composite_update_norm"):
            np.testing.assert_allclose(
                *(values[name] for _, values in found), rtol=1e-4
            )


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    config = dataclasses.replace(
        CONFIG, data=dataclasses.replace(CONFIG.data, num_microbatches=2)
    )
    with pytest.raises(errors.UserError, match=r"^data\.batch_size: 8 in 2 "):
        trainer.Trainer(config, mesh_of(8))


def test_the_layerwise_step_is_no_single_program():
    shape = dataclasses.replace(SHAPE, scan_layers=False)
    config = dataclasses.replace(CONFIG, step="layerwise", model=shape)
    run = trainer.Trainer(config, mesh_of())
    assert run.compile(run.abstract_state) == 0
    assert run.compiled_text(run.abstract_state) is None
    assert run.compiled_memory(run.abstract_state) is None


@pytest.mark.parametrize("name", ["linear", "linear_at", "diagnose"])
def test_the_layerwise_step_has_a_forward_pass_of_its_own(name):
    shape = dataclasses.replace(SHAPE, scan_layers=False)
    config = dataclasses.replace(CONFIG, step="layerwise", model=shape)
    with pytest.raises(ValueError, match="layerwise"):
        trainer.Trainer(config, mesh_of(), **{name: lambda *_: {}})


def test_one_linear_multiplies_by_every_matrix_and_the_head():
    used = []

    def linear(x, w):
        used.append(spectral.transpose(w))
        return spectral.linear(x, w)

    run = trainer.Trainer(
        CONFIG, mesh_of(), linear=linear, tx=optax.sgd(0.1), diagnose=lambda *_: {}
    )
    state = run.init(jax.random.key(0))
    run.compile(state)
    # The layers are scanned, so that one layer is traced, and the head.
    assert len(used) % (len(model.BLOCK_MATRICES) + 1) == 0
    assert used[-1].shape in ((SHAPE.vocab_size, SHAPE.d_model), (16, 300))


def test_parameters_and_diagnostics_of_ones_own():
    """As a study brings them: no rule of `sharding` knows these names."""
    init = lambda key: model.init(key, SHAPE) | {"extra": jnp.ones(3)}
    run = trainer.Trainer(
        CONFIG,
        mesh_of(),
        tx=optax.sgd(0.0),
        init_params=init,
        diagnose=lambda old, new: {"extra": new["extra"].sum()},
    )
    state, values = run.step(run.init(jax.random.key(0)), batch(), diagnose=True)
    assert float(values["extra"]) == 3
    assert int(state.step) == 1


def test_ranks_change_and_the_step_follows():
    config = dataclasses.replace(
        CONFIG,
        optimizer=CONFIG.optimizer.to(optimizer_config.Tsvd),
        adaptive_rank=rank.AdaptiveRankConfig(energy=0.5, floor=1, multiple=1),
    )
    run = trainer.Trainer(config, mesh_of())
    state = run.init(jax.random.key(0))
    before = rank.stored_ranks(state.params)
    changed, change = run.change_ranks(state, 5)
    assert change is not None and change.ranks != before
    assert rank.stored_ranks(changed.params) == change.ranks
    # Shapes of a checkpoint with these ranks.
    found = jax.tree.map(jnp.shape, changed)
    assert found == jax.tree.map(jnp.shape, run.abstract_at({"ranks": change.ranks}))
    after, _ = run.step(changed, batch(), diagnose=False)
    assert jax.tree.map(jnp.shape, after) == found
    same, nothing = run.change_ranks(after, 6)
    assert nothing is None and same is after
