import contextlib
import dataclasses
import functools
import glob
import io
import json
import os
import pathlib
import pwd
import re
import signal
import socket
import tempfile

import hypothesis
import pytest
from hypothesis import strategies as st

from sct_jax import data, errors, files
from sct_jax.data import patterns, sources, splits

SUBJECTS = ("the sea", "a ship", "the harbour", "a gull", "the tide")


@pytest.fixture(autouse=True)
def no_hang():
    """A read that waits for ever ends the test."""

    before = signal.signal(
        signal.SIGALRM, lambda *_: pytest.fail("a read does not return")
    )
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def sentences(number: int) -> str:
    return " and ".join(
        f"{SUBJECTS[(number + k) % 5]} {number * k}" for k in range(1, 20)
    )


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(sentences(number))
    return folder


@pytest.fixture
def config(tmp_path, corpus):
    return data.DataConfig(
        source=str(corpus / "*.txt"),
        cache_dir=str(tmp_path / "cache"),
        batch_size=2,
        seq_len=8,
    )


def prepare(config, **changes):
    """The corpus, and the last line about it."""
    lines = []
    config = dataclasses.replace(config, **changes)
    corpus = data.prepare(config, vocab_size=300, log=lines.append)
    return corpus, lines[-1]


def open_files(pattern, *, split="documents", text_field="text"):
    return sources.open_source(
        str(pattern), text_field=text_field, cache_dir="", split=split
    )


def scan(pattern, **options):
    return sources.scan(open_files(pattern, **options))


def counts(summary):
    return {reason: entry["count"] for reason, entry in summary.skipped.items()}


def texts(pattern, **options):
    source, _ = scan(pattern, **options)
    return sorted(
        t for split in splits.SPLITS for t in sources.documents(source, split)
    )


