import contextlib
import dataclasses
import fcntl
import hashlib
import io
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from sct_jax import data, errors
from sct_jax.data import cache, pipeline, sources, splits, tokenizer, tokens

VOCAB_SIZE = 300
MARK = "<|endoftext|>"


def words(seed: int, count: int) -> str:
    """Returns `count` words of repeated syllables, which a tokenizer can merge."""
    rng = random.Random(seed)
    syllables = ["ka", "to", "mi", "ren", "lu", "\n", "sha", "é", "漢", "🙂"]
    return " ".join("".join(rng.choices(syllables, k=3)) for _ in range(count))


@pytest.fixture
def corpus_dir(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.txt").write_bytes(words(number, 40).encode())
    return folder


@pytest.fixture
def config(tmp_path, corpus_dir):
    return data.DataConfig(
        source=str(corpus_dir / "*.txt"),
        cache_dir=str(tmp_path / "cache"),
        batch_size=4,
        seq_len=16,
    )


def prepare(config, *, vocab_size=VOCAB_SIZE, log=lambda line: None):
    return data.prepare(config, vocab_size=vocab_size, log=log)


def numbered_corpus(tmp_path, *, train, validation=(0,), marks=(), vocab_size=1000):
    """Returns a corpus with token i = i, except marks at the given places."""

    def memmap(name, ids):
        np.asarray(ids, np.uint16).tofile(tmp_path / name)
        return np.memmap(tmp_path / name, np.uint16, mode="r")

    trained = tokenizer.Tokenizer.train(["a"], vocab_size=257)
    trained = dataclasses.replace(trained, document_mark=999, vocab_size=vocab_size)
    train, validation = np.array(train), np.array(validation)
    for place in marks:
        validation[place] = 999
    return data.Corpus(
        tokenizer=trained,
        train=memmap("train", train),
        validation=memmap("validation", validation),
        documents=1,
        bytes=1,
        hash="",
    )


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_batches_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() == {"inputs", "targets", "segment_ids"}
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def split_texts(corpus) -> dict[str, list[str]]:
    """Returns the documents of each split, decoded from the token files."""
    found = {}
    for split, ids in (("train", corpus.train), ("validation", corpus.validation)):
        mark = corpus.tokenizer.document_mark
        assert ids[0] == mark
        starts = np.flatnonzero(ids == mark)
        parts = np.split(np.asarray(ids), starts[1:])
        found[split] = [corpus.tokenizer.decode(part[1:]) for part in parts]
    return found


def all_texts(corpus) -> list[str]:
    found = split_texts(corpus)
    return sorted(found["train"] + found["validation"])


# --- Batches.


def test_windows_and_segments_match_a_hand_computation(tmp_path):
    # 0 1 2 M | 4 5 6 7 | M 9 M 11 | 12 13 (an incomplete window, left out)
    corpus = numbered_corpus(
        tmp_path, train=range(8), validation=range(14), marks=(3, 8, 10)
    )
    config = data.DataConfig(batch_size=3, seq_len=4)
    (batch,) = data.eval_batches(corpus, config, num_batches=5)
    m = 999
    np.testing.assert_array_equal(
        batch["inputs"], [[0, 1, 2, m], [4, 5, 6, 7], [m, 9, m, 11]]
    )
    np.testing.assert_array_equal(
        batch["targets"], [[1, 2, m, 4], [5, 6, 7, m], [9, m, 11, 12]]
    )
    np.testing.assert_array_equal(
        batch["segment_ids"], [[1, 1, 1, 2], [1, 1, 1, 1], [1, 1, 2, 2]]
    )
    assert {value.dtype for value in batch.values()} == {np.dtype(np.int32)}


def test_cross_document_attention_puts_all_into_one_segment(tmp_path):
    corpus = numbered_corpus(
        tmp_path, train=range(8), validation=range(9), marks=(3, 5)
    )
    config = data.DataConfig(batch_size=2, seq_len=4, cross_document_attention=True)
    (batch,) = data.eval_batches(corpus, config, num_batches=1)
    np.testing.assert_array_equal(batch["segment_ids"], np.ones((2, 4)))


@pytest.mark.parametrize("start_step", [1, 5, 6, 17])
def test_resume_continues_the_uninterrupted_run(tmp_path, start_step):
    corpus = numbered_corpus(tmp_path, train=range(90))  # 22 windows, 5.5 batches.
    config = data.DataConfig(batch_size=4, seq_len=4)
    whole = take(data.train_batches(corpus, config, seed=3), 20)
    rest = data.train_batches(corpus, config, seed=3, start_step=start_step)
    assert_batches_equal(take(rest, 20 - start_step), whole[start_step:])


def test_a_far_step_is_reached_at_once(tmp_path):
    corpus = numbered_corpus(tmp_path, train=range(90))
    config = data.DataConfig(batch_size=4, seq_len=4)
    # 22 windows of 4: after 11 steps there are two whole epochs.
    far = data.train_batches(corpus, config, seed=3, start_step=11 * 10**11)
    seen = np.concatenate([batch["inputs"] for batch in take(far, 11)])
    assert sorted(seen[:, 0]) == sorted([*range(0, 88, 4)] * 2)


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[0], [1, 2, 3]], [[0, 2], [1]]])
def test_rows_are_those_of_the_whole_batch(tmp_path, parts):
    corpus = numbered_corpus(tmp_path, train=range(90))
    config = data.DataConfig(batch_size=4, seq_len=4)
    for start_step in (0, 7):
        arguments = {"seed": 5, "start_step": start_step}
        whole = take(data.train_batches(corpus, config, **arguments), 13)
        for rows in parts:
            found = data.train_batches(corpus, config, **arguments, rows=rows)
            wanted = [{name: x[rows] for name, x in batch.items()} for batch in whole]
            assert_batches_equal(take(found, 13), wanted)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_each_epoch_has_every_window_once_in_an_order_of_its_own(tmp_path, batch_size):
    corpus = numbered_corpus(tmp_path, train=range(81))  # 20 windows.
    config = data.DataConfig(batch_size=batch_size, seq_len=4)

    def epochs(seed):
        batches = take(data.train_batches(corpus, config, seed=seed), 60 // batch_size)
        return np.concatenate([batch["inputs"] for batch in batches])[:, 0].reshape(
            3, 20
        )

    orders = [*epochs(0), *epochs(1)]
    for order in orders:
        assert sorted(order) == list(range(0, 80, 4))
    assert len({tuple(order) for order in orders}) == 6


def test_evaluation_is_in_order_evenly_spaced_and_as_long_as_asked(tmp_path):
    corpus = numbered_corpus(tmp_path, train=range(90), validation=range(70))
    config = data.DataConfig(batch_size=2, seq_len=4)

    def first_tokens(num_batches):
        batches = data.eval_batches(corpus, config, num_batches=num_batches)
        return np.concatenate([batch["inputs"] for batch in batches])[:, 0].tolist()

    # 17 windows of 4 tokens; 6 of them, 16 / 6 or 17 / 6 apart.
    assert first_tokens(3) == [0, 8, 20, 32, 44, 56]
    everything = first_tokens(100)
    assert len(everything) == 16
    assert len(set(everything)) == 16
    assert everything == sorted(everything)


@pytest.mark.parametrize(
    ("call", "field", "word"),
    [
        (lambda corpus: data.train_batches(*corpus, seed=-1), "seed", "2^32"),
        (
            lambda corpus: data.train_batches(corpus[0], WIDE, seed=0),
            "data.batch_size",
            "training",
        ),
        (
            lambda corpus: data.eval_batches(corpus[0], WIDE, num_batches=1),
            "data.batch_size",
            "validation",
        ),
        (
            lambda corpus: next(data.train_batches(*corpus, seed=0)),
            "data.cache_dir",
            "id 700",
        ),
        (
            lambda corpus: data.eval_batches(*corpus, num_batches=1),
            "data.cache_dir",
            "id 716",
        ),
    ],
    ids=["seed", "train", "validation", "train id", "validation id"],
)
def test_unfit_batches_are_refused(tmp_path, call, field, word):
    # The last tokens of both splits are outside of the vocabulary.
    corpus = numbered_corpus(
        tmp_path, train=[*range(16), 700], validation=range(700, 717), vocab_size=700
    )
    with pytest.raises(errors.UserError) as caught:
        call((corpus, data.DataConfig(batch_size=4, seq_len=4)))
    assert str(caught.value).startswith(f"{field}: ")
    assert word in str(caught.value)


WIDE = data.DataConfig(batch_size=5, seq_len=4)  # one sequence more than there are


# --- Refusals.


@pytest.fixture(scope="module")
def unfit(trained, tmp_path_factory):
    """A folder of files, named by the table below, and a TFDS dataset in `tfds`."""
    folder = tmp_path_factory.mktemp("unfit")
    text = trained.backend.to_str()
    contents = {
        "good.json": text,
        "cut_off.json": text[:500],
        "empty.json": "",
        "object.json": "{}",
        "no_mark.json": text.replace("endoftext", "other"),
        "two_kinds.json": text.replace("ByteLevel", "Fuse", 2),
        "no_decoder.json": json.dumps(json.loads(text) | {"decoder": None}),
        "data.jsonl.gz": "[]",
        "data.parquet": "[]",
        "file": "not a folder",
        "empty.txt": "",
        "text.txt": "some text",
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
    (folder / "binary.json").write_bytes(b"\xff\xfe\x00")
    write_tfds(folder / "tfds", "train")
    shutil.copytree(folder / "tfds", folder / "tfrecord")
    (info,) = (folder / "tfrecord").glob("**/dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    return folder


REFUSALS = [
    ({"batch_size": 0}, "data.batch_size", ">= 1"),
    ({"seq_len": -1}, "data.seq_len", ">= 1"),
    ({"num_microbatches": 0}, "data.num_microbatches", ">= 1"),
    ({"num_microbatches": 5}, "data.num_microbatches", "does not divide"),
    ({"source": ""}, "data.source", "empty"),
    ({"text_field": ""}, "data.text_field", "empty"),
    ({"tokenizer": ""}, "data.tokenizer", "empty"),
    ({"cache_dir": ""}, "data.cache_dir", "empty"),
    ({"split": "piece"}, "data.split", "did you mean 'pieces'"),
    ({"vocab_size": 256}, "model.vocab_size", "at least 257"),
    *(
        ({"tokenizer": f"{{unfit}}/{name}.json"}, "data.tokenizer", word)
        for name, word in {
            "cut_off": "not a readable",
            "empty": "not a readable",
            "binary": "not a readable",
            "missing": "not a readable",
            "object": "not a readable",
            "two_kinds": "not a readable",
            "no_mark": "mark documents",
            "no_decoder": "byte-level",
            "good": "model.vocab_size 300",  # fewer than it has
        }.items()
    ),
    ({"source": "{unfit}/*.md"}, "data.source", "no file matches"),
    ({"source": "stdlb"}, "data.source", "no file matches"),
    ({"source": "{unfit}/file/nothing"}, "data.source", "no file matches"),
    ({"source": "{unfit}"}, "data.source", "it is a folder: write"),
    ({"source": "{unfit}/*.gz"}, "data.source", "neither text nor JSON lines"),
    ({"source": "{unfit}/*.parquet"}, "data.source", "neither text nor JSON lines"),
    ({"source": "{unfit}/e*.json"}, "data.source", "neither text nor JSON lines"),
    ({"source": "{unfit}/empty.txt"}, "data.source", "1 empty"),
    ({"cache_dir": "{unfit}/file/cache"}, "data.cache_dir", "writable"),
    ({"source": "tfds:nothing"}, "data.source", "download_and_prepare"),
    ({"source": "tfds:lm1b"}, "data.source", "file_format='array_record'"),
    ({"source": "tfds:small/config"}, "data.source", "not prepared"),
    ({"source": "tfds:"}, "data.source", "TFDS"),
    ({"source": "tfds:../x"}, "data.source", "TFDS"),
    ({"source": "tfds:small", "text_field": "body"}, "data.text_field", "number"),
    ({"source": "tfds:small", "text_field": "number"}, "data.text_field", "not text"),
    (
        {"source": "tfds:small", "tfds": "{unfit}/tfrecord"},
        "data.source",
        "file_format='array_record'",
    ),
]


@pytest.mark.parametrize(
    ("changes", "field", "word"),
    REFUSALS,
    ids=[" ".join(map(str, changes.values())) for changes, _, _ in REFUSALS],
)
def test_unfit_data_is_refused(unfit, tmp_path, monkeypatch, changes, field, word):
    values = {"source": "{unfit}/text.txt", "cache_dir": str(tmp_path)} | changes
    values = {
        name: value.format(unfit=unfit) if isinstance(value, str) else value
        for name, value in values.items()
    }
    monkeypatch.setenv("TFDS_DATA_DIR", values.pop("tfds", str(unfit / "tfds")))
    vocab_size = values.pop("vocab_size", VOCAB_SIZE)
    with pytest.raises(errors.UserError) as caught:
        prepare(data.DataConfig(**values), vocab_size=vocab_size)
    assert str(caught.value).startswith(f"{field}: ")
    assert word in str(caught.value)


# --- The tokenizer.


@pytest.fixture(scope="module")
def trained():
    own_source = pathlib.Path(__file__).read_text(encoding="utf-8")
    return tokenizer.Tokenizer.train([own_source, words(0, 500)], vocab_size=600)


@pytest.mark.parametrize(
    "text",
    [
        pathlib.Path(random.__file__).read_text(encoding="utf-8"),
        words(1, 100),
        "",
        "\x00\r\n\ufeff  \t naïve 漢字 🙂\u200d",
        "word" * 50_000,
        MARK + " and " + MARK,
    ],
    ids=["source", "words", "empty", "odd", "chunks", "mark"],
)
def test_text_survives_and_byte_lengths_add_up(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert int(trained.byte_lengths()[ids].sum()) == len(text.encode())
    assert trained.document_mark not in ids
    assert max(ids, default=0) < trained.vocab_size


def test_training_gives_the_size_asked_for_and_the_same_each_time(trained):
    own_source = pathlib.Path(__file__).read_text(encoding="utf-8")
    again = tokenizer.Tokenizer.train([own_source, words(0, 500)], vocab_size=600)
    assert trained.vocab_size == len(trained.byte_lengths()) == 600
    assert again.hash == trained.hash
    assert trained.byte_lengths()[trained.document_mark] == 0
    assert trained.decode([trained.document_mark]) == MARK


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"normalizer": {"type": "NFKC"}},
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            }
        },
    ],
)
def test_a_tokenizer_from_elsewhere_leaves_text_as_it_is(trained, tmp_path, change):
    text = "cafe\u0301 \ufb01ne"
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(trained.backend.to_str()) | change))
    loaded = data.Tokenizer.load(str(path))
    ids = loaded.encode(text)
    assert ids == trained.encode(text)
    assert loaded.decode(ids) == text
    assert loaded.byte_lengths()[ids].sum() == len(text.encode())


