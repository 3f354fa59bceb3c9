import contextlib
import dataclasses
import fcntl
import io
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from sct_jax import data, errors
from sct_jax.data import cache, pipeline, sources, tokenizer, tokens

VOCAB_SIZE = 300
MARK = "<|endoftext|>"


def words(seed: int, count: int) -> str:
    """`count` words with repeated syllables, so that there is something to merge."""
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


def config_error(config, *, vocab_size=VOCAB_SIZE) -> str:
    with pytest.raises(errors.UserError) as caught:
        prepare(config, vocab_size=vocab_size)
    return str(caught.value)


def numbered_corpus(tmp_path, *, train, validation=(0,), marks=(), vocab_size=1000):
    """A corpus whose token i is i, but for marks at the given places."""

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
    """The documents of each split, decoded from the token files."""
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


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_global_batch_in_order(tmp_path, process_count):
    corpus = numbered_corpus(tmp_path, train=range(90), validation=range(60))
    config = data.DataConfig(batch_size=4, seq_len=4)

    def join(parts):
        return [
            {name: np.concatenate([p[name] for p in step]) for name in step[0]}
            for step in zip(*parts, strict=True)
        ]

    ranks = [
        {"process_index": index, "process_count": process_count}
        for index in range(process_count)
    ]
    for start_step in (0, 7):
        arguments = {"seed": 5, "start_step": start_step}
        alone = take(data.train_batches(corpus, config, **arguments), 13)
        parts = [
            take(data.train_batches(corpus, config, **arguments, **rank), 13)
            for rank in ranks
        ]
        assert_batches_equal(join(parts), alone)
    alone = data.eval_batches(corpus, config, num_batches=9)
    parts = [data.eval_batches(corpus, config, num_batches=9, **rank) for rank in ranks]
    assert len(alone) == 3  # 14 windows.
    assert_batches_equal(join(parts), alone)


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


def test_a_corpus_shorter_than_a_batch_is_refused(tmp_path):
    corpus = numbered_corpus(tmp_path, train=range(16), validation=range(16))
    config = data.DataConfig(batch_size=4, seq_len=4)  # 3 windows each.
    with pytest.raises(errors.UserError, match=r"data\.batch_size.*training"):
        data.train_batches(corpus, config, seed=0)
    with pytest.raises(errors.UserError, match=r"data\.batch_size.*validation"):
        data.eval_batches(corpus, config, num_batches=1)


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path):
    corpus = numbered_corpus(
        tmp_path, train=[*range(16), 700], validation=range(700, 717), vocab_size=700
    )
    config = data.DataConfig(batch_size=4, seq_len=4)
    with pytest.raises(errors.UserError, match=r"data\.cache_dir.*id 700"):
        next(data.train_batches(corpus, config, seed=0))
    with pytest.raises(errors.UserError, match=r"data\.cache_dir.*id 716"):
        data.eval_batches(corpus, config, num_batches=1)


def test_batches_that_cannot_be_divided_or_seeded_are_refused(tmp_path):
    corpus = numbered_corpus(tmp_path, train=range(90))
    config = data.DataConfig(batch_size=4, seq_len=4)
    with pytest.raises(errors.UserError, match=r"data\.batch_size"):
        data.train_batches(corpus, config, seed=0, process_count=3)
    with pytest.raises(errors.UserError, match="seed"):
        data.train_batches(corpus, config, seed=-1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("seq_len", -1),
        ("num_microbatches", 0),
        ("num_microbatches", 5),
        ("source", ""),
        ("text_field", ""),
    ],
)
def test_validate_names_the_field(field, value):
    data.DataConfig().validate()
    with pytest.raises(errors.UserError, match=rf"data\.{field}: "):
        dataclasses.replace(data.DataConfig(), **{field: value}).validate()


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
    ids=["source", "words", "empty", "odd", "pieces", "mark"],
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


def test_too_small_a_vocabulary_to_train_is_refused(config):
    assert "model.vocab_size: must be at least 257" in config_error(
        config, vocab_size=256
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text[:500], "not a readable"),
        (lambda text: "", "not a readable"),
        (lambda text: "\x00\x01", "not a readable"),
        (lambda text: "{}", "not a readable"),
        (lambda text: text.replace("endoftext", "other"), "mark documents"),
        (lambda text: text.replace("ByteLevel", "Fuse", 2), "not a readable"),
        (lambda text: json.dumps(json.loads(text) | {"decoder": None}), "byte-level"),
    ],
)
def test_a_corrupt_or_unfit_tokenizer_file_is_refused(
    trained, config, tmp_path, edit, message
):
    path = tmp_path / "tokenizer.json"
    path.write_text(edit(trained.backend.to_str()))
    config = dataclasses.replace(config, tokenizer=str(path))
    error = config_error(config)
    assert error.startswith("data.tokenizer: ")
    assert message in error