def refusal(pattern, **options) -> str:
    with pytest.raises(errors.UserError) as caught:
        scan(pattern, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- What is reported.


def test_the_counts_are_those_of_this_reading(config, corpus, monkeypatch):
    """Files that hold no text leave the tokens as they are, and are still counted."""
    first, line = prepare(config)
    assert "40 files, 40 documents" in line
    assert "skipped" not in line
    latin = [corpus / f"latin{number}.txt" for number in range(10)]
    for path in latin:
        path.write_bytes(b"caf\xe9 ol\xe9")
    again, line = prepare(config)
    assert again.hash == first.hash
    assert "50 files, 40 documents" in line
    assert "skipped 10 not UTF-8 (the first: latin0.txt)" in line
    # Whether the text was read or not.
    with monkeypatch.context() as patch:
        patch.setattr(sources, "scan", None)
        assert prepare(config)[1] == line
    for path in latin:
        path.unlink()
    os.mkfifo(corpus / "pipe.txt")
    _, line = prepare(config)
    assert "40 files, 40 documents" in line
    assert "skipped 1 not a regular file (the first: pipe.txt)" in line
    (corpus / "more.txt").write_bytes(b"")
    _, line = prepare(config)
    assert "41 files, 40 documents" in line
    assert "skipped 1 not a regular file (the first: pipe.txt), 1 empty" in line
    (corpus / "pipe.txt").unlink()
    (corpus / "more.txt").unlink()
    _, line = prepare(config)
    assert "40 files, 40 documents" in line
    assert "skipped" not in line


def test_every_path_is_counted_once(corpus):
    (corpus / "empty.txt").write_bytes(b"")
    (corpus / "latin.txt").write_bytes(b"\xe9")
    (corpus / "gone.txt").symlink_to("nowhere")
    (corpus / "again.txt").symlink_to("0.txt")
    (corpus / "hard.txt").hardlink_to(corpus / "1.txt")
    (corpus / "copy.txt").write_text(sentences(2))
    (corpus / "lines.jsonl").write_text('{"text": "a"}\n\n{"text": ""}\n{"text": "b"}')
    (corpus / "none.jsonl").write_text("\n\n")
    (corpus / "folder.txt").mkdir()
    os.mkfifo(corpus / "pipe.txt")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(str(corpus / "socket.txt"))
        _, summary = scan(corpus / "**")
    assert summary.files == 46
    assert summary.repeats == 1
    assert sum(summary.documents.values()) == 43
    assert counts(summary) == {
        "not a regular file": 2,
        "read by another path": 2,
        "empty": 3,
        "not UTF-8": 1,
        "unreadable": 1,
    }
    assert summary.skipped["not a regular file"]["first"] == "pipe.txt"
    assert summary.skipped["read by another path"]["first"] == "again.txt"


def test_devices_are_not_read(tmp_path):
    (tmp_path / "zeros.txt").symlink_to("/dev/zero")
    (tmp_path / "text.txt").write_text("some text")
    _, summary = scan(tmp_path / "*.txt")
    assert counts(summary) == {"not a regular file": 1}
    assert "is a device, which cannot be read twice" in refusal(tmp_path / "zeros.txt")
    os.mkfifo(tmp_path / "pipe")
    assert "is a FIFO, which cannot be read twice" in refusal(tmp_path / "pipe")


# --- Links.


def test_a_folder_that_holds_itself_is_read_once(corpus):
    before = scan(corpus / "**" / "*.txt")[1]
    for number in range(20):  # paths through them are more than 20^40
        (corpus / f"loop{number}").symlink_to(corpus)
    (corpus / "sub").mkdir()
    (corpus / "sub" / "up").symlink_to("..")
    after = scan(corpus / "**" / "*.txt")[1]
    assert after == before


def test_links_that_leave_the_folder_are_followed_once(corpus, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / "far.txt").write_text("far away")
    (elsewhere / "deep" / "back").symlink_to(corpus)
    (corpus / "a_link").symlink_to(elsewhere)
    (corpus / "b_link").symlink_to(elsewhere / "deep")
    (corpus / "itself").symlink_to("itself")
    _, summary = scan(corpus / "**" / "*.txt")
    assert summary.files == 41
    found = patterns.find(str(corpus / "**" / "*.txt")).files
    assert str(corpus / "a_link" / "deep" / "far.txt") in found


def test_a_file_keeps_the_name_that_is_no_link(corpus):
    (corpus / "zz").mkdir()
    (corpus / "zz" / "real.txt").write_text("real")
    (corpus / "aa").symlink_to("zz")
    (corpus / "a.txt").symlink_to("zz/real.txt")
    found = patterns.find(str(corpus / "*" / "*.txt"))
    assert list(found.files) == [str(corpus / "zz" / "real.txt")]
    assert found.left_out == {
        patterns.SAME_FILE: [str(corpus / "aa" / "real.txt")],
    }
    found = patterns.find(str(corpus / "**" / "*.txt"))
    assert str(corpus / "zz" / "real.txt") in found.files
    assert found.left_out == {patterns.SAME_FILE: [str(corpus / "a.txt")]}


def test_folders_that_cannot_be_listed_are_counted(corpus, monkeypatch):
    (corpus / "closed").mkdir()
    list_folder = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", refuse)
    _, summary = scan(corpus / "**" / "*.txt")
    assert counts(summary) == {"not listed": 1}
    assert "1 not listed (the first: closed)" in sources.describe(summary)
    assert "cannot be listed" in refusal(corpus / "closed" / "*.txt")


@pytest.mark.parametrize("pattern", ["**/*.txt", "*/a.txt", "*/sub/*.txt"])
def test_folders_that_cannot_be_searched_are_counted(corpus, monkeypatch, pattern):
    for name in ("open", "closed"):
        (corpus / name / "sub").mkdir(parents=True)
        (corpus / name / "a.txt").write_text(name)
        (corpus / name / "sub" / "a.txt").write_text(f"below {name}")
    status_of = os.stat

    def refuse(path, **options):
        if "/closed/" in str(path):
            raise PermissionError(13, "Permission denied", path)
        return status_of(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    found = patterns.find(str(corpus / pattern))
    assert found.left_out[patterns.UNLISTED] == [str(corpus / "closed")]
    assert any("/open/" in path for path in found.files)


# --- Patterns.

names = st.sampled_from(["a", "b", "ab", "a.txt", "b.txt", ".hidden", "c[1]", "é.txt"])
parts = st.sampled_from(
    ["**", "*", "a*", "?", "*.txt", "[ab]", ".*", "a", "[!a]*", "**"]
)


@hypothesis.settings(derandomize=True, deadline=None, max_examples=100)
@hypothesis.given(
    tree=st.lists(st.lists(names, min_size=1, max_size=4), max_size=8),
    pattern=st.lists(parts, min_size=1, max_size=4),
)
def test_patterns_match_what_glob_matches(tree, pattern):
    """Where there are no links, and no name looks like a pattern of its own."""
    with tempfile.TemporaryDirectory() as root:
        for path in tree:
            with contextlib.suppress(OSError):
                os.makedirs(os.path.join(root, *path[:-1]), exist_ok=True)
                pathlib.Path(root, *path).write_text("x")
        whole = os.path.join(root, *pattern)
        wanted = glob.glob(whole, recursive=True)
        wanted = sorted({path for path in wanted if os.path.isfile(path)})
        try:
            found = list(patterns.find(whole).files)
        except errors.UserError:
            found = []
    assert found == wanted


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?b", "[!x]", "**", "a[1].txt", "x]["])
def test_an_existing_path_names_itself(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    for other in ("a1", "a1.txt", "axb", "y"):  # what the name matches as a pattern
        (tmp_path / other).mkdir()
        (tmp_path / other / "text.txt").write_text("other text")
    (folder / name).write_text("own text")
    (folder / "text.txt").write_text("some text")
    found = patterns.find(str(folder / name)).files
    assert list(found) == [str(folder / name)]
    assert list(patterns.find(str(folder / "*.txt")).files) == sorted(
        str(path) for path in folder.iterdir() if path.suffix == ".txt"
    )
    assert str(folder / "text.txt") in patterns.find(str(folder / "**" / "*")).files


def test_a_folder_of_any_name_is_prepared(config, corpus):
    before, _ = prepare(config)
    moved = corpus.rename(corpus.parent / "c[1] *?\\")
    for source in (f"{moved}/*.txt", f"{moved}/**/*.txt", f"{moved}/[0-9]*.txt"):
        assert prepare(config, source=source)[0].hash == before.hash


def test_a_folder_without_links_is_listed_in_one_order(corpus, monkeypatch):
    wanted = list(patterns.find(str(corpus / "**")).files)
    list_folder = os.scandir

    @contextlib.contextmanager
    def backwards(path):
        with list_folder(path) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=True)

    monkeypatch.setattr(os, "scandir", backwards)
    assert list(patterns.find(str(corpus / "**")).files) == wanted


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        ({"a.jsonl": "{}", "b.jsonl": "{}", "c.txt": "x"}, "**/*.jsonl'"),
        ({"sub/a.TXT": "x"}, "**/*.TXT'"),
        ({"a.json": "{}"}, "**/*.json'"),
        ({"a.png": "x", "b.png": "x", "c.md": "x"}, "**/*.md'"),
        ({"a.log": "x"}, "**/*.log'"),
        ({"README": "x"}, "**/*'"),
        ({"a.jsonl.gz": "x"}, "of '.gz' files: unpack"),
        ({".git/a.txt": "x"}, "a folder without files"),
        ({}, "a folder without files"),
    ],
)
def test_a_folder_is_refused_with_the_pattern_of_its_text(tmp_path, written, hint):
    folder = tmp_path / "folder[1]"
    folder.mkdir()
    for name, text in written.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    message = refusal(folder)
    assert hint in message
    if "write '" in message:
        pattern = message.split("write '")[1].removesuffix("'")
        assert patterns.find(pattern).files


