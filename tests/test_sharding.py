import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import samples
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sct_jax import errors, model, sharding, spectral
from sct_jax.training import optimizer_config
from sct_jax.training import state as state_lib
from sct_jax.training import step as step_lib

SMALL = samples.SMALL
OPTIMIZER = optimizer_config.Sct(
    peak_learning_rate=1e-2,
    max_update_norm=0.5,
    grad_clip=1.0,
    weight_decay=0.1,
    singular_value_lr_multiplier=2.0,
)
CONFIGS = {
    "spectral": SMALL,
    "dense": dataclasses.replace(SMALL, spectral=(), tie_embeddings=False),
    "apart": dataclasses.replace(SMALL, scan_layers=False, spectral=model.MLP),
    "spectral embedding": dataclasses.replace(
        SMALL, spectral=("embedding", "head", "v"), tie_embeddings=False
    ),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def build(optimizer=OPTIMIZER):
    return optimizer.build(100, decay_mask=model.decay_mask)


@pytest.fixture(scope="module")
def mesh():
    return sharding.MeshConfig(data=2, fsdp=2, tensor=2).build()


@pytest.fixture(scope="module")
def one_device():
    return sharding.MeshConfig().build(1)


# Expected spec of a leaf of one layer, by name.
EXPECTED = {
    "embedding": P("tensor", "fsdp"),
    "head": P("fsdp", "tensor"),
    **dict.fromkeys(["q", "k", "v", "gate", "up"], P("fsdp", "tensor")),
    **dict.fromkeys(["o", "down"], P("tensor", "fsdp")),
    **dict.fromkeys(["final_norm", "attention_norm", "mlp_norm"], P(None)),
}
COLUMNS = {"q", "k", "v", "gate", "up", "head"}


def expected_spec(path, leaf, layout=sharding.UNAIDED) -> P:
    """The spec from the last keys of a path, for parameters and moments."""
    if leaf.ndim == 0:
        return P()
    last = path[-1]
    full = layout == "fully_sharded"
    if isinstance(last, jax.tree_util.GetAttrKey):
        matrix, factor = path[-2].key, last.name
        if factor == "s":
            spec = P(None)
        elif (matrix in COLUMNS) == (factor == "u"):
            # The side of d_model.
            spec = P(("tensor", "fsdp"), None) if full else P("fsdp", None)
        else:
            spec = P(("tensor", "fsdp"), None)  # heads, d_ff or vocabulary
    else:
        spec = EXPECTED[last.key]
        if full and last.key.endswith("_norm"):
            spec = P("tensor")
    return P(*[None] * (leaf.ndim - len(spec)), *spec)


@each_config
@pytest.mark.parametrize(
    "optimizer",
    [
        OPTIMIZER,
        optimizer_config.Sct(),
        optimizer_config.Sct(
            moment_dtype="bfloat16", base_width=16, schedule="wsd", warmup_steps=3
        ),
    ],
    ids=["clipped", "plain", "scaled"],
)
@pytest.mark.parametrize("layout", sharding.LAYOUTS)
def test_every_leaf_of_a_state_is_placed_by_the_table(config, optimizer, layout, mesh):
    state = state_lib.abstract(config, build(optimizer))
    placed = sharding.shardings(state, mesh, layout)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    for (path, leaf), place in zip(leaves, jax.tree.leaves(placed), strict=True):
        assert isinstance(place, NamedSharding) and place.mesh == mesh
        wanted = expected_spec(path, leaf, layout)
        assert place.spec == wanted, sharding.path_name(path)


def test_moments_lie_where_their_parameters_do(mesh):
    state = state_lib.abstract(SMALL, build())
    placed = sharding.shardings(state, mesh)
    for moment in ("mu", "nu"):
        assert optax.tree.get(placed.opt_state, moment) == placed.params


@pytest.mark.parametrize(
    "tree",
    [
        {"layers": {"router": jnp.zeros((4, 4))}},
        {"bias": jnp.zeros(4)},
        {"layers": {"q": jnp.zeros(4)}},  # too few axes for its rule
        {"layers": {"q_lora": jnp.zeros((4, 4))}},
        {"layers": ({"sq": jnp.zeros((4, 4))},)},
        {"extra": spectral.SpectralFactors(*map(jnp.zeros, [(4, 2), (2,), (4, 2)]))},
        {"extra": {"u": jnp.zeros((4, 4))}},
        jnp.zeros((4, 4)),
    ],
    ids=str,
)
def test_a_leaf_that_no_rule_covers_raises(tree, mesh):
    with pytest.raises(ValueError, match="no sharding rule covers") as caught:
        sharding.shardings(tree, mesh)
    assert not isinstance(caught.value, errors.UserError)


@pytest.mark.parametrize(
    ("changes", "leaf"),
    [
        ({"vocab_size": 65, "spectral": model.MLP}, "params/embedding"),
        ({"d_ff": 46}, "params/layers/down.u"),
        ({"d_ff": 46, "spectral": (), "scan_layers": True}, None),
        ({"d_ff": 49, "spectral": ()}, "params/layers/down"),
    ],
    ids=str,
)
def test_an_indivisible_axis_names_the_leaf(changes, leaf, mesh):
    config = dataclasses.replace(SMALL, **changes)
    config.validate()
    state = state_lib.abstract(config, build())
    if leaf is None:  # 46 columns over tensor alone
        sharding.shardings(state, mesh)
        return
    with pytest.raises(errors.UserError, match=r"^mesh\..*not divisible") as caught:
        sharding.shardings(state, mesh)
    assert leaf in str(caught.value)


@pytest.mark.parametrize(
    ("size", "parts", "said"),
    [
        (46, 4, "44 or 48 would be, or 46 by 2"),
        (9, 4, "8 or 12 would be, or 9 by 3"),
        (3, 4, "4 would be, or 3 by 3"),
        (7, 2, "6 or 8 would be, or 7 by 1"),
    ],
)
def test_an_indivisible_axis_names_sizes_that_work(size, parts, said):
    devices = jax.make_mesh((1, 1, parts), sharding.AXES, devices=jax.devices()[:parts])
    weight = {"down": spectral.LowRankFactors(jnp.zeros((size, 2)), jnp.zeros((4, 2)))}
    with pytest.raises(errors.UserError) as caught:
        sharding.shardings(weight, devices)
    assert str(caught.value) == (
        f"mesh.tensor: axis 0 of down.a ({size}, 2) is not divisible by {parts}: {said}"
    )


def test_heads_are_not_divided():
    """SmolLM2-135M: 576 rows of q.v are divisible by 4, its 9 heads are not."""
    devices = sharding.MeshConfig(data=1, tensor=4).build(4)
    sharding.check_heads(devices, num_heads=8, num_kv_heads=4)
    with pytest.raises(errors.UserError) as caught:
        sharding.check_heads(devices, num_heads=9, num_kv_heads=3)
    assert str(caught.value) == (
        "mesh.tensor: 4 does not divide model.num_kv_heads = 3, and every device needs "
        "whole heads: set it to one of 1, 3, or the heads to a multiple of 4"
    )
    with pytest.raises(errors.UserError, match=r"num_kv_heads = 2, .* of 1, 2, or"):
        sharding.check_heads(devices, num_heads=8, num_kv_heads=2)
    with pytest.raises(errors.UserError, match=r"num_heads = model\.num_kv_heads = 6,"):
        sharding.check_heads(devices, num_heads=6, num_kv_heads=6)


def test_mesh_axes():
    mesh = sharding.MeshConfig(data=-1, fsdp=2, tensor=2).build()
    assert mesh.shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.MeshConfig().build().shape == {"data": 8, "fsdp": 1, "tensor": 1}
    single = sharding.MeshConfig().build(1)
    assert single.shape == {"data": 1, "fsdp": 1, "tensor": 1}
    assert list(single.devices.flat) == jax.devices()[:1]


@pytest.mark.parametrize(
    ("sizes", "field"),
    [
        ({"data": 0}, "mesh.data"),
        ({"fsdp": -2}, "mesh.fsdp"),
        ({"tensor": 0}, "mesh.tensor"),
        ({"data": -1, "tensor": -1}, "mesh"),
        ({"tensor_layout": "thin"}, "mesh.tensor_layout"),
    ],
    ids=str,
)
def test_sizes_that_make_no_mesh_are_refused(sizes, field):
    with pytest.raises(errors.UserError, match=f"^{field}: "):
        sharding.MeshConfig(**sizes).validate()


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 3},
        {"data": 1},
        {"data": 4, "fsdp": 4},
        {"data": -1, "fsdp": 3},
        {"data": -1, "tensor": 16},
    ],
    ids=str,
)
def test_a_mesh_of_another_number_of_devices_is_refused(sizes):
    config = sharding.MeshConfig(**sizes)
    config.validate()
    with pytest.raises(errors.UserError, match=r"^mesh: .*\b8\b"):
        config.build()


