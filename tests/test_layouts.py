"""What the layouts of a mesh move between devices, read from compiled programs."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from sct_jax import data, model, sharding
from sct_jax.training import (
    accounting,
    collectives,
    hardware,
    hlo,
    optimizer_config,
    processes,
    trainer,
)
from sct_jax.training import config as config_lib

BYTES = 4  # of a number in float32
TENSOR = 4

# No two axes are equally long, and no product of others is as long as V x D.
SHAPE = model.ModelConfig(
    d_model=64,
    d_ff=176,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    vocab_size=832,
    rank=4,
    spectral=model.BLOCK_MATRICES,
    remat="none",
    attention="xla",
)
DENSE = dataclasses.replace(SHAPE, spectral=(), tie_embeddings=False)
ROWS, LENGTH = 8, 12
R, D, V = SHAPE.rank, SHAPE.d_model, SHAPE.vocab_size


def experiment(shape=SHAPE, *, length=LENGTH, parts=1, **mesh):
    clip = {"max_update_norm": 0.1} if shape.spectral else {}
    return config_lib.ExperimentConfig(
        model=shape,
        mesh=sharding.MeshConfig(**mesh),
        data=data.DataConfig(batch_size=ROWS, seq_len=length, num_microbatches=parts),
        optimizer=optimizer_config.Sct(peak_learning_rate=1e-2, **clip),
    )


@functools.cache
def compiled(shape=SHAPE, *, forward=False, length=LENGTH, parts=1, **mesh):
    """The mesh, and the text of a step or of a forward pass."""
    config = experiment(shape, length=length, parts=parts, **mesh)
    sizes = [getattr(config.mesh, axis) for axis in sharding.AXES]
    devices = config.mesh.build(int(np.prod(sizes)))
    run = trainer.Trainer(config, devices, diagnose=lambda old, new: {})
    if forward:
        arguments = run.abstract_state.params, run.abstract_batch()
        return devices, run._eval_step.lower(*arguments).compile().as_text()
    run.compile(run.abstract_state)
    (step,) = run._compiled.values()
    return devices, step.as_text()


def moved(*args, **kwargs):
    """The collectives of an ordinary call: updated, clipped, no guard needed."""
    devices, text = compiled(*args, **kwargs)
    found = collectives.read(text, devices)
    return collectives.most([c for c in found if not c.loops])


def in_blocks(found):
    """Those of the loop over layers."""
    return [c for c in found if c.count % SHAPE.num_layers == 0]


def per_token(found, tokens=ROWS * LENGTH):
    """Numbers per token and block."""
    moved = collectives.total(in_blocks(found)).payload_bytes
    return moved / BYTES / tokens / SHAPE.num_layers


def tensor_only(found):
    return all(c.kind == "all-reduce" and c.axes == ("tensor",) for c in found)


# --- Tensor parallelism: the bottlenecks, whose sums are one all-reduce where their
# matrices share an input.

# layout -> numbers per token and block: forward, whole step, of RMSNorm and its
# gradient; all-reduces of the forward pass.
MOVED = {
    "thin_replicated": (2 * R, 7 * R, 0, 2),
    "fully_sharded": (7 * R, 14 * R, 2, 6),
}


@pytest.mark.parametrize("layout", sharding.LAYOUTS)
def test_a_forward_pass_sums_bottlenecks_alone(layout):
    forward, _, norms, times = MOVED[layout]
    found = moved(forward=True, data=1, tensor=TENSOR, tensor_layout=layout)
    assert per_token(found) == forward + norms
    assert tensor_only(in_blocks(found))
    assert sum(c.count for c in in_blocks(found)) == times * SHAPE.num_layers


@pytest.mark.parametrize("layout", sharding.LAYOUTS)
def test_a_step_sums_bottlenecks_and_gram_matrices(layout):
    _, step, norms, _ = MOVED[layout]
    found = moved(data=1, tensor=TENSOR, tensor_layout=layout)
    assert per_token(found) == step + 2 * norms
    assert tensor_only(in_blocks(found))
    # Nothing but Gram matrices grows with the layers and not with the tokens: one of
    # the retraction and two of the clip for each factor with sharded rows.
    factors = 14 if layout == "fully_sharded" else 7
    update = [c for c in found if c.branches]
    assert tensor_only(update)
    grams = 3 * factors * SHAPE.num_layers * R * R
    others = (R + 1) * factors * SHAPE.num_layers  # of clipping: peaks, squared norms
    assert collectives.total(update).payload_bytes == (grams + others) * BYTES
    assert len(update) == 5


def test_dense_matrices_move_whole_streams():
    """What the layouts are compared with: Megatron's 2 D forward."""
    found = moved(
        DENSE, forward=True, data=1, tensor=TENSOR, tensor_layout="thin_replicated"
    )
    assert per_token(found) == 2 * D