def test_save_and_load_keep_everything(trained, tmp_path):
    path = str(tmp_path / "tokenizer.json")
    trained.save(path)
    loaded = data.Tokenizer.load(path)
    text = words(2, 50) + MARK
    assert loaded.encode(text) == trained.encode(text)
    assert loaded.document_mark not in loaded.encode(text)
    assert loaded.hash == trained.hash
    np.testing.assert_array_equal(loaded.byte_lengths(), trained.byte_lengths())


def test_a_vocabulary_as_large_as_the_models_is_accepted(trained, config, tmp_path):
    path = tmp_path / "tokenizer.json"
    trained.save(str(path))
    config = dataclasses.replace(config, tokenizer=str(path))
    assert prepare(config, vocab_size=600).tokenizer.vocab_size == 600


def test_a_file_from_elsewhere_is_made_fit_for_corpora(trained, tmp_path):
    content = json.loads(trained.backend.to_str())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    content["added_tokens"][0]["special"] = False  # text could spell the mark
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    loaded = data.Tokenizer.load(str(path))
    text = f"one two three {MARK} four five six seven eight nine ten"
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.document_mark not in loaded.encode(text)
    assert loaded.byte_lengths()[loaded.document_mark] == 0


def test_wide_vocabularies_take_four_bytes_a_token(trained, config, tmp_path):
    wide = dataclasses.replace(trained, vocab_size=70_000)
    source = sources.open_source(
        config.source, text_field="text", cache_dir="", split="pieces"
    )
    source, summary = sources.scan(source)
    for tokenizer_, dtype in ((trained, "uint16"), (wide, "uint32")):
        tokens.build(str(tmp_path), source, summary=summary, tokenizer=tokenizer_)
        metadata = tokens.read_metadata(str(tmp_path))
        assert metadata["dtype"] == dtype
        _, ids = tokens.load(str(tmp_path), metadata=metadata)
        assert ids["train"].dtype == dtype
        assert (ids["train"] == trained.document_mark).sum() == 60 - (
            ids["validation"] == trained.document_mark
        ).sum()