def test_a_relative_path_from_a_folder_that_is_gone_is_refused(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "write the whole path" in refusal("*.txt")


# --- Homes.


def no_such_user(name):
    raise KeyError(name)


def test_a_tilde_is_the_home_folder(config, corpus, tmp_path, monkeypatch):
    before, _ = prepare(config)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "~/elsewhere")
    after, _ = prepare(config, source="~/corpus/*.txt", cache_dir=None)
    assert after.hash == before.hash
    assert (tmp_path / "elsewhere" / "sct_jax").is_dir()
    assert texts("~/corpus/0.txt") == texts(corpus / "0.txt")


@pytest.mark.parametrize("home", [None, ""])
@pytest.mark.parametrize("cache_dir", [None, "~", "~/cache", "~nobody_here/cache"])
def test_without_a_home_no_folder_is_made(
    config, tmp_path, monkeypatch, cache_dir, home
):
    monkeypatch.delenv("HOME")
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_such_user)
    monkeypatch.setattr(pwd, "getpwnam", no_such_user)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(errors.UserError, match=r"^data\.cache_dir: "):
        prepare(config, cache_dir=cache_dir)
    assert list(pathlib.Path().iterdir()) == []
    assert prepare(config)[0].documents == 40  # a whole path needs no home


# --- Names.