# --- Replicas.


@pytest.mark.parametrize("others", [{}, {"fsdp": 2}, {"tensor": 2}], ids=str)
def test_gradients_of_micro_batches_cross_between_replicas_once(others):
    devices, text = compiled(parts=2, data=2, **others)
    found = collectives.most(collectives.read(text, devices))
    crossing = collectives.total([c for c in found if "data" in c.axes])
    state = trainer.Trainer(experiment(data=2, **others), devices).abstract_state
    gradients = hardware.shard_bytes(state.params)
    assert gradients <= crossing.payload_bytes <= gradients + 64  # and the loss


# --- The ends: vocabulary-parallel.

ENDS = {
    "dense, tied": SHAPE,
    "dense": dataclasses.replace(SHAPE, tie_embeddings=False),
    "spectral, tied": dataclasses.replace(
        SHAPE, spectral=(*model.BLOCK_MATRICES, "embedding")
    ),
    "spectral": dataclasses.replace(
        SHAPE, spectral=model.MATRICES, tie_embeddings=False
    ),
}


def shapes(text):
    return {
        tuple(map(int, axes.split(","))) for axes in re.findall(r"\[([\d,]+)\]", text)
    }


@pytest.mark.parametrize("layout", sharding.LAYOUTS)
@pytest.mark.parametrize("name", ENDS)
def test_the_vocabulary_stays_divided(name, layout):
    """Neither all logits nor a whole table exist; spectral ends move R numbers."""
    mesh = {"data": 1, "tensor": TENSOR, "tensor_layout": layout}
    _, text = compiled(ENDS[name], **mesh)
    assert not [s for s in shapes(text) if V in s]
    found = moved(ENDS[name], **mesh)
    ends = [c for c in found if not c.branches and c not in in_blocks(found)]
    numbers = collectives.total(ends).payload_bytes / BYTES / (ROWS * LENGTH)
    if name.startswith("spectral"):
        # Forward and backward, in each end the bottleneck; scalars of the loss.
        assert numbers < 4 * R + 8
    else:
        assert numbers < 4 * D + 8


def test_the_head_sums_its_gradient_once():
    """Not in every chunk of tokens."""
    long = 2 * 1024 * 4 // ROWS
    found = moved(DENSE, data=4, length=long)
    of_table = [c for c in found if c.payload_bytes >= V * D * BYTES]
    assert {(c.kind, c.count) for c in of_table} == {("all-reduce", 1)}
    ends = collectives.total(of_table).payload_bytes
    assert ends < 2.01 * V * D * BYTES  # of the embedding and of the head


def test_an_mlp_by_chunks_sums_its_gradients_once(monkeypatch):
    monkeypatch.setattr(model, "MLP_TOKENS", 4)  # six chunks of each device
    shape = dataclasses.replace(SHAPE, remat="full", rope_theta=20_000.0)
    found = [c for c in in_blocks(moved(shape, data=4)) if not c.branches]
    assert {c.count for c in found} == {SHAPE.num_layers}
    once = num_parameters(shape, "layers") * BYTES
    assert collectives.total(found).payload_bytes <= 1.01 * once


# --- FSDP.


def num_parameters(shape, *names):
    params = jax.eval_shape(lambda key: model.init(key, shape), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves([params[name] for name in names]))


@pytest.mark.parametrize("shape", [SHAPE, DENSE], ids=["spectral", "dense"])
def test_fsdp_moves_parameters_and_no_activations(shape):
    found = in_blocks(moved(shape, data=1, fsdp=4))
    assert {c.axes for c in found} == {("fsdp",)}
    of_block = num_parameters(shape, "layers") * BYTES
    small = 0.05 * of_block  # s and the scales of norms are not divided
    gathered = collectives.total([c for c in found if c.kind == "all-gather"])
    # Once for the forward pass, and once more for the backward pass.
    assert 2 * of_block - 2 * small < gathered.payload_bytes <= 2 * of_block
    summed = collectives.total([c for c in found if c.kind != "all-gather"])
    assert summed.payload_bytes == of_block