def test_a_missing_or_binary_tokenizer_file_is_refused(config, tmp_path):
    path = tmp_path / "tokenizer.json"
    config = dataclasses.replace(config, tokenizer=str(path))
    assert config_error(config).startswith("data.tokenizer: ")
    path.write_bytes(b"\xff\xfe\x00")
    assert config_error(config).startswith("data.tokenizer: ")


def test_a_vocabulary_beyond_the_models_is_refused(trained, config, tmp_path):
    path = tmp_path / "tokenizer.json"
    trained.save(str(path))
    config = dataclasses.replace(config, tokenizer=str(path))
    error = config_error(config, vocab_size=599)
    assert error.startswith("data.tokenizer: ")
    assert "model.vocab_size 599" in error
    assert prepare(config, vocab_size=600).tokenizer.vocab_size == 600


def test_a_file_from_elsewhere_is_made_fit_for_corpora(trained, tmp_path):
    content = json.loads(trained.backend.to_str())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    content["added_tokens"][0]["special"] = False  # Text could spell the mark.
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    loaded = data.Tokenizer.load(str(path))
    text = f"one two three {MARK} four five six seven eight nine ten"
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.document_mark not in loaded.encode(text)
    assert loaded.byte_lengths()[loaded.document_mark] == 0


def test_wide_vocabularies_take_four_bytes_a_token(trained, config, tmp_path):
    wide = dataclasses.replace(trained, vocab_size=70_000)
    source = sources.open_source(config.source, text_field="text", cache_dir="")
    source, summary = sources.scan(source)
    for tokenizer_, dtype in ((trained, "uint16"), (wide, "uint32")):
        tokens.build(str(tmp_path), source, summary=summary, tokenizer=tokenizer_)
        metadata = tokens.read_metadata(str(tmp_path))
        assert metadata["dtype"] == dtype
        _, splits = tokens.load(str(tmp_path), metadata=metadata)
        assert splits["train"].dtype == dtype
        assert (splits["train"] == trained.document_mark).sum() == 60 - (
            splits["validation"] == trained.document_mark
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
    # 0.04 of 60: the hash must have put something on both sides for this to mean much.
    assert len(split_texts(before)["validation"]) >= 1
    moved = corpus_dir.rename(tmp_path / "moved")
    after = prepare(dataclasses.replace(config, source=str(moved / "*.txt")))
    assert after.hash == before.hash
    assert split_texts(after) == split_texts(before)


def test_odd_documents_are_kept_or_skipped_and_counted(config, corpus_dir):
    long_line = "x y=" * 250_000
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
    corpus = prepare(config)
    assert text in all_texts(corpus)


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
    error = config_error(json_lines(good, b"", line, good))
    assert error.startswith(field)
    assert f"lines.jsonl line 3 (byte {len(good) + 2})" in error


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{folder}/*.md", "no file matches"),
        ("stdlb", "no file matches"),
        ("{folder}/0.txt/nothing", "no file matches"),
        ("{folder}", "it is a folder: write"),
    ],
)
def test_a_source_that_matches_nothing_is_refused(config, corpus_dir, source, message):
    source = source.format(folder=corpus_dir)
    error = config_error(dataclasses.replace(config, source=source))
    assert error.startswith("data.source: ")
    assert message in error


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet", ".json"])
def test_a_source_in_another_format_is_refused(config, tmp_path, suffix):
    (tmp_path / f"part{suffix}").write_bytes(b"[]")
    source = str(tmp_path / "part*")
    error = config_error(dataclasses.replace(config, source=source))
    assert error.startswith("data.source: ")
    assert "neither text nor JSON lines" in error


def test_a_corpus_without_text_is_refused(config, corpus_dir):
    for path in corpus_dir.iterdir():
        path.write_bytes(b"")
    error = config_error(config)
    assert error.startswith("data.source: ")
    assert "60 empty" in error


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
    ],
)
def test_a_damaged_cache_is_made_again(config, name, damage):
    first = prepare(config)
    (folder,) = token_folders(config)
    content = (folder / name).read_bytes()
    (folder / name).unlink()  # `first` keeps its mapped file.
    (folder / name).write_bytes(damage(content))
    again = prepare(config)
    assert (folder / name).read_bytes() == content
    np.testing.assert_array_equal(again.train, first.train)


@pytest.mark.parametrize("missing", ["train.tokens", "tokenizer.json", "metadata.json"])
def test_a_cache_with_a_file_missing_is_made_again(config, missing):
    first = prepare(config)
    (folder,) = token_folders(config)
    (folder / missing).unlink()
    assert prepare(config).hash == first.hash
    assert (folder / missing).exists()


def test_text_that_changes_while_it_is_read_is_not_cached(
    config, corpus_dir, monkeypatch
):
    build = tokens.build

    def slow_build(*args, **kwargs):
        build(*args, **kwargs)
        (corpus_dir / "0.txt").write_bytes(b"new")

    monkeypatch.setattr(tokens, "build", slow_build)
    assert "changed while" in config_error(config)
    assert token_folders(config) == []
    monkeypatch.setattr(tokens, "build", build)
    assert "new" in all_texts(prepare(config))


def test_an_unwritable_cache_folder_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("")
    config = dataclasses.replace(config, cache_dir=str(tmp_path / "file" / "cache"))
    assert config_error(config).startswith("data.cache_dir: ")


def test_the_default_cache_is_the_users(config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    prepare(dataclasses.replace(config, cache_dir=None))
    assert list((tmp_path / "home" / "sct_jax").glob("*/train.tokens"))


CHILD = """
import os, signal, sys
from sct_jax import data
from sct_jax.data import tokens
config = data.DataConfig(source=sys.argv[1], cache_dir=sys.argv[2])
if sys.argv[3] == "die":
    def die(*args, **kwargs):
        build(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    build, tokens.build = tokens.build, die
print("ready", flush=True)
sys.stdin.readline()
corpus = data.prepare(config, vocab_size=300)
print("hash", corpus.hash, len(corpus.train), flush=True)
"""


def start_child(config, mode):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, config.source, config.cache_dir, mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_kill_in_the_middle_leaves_nothing_half_made(config):
    with start_child(config, "die") as child:
        _, err = child.communicate("go\n", timeout=120)
    assert child.returncode == -signal.SIGKILL, err
    (left_over,) = pathlib.Path(config.cache_dir).glob("*.partial-*")
    assert (left_over / "train.tokens").exists()
    corpus = prepare(config)
    assert corpus.documents == 60
    assert not list(pathlib.Path(config.cache_dir).glob("*.partial-*"))


def test_two_processes_at_once_both_end_well(config):
    with start_child(config, "race") as one, start_child(config, "race") as two:
        for child in (one, two):
            assert child.stdout.readline() == "ready\n"
        for child in (one, two):
            child.stdin.write("go\n")
            child.stdin.flush()
        outputs = [child.communicate(timeout=120) for child in (one, two)]
    assert [one.returncode, two.returncode] == [0, 0], outputs
    results = [out.splitlines()[-1] for out, _ in outputs]
    assert results[0] == results[1]
    assert results[0].startswith("hash ")
    # One trained, the other waited for it.
    assert sum("training a tokenizer" in out for out, _ in outputs) == 1
    assert len(token_folders(config)) == 1


def test_a_lost_race_without_locks_ends_well(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError("not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    path = tmp_path / "cache" / "folder"

    def is_complete(folder):
        return os.path.exists(os.path.join(folder, "whole"))

    def build(folder):
        # The other process is faster.
        path.mkdir()
        (path / "whole").write_text("theirs")
        pathlib.Path(folder, "whole").write_text("ours")

    cache.folder(str(path), build=build, is_complete=is_complete)
    assert (path / "whole").read_text() == "theirs"
    assert not list(path.parent.glob("*.partial-*"))


# --- TFDS.


@pytest.fixture
def tfds_dir(tmp_path, monkeypatch):
    """Where a small dataset can be prepared, and is then looked for."""
    import tensorflow_datasets as tfds

    class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        splits: tuple[str, ...] = ("train", "validation")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description="Small.",
                features=tfds.features.FeaturesDict(
                    {"text": tfds.features.Text(), "number": np.int64}
                ),
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in self.splits}

        def _generate_examples(self, split):
            for number in range(300):
                yield number, {"text": f"{split} {number}", "number": number}

    def build(*splits):
        Small.splits = splits
        with contextlib.redirect_stdout(io.StringIO()):
            Small(
                data_dir=tmp_path / "tfds", file_format="array_record"
            ).download_and_prepare()

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    tfds.disable_progress_bar()
    return build


def test_a_prepared_tfds_dataset_is_read_by_name(config, tfds_dir, monkeypatch):
    tfds_dir("train", "validation")
    config = dataclasses.replace(config, source="tfds:small")
    corpus = prepare(config)
    found = split_texts(corpus)
    for split in ("train", "validation"):
        assert sorted(found[split]) == sorted(f"{split} {n}" for n in range(300))
    forbid(monkeypatch, sources, "scan")
    assert prepare(config).hash == corpus.hash


def test_validation_is_carved_off_train_where_there_is_none(config, tfds_dir):
    tfds_dir("train", "test")
    found = split_texts(prepare(dataclasses.replace(config, source="tfds:small")))
    assert len(found["validation"]) == 12
    assert sorted(found["train"] + found["validation"]) == sorted(
        f"train {n}" for n in range(300)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "tfds:nothing"}, "data.source: .*not prepared.*download_and_prep"),
        ({"source": "tfds:lm1b"}, "data.source: .*'lm1b'.*array_record"),
        ({"source": "tfds:small/config"}, "data.source: .*not prepared"),
        ({"source": "tfds:"}, "data.source: "),
        ({"source": "tfds:../x"}, "data.source: "),
        ({"source": "tfds:small", "text_field": "body"}, "data.text_field: .*number"),
        ({"source": "tfds:small", "text_field": "number"}, "data.text_field: .*not te"),
    ],
)
def test_an_unfit_tfds_name_or_field_is_refused(config, tfds_dir, changes, message):
    tfds_dir("train")
    with pytest.raises(errors.UserError, match=f"(?s)^{message}"):
        prepare(dataclasses.replace(config, **changes))