ODD_NAMES = [
    b"latin\xe9.txt",
    b"new\nline.txt",
    b"escape\x1b[31m.txt",
    "漢字.txt".encode(),
    b"-rf.txt",
    b" .txt",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_of_any_bytes_are_read_and_printed(config, corpus, capsys, name):
    name = os.fsdecode(name)
    (corpus / name).write_text("odd name")
    (corpus / f"empty{name}").write_text("")
    (corpus / f"link{name}").symlink_to(corpus / name)
    found = data.prepare(config, vocab_size=300)  # prints
    line = capsys.readouterr().out.splitlines()[-1]
    assert found.documents == 41
    assert "1 empty (the first: empty" in line
    assert line.isprintable()
    assert texts(corpus / name) == texts(corpus / f"link{name}")
    (corpus / f"{name}.jsonl").write_text("{")
    message = refusal(corpus / f"{name}.jsonl")
    assert message.isprintable()
    folder = corpus / f"folder{name}"
    folder.mkdir()
    assert refusal(folder).isprintable()
    (folder / name).write_text("odd folder")
    corpus_of_one, line = prepare(config, source=str(folder / "*"))
    assert corpus_of_one.bytes == 10
    assert line.isprintable()


def test_a_zero_byte_in_a_path_is_refused(config):
    for field in ("source", "cache_dir", "tokenizer"):
        with pytest.raises(errors.UserError, match=rf"^data\.{field}: .*zero byte"):
            prepare(config, **{field: "a\0b"})


# --- JSON.


def test_json_is_read_alike_beside_text_and_alone(tmp_path):
    lines = [json.dumps({"id": n, "text": f"text {n}"}) for n in range(30)]
    (tmp_path / "lines.json").write_text("\n".join(lines))
    alone = texts(tmp_path / "*.json")
    assert "text 7" in alone
    (tmp_path / "other.txt").write_text("other")
    assert texts(tmp_path / "*") == sorted([*alone, "other"])


PRETTY = json.dumps({"text": "a"}, indent=1)
ARRAY = json.dumps([{"text": "a"}, {"text": "b"}], indent=1)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "ndjson"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (PRETTY, ["the object does not end in its line", "jq -c ."]),
        (ARRAY, ["the array does not end in its line", "jq -c '.[]'"]),
        ('[{"text": "a"},\n{"text": "b"}]', ["array does not end", "jq -c '.[]'"]),
        ('[{"text": "a"}, {"text": "b"}]', ["is an array", "jq -c '.[]'"]),
        ('{"text": "a",\n"b": 1}', ["the object does not end in its line"]),
        ("some text\nmore text", ["not valid JSON"]),
        ('"a string"', ["has no text under 'text' (fields: none)"]),
        ('{"text": "a"},\n{"text": "b"}', ["the comma after the object"]),
        ('{"text": "a", }', ["the trailing comma"]),
        ('{"text": "a", "b": [1, 2,]}', ["the trailing comma"]),
        ('{"text": "a"} {"text": "b"}', ["not valid JSON (Extra data"]),
        ('{"text": null}', ["'text' is null, not text, at"]),
        ('{"text": 12}', ["'text' is a number, not text, at"]),
        ('{"text": 1e9}', ["'text' is a number"]),
        ('{"text": NaN}', ["'text' is a number"]),
        ('{"text": true}', ["'text' is true or false"]),
        ('{"text": ["a"]}', ["'text' is an array"]),
        ('{"text": {"a": 1}}', ["'text' is an object"]),
        ('{"body": "a", "title": "b"}', ["fields: 'body', 'title'"]),
        ('{"text": "a", "text": "b"}', ["has 2 values of 'text'; keep one"]),
        ('{"te\\u0078t": "a", "te\\u0078t": "b"}', ["has 2 values of 'text'"]),
        ('{"text": "a", "te\\u0078t": "b"}', ["has 2 values of 'text'"]),
    ],
)
def test_unfit_json_is_refused_by_cause_and_place(tmp_path, suffix, content, words):
    path = tmp_path / f"lines.{suffix}"
    good = '{"text": "good"}\n'
    (tmp_path / "other.txt").write_text("other")
    for before, place in (("", "line 1 (byte 0)"), (good, "line 2 (byte 17)")):
        path.write_text(before + content)
        for pattern in (path, tmp_path / "*"):
            message = refusal(pattern)
            assert message.startswith("data.")
            assert f"{path} {place}" in message
            for word in words:
                assert word in message


