"""The record of a checkpoint: checksums of files that are read in pieces."""

import concurrent.futures
import os
import random
import zlib

import pytest

from sct_jax import errors
from sct_jax.training import records


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 12_345])
def test_pieces_give_the_checksum_of_the_whole_file(tmp_path, monkeypatch, size):
    monkeypatch.setattr(records, "_PIECE", 1000)
    monkeypatch.setattr(records, "_CHUNK", 64)
    content = random.Random(size).randbytes(size)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content[::-1])
    sums = records._crc32s(tmp_path, {"a": size, "b": size})
    assert sums == {"a": zlib.crc32(content), "b": zlib.crc32(content[::-1])}


def seal(folder, **record):
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "a").write_text("some text")
    records.write(folder, {"step": 6, "leaves": {}, "finite": True} | record)
    return folder


def test_a_record_comes_back(tmp_path):
    config = {"a": {"b": [1, 2.5, None, True, "ü\ud800"]}, "c": 1e-30}
    folder = seal(tmp_path / "6", config=config, ranks={"x": 3})
    record = records.read(folder, 6)
    assert record["config"] == config
    assert record["ranks"] == {"x": 3}
    assert record["files"] == {
        "state/a": {"bytes": 9, "crc32": zlib.crc32(b"some text")}
    }
    records.check_files(folder, record)


def test_how_a_record_is_written_does_not_matter(tmp_path):
    import json

    folder = seal(tmp_path / "6")
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(
        json.dumps(dict(sorted(record.items(), reverse=True)), separators=(",", ":"))
    )
    assert records.read(folder, 6) == {
        k: v for k, v in record.items() if k != "checksum"
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    folder = seal(tmp_path / "6")
    (folder / "state" / "a").chmod(0)
    with pytest.raises(
        errors.UserError, match="state/a of checkpoint 6 cannot be read"
    ):
        records.check_files(folder, records.read(folder, 6))


def test_a_file_that_vanishes_is_named(tmp_path, monkeypatch):
    folder = seal(tmp_path / "6")
    record, sizes = records.read(folder, 6), records._sizes

    def then_remove(state):
        found = sizes(state)
        (state / "a").unlink()
        return found

    monkeypatch.setattr(records, "_sizes", then_remove)
    with pytest.raises(records.DamagedError, match=r"^state/a: No such file"):
        records.check_files(folder, record)


def test_without_further_threads_all_is_done_in_one(monkeypatch):
    def refuse(self, *args):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", refuse)
    assert records.in_parallel(len, ["a", "bc"]) == {"a": 1, "bc": 2}