# --- Files.


def test_documents_reach_the_token_files_unchanged(config, corpus_dir):
    lines = []
    corpus = prepare(config, log=lines.append)
    texts = [path.read_bytes().decode() for path in corpus_dir.iterdir()]
    assert all_texts(corpus) == sorted(texts)
    assert corpus.documents == 60
    assert corpus.bytes == sum(len(text.encode()) for text in texts)
    assert corpus.tokenizer.vocab_size == VOCAB_SIZE
    assert "60 files" in lines[-1]
    assert "60 documents" in lines[-1]
    assert corpus.hash[:16] in lines[-1]


def test_splits_follow_the_name_and_survive_a_move(config, corpus_dir, tmp_path):
    before = prepare(config)
    # The comparison below needs text in both splits.
    assert len(split_texts(before)["validation"]) >= 1
    moved = corpus_dir.rename(tmp_path / "moved")
    after = prepare(dataclasses.replace(config, source=str(moved / "*.txt")))
    assert after.hash == before.hash
    assert split_texts(after) == split_texts(before)


def test_odd_documents_are_kept_or_skipped_and_counted(config, corpus_dir):
    long_line = "x y=" * 50_000  # four chunks of the tokenizer
    odd = {
        "bom": b"\xef\xbb\xbfmarked",
        "crlf": b"one\r\ntwo\r\n",
        "nul": b"a\x00b",
        "special": f"before{MARK}after".encode(),
        "long": long_line.encode(),
        "empty": b"",
        "only_bom": b"\xef\xbb\xbf",
        "invalid": b"good \xff\xfe bad",
        "cut_short": "é".encode()[:1],
    }
    usual = [path.read_bytes().decode() for path in corpus_dir.iterdir()]
    for name, content in odd.items():
        (corpus_dir / f"{name}.txt").write_bytes(content)
    (corpus_dir / "missing.txt").symlink_to(corpus_dir / "nowhere")
    (corpus_dir / "folder.txt").mkdir()
    lines = []
    corpus = prepare(config, log=lines.append)
    kept = ["marked", "one\r\ntwo\r\n", "a\x00b", f"before{MARK}after", long_line]
    assert all_texts(corpus) == sorted(usual + kept)
    assert "70 files, 65 documents" in lines[-1]
    assert "2 empty" in lines[-1]
    assert "2 not UTF-8" in lines[-1]
    assert "1 unreadable (the first: missing.txt)" in lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize("separator", ["", " "])