def test_path_names():
    tree = {"layers": ({"q": spectral.LowRankFactors(a=1, b=2)},)}
    names = [
        sharding.path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
    assert names == ["layers/0/q.a", "layers/0/q.b"]


# --- Eight devices and one.

# One spectral matrix per rule is enough; the others are dense.
TRAINED = dataclasses.replace(SMALL, spectral=("q", "down"))


def run(mesh: Mesh, *, num_steps: int):
    """Losses of the first steps, and the state after them and before."""
    tx = build()
    abstract = state_lib.abstract(TRAINED, tx)
    placed = sharding.shardings(abstract, mesh)
    init = jax.jit(lambda key: state_lib.init(key, TRAINED, tx), out_shardings=placed)
    first = init(jax.random.key(0))
    step = jax.jit(
        step_lib.make_train_step(TRAINED, tx, num_microbatches=2),
        out_shardings=(placed, None),
    )
    rng = np.random.default_rng(0)
    rows = NamedSharding(mesh, sharding.BATCH)
    state, metrics = first, []
    for _ in range(num_steps):
        tokens = rng.integers(TRAINED.vocab_size, size=(8, 17), dtype=np.int32)
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
        batch = {name: jax.device_put(ids, rows) for name, ids in batch.items()}
        state, values = step(state, batch, jnp.array(True))
        metrics.append({name: float(value) for name, value in values.items()})
    return first, state, metrics


@pytest.fixture(scope="module")
def eight(mesh):
    return run(mesh, num_steps=5)


@pytest.fixture(scope="module")
def one(one_device):
    return run(one_device, num_steps=5)


def test_eight_devices_compute_what_one_does(eight, one):
    first, last, metrics = eight
    first_one, last_one, metrics_one = one
    # Random bits do not depend on the layout; the retraction sums in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
        jax.device_get(first.params),
        jax.device_get(first_one.params),
    )
    for on_eight, on_one in zip(metrics, metrics_one, strict=True):
        assert set(on_eight) == set(on_one)
        assert abs(on_eight["loss"] - on_one["loss"]) < 1e-4
        assert on_eight["grad_norm"] == pytest.approx(on_one["grad_norm"], rel=1e-3)
        assert on_eight["orthonormality_error"] < 1e-5
    assert metrics[0]["loss"] != metrics[-1]["loss"]
    assert int(last.step) == int(last_one.step) == 5


def test_arrays_lie_where_the_table_says(eight, mesh):
    for state in eight[:2]:
        assert not state.params["layers"]["q"].v.is_fully_replicated
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            spec = expected_spec(path, leaf)
            wanted = NamedSharding(mesh, spec)
            name = sharding.path_name(path)
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), name
            axes = [axis for part in spec if part for axis in np.atleast_1d(part)]
            parts = math.prod(mesh.shape[axis] for axis in axes)
            assert leaf.addressable_shards[0].data.size * parts == leaf.size, name


def test_abstract_arrays_carry_their_shardings(mesh):
    state = state_lib.abstract(SMALL, build())
    placed = sharding.shardings(state, mesh)
    abstract = sharding.abstract(state, placed)
    assert jax.tree.map(lambda x: x.sharding, abstract) == placed
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
