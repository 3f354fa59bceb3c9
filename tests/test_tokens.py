"""Cached text and tokens are as they were written, or are made again."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import zlib

import numpy as np
import pytest

from experiments.faults import fuzz_caches
from sct_jax import data, errors
from sct_jax.data import cache, sources, splits, tokenizer, tokens

VOCAB_SIZE = 300


def words(seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(
        "".join(rng.choices(["ka", "to", "é", "🙂"], k=3)) for _ in "x" * 60
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a corpus and its cache, and what the corpus had when it was new."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "corpus").mkdir()
    for number in range(40):
        (folder / "corpus" / f"{number}.txt").write_text(words(number))
    config = config_in(folder)
    return folder, fuzz_caches.corpus_bits(prepare(config))


def config_in(folder):
    return data.DataConfig(
        source=str(folder / "corpus" / "*.txt"),
        cache_dir=str(folder / "cache"),
        batch_size=2,
        seq_len=16,
    )


@pytest.fixture
def config(made, tmp_path):
    """The corpus of `made`, with a cache of its own that is full already."""
    folder, _ = made
    shutil.copytree(folder / "cache", tmp_path / "cache")
    return dataclasses.replace(config_in(folder), cache_dir=str(tmp_path / "cache"))


def prepare(config, log=lambda line: None):
    return data.prepare(config, vocab_size=VOCAB_SIZE, log=log)


def folder_of(config) -> pathlib.Path:
    (path,) = pathlib.Path(config.cache_dir).glob("*/train.tokens")
    return path.parent


def lookup_of(config) -> pathlib.Path:
    (path,) = pathlib.Path(config.cache_dir).glob("lookup/*")
    return path


def forbid_reading(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the text was read again")

    monkeypatch.setattr(sources, "scan", fail)


# --- What is written.


def test_the_metadata_describe_the_files(config, made):
    folder = folder_of(config)
    metadata = tokens.read_metadata(str(folder))
    lengths = prepare(config).tokenizer.byte_lengths()
    for split in splits.SPLITS:
        raw = (folder / f"{split}.tokens").read_bytes()
        ids = np.frombuffer(raw, np.uint16)
        assert metadata["tokens"][split] == len(ids)
        assert metadata["largest_id"][split] == ids.max()
        assert metadata["bytes"][split] == lengths[ids].sum()
        checksum = {"bytes": len(raw), "crc32": zlib.crc32(raw)}
        assert metadata["checksums"][f"{split}.tokens"] == checksum
    assert metadata["key"] == folder.name
    assert sum(metadata["bytes"].values()) == made[1]["bytes"]


@pytest.mark.parametrize("size", [0, 1, 6, 7, 8, 100])
def test_checksums_do_not_depend_on_blocks(tmp_path, monkeypatch, size):
    content = random.Random(0).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    monkeypatch.setattr(cache, "_BLOCK_BYTES", 7)
    found = cache.checksums(str(tmp_path), ["file"])
    assert found == {"file": {"bytes": size, "crc32": zlib.crc32(content)}}
    cache.verify(str(tmp_path), {"checksums": found})


def test_a_document_that_the_tokenizer_changes_is_named(config, made, tmp_path):
    folder, _ = made
    corpus = tmp_path / "corpus"
    shutil.copytree(folder / "corpus", corpus)
    (corpus / "a.txt").write_text("x" * 70_000 + " look: zq7 " + "y" * 100)
    content = json.loads((folder_of(config) / "tokenizer.json").read_text())
    rare = {
        "type": "Split",
        "pattern": {"Regex": "zq[0-9]"},
        "behavior": "Removed",
        "invert": False,
    }
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [rare, content["pre_tokenizer"]],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    config = dataclasses.replace(
        config,
        source=str(corpus / "*.txt"),
        tokenizer=str(tmp_path / "tokenizer.json"),
        cache_dir=str(tmp_path / "new"),
    )
    with pytest.raises(errors.UserError) as caught:
        prepare(config)
    message = str(caught.value)
    assert message.startswith("data.tokenizer: document ")
    assert "of the train split of" in message
    assert "look: zq7 yyyyy" in message
    assert "look:  yyyyy" in message
    assert not list((tmp_path / "new").glob("*/metadata.json"))


def test_the_first_document_at_fault_is_named(tmp_path, made):
    trained = tokenizer.Tokenizer.train(["zebra"], vocab_size=257)
    lossy = LossyTokenizer(**vars(trained))
    documents = ["a" * 70_000, "b", "c" * 140_000, "dzd", "ez"]
    path = tmp_path / "tokens"

    def write(tokenizer_, documents):
        return tokens.write(
            str(path),
            documents,
            tokenizer=tokenizer_,
            dtype=np.dtype(np.uint16),
            where="of it",
        )

    with pytest.raises(errors.UserError, match=r"document 4 of it: 'dzd' becomes 'dd'"):
        write(lossy, documents)
    written = write(lossy, documents[:3])
    assert written == (210_004, trained.encode("c")[0], 210_001)
    assert written.largest_id == np.fromfile(path, np.uint16).max()


class LossyTokenizer(tokenizer.Tokenizer):
    """Drops every z."""

    def encode_batch(self, texts):
        return super().encode_batch([text.replace("z", "") for text in texts])


def test_text_that_is_not_that_of_the_summary_is_not_kept(config, tmp_path):
    source = sources.open_source(
        config.source, text_field="text", cache_dir="", split="pieces"
    )
    source, summary = sources.scan(source)
    wrong = {split: size + (split == "train") for split, size in summary.bytes.items()}
    summary = dataclasses.replace(summary, bytes=wrong)
    trained = tokenizer.Tokenizer.train(["a"], vocab_size=257)
    with pytest.raises(errors.UserError, match=r"^data\.source: .* changed while"):
        tokens.build(str(tmp_path), source, summary=summary, tokenizer=trained)


# --- Damage is seen, said and mended.


def damage(change):
    """Returns a function that replaces a file by a new one with other content."""

    def apply(path):
        content = change(path.read_bytes())
        path.unlink()
        path.write_bytes(content)

    return apply


def flipped(content: bytes) -> bytes:
    rng = random.Random(0)
    content = bytearray(content)
    for place in rng.sample(range(len(content)), min(len(content), 5000) // 2):
        content[place] ^= 1 << rng.randrange(8)
    return bytes(content)


def one_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def swapped(content: bytes) -> bytes:
    """Two tokens change places: same size, same ids."""
    ids = np.frombuffer(content, np.uint16).copy()
    other = np.flatnonzero(ids != ids[1])[-1]
    ids[[1, other]] = ids[[other, 1]]
    return ids.tobytes()


def replaced(make):
    def apply(path):
        path.unlink()
        make(path)

    return apply


TOKENS = {
    "zeros": (damage(lambda content: bytes(len(content))), "other bytes than were"),
    "flipped bits": (damage(flipped), "other bytes than were written"),
    "one bit": (damage(one_bit), "other bytes than were written"),
    "two tokens swapped": (damage(swapped), "other bytes than were written"),
    "cut off": (damage(lambda content: content[:-2]), "bytes, not the"),
    "half a token": (damage(lambda content: content[:-1]), "bytes, not the"),
    "longer": (damage(lambda content: content + content[:64]), "bytes, not the"),
    "empty": (damage(lambda content: b""), "has 0 bytes, not the"),
    "missing": (replaced(lambda path: None), "No such file or directory"),
    "a folder": (replaced(lambda path: path.mkdir()), "Is a directory"),
    "a pipe": (replaced(os.mkfifo), "Not a regular file"),
    "a link to zeros": (
        replaced(lambda path: path.symlink_to("/dev/zero")),
        "Not a regular file",
    ),
    "a link to itself": (
        replaced(lambda path: path.symlink_to(path.name)),
        "symbolic links",
    ),
    "a link to another": (
        replaced(lambda path: path.symlink_to("metadata.json")),
        "bytes, not the",
    ),
}


def assert_rebuilt(config, made, path, word):
    """Checks that a damaged cache gives one line about `path`, and the same tokens."""
    lines = []
    corpus = prepare(config, log=lines.append)
    assert fuzz_caches.corpus_bits(corpus) == made[1]
    (line,) = [line for line in lines if "built again" in line]
    assert line.startswith(f"data: {str(path)!r} ")
    assert word in line
    assert not list(pathlib.Path(config.cache_dir).glob("*.partial-*"))
    # Whole again: the next time is quiet.
    lines = []
    corpus = prepare(config, log=lines.append)
    assert fuzz_caches.corpus_bits(corpus) == made[1]
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("name", "split"),
    [*((name, "train") for name in TOKENS), ("zeros", "validation")],
)
def test_damaged_tokens_are_made_again(config, made, name, split):
    path = folder_of(config) / f"{split}.tokens"
    before = path.read_bytes()
    change, word = TOKENS[name]
    change(path)
    assert_rebuilt(config, made, path, word)
    assert path.read_bytes() == before
    assert not path.is_symlink()


def edit(**changes):
    """Returns a change of JSON values; the checksum stays."""
    return damage(lambda content: json.dumps(json.loads(content) | changes).encode())


def sealed(**changes):
    """Returns a change of values with a checksum that fits: of another version."""

    def apply(path):
        record = cache.read_record(str(path)) | changes
        path.unlink()
        cache.write_record(
            str(path), {key: value for key, value in record.items() if value != DROPPED}
        )

    return apply


DROPPED = "dropped"
RECORDS = {
    "cut off": (damage(lambda content: content[:20]), "is not valid JSON"),
    "empty": (damage(lambda content: b""), "is not valid JSON"),
    "a list": (damage(lambda content: b"[]"), "is not a JSON object"),
    "a number": (damage(lambda content: b"NaN"), "is not a JSON object"),
    "nested deeply": (damage(lambda content: b"[" * 100_000), "is not valid JSON"),
    "nested within": (
        damage(lambda content: b'{"checksum": ' + b"[" * 900 + b"]" * 900 + b"}"),
        "",
    ),
    "binary": (damage(lambda content: bytes(range(256))), "is not valid JSON"),
    "many digits": (damage(lambda content: b"1" * 5000), "is not valid JSON"),
    "one bit": (damage(one_bit), ""),
    "no checksum": (damage(lambda content: b"{}"), "has no checksum"),
    "other hash": (edit(hash="0" * 64), "was changed after it was written"),
    "not a number": (edit(tokens=float("nan")), "was changed after it was written"),
    "missing": (replaced(lambda path: None), "No such file"),
    "a folder": (replaced(lambda path: path.mkdir()), "Is a directory"),
    "a pipe": (replaced(os.mkfifo), "Not a regular file"),
    "a link to itself": (
        replaced(lambda path: path.symlink_to(path.name)),
        "symbolic links",
    ),
}
FORMATS = {
    "no type": sealed(dtype=DROPPED),
    "unknown type": sealed(dtype="uint17"),
    "no checksums": sealed(checksums=DROPPED),
    "checksums of text": sealed(checksums="abc"),
    "numbers of text": sealed(tokens="abc"),
    "fewer tokens": sealed(tokens={"train": 1, "validation": 1}),
    "no largest id": sealed(largest_id=DROPPED),
    "no key": sealed(key=DROPPED),
    "key of another": sealed(key="0" * 32),
    "an id beyond the vocabulary": sealed(
        largest_id={"train": VOCAB_SIZE, "validation": 1}
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_damaged_metadata_are_made_again(config, made, name):
    path = folder_of(config) / "metadata.json"
    change, word = RECORDS[name]
    change(path)
    assert_rebuilt(config, made, path, word)


@pytest.mark.parametrize("name", FORMATS)
def test_metadata_of_another_format_are_made_again(config, made, name):
    folder = folder_of(config)
    FORMATS[name](folder / "metadata.json")
    lines = []
    assert fuzz_caches.corpus_bits(prepare(config, log=lines.append)) == made[1]
    (line,) = [line for line in lines if "built again" in line]
    assert str(folder) in line
    assert fuzz_caches.corpus_bits(prepare(config)) == made[1]


@pytest.mark.parametrize(
    "name", ["zeros", "flipped bits", "cut off", "empty", "missing", "a pipe"]
)
def test_a_damaged_tokenizer_is_made_again(config, made, name):
    path = folder_of(config) / "tokenizer.json"
    before = path.read_bytes()
    change, word = TOKENS[name]
    change(path)
    assert_rebuilt(config, made, path, word)
    assert path.read_bytes() == before


def test_a_folder_of_other_text_under_this_name_is_made_again(config, made, tmp_path):
    folder = folder_of(config)
    other = tmp_path / "other"
    shutil.copytree(made[0] / "corpus", other)
    (other / "more.txt").write_text("other words " * 50)
    prepare(dataclasses.replace(config, source=str(other / "*.txt")))
    (wrong,) = set(folder.parent.glob("*/train.tokens")) - {folder / "train.tokens"}
    shutil.rmtree(folder)
    shutil.copytree(wrong.parent, folder)
    assert_rebuilt(config, made, folder, "holds other text")


@pytest.mark.parametrize("make", ["file", "link", "pipe"])
def test_what_is_no_folder_is_replaced(config, made, tmp_path, make):
    folder = folder_of(config)
    shutil.rmtree(folder)
    if make == "file":
        folder.write_text("x")
    elif make == "link":
        folder.symlink_to(tmp_path / "nowhere")
    else:
        os.mkfifo(folder)
    assert_rebuilt(config, made, folder / "metadata.json", "cannot be read")
    assert folder.is_dir()
    assert not folder.is_symlink()


def test_an_earlier_versions_folder_is_made_again_with_its_own_tokenizer(config, made):
    # Text that is encoded again must keep its ids, whatever trains tokenizers today.
    folder = folder_of(config)
    other = tokenizer.Tokenizer.train(["other words, other merges"], vocab_size=270)
    other.save(str(folder / "tokenizer.json"))
    metadata = tokens.cache.read_record(str(folder / "metadata.json"))
    metadata["tokenizer_hash"] = tokens._file_hash(str(folder / "tokenizer.json"))
    for name in ("key", "checksums", "largest_id"):
        del metadata[name]
    (folder / "metadata.json").write_text(json.dumps(metadata))
    lines = []
    corpus = prepare(config, log=lines.append)
    assert corpus.tokenizer.hash == other.hash
    (line,) = [line for line in lines if "built again" in line]
    assert "an earlier version wrote it" in line
    assert not [line for line in lines if "training a tokenizer" in line]
    assert prepare(config).tokenizer.hash == other.hash


@pytest.mark.parametrize(
    "changes",
    [{"hash": "0" * 64}, {"tokenizer_hash": "0" * 64}, {"key": "0" * 32}],
    ids=["text", "tokenizer", "key"],
)
def test_the_tokenizer_of_other_text_is_not_kept(config, made, changes):
    folder = folder_of(config)
    metadata = json.loads((folder / "metadata.json").read_text())
    kept = {"text_hash": metadata["hash"], "vocab_size": VOCAB_SIZE}
    assert tokens.kept_tokenizer(str(folder), **kept).hash == made[1]["tokenizer"]
    kept["vocab_size"] -= 1
    assert tokens.kept_tokenizer(str(folder), **kept) is None
    kept["vocab_size"] += 1
    (folder / "metadata.json").write_text(json.dumps(metadata | changes))
    assert tokens.kept_tokenizer(str(folder), **kept) is None
    assert tokens.kept_tokenizer(str(folder / "nothing"), **kept) is None


def test_a_disk_that_changes_what_it_keeps_is_an_error(config, made, monkeypatch):
    monkeypatch.setattr(zlib, "crc32", lambda *args: random.getrandbits(32))
    with pytest.raises(
        errors.UserError, match=r"^data\.cache_dir: .*just after it was"
    ):
        prepare(config)


# --- Lookups.


LOOKUPS = RECORDS | {
    "the parent": (sealed(folder=".."), None),
    "no folder": (sealed(folder=""), None),
    "an absolute path": (sealed(folder="/etc"), None),
    "a name": (damage(lambda content: b"0" * 32), "is not valid JSON"),
    "folder of another type": (sealed(folder=5), "read again"),
    "summary of another type": (sealed(summary=5), "read again"),
    "summary of another version": (sealed(summary={"x": 1}), "read again"),
    "of another source": (sealed(lookup="0" * 32), "is a copy of another file"),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_a_damaged_lookup_costs_one_reading(config, made, monkeypatch, name):
    path = lookup_of(config)
    change, word = LOOKUPS[name]
    change(path)
    lines = []
    assert fuzz_caches.corpus_bits(prepare(config, log=lines.append)) == made[1]
    if word is None or name == "missing":
        assert not [line for line in lines if "read again" in line]
    else:
        (line,) = [line for line in lines if "read again" in line]
        assert word in line
    assert not [line for line in lines if "built again" in line]
    forbid_reading(monkeypatch)
    assert fuzz_caches.corpus_bits(prepare(config)) == made[1]


def test_a_lookup_that_takes_the_place_of_another_is_refused(config, made, tmp_path):
    ours = lookup_of(config)
    other = tmp_path / "other"
    shutil.copytree(made[0] / "corpus", other)
    (other / "more.txt").write_text("other words " * 50)
    prepare(dataclasses.replace(config, source=str(other / "*.txt")))
    (theirs,) = set(ours.parent.iterdir()) - {ours}
    shutil.copy(theirs, ours)
    assert fuzz_caches.corpus_bits(prepare(config)) == made[1]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_lock_that_is_no_file_is_an_error(config, make):
    folder = folder_of(config)
    shutil.rmtree(folder)
    os.remove(f"{folder}.lock")
    make(f"{folder}.lock")
    with pytest.raises(errors.UserError, match=r"^data\.cache_dir: cannot write"):
        prepare(config)


# --- The text of the standard library.


@pytest.fixture
def stdlib(tmp_path, monkeypatch):
    root = tmp_path / "stdlib"
    root.mkdir()
    for number in range(100):
        (root / f"{number}.py").write_text(words(number) * 20)
    monkeypatch.setattr(sources, "stdlib_root", lambda: str(root))
    return data.DataConfig(cache_dir=str(tmp_path / "cache"))


def test_damaged_text_of_the_standard_library_is_written_again(stdlib):
    expected = fuzz_caches.corpus_bits(prepare(stdlib))
    folder = pathlib.Path(stdlib.cache_dir)
    (records,) = folder.glob("stdlib_text-*/*/*/*train.array_record*")
    (checksums,) = folder.glob("stdlib_text-*/checksums.json")
    damages = [
        (records, damage(one_bit), "other bytes than were written"),
        (checksums, sealed(checksums=DROPPED), "has another format"),
    ]
    for path, change, word in damages:
        change(path)
        (record,) = folder.glob("*/train.tokens")
        shutil.rmtree(record.parent)
        shutil.rmtree(folder / "lookup")
        lines = []
        assert fuzz_caches.corpus_bits(prepare(stdlib, log=lines.append)) == expected
        (line,) = [line for line in lines if "built again" in line]
        assert str(path if path != checksums else path.parent) in line
        assert word in line


# --- At random.


@pytest.mark.parametrize("seed", range(8))
def test_no_damage_is_trained_on(config, made, seed):
    done = fuzz_caches.damage_cache(random.Random(seed), config.cache_dir)
    outcome = fuzz_caches.try_cache(lambda log: prepare(config, log=log), made[1])
    assert outcome in ("repaired", "unharmed") or ".lock" in done


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8, 200))
def test_no_damage_at_all_is_trained_on(config, made, seed):
    test_no_damage_is_trained_on(config, made, seed)