def test_json_keeps_what_only_looks_unfit(tmp_path):
    lines = [
        '{"text": "a", "score": NaN, "rate": -Infinity}',
        '{"text": "b", "id": ' + "9" * 5000 + "}",
        '{"text": "c", "meta": {"text": "inner", "text": 3}}',
        '{"text": "d \\"text\\": twice"}',
        '  {"text": "e"}\t\r',
        '{"id": 1, "id": 2, "text": "f"}',
        "",
        '{"text": "\\ud83d\\ude42 \\u0000"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert texts(tmp_path / "a.jsonl") == sorted(
        ["a", "b", "c", 'd "text": twice', "e", "f", "🙂 \0"]
    )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_json_in_another_encoding_is_named(tmp_path, encoding):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "a"}\n{"text": "b"}\n'.encode(encoding))
    message = refusal(path)
    assert str(path) in message
    assert f"iconv -f {encoding[:6].upper()} -t UTF-8" in message
    path.write_bytes('{"text": "a"}\n{"text": "b"}\n'.encode("utf-8-sig"))
    assert texts(path) == ["a", "b"]


@pytest.mark.parametrize("name", ["a.gz", "b.jsonl.zst", "c.PARQUET", "d.tar"])
def test_packed_files_are_refused_beside_text_and_alone(tmp_path, name):
    (tmp_path / name).write_bytes(b"packed")
    alone = refusal(tmp_path / name)
    (tmp_path / "text.txt").write_text("text")
    beside = refusal(tmp_path / "*")
    assert alone == beside
    assert f"{str(tmp_path / name)!r} is neither text nor JSON lines" in alone


@pytest.mark.slow
def test_a_json_line_of_50_megabytes_is_read(tmp_path):
    text = "word " * 10_000_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + '\n{"text": "b"}')
    assert sum(map(len, texts(tmp_path / "a.jsonl"))) == len(text) + 1


# --- Text that changes while it is read.


def rewrite(path):
    path.write_text(path.read_text().replace("the", "tho"))  # as long as before


def append(path):
    with path.open("a") as file:
        file.write("more")


def empty(path):
    path.write_text("")


def to_pipe(path):
    path.unlink()
    os.mkfifo(path)


CHANGES = [rewrite, append, empty, to_pipe, os.remove]


