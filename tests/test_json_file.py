"""The flag --json: a file that cannot be written is refused before any work."""

import importlib
import json
import os

import pytest

from experiments import json_file
from sct_jax import errors
from sct_jax.training import overrides

PROGRAMS = {
    "generate": ["--workdir=/nowhere", "--prompt=a"],
    "communication": ["--config=/nowhere.py", "--mesh=data:2"],
    "evaluate": ["--workdir=/nowhere"],
    "memory_table": [],
    "step70b": [],
    "faults.__main__": [],
    "benchmarks.accelerator": [],
    "benchmarks.decode": [],
    "benchmarks.optimizers": [],
    "benchmarks.train_step": [],
}


def parse(path):
    parser = overrides.FlagParser("")
    json_file.add_flag(parser)
    return parser.parse_flags([f"--json={path}"]).json


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_refuses_a_missing_folder_at_once(program, tmp_path, capsys):
    path = tmp_path / "missing" / "x.json"
    main = importlib.import_module(f"experiments.{program}").main
    with pytest.raises(SystemExit) as end:
        main([*PROGRAMS[program], f"--json={path}"])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert f"--json: cannot write '{path}': {path.parent} is not a folder" in (
        captured.err
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "not a regular file"),
        (".", "not a regular file"),
        ("pipe", "not a regular file"),
        ("text/x.json", "text is not a folder"),
        ("x" * 300, "File name too long"),
        ("a\0b", "null"),
        ("~nobody-at-all/x.json", "no home folder"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    (tmp_path / "text").touch()
    with pytest.raises(SystemExit) as end:
        parse(name)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("--json") == 1
    assert message in error
    assert sorted(os.listdir()) == ["pipe", "text"]


def test_a_file_keeps_its_content_until_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "old.json").write_text("old")
    (tmp_path / "link.json").symlink_to("old.json")
    monkeypatch.chdir(tmp_path)
    path = parse("link.json")
    assert sorted(os.listdir()) == ["link.json", "old.json"]
    assert (tmp_path / "old.json").read_text() == "old"
    json_file.write(path, {"loss": 1.5})
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "old.json").read_text()) == {"loss": 1.5}


def test_a_folder_that_goes_meanwhile_is_an_error_of_the_user(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = parse(folder / "x.json")
    folder.rmdir()
    with pytest.raises(errors.UserError, match=f"--json: cannot write {path}: No such"):
        json_file.write(path, {})


def test_no_flag_is_no_file():
    parser = overrides.FlagParser("")
    json_file.add_flag(parser)
    assert parser.parse_flags([]).json is None
