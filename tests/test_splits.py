import collections
import json
import pathlib
import random
import tempfile

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from experiments.studies import trial as trial_lib
from sct_jax import data, errors
from sct_jax.data import sources, splits
from sct_jax.training import config as config_lib

quick = hypothesis.settings(derandomize=True, deadline=None, max_examples=60)
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=300)


def open_files(pattern, *, split="documents", text_field="text"):
    return sources.open_source(
        str(pattern), text_field=text_field, cache_dir="", split=split
    )


def read(pattern, *, split="documents"):
    """The documents of each split, and the summary."""
    source, summary = sources.scan(open_files(pattern, split=split))
    found = {part: list(sources.documents(source, part)) for part in splits.SPLITS}
    return found, summary


def write(folder, documents, *, names=None):
    folder.mkdir(parents=True, exist_ok=True)
    names = names or [f"{number:04}.txt" for number in range(len(documents))]
    for name, text in zip(names, documents, strict=True):
        (folder / name).write_bytes(text.encode())
    return folder / "*.txt"


def share(summary) -> float:
    return summary.bytes["validation"] / sum(summary.bytes.values())


# --- Splits by content.


def test_a_split_is_cut_by_bytes_where_one_document_is_nearly_all(tmp_path):
    large, small = "one line of text\n" * 75_000, "x" * 500
    # Whichever of them a hash holds out.
    assert splits._split(splits.content_hash(large.encode())) == "train"
    letters = [chr(code) * 1_200_000 for code in range(33, 127)]
    held_out = next(
        text
        for text in letters
        if splits._split(splits.content_hash(text.encode())) == "validation"
    )
    for name, text in (("train", large), ("validation", held_out)):
        found, summary = read(write(tmp_path / name, [text, small]))
        assert 0.02 <= share(summary) <= 0.08
        assert summary.cut == 1
        head, tail = (max(found[split], key=len) for split in splits.SPLITS)
        assert head + tail == text
        assert sum(summary.bytes.values()) == len(text) + len(small)
        assert "1 cut in two, because" in sources.describe(summary)


def test_a_whole_document_stays_whole_where_the_share_is_near(tmp_path):
    documents = [f"document {number} " * 20 for number in range(400)]
    found, summary = read(write(tmp_path, documents))
    assert summary.cut == 0
    assert "cut" not in sources.describe(summary)
    assert sorted(found["train"] + found["validation"]) == sorted(documents)
    held_out = {
        text
        for text in documents
        if splits._split(splits.content_hash(text.encode())) == "validation"
    }
    assert set(found["validation"]) == held_out
    assert 0.02 <= share(summary) <= 0.08


@pytest.mark.parametrize(
    ("validation", "far"), [(0, True), (19, True), (20, False), (80, False), (81, True)]
)
def test_a_share_is_far_below_half_and_above_twice(validation, far):
    assert splits.is_far(validation, 1000) == far


def test_equal_documents_land_in_one_split(tmp_path):
    """Under other names, in JSON lines, with a byte order mark, by a link."""
    unique = [f"text {number} " * 30 for number in range(200)]
    write(tmp_path / "a", unique)
    write(tmp_path / "b", unique[:100], names=[f"copy{n}.txt" for n in range(100)])
    (tmp_path / "b" / "bom.txt").write_bytes(b"\xef\xbb\xbf" + unique[100].encode())
    (tmp_path / "b" / "link.txt").symlink_to(tmp_path / "a" / "0101.txt")
    found, summary = read(tmp_path / "**" / "*.txt")
    assert set(found["train"]).isdisjoint(found["validation"])
    assert summary.repeats == 101
    assert sum(summary.documents.values()) == 301
    assert "301 documents (101 equal to an earlier one)" in sources.describe(summary)
    assert len(found["validation"]) > 2


