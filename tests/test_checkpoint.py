import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import random
import shutil
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import samples

from experiments.faults import fuzz_checkpoints
from sct_jax import errors, model, sharding
from sct_jax.training import (
    array_files,
    arrays,
    checkpoint,
    optimizer_config,
    records,
)
from sct_jax.training import state as state_lib

STACKED = dataclasses.replace(samples.SMALL, spectral=("q", "gate", "embedding"))
APART = dataclasses.replace(STACKED, scan_layers=False)
TX = optimizer_config.Sct(max_update_norm=0.5, grad_clip=1.0).build(
    10, decay_mask=model.decay_mask
)


def one_device():
    return sharding.MeshConfig().build(1)


@functools.cache
def abstract(config=STACKED, tx=TX):
    return state_lib.abstract(config, tx)


@functools.cache
def draw_state(step: int, config=STACKED, tx=TX) -> state_lib.TrainState:
    """A state of random bytes: checkpoints do not care what the numbers mean."""
    rng = np.random.default_rng(step)

    def draw(path, leaf, place):
        if leaf.ndim == 0:
            skipped = sharding.path_name(path).startswith("guard")
            value = np.full((), 0 if skipped else step, leaf.dtype)
        else:
            value = rng.normal(size=leaf.shape).astype(leaf.dtype)
        return jax.device_put(value, place)

    shapes = abstract(config, tx)
    places = sharding.shardings(shapes, one_device())
    return jax.tree_util.tree_map_with_path(draw, shapes, places)


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


def restore(directory, *, config=STACKED, tx=TX, mesh=None, **options):
    with contextlib.closing(
        checkpoint.Checkpointer(directory, keep=5, **options)
    ) as checkpointer:
        wanted = abstract(config, tx)
        return checkpointer.restore(lambda _: wanted, mesh or one_device())


