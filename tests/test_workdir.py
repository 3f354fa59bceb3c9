"""The folder of a run: what it may be called, and what is read back from it."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
import samples
import saved_runs

from sct_jax import data, errors, sharding
from sct_jax.training import config as config_lib
from sct_jax.training import optimizer_config, records, trainer, workdir

CONFIG = config_lib.ExperimentConfig(
    num_steps=8,
    model=dataclasses.replace(samples.SMALL, vocab_size=300, spectral=("gate", "down")),
    data=data.DataConfig(
        source="nowhere/*.txt", split="documents", batch_size=8, seq_len=16
    ),
    optimizer=optimizer_config.Sct(warmup_steps=2),
)


@pytest.fixture(scope="module")
def tokenizer():
    return data.Tokenizer.train(["kato mi ren lu"] * 10, vocab_size=300)


@pytest.fixture(scope="module")
def run():
    return trainer.Trainer(CONFIG, sharding.MeshConfig().build(1))


def write_run(path, run, tokenizer, *steps, config=CONFIG):
    path.mkdir(exist_ok=True)
    workdir.write_json(path / "config.json", config_lib.to_dict(CONFIG))
    tokenizer.save(str(path / "tokenizer.json"))
    identity = {"corpus": "0" * 64, "tokenizer": tokenizer.hash}
    with (
        workdir.claim(path) as claimed,
        contextlib.closing(workdir.writing(claimed, keep=5)) as checkpoints,
    ):
        for step in steps:
            state = saved_runs.state_at(run, step)
            record = workdir.record(config, step, state, identity)
            checkpoints.save(step, state, record=record)


@pytest.fixture(scope="module")
def written(tmp_path_factory, run, tokenizer):
    """A run with checkpoints of steps 3 and 6; not to be changed."""
    path = tmp_path_factory.mktemp("written") / "run"
    write_run(path, run, tokenizer, 3, 6)
    return path


@pytest.fixture
def path(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# --- A folder for a run.


def refusal(path) -> str:
    with pytest.raises(errors.UserError, match=r"^workdir: ") as caught:
        workdir.make(pathlib.Path(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "a/b/c",
        "[b]",
        "a\\b*?",
        "a\nb",
        "%41",
        " ",
        "a:b",
        "x/gs:/b",
        os.fsdecode(b"\xff"),
    ],
)
def test_a_folder_is_made_and_left_empty(tmp_path, name):
    workdir.make(tmp_path / name)
    workdir.make(tmp_path / name)
    assert not list((tmp_path / name).iterdir())


@pytest.mark.parametrize("name", ["gs://bucket/run", "s3://b", "hdfs:/x", "file:///x"])
def test_the_address_of_a_store_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert "address of a store" in refusal(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["x" * 256, "/".join(["x" * 250] * 16), "a\0b"], ids=["", "deep", "NUL"]
)
def test_a_path_that_cannot_exist_is_refused(tmp_path, name):
    assert "cannot write to" in refusal(tmp_path / name)


def test_a_path_without_room_for_checkpoints_is_refused(tmp_path):
    """The folder itself can be made, but not what a run writes in it."""
    path = tmp_path
    while len(str(path)) < 3830:
        path = path / ("x" * 50)
    path.mkdir(parents=True)
    workdir.make(path)
    path = path / ("x" * (4067 - len(str(path)) - 1))
    message = refusal(path)
    assert "a path of 4067 bytes is too long" in message


def test_checkpoints_that_cannot_be_written_are_refused(path, monkeypatch):
    mkdir = pathlib.Path.mkdir

    def refuse(self, *args, **kwargs):
        if "checkpoints" in self.parts:
            raise PermissionError(1, "Operation not permitted")
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    assert "cannot write to" in refusal(path)


def test_a_folder_that_was_replaced_since_the_start_is_refused(tmp_path):
    path = tmp_path / "run"
    workdir.make(path)
    with workdir.claim(path) as claimed:
        path.rename(tmp_path / "other")
        with pytest.raises(errors.UserError, match="was removed, renamed or replaced"):
            workdir.writing(claimed, keep=1)
        path.mkdir()
        with pytest.raises(errors.UserError, match="was removed, renamed or replaced"):
            workdir.writing(claimed, keep=1)
    assert not list(path.iterdir())


@pytest.mark.parametrize("first", [True, False])
def test_errors_of_the_run_are_not_of_the_lock(tmp_path, monkeypatch, first):
    monkeypatch.setattr(workdir.processes, "is_first", lambda: first)
    with pytest.raises(OSError, match="no space"), workdir.claim(tmp_path):
        raise OSError(errno.ENOSPC, "no space")


def test_a_folder_that_cannot_be_locked_is_refused(tmp_path):
    (tmp_path / ".lock").mkdir()
    with (
        pytest.raises(errors.UserError, match=r"^workdir: .* cannot be locked: "),
        workdir.claim(tmp_path),
    ):
        pass


# --- What is read back.


def test_a_run_is_what_its_checkpoint_says(path, run, tokenizer):
    loaded = workdir.load_run(path)
    assert loaded.config == CONFIG
    assert_same(loaded.params, saved_runs.state_at(run, 6).params)
    assert loaded.tokenizer.hash == tokenizer.hash


def test_another_tokenizer_is_refused_by_its_hash(path):
    other = data.Tokenizer.train(["xyz zyx yxz"] * 10, vocab_size=300)
    other.save(str(path / "tokenizer.json"))
    with pytest.raises(errors.UserError, match=r"^workdir: .*tokenizer\.json has hash"):
        workdir.load_run(path)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(path, monkeypatch):
    """Records of the first version do not know the hash of their tokenizer."""
    read = records.read
    forget = lambda *args: {k: v for k, v in read(*args).items() if k != "tokenizer"}
    monkeypatch.setattr(records, "read", forget)
    text = ["".join(map(chr, range(start, start + 90))) for start in (33, 192, 300)]
    larger = data.Tokenizer.train(text * 10, vocab_size=301)
    assert larger.vocab_size == CONFIG.model.vocab_size + 1
    larger.save(str(path / "tokenizer.json"))
    with pytest.raises(errors.UserError, match=r"^workdir: .*ids up to 300, beyond"):
        workdir.load_run(path)


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"model"', "x" * 100])
def test_a_damaged_tokenizer_is_refused(path, content):
    file = path / "tokenizer.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(errors.UserError, match=r"^workdir: .*tokenizer\.json cannot"):
        workdir.load_run(path)


def test_a_record_that_does_not_know_its_tokenizer_is_no_reason(path, monkeypatch):
    read = records.read
    forget = lambda *args: {k: v for k, v in read(*args).items() if k != "tokenizer"}
    monkeypatch.setattr(records, "read", forget)
    assert workdir.load_run(path).config == CONFIG


@pytest.mark.parametrize("field", ["rank", "num_layers", "rope_theta", "qk_norm"])
def test_a_run_is_what_its_checkpoint_says_whatever_config_json_does(path, run, field):
    """A command may have changed it, and ended before its first save."""
    values = json.loads((path / "config.json").read_text())
    old = values["model"][field]
    values["model"][field] = not old if isinstance(old, bool) else old * 2
    (path / "config.json").write_text(json.dumps(values))
    loaded = workdir.load_run(path)
    assert loaded.config == CONFIG
    assert_same(loaded.params, saved_runs.state_at(run, 6).params)


def test_what_a_killed_process_had_begun_is_removed(path):
    part = "partial-" + "0f" * 16
    begun = [f"config.json.{part}", f"metrics.jsonl.{part}"]
    for name in begun:
        (path / name).write_text("{")
    (path / ".probe-123").mkdir()
    (path / f"mine.{part}").write_text("kept")
    before = set(os.listdir(path))
    with workdir.claim(path):
        pass
    assert before - set(os.listdir(path)) == {*begun, ".probe-123"}


def test_settings_of_the_first_call_may_differ(path):
    values = json.loads((path / "config.json").read_text())
    values |= {"num_steps": 4, "log_every": 3}
    (path / "config.json").write_text(json.dumps(values))
    assert workdir.load_run(path).config == CONFIG


def test_parameters_come_in_the_layout_of_the_configuration(path, run):
    """config.json is of the first call, which may have had another layout."""
    values = json.loads((path / "config.json").read_text())
    values["model"]["scan_layers"] = False
    (path / "config.json").write_text(json.dumps(values))
    config, params, _ = workdir.load_run(path)
    assert config.model.scan_layers
    assert_same(params, saved_runs.state_at(run, 6).params)


def test_a_record_without_a_configuration_is_damage(path, run):
    folder = path / "checkpoints" / "6"
    record = json.loads((folder / "record.json").read_text())
    del record["config"], record["checksum"]
    record["checksum"] = records._checksum(record)
    (folder / "record.json").write_text(json.dumps(record))
    assert workdir.steps_done(path) == 3
    with pytest.warns(UserWarning, match="its record has no configuration"):
        loaded = workdir.load_run(path)
    assert_same(loaded.params, saved_runs.state_at(run, 3).params)


# --- Earlier versions.


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, None),
        ({"data_position": 40}, "the data position of its record is 40, not 48"),
        ({"data_position": None}, "'data_position' is not"),
        ({"config": {}}, None),
        ({"config": {"data": 3}}, None),
        ({"config": {"data": {"batch_size": "8"}}}, None),
    ],
    ids=str,
)
def test_the_position_of_an_earlier_version_agrees_with_its_step(
    tmp_path, changes, found
):
    path = tmp_path / "checkpoints" / "6" / "record"
    path.mkdir(parents=True)
    record = {
        "step": 6,
        "leaves": {},
        "data_position": 48,
        "config": config_lib.to_dict(CONFIG),
    }
    (path / "metadata").write_text(json.dumps(record | changes))
    with workdir.reading(tmp_path) as checkpoints:
        if found is None:
            assert checkpoints.read_record(6)["step"] == 6
            assert workdir.steps_done(tmp_path) == 6
        else:
            with pytest.raises(records.DamagedError, match=found):
                checkpoints.read_record(6)
            assert workdir.steps_done(tmp_path) == 0