def test_a_line_of_50_megabytes_is_encoded(config, corpus_dir, separator):
    rng = random.Random(0)
    part = separator.join(rng.choices("abcdefgh", k=500_000))
    text = part * (50_000_000 // len(part))
    (corpus_dir / "long.txt").write_text(text)
    found = split_texts(prepare(config))
    # It is nearly all of the corpus, so that its end is held out.
    assert any(text == a + b for a in found["train"] for b in found["validation"])


def test_a_single_file_is_cut_into_both_splits(config, tmp_path):
    text = words(7, 2000)
    (tmp_path / "book.txt").write_bytes(text.encode())
    config = dataclasses.replace(config, source=str(tmp_path / "book.txt"))
    found = split_texts(prepare(config))
    (train,), (validation,) = found["train"], found["validation"]
    assert train + validation == text
    assert len(validation) == pytest.approx(0.04 * len(text), abs=1)


@pytest.fixture
def json_lines(config, tmp_path):
    def write(*lines: bytes, **changes):
        (tmp_path / "lines.jsonl").write_bytes(b"\n".join(lines))
        return dataclasses.replace(config, source=str(tmp_path / "*.jsonl"), **changes)

    return write


def test_json_lines_are_documents(json_lines):
    texts = [words(number, 20) for number in range(100)]
    lines = [json.dumps({"id": 1, "body": text}).encode() for text in texts]
    lines[0] = b"\xef\xbb\xbf" + lines[0]
    lines += [
        b"  ",
        b'{"body": "\xff"}',
        b'{"body": "half of a pair: \\ud800"}',
        b'{"body": ""}',
    ]
    log = []
    corpus = prepare(json_lines(*lines, text_field="body"), log=log.append)
    assert all_texts(corpus) == sorted(texts)
    assert 0 < len(split_texts(corpus)["validation"]) < 20
    assert "1 files, 100 documents" in log[-1]
    assert "2 not UTF-8" in log[-1]
    assert "1 empty" in log[-1]


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (b'{"text": "cut of', "data.source"),
        (b'{"text": 1e5}', "data.text_field"),
        (b'{"body": "x"}', "data.text_field"),
        (b'["text"]', "data.text_field"),
        (b"[" * 100_000, "data.source"),
    ],
)
def test_a_bad_json_line_is_named_by_line_and_byte(json_lines, line, field):
    good = b'{"text": "something"}'
    with pytest.raises(errors.UserError) as caught:
        prepare(json_lines(good, b"", line, good))
    assert str(caught.value).startswith(f"{field}: ")
    assert f"lines.jsonl line 3 (byte {len(good) + 2})" in str(caught.value)