def test_a_tfds_dataset_in_another_format_is_refused(config, tfds_dir, tmp_path):
    tfds_dir("train")
    (info,) = (tmp_path / "tfds").glob("**/dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    error = config_error(dataclasses.replace(config, source="tfds:small"))
    assert error.startswith("data.source: ")
    assert "file_format='array_record'" in error


# --- The standard library.


def test_the_standard_library_is_a_tfds_dataset(config, tmp_path, monkeypatch):
    root = tmp_path / "stdlib"
    (root / "package").mkdir(parents=True)
    (root / "site-packages").mkdir()
    texts = {f"package/{number}.py": words(number, 20) for number in range(80)}
    for path, text in texts.items():
        (root / path).write_bytes(text.encode())
    (root / "latin.py").write_bytes(b"# coding: latin-1\n# \xe9")
    (root / "gone.py").symlink_to(root / "nowhere")
    (root / "site-packages" / "installed.py").write_text("installed = 1")
    (root / "notes.txt").write_text("not Python")
    monkeypatch.setattr(sources, "stdlib_root", lambda: str(root))
    config = dataclasses.replace(config, source="stdlib")
    lines = []
    corpus = prepare(config, log=lines.append)
    found = split_texts(corpus)
    for split in ("train", "validation"):
        expected = sorted(
            text for path, text in texts.items() if sources.split_of(path) == split
        )
        assert sorted(found[split]) == expected
    assert "82 files, 80 documents" in lines[-1]
    assert "1 not UTF-8 (the first: latin.py)" in lines[-1]
    assert "1 unreadable (the first: gone.py)" in lines[-1]
    # The second time neither the text nor TFDS is needed.
    forbid(monkeypatch, sources, "scan")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert prepare(config).hash == corpus.hash


def test_the_real_standard_library_is_split_by_path():
    files = sources.stdlib_files(sources.stdlib_root())
    assert len(files) > 1000
    assert "json/decoder.py" in files
    assert not [path for path in files if "site-packages" in path.split(os.sep)]
    share = np.mean([sources.split_of(path) == "validation" for path in files])
    # Binomial, 4 %: five standard deviations of 1,790 draws.
    assert abs(share - 0.04) < 5 * np.sqrt(0.04 * 0.96 / len(files))


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