def test_one_document_alone_is_cut_where_it_always_was(tmp_path):
    text = "".join(f"ligne {number} {'é' * (number // 9)}\n" for number in range(900))
    pattern = write(tmp_path, [text])
    found, summary = read(pattern)
    assert found == {
        "train": [text[: 96 * len(text) // 100]],
        "validation": [text[96 * len(text) // 100 :]],
    }
    assert summary.hash == read(pattern, split="paths")[1].hash
    # Unless its end has wider characters than the rest.
    text = "a" * 960 + "🙂" * 40
    _, summary = read(write(tmp_path, [text]))
    assert 0.02 <= share(summary) <= 0.08


def test_documents_stay_whole_where_other_ones_can_be_held_out(tmp_path):
    """One document is nearly all, and the small ones are more than 4 %."""
    documents = ["large " * 20_000, *(f"small {n} " * 30 for n in range(60))]
    found, summary = read(write(tmp_path, documents))
    assert sorted(found["train"] + found["validation"]) == sorted(documents)
    assert summary.cut == 0
    assert 0.02 <= share(summary) <= 0.08


def test_copies_of_one_document_are_cut_alike(tmp_path):
    text = "a line that every copy has\n" * 50
    found, summary = read(write(tmp_path, [text] * 30))
    (head,), (tail,) = (set(found[split]) for split in splits.SPLITS)
    assert head + tail == text
    assert share(summary) == pytest.approx(0.04, abs=0.001)
    assert summary.repeats == 29
    assert summary.cut == 30


@quick
@hypothesis.given(
    documents=st.lists(texts, min_size=1, max_size=30),
    copies=st.lists(st.integers(0, 29), max_size=30),
)
def test_splits_partition_any_corpus_by_content(documents, copies):
    documents += [documents[k % len(documents)] for k in copies]
    total = sum(len(text.encode()) for text in documents)
    hypothesis.assume(total >= 8)
    with tempfile.TemporaryDirectory() as name:
        pattern = write(pathlib.Path(name), documents)
        # A byte order mark is not text.
        documents = [text.removeprefix("\ufeff") for text in documents]
        if not any(documents):
            return
        try:
            found, summary = read(pattern)
        except errors.UserError as error:
            assert "too little text" in str(error)
            assert len(set(documents) - {""}) <= 2
            return
    kept = [text for text in documents if text]
    assert sum(summary.bytes.values()) == sum(len(text.encode()) for text in kept)
    assert summary.skipped.get("empty", {"count": 0})["count"] == (
        len(documents) - len(kept)
    )
    assert summary.repeats == len(kept) - len(set(kept))
    # Each content is in one split, or cut at one place; nothing is lost.
    parts = {split: collections.Counter(found[split]) for split in splits.SPLITS}
    whole = collections.Counter(kept)
    cut = [text for text in whole if not fits(whole, text, parts)]
    assert len(cut) <= 1
    for text in cut:
        assert summary.cut == whole[text]
        ends = [k for k in range(1, len(text)) if is_cut_at(whole, text, parts, k)]
        assert ends, (text, parts)
    # The share, up to the characters that a border cannot divide.
    most = 4 * max(whole.values()) / sum(summary.bytes.values())
    assert 0.02 - most <= share(summary) <= 0.08 + most


def fits(whole, text, parts) -> bool:
    """Whether all copies of a text are in one split, as they are."""
    counts = sorted(parts[split][text] for split in splits.SPLITS)
    return counts[1] >= whole[text]


def is_cut_at(whole, text, parts, place) -> bool:
    head, tail = text[:place], text[place:]
    return (
        parts["train"][head] >= whole[text] and parts["validation"][tail] >= whole[text]
    )


@quick
@hypothesis.given(
    documents=st.lists(texts, min_size=2, max_size=20), seed=st.integers()
)
def test_neither_the_folder_nor_the_order_of_its_names_changes_anything(
    documents, seed
):
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        first, second = root / "corpus", root / "moved" / "c[1]" / "corpus"
        names = [f"{number:04}.txt" for number in range(len(documents))]
        write(first, documents, names=names)
        # The system lists files in the order of their creation, or in no order.
        write(
            second,
            [documents[k] for k in order],
            names=[names[k] for k in order],
        )
        results = []
        for folder in (first, second):
            try:
                results.append(read(folder / "*.txt"))
            except errors.UserError as error:
                results.append(str(error).replace(str(folder), ""))
    assert results[0] == results[1]


@quick
@hypothesis.given(
    contents=st.dictionaries(
        st.integers(0, 2**64 - 1), st.integers(1, 10**6), min_size=1, max_size=40
    ),
    copies=st.lists(st.integers(0, 39), max_size=10),
)
def test_a_border_is_near_four_percent_and_cuts_only_where_it_must(contents, copies):
    documents = list(contents.items())
    documents += [documents[k % len(contents)] for k in copies]
    hashes, sizes = zip(*documents, strict=True)
    border = splits.border(np.array(hashes, np.uint64), np.array(sizes, np.uint64))
    total = sum(sizes)
    order = lambda hash_, size: (size > 0.08 * total, hash_)
    place = (border.is_large, border.hash)
    below = sum(size for hash_, size in documents if order(hash_, size) < place)
    own = sum(size for hash_, size in documents if hash_ == border.hash)
    assert own == border.size
    assert 0 <= border.held_out <= own
    held_out = below + border.held_out
    assert not splits.is_far(held_out, total) or total < 50
    if border.held_out not in (0, own):  # it cuts only where it must
        assert held_out == -(-total // 25)
        assert all(splits.is_far(below + whole, total) for whole in (0, own))


def test_a_border_never_divides_a_character():
    for text in ("🙂" * 7, "é" * 30, "a🙂", "🙂a", "漢字かな" * 9):
        raw = text.encode()
        for held_out in range(1, len(raw) + 1):
            border = splits.Border(
                splits.content_hash(raw), len(raw), held_out, True, 0
            )
            train, validation = (
                "".join(border.cut(text, split)) for split in splits.SPLITS
            )
            assert train + validation == text
            assert held_out <= len(validation.encode()) < held_out + 4


# --- Runs that began before splits went by content.


def by_name(pattern):
    """The splits that hashes of relative names give, read file by file."""
    found = {split: [] for split in splits.SPLITS}
    for path in sorted(pattern.parent.glob(pattern.name)):
        if not path.exists():
            continue
        text = path.read_text()
        if path.suffix == ".jsonl":
            for number, line in enumerate(text.splitlines(), 1):
                where = f"{path.name}:{number}"
                found[splits.split_of(where)].append(json.loads(line)["text"])
        else:
            found[splits.split_of(path.name)].append(text)
    return found


def test_the_split_by_paths_is_as_it_was(tmp_path):
    write(tmp_path, [f"text {number} " * 9 for number in range(150)])
    (tmp_path / "link.txt").symlink_to(tmp_path / "0000.txt")
    (tmp_path / "hard.txt").hardlink_to(tmp_path / "0001.txt")
    (tmp_path / "raw.json").write_text('{\n "text": "pretty"\n}')
    lines = [f'{{"text": "old", "text": "line {number}"}}' for number in range(80)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    found, summary = read(tmp_path / "*", split="paths")
    assert found == by_name(tmp_path / "*")
    assert summary.files == 156
    assert {reason: entry["count"] for reason, entry in summary.skipped.items()} == {
        "empty": 1,
        "unreadable": 1,
    }
    assert summary.hash == read(tmp_path / "*", split="paths")[1].hash
    assert summary.hash != read(tmp_path / "*.txt")[1].hash


def test_the_split_by_paths_moves_with_its_folder(tmp_path):
    write(tmp_path / "a", [f"text {number} " * 9 for number in range(150)])
    before = read(tmp_path / "a" / "*.txt", split="paths")
    (tmp_path / "b").mkdir()
    (tmp_path / "a").rename(tmp_path / "b" / "[c]")
    assert read(tmp_path / "b" / "[c]" / "*.txt", split="paths") == before
    (tmp_path / "b" / "[c]").rename(tmp_path / "c")
    assert read(tmp_path / "c" / "*.txt", split="paths") == before


def test_a_split_by_paths_is_cut_only_where_it_is_empty(tmp_path):
    text = "one line of text\n" * 75_000
    names = (f"{number}.txt" for number in range(1000))
    held_out = next(n for n in names if splits.split_of(n) == "validation")
    pattern = write(tmp_path, [text, "x" * 500], names=[held_out, "other.txt"])
    assert splits.split_of("other.txt") == "train"
    _, summary = read(pattern, split="paths")
    assert summary.bytes == {"train": 500, "validation": len(text)}


# --- Which value divides which source.


def test_a_new_run_takes_the_first_kind_of_its_source():
    own, stdlib = data.DataConfig(source="x"), data.DataConfig()
    assert own.kinds_of_split == ("documents", "paths")
    assert stdlib.kinds_of_split == ("pieces", "files")


@pytest.mark.parametrize("split", ["documents", "paths"])
def test_the_standard_library_is_not_divided_by_document(split):
    with pytest.raises(errors.UserError, match=r"^data\.split: .*'pieces' or 'files'"):
        data.DataConfig(split=split).validate()
    data.DataConfig(source="x", split=split).validate()


def test_a_source_read_from_a_cache_of_another_split_is_another(tmp_path):
    pattern = write(tmp_path, [f"text {number} " * 9 for number in range(100)])
    kinds = [open_files(pattern, split=split) for split in ("documents", "paths")]
    assert kinds[0].fingerprint != kinds[1].fingerprint
    # Values for other sources have no effect.
    for split in ("pieces", "files"):
        other = open_files(pattern, split=split)
        assert other.fingerprint == kinds[0].fingerprint


def test_a_trial_on_own_files_is_the_same_however_its_text_is_divided():
    """The hash of the text tells, so a study from before `documents` can go on."""

    def identity(**fields):
        experiment = config_lib.ExperimentConfig(data=data.DataConfig(**fields))
        return trial_lib.Trial(method="m", experiment=experiment, branches=()).identity

    own = [identity(source="x", split=split) for split in (None, "documents", "paths")]
    assert own[0] == own[1] == own[2]
    assert identity(split="files") != identity(split="pieces")


def test_a_configuration_from_before_names_no_kind_of_split():
    for fields, split in (
        ({"source": "x"}, "paths"),
        ({"source": "x", "split": "files"}, "paths"),  # it had no effect
        ({"source": "x", "split": "pieces"}, "paths"),
        ({"source": "x", "split": "documents"}, "documents"),
        ({"source": "tfds:x"}, "paths"),
        ({"source": "stdlib"}, "files"),
        ({"source": "stdlib", "split": "pieces"}, "pieces"),
    ):
        read_back = config_lib.run_from_dict({"data": fields})
        assert read_back.data.split == split
        written = config_lib.to_dict(read_back)
        assert config_lib.run_from_dict(written) == read_back


def test_a_kind_of_split_for_another_source_is_noted():
    for source, split, noted in (
        ("x", "files", True),
        ("x", "pieces", True),
        ("x", "paths", False),
        ("x", "documents", False),
        ("x", None, False),
        ("stdlib", "files", False),
    ):
        fields = data.DataConfig(source=source, split=split)
        notes = config_lib.ExperimentConfig(data=fields).unused_fields()
        assert any(note.startswith("data.split: ") for note in notes) == noted