@pytest.mark.parametrize("change", CHANGES)
def test_text_that_changes_after_it_was_hashed_is_an_error(corpus, change):
    """Names, sizes and times need not tell: what is read does."""
    source, _ = scan(corpus / "*.txt")
    for split in splits.SPLITS:
        list(sources.documents(source, split))
    with pytest.raises(errors.UserError, match=r"^data\.source: .* changed while"):
        for path in corpus.iterdir():
            change(path)
        for split in splits.SPLITS:
            list(sources.documents(source, split))


@pytest.mark.parametrize("change", [to_pipe, os.remove])
def test_files_that_vanish_before_they_are_read_are_counted(corpus, change):
    source = open_files(corpus / "*.txt")
    change(corpus / "7.txt")
    _, summary = sources.scan(source)
    assert counts(summary) == {"unreadable": 1}
    assert summary.skipped["unreadable"]["first"] == "7.txt"
    assert sum(summary.documents.values()) == 39


@pytest.mark.parametrize("change", CHANGES)
def test_text_that_changes_in_between_is_not_cached(
    config, corpus, monkeypatch, change
):
    scan_source = sources.scan

    def scan_and_change(source):
        result = scan_source(source)
        change(corpus / "7.txt")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(sources, "scan", scan_and_change)
        with pytest.raises(errors.UserError, match=r"^data\.source: .* changed while"):
            prepare(config)
    assert not list(pathlib.Path(config.cache_dir).glob("*/*.tokens"))
    _, line = prepare(config)
    assert re.search(r"(40|39) documents", line)


def test_a_file_that_fails_while_it_is_read_is_counted(corpus, monkeypatch):
    """Lines before an error are documents; the file is counted."""
    lines = [json.dumps({"text": f"line {number}"}) for number in range(5)]
    path = corpus / "a.jsonl"
    path.write_text("\n".join(lines))
    open_regular = files.open_regular

    class Failing(io.FileIO):
        """Two lines, then an error of the disk."""

        def readinto(self, buffer):
            if self.tell() >= 2 * len(lines[0]):
                raise OSError(5, "Input/output error")
            return super().readinto(memoryview(buffer)[: len(lines[0]) + 1])

    def failing(name):
        if not str(name).endswith("a.jsonl"):
            return open_regular(name)
        return io.BufferedReader(Failing(name))

    monkeypatch.setattr(files, "open_regular", failing)
    _, summary = scan(corpus / "*")
    assert counts(summary) == {"unreadable": 1}
    assert sum(summary.documents.values()) == 42


# --- Where a corpus is.


def test_a_moved_corpus_keeps_its_hash_and_its_splits(config, corpus, tmp_path):
    (corpus / "sub").mkdir()
    lines = [json.dumps({"text": f"line {number} " * 9}) for number in range(60)]
    (corpus / "sub" / "a.jsonl").write_text("\n".join(lines))
    (corpus / "link.txt").symlink_to("0.txt")
    for split in ("documents", "paths"):
        config = dataclasses.replace(config, split=split)
        before, _ = prepare(config, source=str(corpus / "**" / "*.*"))
        corpus = corpus.rename(tmp_path / f"moved for {split}")
        after, _ = prepare(config, source=str(corpus / "**" / "*.*"))
        assert after.hash == before.hash
        assert after.train.tobytes() == before.train.tobytes()
        assert after.validation.tobytes() == before.validation.tobytes()


def test_new_names_of_the_same_text_keep_its_splits(corpus):
    source, summary = scan(corpus / "*.txt")
    before = {s: sorted(sources.documents(source, s)) for s in splits.SPLITS}
    for path in list(corpus.iterdir()):
        path.rename(path.with_name(f"renamed {path.stem[::-1]}.md"))
    source, again = scan(corpus / "*.md")
    assert before == {s: sorted(sources.documents(source, s)) for s in splits.SPLITS}
    assert again.bytes == summary.bytes


# --- Short text.