def test_gradients_of_replicas_are_as_large_as_the_parameters():
    for shape in (SHAPE, ENDS["spectral, tied"], DENSE):
        found = moved(shape, data=4)
        params = accounting.parameters(shape) * BYTES
        assert {(c.kind, c.axes) for c in found} == {("all-reduce", ("data",))}
        total = collectives.total(found).payload_bytes
        assert params <= total < params + 64  # and scalars of the loss


def test_a_tied_table_is_gathered_and_summed_once():
    """Though the first layer and the head read it."""
    found = moved(data=1, fsdp=4)
    of_table = [c for c in found if c.payload_bytes >= V * D * BYTES]
    sizes = [(c.kind, c.payload_bytes // (V * D * BYTES)) for c in of_table]
    assert sorted(sizes) == [("all-gather", 1), ("all-reduce", 1)]


def test_the_retraction_and_the_clip_of_fsdp_gather_nothing():
    update = [c for c in moved(data=1, fsdp=4) if c.branches]
    assert update
    assert {c.kind for c in update} == {"all-reduce"}
    assert len(update) == 5


# --- Several processes.


def groups(text):
    """The devices of every group of every collective, in order."""
    module = hlo.Module.parse(text)
    return {
        tuple(group)
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode.removesuffix("-start") in collectives.KINDS
        for group in hlo.device_groups(instruction.attributes, module.num_devices)
        if len(group) > 1 and instruction.opcode != "collective-permute"
    }


def test_a_step_needs_no_group_that_processes_do_not_connect():
    mesh, text = compiled(data=2, fsdp=2, tensor=2)
    gather = processes.gather_in_groups(mesh).lower(1.0).compile()
    assert groups(text) and groups(text) <= groups(gather.as_text())


# --- Numbers.

MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"data": 1, "fsdp": 8},
    "thin": {"data": 2, "tensor": 4, "tensor_layout": "thin_replicated"},
    "full": {"data": 2, "tensor": 4, "tensor_layout": "fully_sharded"},
    "fsdp, thin": {
        "data": 1,
        "fsdp": 2,
        "tensor": 4,
        "tensor_layout": "thin_replicated",
    },
    "all, full": {"data": 2, "fsdp": 2, "tensor": 2, "tensor_layout": "fully_sharded"},
}
NUM_STEPS = 50

# At small steps: at large ones, Adam doubles a difference of rounding every few steps.
TRAINED = dataclasses.replace(SHAPE, vocab_size=96)
RATE = 1e-3


@functools.cache
def losses(**mesh):
    config = experiment(TRAINED, **mesh)
    optimizer = dataclasses.replace(config.optimizer, peak_learning_rate=RATE)
    config = dataclasses.replace(config, optimizer=optimizer)
    run = trainer.Trainer(config, config.mesh.build(8 if mesh else 1))
    state, rng, found = run.init(jax.random.key(0)), np.random.default_rng(0), []
    for _ in range(NUM_STEPS):
        first = rng.integers(TRAINED.vocab_size, size=(ROWS, 1), dtype=np.int32)
        tokens = (first + np.arange(LENGTH + 1, dtype=np.int32)) % TRAINED.vocab_size
        batch = {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": np.ones((ROWS, LENGTH), np.int32),
        }
        state, metrics = run.step(state, batch, diagnose=False)
        found.append(float(metrics["loss"]))
    return np.array(found)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if "," in name else [pytest.mark.slow])
        for name in MESHES
    ],
)
def test_eight_devices_lose_what_one_does(name):
    one = losses()
    assert one[-1] < one[0] - 0.1
    np.testing.assert_allclose(losses(**MESHES[name]), one, rtol=1e-5)


# --- Bad input.


def test_a_mesh_that_does_not_divide_heads_is_refused():
    shape = dataclasses.replace(SHAPE, d_model=576, num_heads=9, num_kv_heads=3)
    config = experiment(shape, data=1, tensor=4)
    with pytest.raises(ValueError, match=r"^mesh\.tensor: 4 .*num_kv_heads = 3,"):
        trainer.Trainer(config, config.mesh.build(4))