# --- The cache.


def forbid(monkeypatch, module, name):
    def fail(*args, **kwargs):
        raise AssertionError(f"{name} was called again")

    monkeypatch.setattr(module, name, fail)


def token_folders(config) -> list[pathlib.Path]:
    return sorted(
        path.parent for path in pathlib.Path(config.cache_dir).glob("*/metadata.json")
    )


def test_the_second_prepare_reads_no_text(config, monkeypatch):
    first = prepare(config)
    forbid(monkeypatch, sources, "scan")
    forbid(monkeypatch, tokens, "build")
    again = prepare(config)
    assert again.hash == first.hash
    np.testing.assert_array_equal(again.train, first.train)


def test_files_touched_but_unchanged_are_not_tokenized_again(
    config, corpus_dir, monkeypatch
):
    first = prepare(config)
    os.utime(corpus_dir / "0.txt", (1, 1))
    forbid(monkeypatch, tokens, "build")
    assert prepare(config).hash == first.hash


def test_changed_text_is_tokenized_again(config, corpus_dir):
    first = prepare(config)
    path = corpus_dir / "0.txt"
    path.write_bytes(path.read_bytes().upper())  # As long as before.
    os.utime(path, (1, 1))
    second = prepare(config)
    assert second.hash != first.hash
    assert path.read_bytes().decode() in all_texts(second)


def test_a_cache_is_per_vocabulary_and_tokenizer(config, trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    trained.save(str(path))
    given = dataclasses.replace(config, tokenizer=str(path))
    corpora = [
        prepare(config),
        prepare(config, vocab_size=280),
        prepare(given, vocab_size=1000),
    ]
    assert [corpus.tokenizer.vocab_size for corpus in corpora] == [300, 280, 600]
    assert len({corpus.hash for corpus in corpora}) == 1
    assert len(token_folders(config)) == 3


def test_the_tokenizer_is_shown_a_part_of_a_large_corpus(config, monkeypatch):
    log = []
    monkeypatch.setattr(pipeline, "_TRAINER_BYTES", 1000)
    corpus = prepare(config, log=log.append)
    assert any("on 1/" in line for line in log)
    assert corpus.documents == 60


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train.tokens", lambda content: content[:-2]),
        ("validation.tokens", lambda content: b""),
        ("tokenizer.json", lambda content: content.replace(b"k", b"c")),
        ("metadata.json", lambda content: content[:20]),
        ("metadata.json", lambda content: b"[]"),
        ("train.tokens", None),
        ("tokenizer.json", None),
        ("metadata.json", None),
    ],
)
def test_a_damaged_cache_is_made_again(config, name, damage):
    first = prepare(config)
    (folder,) = token_folders(config)
    content = (folder / name).read_bytes()
    (folder / name).unlink()  # `first` keeps its mapped file.
    if damage:
        (folder / name).write_bytes(damage(content))
    again = prepare(config)
    assert (folder / name).read_bytes() == content
    np.testing.assert_array_equal(again.train, first.train)