def test_text_shorter_than_a_batch_is_an_error(config, tmp_path):
    (tmp_path / "short.txt").write_text("a few words of text")
    found, _ = prepare(config, source=str(tmp_path / "short.txt"))
    for batches in (
        functools.partial(data.train_batches, seed=0),
        functools.partial(data.eval_batches, num_batches=1),
    ):
        with pytest.raises(errors.UserError, match=r"^data\.batch_size: .*tokens"):
            batches(found, dataclasses.replace(config, batch_size=64))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no document, neither text nor JSON lines (skipped: 1 empty"),
        (b"\xef\xbb\xbf", "1 empty"),
        (b"\xff\xfe", "1 not UTF-8"),
        (b"x", "too little text"),
    ],
)
def test_a_corpus_without_two_splits_is_an_error(tmp_path, content, words):
    (tmp_path / "a.txt").write_bytes(content)
    message = refusal(tmp_path / "a.txt")
    assert message.startswith("data.source: ")
    assert words in message


# --- Any corpus.

contents = st.one_of(
    st.binary(max_size=40),
    st.text(st.characters(codec="utf-8"), max_size=40).map(str.encode),
    st.sampled_from(
        [b"", b"\xef\xbb\xbf", b"\xff\xfe", b"same", b"a\r\nb\0", b"caf\xe9"]
    ),
)


@hypothesis.settings(derandomize=True, deadline=None, max_examples=60)
@hypothesis.given(
    written=st.lists(contents, min_size=1, max_size=12),
    links=st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=5),
)
def test_the_counts_of_any_corpus_add_up(written, links):
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        for number, content in enumerate(written):
            (root / f"{number}.txt").write_bytes(content)
        for number, (is_hard, target) in enumerate(links):
            path, other = root / f"link{number}.txt", root / f"{target}.txt"
            if is_hard and other.exists():
                path.hardlink_to(other)
            else:
                path.symlink_to(other)
        try:
            source, summary = scan(root / "*.txt")
        except errors.UserError as error:
            assert re.match(
                r"data\.source: .*(too little text|no document)", str(error)
            )
            return
        read = [
            text for split in splits.SPLITS for text in sources.documents(source, split)
        ]
        paths = len(list(root.iterdir()))
    skipped = counts(summary)
    again = skipped.get("read by another path", 0)
    assert summary.files + again == paths == len(written) + len(links)
    whole = sum(summary.documents.values()) - summary.cut
    assert whole + sum(skipped.values()) == paths
    assert sum(summary.bytes.values()) == sum(len(text.encode()) for text in read)


# --- TFDS.


def write_tfds(folder, texts_of):
    import tensorflow_datasets as tfds

    class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(
                builder=self, description="Small.", features=features
            )

        def _split_generators(self, dl_manager):
            return {part: self._generate_examples(part) for part in texts_of}

        def _generate_examples(self, part):
            for number, text in enumerate(texts_of[part]):
                yield number, {"text": text}

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        Small(data_dir=folder, file_format="array_record").download_and_prepare()


def test_examples_of_validation_are_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    train = [f"example {number}" for number in range(100)]
    write_tfds(tmp_path, {"train": train, "validation": [*train[:3], "own"]})
    source, summary = scan("tfds:small")
    found = {split: list(sources.documents(source, split)) for split in splits.SPLITS}
    assert sorted(found["validation"]) == sorted([*train[:3], "own"])
    assert sorted(found["train"]) == sorted(train[3:])
    assert counts(summary) == {"in validation too": 3}
    by_path, _ = scan("tfds:small", split="paths")
    assert len(list(sources.documents(by_path, "train"))) == 100


def test_a_part_of_train_is_cut_by_bytes_where_its_share_is_far(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    # In whatever order they are, the last 4 % of the examples are far below 4 %.
    write_tfds(
        tmp_path, {"train": ["x" * 9, *(f"{n} " * 9 for n in range(20)), "y" * 99999]}
    )
    source, summary = scan("tfds:small")
    held_out = summary.bytes["validation"] / sum(summary.bytes.values())
    assert 0.02 <= held_out <= 0.08
    found = {split: list(sources.documents(source, split)) for split in splits.SPLITS}
    assert set(found["train"]).isdisjoint(found["validation"])
