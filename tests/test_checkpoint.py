import contextlib
import dataclasses
import functools
import pathlib
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import samples

from sct_jax import errors, model, sharding
from sct_jax.training import checkpoint, optimizer_config
from sct_jax.training import state as state_lib

STACKED = dataclasses.replace(samples.SMALL, spectral=("q", "gate", "embedding"))
APART = dataclasses.replace(STACKED, scan_layers=False)
TX = optimizer_config.Sct(max_update_norm=0.5, grad_clip=1.0).build(
    10, decay_mask=model.decay_mask
)


def one_device():
    return sharding.MeshConfig().build(1)


def abstract(config=STACKED, tx=TX):
    return state_lib.abstract(config, tx)


@functools.cache
def draw_state(step: int, config=STACKED, tx=TX) -> state_lib.TrainState:
    """A state of random bytes: checkpoints do not care what the numbers mean."""
    rng = np.random.default_rng(step)

    def draw(leaf, place):
        if leaf.ndim == 0:
            value = np.full((), step, leaf.dtype)
        else:
            value = rng.normal(size=leaf.shape).astype(leaf.dtype)
        return jax.device_put(value, place)

    shapes = abstract(config, tx)
    return jax.tree.map(draw, shapes, sharding.shardings(shapes, one_device()))


def assert_equal(actual, expected):
    """Bitwise, dtypes included."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@contextlib.contextmanager
def opened(directory, *, keep=5):
    checkpointer = checkpoint.Checkpointer(directory, keep=keep)
    try:
        yield checkpointer
    finally:
        checkpointer.close()


def save(directory, *steps, config=STACKED, tx=TX, keep=5):
    with opened(directory, keep=keep) as checkpointer:
        for step in steps:
            record = {"data_position": 8 * step, "note": f"step {step}"}
            checkpointer.save(step, draw_state(step, config, tx), record=record)


def restore(directory, *, config=STACKED, tx=TX, mesh=None):
    with opened(directory) as checkpointer:
        wanted = abstract(config, tx)
        return checkpointer.restore(lambda _: wanted, mesh or one_device())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 3 and 6, stacked; not to be changed."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(directory, 3, 6)
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    """Where the arrays are."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def test_a_state_comes_back_bitwise(saved):
    state, record = restore(saved)
    assert isinstance(state, state_lib.TrainState)
    assert_equal(state, draw_state(6))
    assert record["step"] == 6
    assert record["data_position"] == 48
    assert record["note"] == "step 6"