def test_text_that_changes_while_it_is_read_is_not_cached(
    config, corpus_dir, monkeypatch
):
    build = tokens.build

    def slow_build(*args, **kwargs):
        build(*args, **kwargs)
        (corpus_dir / "0.txt").write_bytes(b"new")

    monkeypatch.setattr(tokens, "build", slow_build)
    with pytest.raises(errors.UserError, match=r"^data\.source: .* changed while"):
        prepare(config)
    assert token_folders(config) == []
    monkeypatch.setattr(tokens, "build", build)
    assert "new" in all_texts(prepare(config))


def test_the_default_cache_is_the_users(config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    prepare(dataclasses.replace(config, cache_dir=None))
    assert list((tmp_path / "home" / "sct_jax").glob("*/train.tokens"))


FORK_SERVER = """
import json, os, signal, sys
from sct_jax import data
heavy = {"grain", "tensorflow_datasets", "tokenizers", "array_record"}
print(json.dumps(sorted(heavy & set(sys.modules))), flush=True)
from sct_jax.data import pipeline, tokens
print(json.dumps(sorted(heavy & set(sys.modules))), flush=True)

def die(*args, **kwargs):
    build(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)

build = tokens.build
for line in sys.stdin:
    source, cache_dir, *modes = json.loads(line)
    children = []
    for mode in modes:
        child = os.fork()
        if not child:
            if mode == "die":
                tokens.build = die
            config = data.DataConfig(source=source, cache_dir=cache_dir)
            corpus = data.prepare(config, vocab_size=300)
            print("hash", corpus.hash, len(corpus.train), flush=True)
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(codes), flush=True)
"""


@pytest.fixture(scope="module")
def fork_server():
    """A process that has the libraries loaded, and forks those that a test needs.

    Its first two lines name the libraries loaded with the package and its pipeline.
    """
    server = subprocess.Popen(
        [sys.executable, "-c", FORK_SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with server:
        loaded = [json.loads(server.stdout.readline()) for _ in range(2)]
        yield server, loaded
        server.stdin.close()


def run_processes(fork_server, config, *modes):
    """Returns exit codes and printed lines of simultaneous processes."""
    server, _ = fork_server
    server.stdin.write(json.dumps([config.source, config.cache_dir, *modes]) + "\n")
    server.stdin.flush()
    lines = []
    while True:
        lines.append(server.stdout.readline())
        assert lines[-1], lines  # the server died
        if lines[-1].startswith("["):
            return json.loads(lines[-1]), lines[:-1]


def test_importing_the_package_loads_no_library(fork_server):
    _, (package, pipeline_) = fork_server
    assert package == []
    assert "grain" in pipeline_
    assert "tensorflow_datasets" not in pipeline_


def test_a_kill_in_the_middle_leaves_nothing_half_made(fork_server, config):
    codes, _ = run_processes(fork_server, config, "die")
    assert codes == [-signal.SIGKILL]
    (left_over,) = pathlib.Path(config.cache_dir).glob("*.partial-*")
    assert (left_over / "train.tokens").exists()
    corpus = prepare(config)
    assert corpus.documents == 60
    assert not list(pathlib.Path(config.cache_dir).glob("*.partial-*"))


def test_two_processes_at_once_both_end_well(fork_server, config):
    codes, lines = run_processes(fork_server, config, "race", "race")
    assert codes == [0, 0]
    one, other = [line for line in lines if line.startswith("hash ")]
    assert one == other
    # One trained, the other waited.
    assert sum("training a tokenizer" in line for line in lines) == 1
    assert len(token_folders(config)) == 1


def test_a_lost_race_without_locks_ends_well(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError("not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    path = tmp_path / "cache" / "folder"

    def load(folder):
        try:
            return pathlib.Path(folder, "whole").read_text()
        except OSError as error:
            raise cache.Damaged(str(error)) from error

    def build(folder):
        # The other process is faster.
        path.mkdir()
        (path / "whole").write_text("theirs")
        pathlib.Path(folder, "whole").write_text("ours")

    assert cache.folder(str(path), build=build, load=load) == "theirs"
    assert not list(path.parent.glob("*.partial-*"))


# --- TFDS.


def write_tfds(folder, *parts, last=None):
    """Writes a dataset "small" with 300 examples per split, of which one is `last`."""
    import tensorflow_datasets as tfds

    class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description="Small.",
                features=tfds.features.FeaturesDict(
                    {"text": tfds.features.Text(), "number": np.int64}
                ),
            )

        def _split_generators(self, dl_manager):
            return {part: self._generate_examples(part) for part in parts}

        def _generate_examples(self, part):
            texts = [f"{part} {number}" for number in range(300)]
            if last:
                texts[-1] = last[part]
            for number, text in enumerate(texts):
                yield number, {"text": text, "number": number}

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        Small(data_dir=folder, file_format="array_record").download_and_prepare()


@pytest.fixture
def tfds_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


def test_a_prepared_tfds_dataset_is_read_by_name(config, tfds_dir, monkeypatch):
    write_tfds(tfds_dir, "train", "validation")
    config = dataclasses.replace(config, source="tfds:small")
    corpus = prepare(config)
    found = split_texts(corpus)
    for split in splits.SPLITS:
        assert sorted(found[split]) == sorted(f"{split} {n}" for n in range(300))
    forbid(monkeypatch, sources, "scan")
    assert prepare(config).hash == corpus.hash


def test_a_mark_before_a_text_does_not_make_another_of_it(config, tfds_dir):
    last = {"train": "\ufeffin both", "validation": "in both"}
    write_tfds(tfds_dir, "train", "validation", last=last)
    found = split_texts(prepare(dataclasses.replace(config, source="tfds:small")))
    assert "in both" in found["validation"]
    assert len(found["train"]) == 299 and "in both" not in found["train"]


def test_validation_is_carved_off_train_where_there_is_none(config, tfds_dir):
    write_tfds(tfds_dir, "train", "test")
    found = split_texts(prepare(dataclasses.replace(config, source="tfds:small")))
    assert len(found["validation"]) == 12
    assert sorted(found["train"] + found["validation"]) == sorted(
        f"train {n}" for n in range(300)
    )


# --- The standard library.


def is_held_out(raw: bytes, percent: int = 4) -> bool:
    return int(hashlib.sha256(raw).hexdigest()[:16], 16) < percent * 2**64 / 100


def documents_of_files(split: str) -> list[bytes]:
    """Returns whole files of a split, in the order that TFDS shuffles them."""
    paths = [
        path for path in STDLIB if is_held_out(path.encode()) == (split == "validation")
    ]
    order = {path: hashlib.md5(f"{split}{path}".encode()).digest() for path in paths}
    return [STDLIB[path] for path in sorted(paths, key=order.__getitem__)]


def numbered_lines(seed: int, count: int) -> bytes:
    return "".join(
        f"{seed} {k} {'é' * (k * seed % 50)}\n" for k in range(count)
    ).encode()


# Files of one piece, of a few, and of many; a copy; odd lines.
STDLIB = {
    **{f"package/{n}.py": words(n, 20).encode() for n in range(80)},
    **{f"large/{n}.py": numbered_lines(n, 1200) for n in range(6)},
    "large/copy.py": numbered_lines(5, 1200),
    "long_line.py": b"x" * 20_000 + b"\ny",
    "short_end.py": b"x" * 8191 + b"\n" + b"y" * 4095,
    "long_end.py": b"x" * 8191 + b"\n" + b"y" * 4096,
    "crlf.py": numbered_lines(0, 1500).replace(b"\n", b"\r\n"),
    "marks.py": b"\n\xef\xbb\xbf# not the start of the file" * 300,
}


@pytest.fixture
def stdlib(config, tmp_path, monkeypatch):
    """The configuration of a corpus of `STDLIB` and of files to skip."""
    root = tmp_path / "stdlib"
    for path, text in STDLIB.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(text)
    (root / "latin.py").write_bytes(b"# coding: latin-1\n# \xe9" * 1000)
    (root / "gone.py").symlink_to(root / "nowhere")
    (root / "site-packages").mkdir()
    (root / "site-packages" / "installed.py").write_text("installed = 1")
    (root / "notes.txt").write_text("not Python")
    monkeypatch.setattr(sources, "stdlib_root", lambda: str(root))
    return dataclasses.replace(config, source="stdlib")


def test_the_split_by_files_keeps_its_documents_and_their_order(stdlib):
    lines = []
    corpus = prepare(dataclasses.replace(stdlib, split="files"), log=lines.append)
    digest = hashlib.sha256()
    for split in splits.SPLITS:
        expected = documents_of_files(split)
        assert split_texts(corpus)[split] == [text.decode() for text in expected]
        digest.update(split.encode())
        for text in expected:
            digest.update(len(text).to_bytes(8, "big") + text)
    assert corpus.hash == digest.hexdigest()
    count = len(STDLIB)
    assert f"{count + 2} files, {count} documents" in lines[-1]
    assert "1 not UTF-8 (the first: latin.py)" in lines[-1]
    assert "1 unreadable (the first: gone.py)" in lines[-1]


def test_the_split_by_pieces_divides_files_and_loses_nothing(stdlib):
    lines = []
    corpus = prepare(stdlib, log=lines.append)
    found = split_texts(corpus)
    order = [
        text.decode() for split in splits.SPLITS for text in documents_of_files(split)
    ]
    for split in splits.SPLITS:
        expected = [part for text in order for part in splits.cut_pieces(text, split)]
        assert found[split] == expected
    assert corpus.bytes == sum(map(len, STDLIB.values()))
    assert len(found["validation"]) > 3
    # Skipped once, as with whole files.
    assert f"{len(STDLIB) + 2} files" in lines[-1]
    assert "1 not UTF-8 (the first: latin.py)" in lines[-1]
    assert "1 unreadable (the first: gone.py)" in lines[-1]


def test_a_cache_is_per_split_and_needs_no_tfds(stdlib, monkeypatch):
    kinds = [dataclasses.replace(stdlib, split=kind) for kind in ("files", "pieces")]
    corpora = [prepare(kind) for kind in kinds]
    assert corpora[0].hash != corpora[1].hash
    assert len(token_folders(stdlib)) == 2
    # Both share one copy of the text.
    assert len(list(pathlib.Path(stdlib.cache_dir).glob("stdlib_text-*.lock"))) == 1
    forbid(monkeypatch, sources, "scan")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    for kind, corpus in zip([*kinds, stdlib], [*corpora, corpora[1]], strict=True):
        assert prepare(kind).hash == corpus.hash


def test_other_sources_ignore_the_kind_of_split(config, monkeypatch):
    corpus = prepare(config)
    forbid(monkeypatch, sources, "scan")
    assert prepare(dataclasses.replace(config, split="files")).hash == corpus.hash


def pieces_by_hand(text: bytes) -> list[bytes]:
    """Returns pieces of 8 KiB and the rest of a line."""
    pieces = [b""]
    for line in text.split(b"\n"):
        if len(pieces[-1]) >= 8192:
            pieces.append(b"")
        pieces[-1] += line + b"\n"
    pieces[-1] = pieces[-1][:-1]
    if len(pieces) > 1 and len(pieces[-1]) < 4096:
        pieces[-2:] = [pieces[-2] + pieces[-1]]
    return pieces


@pytest.mark.parametrize("percent", [4, 40])
def test_pieces_match_a_slow_computation(monkeypatch, percent):
    monkeypatch.setattr(splits, "VALIDATION_PERCENT", percent)
    counts = []
    for text in STDLIB.values():
        pieces = pieces_by_hand(text)
        assert splits._pieces(text) == pieces
        ranked = sorted(pieces, key=lambda piece: hashlib.sha256(piece).digest())
        held_out = [piece for piece in ranked if is_held_out(piece, percent)][:2]
        expected = {"train": [], "validation": []}
        last = None
        for piece in pieces:
            split = "validation" if piece in held_out else "train"
            if split == last:
                expected[split][-1] += piece
            else:
                expected[split].append(piece)
            last = split
        for split, runs in expected.items():
            found = splits.cut_pieces(text.decode(), split)
            assert [part.encode() for part in found] == runs
        counts.append(sum(is_held_out(piece, percent) for piece in pieces))
    assert percent == 4 or max(counts) > 2  # the limit per file was reached


def test_both_splits_of_the_real_standard_library():
    root = sources.stdlib_root()
    paths = sources.stdlib_files(root)
    assert len(paths) > 500
    assert "json/decoder.py" in paths
    assert not [path for path in paths if "site-packages" in path.split(os.sep)]
    sizes, total = [], 0
    pieces = {split: set() for split in splits.SPLITS}
    for path in paths:
        is_validation = splits.split_of(path) == "validation"
        assert is_validation == is_held_out(path.encode())
        raw = pathlib.Path(root, path).read_bytes()
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            continue
        held_out = [part.encode() for part in splits.cut_pieces(text, "validation")]
        for piece in pieces_by_hand(raw):
            is_in = any(piece in part for part in held_out)
            pieces["validation" if is_in else "train"].add(piece)
        sizes.append(sum(map(len, held_out)))
        total += len(raw)
    assert pieces["validation"].isdisjoint(pieces["train"] - {b""})
    assert 0.03 * total < sum(sizes) < 0.05 * total
    # No file dominates. Some systems package the large folder `test` separately.
    most = 0.02 if total > 25_000_000 else 0.06
    assert max(sizes) < most * sum(sizes)


@pytest.mark.slow
def test_the_real_standard_library_trains(tmp_path):
    config = data.DataConfig(cache_dir=str(tmp_path))
    corpus = data.prepare(config, vocab_size=4096, log=lambda line: None)
    assert corpus.tokenizer.vocab_size == 4096
    assert corpus.bytes > 10_000_000
    lengths = corpus.tokenizer.byte_lengths()
    total = sum(int(lengths[ids].sum()) for ids in (corpus.train, corpus.validation))
    assert total == corpus.bytes
    batch = next(data.train_batches(corpus, config, seed=0))
    assert batch["inputs"].shape == (32, 256)