def restore_over_damage(directory, **options):
    """Also returns the one warning there was."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state, record = restore(directory, **options)
    (warning,) = caught
    return state, record, str(warning.message)


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


def names(directory):
    return {path.name for path in directory.iterdir()}


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


def test_the_same_checkpoint_again_changes_nothing(copy):
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
    save(copy, 6)
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*")} == before


def test_another_checkpoint_of_the_same_step_is_refused(copy):
    state = draw_state(6)
    other = state.replace(params=jax.tree.map(lambda x: x + 1, state.params))
    record = {"data_position": 48, "note": "step 6"}
    with opened(copy) as checkpointer:
        with pytest.raises(checkpoint.SaveError, match="another one of this step"):
            checkpointer.save(6, other, record=record)
        with pytest.raises(checkpoint.SaveError, match="another one of this step"):
            checkpointer.save(6, state, record=record | {"note": "again"})
        checkpointer.save(6, state, record=record)
    assert_equal(restore(copy)[0], state)


def test_a_state_is_saved_as_its_own_step_alone(tmp_path):
    with opened(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match="step is 3, not 6"):
            checkpointer.save(6, draw_state(3), record={})
        count = lambda path, x: (
            x + 1 if path[-1] == jax.tree_util.GetAttrKey("count") else x
        )
        ahead = jax.tree_util.tree_map_with_path(count, draw_state(3).opt_state)
        with pytest.raises(ValueError, match=r"count is 4, not 3"):
            checkpointer.save(3, draw_state(3).replace(opt_state=ahead), record={})
        # A step that was skipped is a step, but no update.
        skipped = draw_state(3).guard._replace(skipped=jnp.ones([], jnp.int32))
        state = draw_state(4).replace(guard=skipped, opt_state=draw_state(3).opt_state)
        checkpointer.save(4, state, record={})
        assert checkpointer.latest_step() == 4


def test_a_record_that_json_cannot_hold_is_refused_at_once(tmp_path):
    with opened(tmp_path) as checkpointer:
        for value in (object(), float("nan")):
            with pytest.raises((TypeError, ValueError)):
                checkpointer.save(3, draw_state(3), record={"config": value})
    assert not list(tmp_path.iterdir())


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
        checkpointer.save(6, state, record={})
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
    name = largest_file(copy / "6").relative_to(copy / "6")
    flip_a_bit(copy / "6")
    state, record, warning = restore_over_damage(copy)
    assert warning == (
        "checkpoint 6 is damaged, trying an older one: "
        f"{name}: its content differs from the record"
    )
    assert record["step"] == 3
    assert_equal(state, draw_state(3))
    # Nothing is deleted, and the damaged one is not in the way of a new one.
    assert (copy / "damaged-6").is_dir()
    save(copy, 6)
    assert_equal(restore(copy)[0], draw_state(6))


@pytest.mark.parametrize(
    "seeds", [range(10), pytest.param(range(10, 50), marks=pytest.mark.slow)], ids=str
)
def test_a_flipped_bit_anywhere_never_passes(saved, tmp_path, seeds, capfd):
    for seed in seeds:
        copy = tmp_path / str(seed)
        shutil.copytree(saved, copy)
        what = fuzz_checkpoints.flip_bit(random.Random(seed), copy / "6")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state, record = restore(copy)
        # Either it did not matter (a space, say) or the older one is used.
        assert record["step"] == (3 if caught else 6), what
        assert [str(w.message)[:23] for w in caught] in (
            [],
            ["checkpoint 6 is damaged"],
        )
        assert_equal(state, draw_state(record["step"]))
    assert capfd.readouterr() == ("", "")


def test_changed_records_never_pass(saved, tmp_path):
    before = (saved / "6" / "record.json").read_text()
    known = json.loads(before)
    folder = tmp_path / "6"
    shutil.copytree(saved / "6", folder)
    for seed in range(200):
        text = fuzz_checkpoints.mutate_record(random.Random(seed), before)
        (folder / "record.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            records.read(folder, 6)
        except records.DamagedError as error:
            assert str(error).startswith("record.json: "), seed
        else:
            assert json.loads(text) == known, seed


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def add(path: pathlib.Path) -> None:
    path.write_text("x")


def link_away(path: pathlib.Path) -> None:
    """The same content, by a link to a place outside of the step folder."""
    place = path.parents[[p.name for p in path.parents].index("6")].parent / "elsewhere"
    path.rename(place)
    path.symlink_to(place)


DAMAGE = {
    "truncated data": lambda folder: truncate(largest_file(folder)),
    "no data": lambda folder: largest_file(folder).unlink(),
    "longer data": lambda folder: largest_file(folder).write_bytes(
        largest_file(folder).read_bytes() + b"x"
    ),
    "data behind a link": lambda folder: link_away(largest_file(folder)),
    "folder for data": lambda folder: (
        largest_file(folder).unlink(),
        (folder / "state" / "manifest.ocdbt").unlink(),
        (folder / "state" / "manifest.ocdbt").mkdir(),
    ),
    "pipe for data": lambda folder: (
        (folder / "state" / "manifest.ocdbt").unlink(),
        os.mkfifo(folder / "state" / "manifest.ocdbt"),
    ),
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "state behind a link": lambda folder: link_away(folder / "state"),
    "file for the state": lambda folder: (
        shutil.rmtree(folder / "state"),
        add(folder / "state"),
    ),
    "no record": lambda folder: (folder / "record.json").unlink(),
    "truncated record": lambda folder: truncate(folder / "record.json"),
    "empty record": lambda folder: (folder / "record.json").write_text("{}"),
    "record of another kind": lambda folder: (folder / "record.json").write_text("[]"),
    "record that is deep": lambda folder: (folder / "record.json").write_text(
        "[" * 100_000
    ),
    "record behind a link": lambda folder: link_away(folder / "record.json"),
    "folder for the record": lambda folder: (
        (folder / "record.json").unlink(),
        (folder / "record.json").mkdir(),
    ),
    "pipe for the record": lambda folder: (
        (folder / "record.json").unlink(),
        os.mkfifo(folder / "record.json"),
    ),
    "record of another step": lambda folder: shutil.copy(
        folder.parent / "3" / "record.json", folder
    ),
    "all of another step": lambda folder: (
        shutil.rmtree(folder),
        shutil.copytree(folder.parent / "3", folder),
    ),
    "truncated manifest": lambda folder: truncate(folder / "state" / "_METADATA"),
    "no manifest": lambda folder: (folder / "state" / "_METADATA").unlink(),
    "one more file": lambda folder: add(folder / "state" / "_sharding"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_older_one(copy, damage, capfd):
    damage(copy / "6")
    state, record, warning = restore_over_damage(copy)
    assert warning.startswith("checkpoint 6 is damaged, trying an older one: ")
    assert any(name in warning for name in ("state", "record.json"))
    assert record["step"] == 3
    assert_equal(state, draw_state(3))
    assert names(copy) - {"elsewhere"} == {"3", "damaged-6"}
    assert capfd.readouterr() == ("", "")


def test_a_reader_leaves_a_damaged_checkpoint_where_it_is(copy):
    flip_a_bit(copy / "6")
    assert restore_over_damage(copy, read_only=True)[1]["step"] == 3
    assert names(copy) == {"3", "6"}


def test_files_that_nobody_reads_have_no_effect(copy):
    add(copy / "6" / "notes.txt")
    add(copy / "6" / "state" / ".DS_Store")
    assert_equal(restore(copy)[0], draw_state(6))


def reseal(folder, **changes):
    """Changes the record of a step and its checksum, as someone on purpose would."""
    record = json.loads((folder / "record.json").read_text()) | changes
    del record["checksum"]
    (folder / "record.json").write_text(
        json.dumps(record | {"checksum": records._checksum(record)})
    )


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../3/record.json",
        "state/../../3/record.json",
        "state//d",
        "state/",
        "state",
        "",
        "record.json",
        "state/./_METADATA",
        "state/\0",
    ],
)
def test_a_record_names_no_file_elsewhere(copy, name):
    listed = json.loads((copy / "6" / "record.json").read_text())["files"]
    reseal(copy / "6", files=listed | {name: {"bytes": 1, "crc32": 1}})
    _, record, warning = restore_over_damage(copy)
    assert record["step"] == 3
    assert "'files' is not a list of files in state/" in warning


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "step": (True, 6.0, "6", None, -6, [6]),
        "leaves": ([], {"a": 1}, {"a": {"shape": 1, "dtype": "x", "crc32": 1}}, None),
        "files": ([], {"state/a": 1}, {"state/a": {"bytes": "1", "crc32": 1}}, None),
        "format": ("2", None, -1),
        "finite": (1, "yes", None),
        "config": ([], "x", None, 1),
        "data_position": (-1, 1.5, "48", None),
        "ranks": ([], {"a": "4"}, {"a": True}, None),
        "corpus": (1, None),
        "tokenizer": (["x"], None),
    }.items(),
)
def test_a_field_of_another_type_is_damage(copy, field, values):
    for value in values:
        reseal(copy / "6", **{field: value})
        with pytest.raises(records.DamagedError, match=rf"{field!r} is not"):
            records.read(copy / "6", 6)


def test_a_checkpoint_of_a_later_version_is_not_damaged(copy):
    reseal(copy / "6", format=records.FORMAT + 1)
    with pytest.raises(errors.UserError, match=r"^workdir: a later version"):
        restore(copy)
    assert (copy / "6").exists()


def test_a_record_that_the_owner_rejects_is_damage(copy):
    def check(record):
        if record["data_position"] != 24:
            raise records.DamagedError("not here")

    _, record, warning = restore_over_damage(copy, check=check)
    assert (record["step"], warning[-8:]) == (3, "not here")


def test_arrays_that_differ_from_the_record_are_named(copy):
    leaves = json.loads((copy / "6" / "record.json").read_text())["leaves"]
    leaves["params/final_norm"]["crc32"] += 1
    reseal(copy / "6", leaves=leaves)
    _, record, warning = restore_over_damage(copy)
    assert record["step"] == 3
    assert "params/final_norm differs from its record" in warning


def test_a_file_that_may_not_be_read_is_no_damage(copy, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(records.files, "open_regular", refuse)
    with pytest.raises(errors.UserError, match=r"record\.json of checkpoint 6 cannot"):
        restore(copy)
    assert (copy / "6").exists()


def test_nothing_is_unpickled(copy, monkeypatch):
    import pickle

    def refuse(*_, **__):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(np, "load", refuse)
    assert_equal(restore(copy)[0], draw_state(6))


def junk_file_in_folder(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("x")


# Taken for a checkpoint that is damaged.
JUNK = {
    "empty folder": lambda directory: (directory / "9").mkdir(),
    "folder of junk": lambda directory: junk_file_in_folder(directory / "9"),
    "link to another step": lambda directory: (directory / "9").symlink_to("6"),
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
def test_junk_in_the_place_of_a_checkpoint_gives_way(copy, junk):
    junk(copy)
    state, record, warning = restore_over_damage(copy, read_only=True)
    assert "checkpoint 9 is damaged" in warning
    assert record["step"] == 6
    assert_equal(state, draw_state(6))
    # Step 9 can be saved where the junk was.
    save(copy, 9)
    assert names(copy) == {"3", "6", "9", "damaged-9"}
    assert_equal(restore(copy)[0], draw_state(9))


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_text("x"),
        lambda path: path.symlink_to("nothing"),
        lambda path: path.symlink_to("9"),
        os.mkfifo,
    ],
    ids=["file", "link to nothing", "link to itself", "pipe"],
)
def test_what_is_no_folder_is_no_checkpoint(copy, make):
    make(copy / "9")
    state, _, warning = restore_over_damage(copy)
    assert warning == f"{copy / '9'} is no checkpoint and is ignored"
    assert_equal(state, draw_state(6))
    save(copy, 9)
    assert names(copy) == {"3", "6", "9", "damaged-9"}


def test_folders_with_odd_names_are_ignored(copy):
    like_steps = ("-9", "+9", "009", "1_0", "4294967296", "9" * 250)
    others = ("notes", "٩", "9 ", "9.0", "0x9", os.fsdecode(b"9\xff"), ".9")
    for name in like_steps + others:
        junk_file_in_folder(copy / name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert restore(copy)[1]["step"] == 6
    assert {str(w.message) for w in caught} == {
        f"{copy / name} is no checkpoint and is ignored" for name in like_steps
    }


def test_halves_of_killed_saves_are_removed_and_nothing_else(copy):
    halves = (
        f".partial-9-{'a' * 32}",
        "9.orbax-checkpoint-tmp",
        "9.orbax-checkpoint-tmp-1",
    )
    others = (".partial-9", "9.txt", "damaged-4", "x.orbax-checkpoint-tmp", ".hidden")
    for name in (*halves, *others):
        junk_file_in_folder(copy / name)
    restore(copy, read_only=True)
    assert {p.name for p in copy.iterdir()} == {"3", "6", *halves, *others}
    restore(copy)
    save(copy, 7, 8, 9, keep=1)
    assert {p.name for p in copy.iterdir()} == {"9", *others}


def test_latest_step_is_one_that_can_be_restored(copy):
    (copy / "9").mkdir()
    shutil.copytree(copy / "3", copy / "12")
    with opened(copy) as checkpointer:
        assert checkpointer.latest_step() == 6
        with pytest.raises(records.DamagedError, match="it is of step 3"):
            checkpointer.read_record(12)


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


def test_nothing_starts_from_scratch_over_one_that_was_set_aside(copy):
    shutil.rmtree(copy / "3")
    (copy / "6").rename(copy / "damaged-6")
    with pytest.raises(errors.UserError, match=r"^workdir: .*another --workdir"):
        restore(copy)


def test_a_checkpoint_that_vanishes_while_it_is_read_is_not_damaged(copy, monkeypatch):
    """Another process trains here, and removes what is old."""
    save(copy, 9)
    check_files = records.check_files

    def remove_first(folder, record, **options):
        if record["step"] == 9:
            shutil.rmtree(copy / "9")
            save(copy, 12)
        check_files(folder, record, **options)

    monkeypatch.setattr(records, "check_files", remove_first)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert restore(copy, read_only=True)[1]["step"] == 12


def test_a_step_folder_may_lie_elsewhere(copy, tmp_path):
    """Whoever runs out of room moves a checkpoint and leaves a link."""
    (copy / "6").rename(tmp_path / "moved")
    (copy / "6").symlink_to(tmp_path / "moved")
    assert_equal(restore(copy)[0], draw_state(6))
    save(copy, 7, 8, keep=1)
    assert {p.name for p in copy.iterdir()} == {"8"}
    assert (tmp_path / "moved" / "record.json").exists()


# --- What is kept.


def test_damaged_checkpoints_do_not_push_out_whole_ones(copy):
    save(copy, 9)
    truncate(largest_file(copy / "9"))
    (copy / "6" / "record.json").unlink()
    save(copy, 12, keep=2)
    assert names(copy) == {"3", "6", "9", "12"}


def not_finite(step, field, value):
    state = draw_state(step)
    leaves, treedef = jax.tree.flatten(getattr(state, field))
    index = next(i for i, leaf in enumerate(leaves) if leaf.ndim)
    leaves[index] = leaves[index].at[(0,) * leaves[index].ndim].set(value)
    return state.replace(**{field: jax.tree.unflatten(treedef, leaves)})


@pytest.mark.parametrize(
    ("field", "value"),
    [("params", np.nan), ("opt_state", np.nan), ("opt_state", -np.inf)],
)
def test_the_newest_finite_checkpoint_is_kept(copy, field, value):
    with opened(copy, keep=1) as checkpointer:
        for step in (7, 8):
            checkpointer.save(step, not_finite(step, field, value), record={})
            checkpointer.wait()
            assert checkpointer.read_record(step)["finite"] is False
        assert names(copy) == {"6", "8"}
        checkpointer.save(9, draw_state(9), record={})
        checkpointer.wait()
        assert checkpointer.read_record(9)["finite"] is True
    assert names(copy) == {"9"}


def test_large_numbers_are_finite(tmp_path):
    state = draw_state(3)
    large = state.replace(params=jax.tree.map(lambda x: x * 0 + 3e38, state.params))
    with opened(tmp_path) as checkpointer:
        checkpointer.save(3, large, record={})
        checkpointer.wait()
        assert checkpointer.read_record(3)["finite"] is True


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float64"])
@pytest.mark.parametrize("value", [1.0, np.nan])
def test_every_floating_dtype_is_looked_at(dtype, value):
    array = np.full((3, 5), 1, np.dtype(jnp.dtype(dtype)))
    array[1, 2] = value
    assert arrays._is_finite(array) == np.isfinite(value)


# --- Earlier versions: CheckpointManager of orbax, no guard, no checksums of files.


def save_earlier(directory, *steps):
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=5)
    with ocp.CheckpointManager(directory, options=options) as writer:
        for step in steps:
            state = draw_state(step).replace(guard=None)
            named = arrays.by_name(
                model.unstack_layers(jax.tree.map(np.asarray, state))
            )
            record = {
                "data_position": 8 * step,
                "step": step,
                "leaves": arrays.describe(named),
            }
            writer.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(named),
                    record=ocp.args.JsonSave(record),
                ),
            )


@pytest.fixture(scope="module")
def saved_earlier(tmp_path_factory):
    directory = tmp_path_factory.mktemp("earlier") / "checkpoints"
    save_earlier(directory, 3, 6)
    return directory


@pytest.fixture
def earlier(saved_earlier, tmp_path):
    shutil.copytree(saved_earlier, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_a_checkpoint_of_an_earlier_version_opens(saved_earlier):
    state, record = restore(saved_earlier, read_only=True)
    assert_equal(state, draw_state(6))  # with a guard of zeros
    assert record["data_position"] == 48
    assert_equal(
        restore(saved_earlier, config=APART, read_only=True)[0],
        model.unstack_layers(draw_state(6)),
    )


def test_a_run_goes_on_where_an_earlier_version_saved(earlier):
    restore(earlier)
    save(earlier, 9, keep=2)
    assert names(earlier) == {"6", "9"}
    assert_equal(restore(earlier)[0], draw_state(9))
    flip_a_bit(earlier / "9")
    state, record, _ = restore_over_damage(earlier)
    assert_equal(state, draw_state(6))
    assert record["step"] == 6


EARLIER_DAMAGE = {
    "flipped bit": lambda folder: flip_a_bit(folder),
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "no record": lambda folder: shutil.rmtree(folder / "record"),
    "truncated data": lambda folder: truncate(largest_file(folder)),
    "no data": lambda folder: largest_file(folder).unlink(),
    "truncated record": lambda folder: truncate(folder / "record" / "metadata"),
    "empty record": lambda folder: (folder / "record" / "metadata").write_text("{}"),
    "truncated manifest": lambda folder: truncate(folder / "state" / "manifest.ocdbt"),
    "truncated metadata": lambda folder: truncate(folder / "state" / "_METADATA"),
    "state behind a link": lambda folder: link_away(folder / "state"),
    "record behind a link": lambda folder: link_away(folder / "record" / "metadata"),
    "of another step": lambda folder: (
        shutil.rmtree(folder),
        shutil.copytree(folder.parent / "3", folder),
    ),
    "edited step": lambda folder: edit_earlier(folder, step=3),
    "state of another step": lambda folder: (
        shutil.copytree(folder.parent / "3", folder, dirs_exist_ok=True),
        edit_earlier(folder, step=6),
    ),
    "listed files": lambda folder: edit_earlier(folder, files={}),
}


def edit_earlier(folder, **changes):
    path = folder / "record" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("damage", EARLIER_DAMAGE.values(), ids=EARLIER_DAMAGE)
def test_damage_to_a_checkpoint_of_an_earlier_version_is_found(earlier, damage, capfd):
    damage(earlier / "6")
    state, record, warning = restore_over_damage(earlier)
    assert warning.startswith("checkpoint 6 is damaged, trying an older one: ")
    assert record["step"] == 3
    assert_equal(state, draw_state(3))
    assert (earlier / "damaged-6").exists()
    assert capfd.readouterr() == ("", "")


def coroutine_of(path):
    """A coroutine whose code is in a file."""
    found = {}
    exec(compile("async def read(): pass", path, "exec"), found)
    coroutine = found["read"]()
    coroutine.close()
    return coroutine


def test_reads_that_outlive_a_failed_one_say_nothing(earlier, capfd):
    """Orbax closes its event loop under them; the hook of the process reports that."""
    flip_a_bit(earlier / "6")
    restore_over_damage(earlier)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", seen.append)
        array_files._orbax(earlier)
        hook = sys.unraisablehook
        for message, object_ in (
            ("Event loop is closed", None),
            ("ended late", coroutine_of("orbax/checkpoint/reads.py")),
            ("another error", coroutine_of("mine.py")),
            ("a third", None),
        ):
            hook(types.SimpleNamespace(exc_value=RuntimeError(message), object=object_))
    assert [str(x.exc_value) for x in seen] == ["another error", "a third"]
    assert capfd.readouterr() == ("", "")


def test_nothing_starts_from_scratch_over_an_earlier_version(earlier):
    for step in (3, 6):
        (earlier / str(step) / "record" / "metadata").unlink()
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(errors.UserError, match=r"^workdir: .*another --workdir"),
    ):
        restore(earlier)
    assert names(earlier) >= {"3", "6"}


@pytest.mark.parametrize(
    "error",
    [RuntimeError("can't start new thread"), OSError(24, "Too many open files")],
    ids=repr,
)
def test_what_a_process_lacks_is_no_damage(saved, tmp_path, monkeypatch, error):
    directory = tmp_path / "copy"
    shutil.copytree(saved, directory)
    before = names(directory)

    def fail(*args):
        raise error

    monkeypatch.setattr(array_files, "read", fail)
    with pytest.raises(errors.UserError, match=r"^workdir: checkpoint 6 is whole but"):
        restore(directory)
    assert names(directory) == before


def test_steps_and_records_are_read_without_orbax(saved, saved_earlier):
    """It takes a third of a second to import."""
    import subprocess

    program = """
import pathlib, sys
from sct_jax.training import checkpoint
for directory in sys.argv[1:]:
    reader = checkpoint.Checkpointer(pathlib.Path(directory), keep=1, read_only=True)
    assert reader.read_record(reader.latest_step())["step"] == 6
assert "orbax.checkpoint" not in sys.modules and "tensorstore" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, saved, saved_earlier], check=True)


# --- Another state.


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