def test_a_folder_without_checkpoints_has_none(tmp_path):
    with opened(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.latest_step() is None
        assert checkpointer.restore(lambda _: abstract(), one_device()) is None


def test_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, keep=2)
    with opened(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 3
    kept = {path.name for path in tmp_path.iterdir() if path.name.isdigit()}
    assert kept == {"2", "3"}


def test_a_step_is_saved_once(copy):
    with opened(copy) as checkpointer:
        checkpointer.save(6, draw_state(3), record={"note": "again"})
    state, record = restore(copy)
    assert_equal(state, draw_state(6))
    assert record["note"] == "step 6"


def test_the_state_may_be_donated_while_it_is_saved(tmp_path):
    double = jax.jit(
        lambda state: jax.tree.map(lambda x: x + x, state), donate_argnums=0
    )
    state = jax.tree.map(jnp.copy, draw_state(3))
    with opened(tmp_path) as checkpointer:
        checkpointer.save(3, state, record={})
        for _ in range(3):
            state = double(state)
    assert_equal(restore(tmp_path)[0], draw_state(3))


# --- The other layout, another mesh.


def test_stacked_layers_open_as_separate_ones(saved):
    state, _ = restore(saved, config=APART)
    assert isinstance(state.params["layers"], tuple)
    assert_equal(state, model.unstack_layers(draw_state(6)))


def test_separate_layers_open_as_stacked_ones(tmp_path):
    save(tmp_path, 3, config=APART)
    assert_equal(restore(tmp_path, config=APART)[0], draw_state(3, APART))
    state, _ = restore(tmp_path)
    assert_equal(state, model.stack_layers(draw_state(3, APART)))


@pytest.mark.parametrize(
    ("name", "spectral"),
    [("muon", ()), ("stiefel_muon", ("embedding",))],
)
def test_layers_without_a_state_open_in_the_other_layout(tmp_path, name, spectral):
    # What one rule of the chain does not see of the layers has no arrays there.
    tx = optimizer_config.CHAINS[name]().build(
        10, decay_mask=model.decay_mask, matrix_mask=model.hidden_matrices
    )
    stacked = dataclasses.replace(STACKED, spectral=spectral)
    apart = dataclasses.replace(stacked, scan_layers=False)
    save(tmp_path / "stacked", 3, config=stacked, tx=tx)
    save(tmp_path / "apart", 3, config=apart, tx=tx)
    for folder in ("stacked", "apart"):
        for config in (stacked, apart):
            state, _ = restore(tmp_path / folder, config=config, tx=tx)
            assert jax.tree.structure(state) == jax.tree.structure(abstract(config, tx))
            drawn = draw_state(3, {"stacked": stacked, "apart": apart}[folder], tx)
            expected = jax.tree.leaves(model.unstack_layers(drawn))
            assert_equal(jax.tree.leaves(model.unstack_layers(state)), expected)


@pytest.mark.parametrize("config", [STACKED, APART], ids=["stacked", "apart"])
def test_a_state_opens_on_another_mesh(saved, tmp_path, config):
    mesh = sharding.MeshConfig(data=2, fsdp=2, tensor=2).build()
    state, _ = restore(saved, config=config, mesh=mesh)
    expected = (
        draw_state(6) if config is STACKED else model.unstack_layers(draw_state(6))
    )
    assert_equal(state, expected)
    placed = sharding.shardings(abstract(config), mesh)
    for leaf, place in zip(
        jax.tree.leaves(state), jax.tree.leaves(placed), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    # And back: saved from eight devices, opened on one.
    with opened(tmp_path) as checkpointer:
        checkpointer.save(7, state, record={})
    again, _ = restore(tmp_path, config=config)
    assert_equal(again, expected)
    assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(again)} == {1}


# --- Damage.


def flip_a_bit(folder):
    path = largest_file(folder)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_a_flipped_bit_is_found_and_the_older_checkpoint_is_used(copy):
    flip_a_bit(copy / "6")
    with pytest.warns(UserWarning, match="checkpoint 6 is damaged") as caught:
        state, record = restore(copy)
    # The leaf by name: one of the parameters or moments.
    (warning,) = [w for w in caught if "is damaged" in str(w.message)]
    assert any(
        f" {sharding.path_name(path)} differs from its record" in str(warning.message)
        for path, _ in jax.tree_util.tree_leaves_with_path(
            {
                "params": model.unstack_layers(draw_state(6)).params,
                "opt_state": model.unstack_layers(draw_state(6)).opt_state,
            }
        )
    )
    assert record["step"] == 3
    assert_equal(state, draw_state(3))
    # Nothing is deleted, and the damaged one is not in the way of a new one.
    assert (copy / "damaged-6").is_dir()
    save(copy, 6)
    assert_equal(restore(copy)[0], draw_state(6))


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_anywhere_never_passes(copy, seed):
    rng = np.random.default_rng(seed)
    files = sorted(p for p in (copy / "6").rglob("*") if p.is_file())
    sizes = np.array([path.stat().st_size for path in files], float)
    path = files[rng.choice(len(files), p=sizes / sizes.sum())]
    raw = bytearray(path.read_bytes())
    raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
    path.write_bytes(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state, record = restore(copy)
    # Either it did not matter (a time stamp, say) or the older one is used.
    assert record["step"] in (3, 6)
    assert_equal(state, draw_state(record["step"]))


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "truncated data": lambda folder: truncate(largest_file(folder)),
    "no data": lambda folder: largest_file(folder).unlink(),
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "no record": lambda folder: shutil.rmtree(folder / "record"),
    "truncated record": lambda folder: truncate(largest_file(folder / "record")),
    "empty record": lambda folder: largest_file(folder / "record").write_text("{}"),
    "truncated manifest": lambda folder: truncate(folder / "state" / "_METADATA"),
    "no manifest": lambda folder: (folder / "state" / "_METADATA").unlink(),
    "no checkpoint metadata": lambda folder: (folder / "_CHECKPOINT_METADATA").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_older_one(copy, damage):
    damage(copy / "6")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state, record = restore(copy)
    if record["step"] == 6:  # the file was not needed
        assert_equal(state, draw_state(6))
        return
    assert record["step"] == 3
    assert_equal(state, draw_state(3))
    assert any("checkpoint 6 is damaged" in str(w.message) for w in caught)


def junk_file_in_folder(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("x")


JUNK = {
    "empty folder": lambda directory: (directory / "9").mkdir(),
    "folder of junk": lambda directory: junk_file_in_folder(directory / "9"),
    "file": lambda directory: (directory / "9").write_text("x"),
    "other folder": lambda directory: junk_file_in_folder(directory / "notes"),
    "half save": lambda directory: junk_file_in_folder(
        directory / "9.orbax-checkpoint-tmp"
    ),
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
def test_junk_beside_checkpoints_is_ignored(copy, junk):
    junk(copy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state, record = restore(copy)
    assert record["step"] == 6
    assert_equal(state, draw_state(6))
    is_step = (copy / "9").is_dir() or (copy / "damaged-9").is_dir()
    messages = [str(w.message) for w in caught]
    assert any("checkpoint 9 is damaged" in m for m in messages) == is_step
    # Step 9 can be saved where the junk was.
    save(copy, 9)
    assert_equal(restore(copy)[0], draw_state(9))


def test_latest_step_is_one_that_can_be_restored(copy):
    (copy / "9").mkdir()
    with opened(copy) as checkpointer:
        assert checkpointer.latest_step() == 6


def test_nothing_starts_from_scratch_over_damaged_checkpoints(copy):
    for step in (3, 6):
        flip_a_bit(copy / str(step))
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(errors.UserError, match=r"^workdir: .*another --workdir"),
    ):
        restore(copy)
    # Whoever can mend them finds them where they were.
    assert {p.name for p in copy.iterdir()} >= {"3", "6"}


def test_nothing_starts_from_scratch_the_second_time_either(copy):
    for step in (3, 6):
        flip_a_bit(copy / str(step))
    with (
        pytest.warns(UserWarning, match="is damaged"),
        contextlib.suppress(errors.UserError),
    ):
        restore(copy)
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(errors.UserError, match=r"^workdir: "),
    ):
        restore(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 5},
        {"d_ff": 64},
        {"vocab_size": 65},
        {"num_layers": 3},
        {"num_layers": 1},
        {"spectral": ("q", "gate")},
        {"spectral": ("q", "gate", "embedding", "up")},
        {"tie_embeddings": False},
    ],
    ids=str,
)
def test_another_shape_is_refused(copy, changes):
    config = dataclasses.replace(STACKED, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(errors.UserError):
            restore(copy, config=config)


def test_a_checkpoint_of_another_shape_is_not_damaged(copy):
    # It is whole; whoever asked for the wrong shape must not cost it its name.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(errors.UserError):
            restore(copy, config=dataclasses.replace(STACKED, rank=5))
    assert_equal(restore(copy)[0], draw_state(6))


def test_another_dtype_is_refused(copy):
    tx = optimizer_config.Sct(
        max_update_norm=0.5, grad_clip=1.0, moment_dtype="bfloat16"
    ).build(10, decay_mask=model.decay_mask)
    half = state_lib.abstract(STACKED, tx)
    assert optax.tree.get(half.opt_state, "mu")["final_norm"].dtype == jnp.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with (
            opened(copy) as checkpointer,
            pytest.raises(errors.UserError),
        ):
            checkpointer.restore(lambda _: half, one_device())
