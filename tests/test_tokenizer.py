"""A tokenizer keeps text as it is, gives the same ids each time, or is refused."""

import dataclasses
import json
import os
import random
import string

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from sct_jax import data, errors
from sct_jax.data import tokenizer, tokenizer_json

MARK = "<|endoftext|>"
PROSE = "the quick brown fox jumps over the lazy dog, again and again. " * 50


@pytest.fixture(scope="module")
def trained():
    with open(random.__file__, encoding="utf-8") as file:
        return tokenizer.Tokenizer.train([file.read(), PROSE], vocab_size=600)


@pytest.fixture(scope="module")
def content(trained):
    """Returns a function that returns a new copy of the tokenizer.json."""
    text = trained.backend.to_str()
    return lambda: json.loads(text)


@pytest.fixture
def write(tmp_path):
    def write(content, name="tokenizer.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def refusal(path) -> str:
    with pytest.raises(errors.UserError) as caught:
        data.Tokenizer.load(str(path))
    message = str(caught.value)
    assert message.startswith("data.tokenizer: ")
    assert "\n" not in message
    return message


def byte_level(**changes):
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    } | changes


def split(pattern, behavior, *, invert=False):
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": behavior,
        "invert": invert,
    }


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


def added(content, id_=600, **changes):
    return {
        "id": id_,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
    } | changes


# --- Text is kept, or the tokenizer is refused.


def test_a_tokenizer_without_digits_is_refused(tmp_path):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[MARK], show_progress=False
    )
    backend.train_from_iterator([PROSE], trainer)
    assert backend.decode(backend.encode("1234567890").ids) == ""
    backend.save(str(tmp_path / "tokenizer.json"))
    message = refusal(tmp_path / "tokenizer.json")
    # 256 bytes, but the 13 that UTF-8 never has, 26 letters, a space and two marks.
    assert "no token for 214 of the bytes of text" in message


def without(*characters):
    """Returns a change: the vocabulary lacks these, and all that has them."""

    def change(content):
        model = content["model"]
        lost = set(characters)
        model["vocab"] = {
            token: id_ for token, id_ in model["vocab"].items() if not lost & set(token)
        }
        model["merges"] = [
            pair for pair in model["merges"] if not lost & set("".join(pair))
        ]

    return change


def setting(**values):
    return lambda content: content.update(values)


def model(**values):
    return lambda content: content["model"].update(values)


def both(*changes):
    def change(content):
        for part in changes:
            part(content)

    return change


def add(*tokens):
    return lambda content: content["added_tokens"].extend(tokens)


def unknown(content):
    """The byte "1" becomes an unknown token."""
    without("1")(content)
    content["model"]["vocab"]["<unk>"] = 700
    content["model"]["unk_token"] = "<unk>"


def words_alone(content):
    vocab = content["model"]["vocab"]
    content["model"] = {
        "type": "WordLevel",
        "vocab": vocab | {"<unk>": 700},
        "unk_token": "<unk>",
    }


def word_pieces(content):
    words_alone(content)
    content["model"] |= {
        "type": "WordPiece",
        "continuing_subword_prefix": "",
        "max_input_chars_per_word": 100,
    }


def unigram(content):
    vocab = content["model"]["vocab"]
    content["model"] = {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [[token, -1.0] for token in vocab],
        "byte_fallback": False,
    }


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": MARK, "type_id": 0}}],
    "pair": [{"SpecialToken": {"id": MARK, "type_id": 0}}],
    "special_tokens": {MARK: {"id": MARK, "ids": [0], "tokens": [MARK]}},
}

CHANGES_TEXT = {
    "lacks digits": (without(*"0123456789"), "no token for 10 of the bytes"),
    "lacks a byte of emoji": (without("Ł"), "no token for 1 of the bytes"),
    "unknown token": (unknown, "no token for 1 of the bytes"),
    "unknown tokens in one": (
        both(unknown, model(fuse_unk=True)),
        "no token for 1 of the bytes",
    ),
    "falls back to bytes": (
        both(without("1"), model(byte_fallback=True)),
        "no token for 1 of the bytes",
    ),
    "empty vocabulary": (model(vocab={}, merges=[]), "no token for 243 of the bytes"),
    "removes digits": (
        setting(pre_tokenizer=sequence(split(r"\d", "Removed"), byte_level())),
        "changes text",
    ),
    "removes all but words": (
        setting(
            pre_tokenizer=sequence(
                split(r"\S+", "Removed", invert=True), byte_level(use_regex=False)
            )
        ),
        "changes text",
    ),
    "splits at whitespace": (
        setting(pre_tokenizer=sequence({"type": "WhitespaceSplit"}, byte_level())),
        "changes text",
    ),
    "splits at words": (
        setting(pre_tokenizer=sequence({"type": "Whitespace"}, byte_level())),
        "changes text",
    ),
    "splits as BERT": (
        setting(pre_tokenizer=sequence({"type": "BertPreTokenizer"}, byte_level())),
        "changes text",
    ),
    "splits at a character": (
        setting(
            pre_tokenizer=sequence(
                {"type": "CharDelimiterSplit", "delimiter": "x"}, byte_level()
            )
        ),
        "changes text",
    ),
    "removes punctuation": (
        setting(
            pre_tokenizer=sequence(
                {"type": "Punctuation", "behavior": "Removed"}, byte_level()
            )
        ),
        "changes text",
    ),
    "metaspace": (
        setting(pre_tokenizer=sequence(METASPACE, byte_level())),
        "changes text",
    ),
    "encodes bytes twice": (
        setting(pre_tokenizer=sequence(byte_level(), byte_level())),
        "changes text",
    ),
    "no pre-tokenizer": (setting(pre_tokenizer=None), "changes text"),
    "bytes in the normalizer": (
        setting(pre_tokenizer=None, normalizer={"type": "ByteLevel"}),
        "changes text",
    ),
    "other decoder": (setting(decoder={"type": "Fuse"}), "not byte-level"),
    "template without text": (setting(post_processor=TEMPLATE), "changes text"),
    "added token takes space before": (add(added("fox", lstrip=True)), "changes text"),
    "added token takes space after": (add(added("fox", rstrip=True)), "changes text"),
    "added token written as a space is": (
        add(added("Ġ")),
        "no token for 1 of the bytes of text (the first: b' ')",
    ),
    "prefix": (model(continuing_subword_prefix="##"), "continuing_subword_prefix"),
    "suffix": (model(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    "words": (words_alone, "WordLevel"),
    "word pieces": (word_pieces, "WordPiece"),
    "unigram": (unigram, "Unigram"),
}


@pytest.mark.parametrize("name", CHANGES_TEXT)
def test_a_tokenizer_that_changes_text_is_refused(content, write, name):
    change, word = CHANGES_TEXT[name]
    changed = content()
    change(changed)
    path = write(changed)
    message = refusal(path)
    assert repr(path) in message
    assert word in message


LOSSLESS = {
    "as GPT-2": setting(),
    "as Llama 3": both(
        setting(
            pre_tokenizer=sequence(
                split(r"\p{N}{1,3}| ?\p{L}+|[^\p{L}\p{N}]+?", "Isolated"),
                byte_level(use_regex=False),
            ),
            post_processor=TEMPLATE
            | {
                "single": [
                    {"SpecialToken": {"id": MARK, "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ]
            },
        ),
        model(ignore_merges=True),
    ),
    "as GPT-4": setting(
        pre_tokenizer=sequence(
            split(r" ?\p{L}+|\p{N}{1,3}|[^\p{L}\p{N}]", "Removed", invert=True),
            byte_level(use_regex=False),
        )
    ),
    "as SmolLM2": setting(
        pre_tokenizer=sequence(
            {"type": "Digits", "individual_digits": True}, byte_level()
        )
    ),
    "as GPT-NeoX": add(
        added("    ", 600, normalized=True), added("\t\t", 601, normalized=True)
    ),
    "strips around special tokens": add(
        added("<mask>", lstrip=True, rstrip=True, special=True)
    ),
    "added tokens in Latin-1": add(added("café")),
    "strips when it decodes": setting(
        decoder={
            "type": "Sequence",
            "decoders": [
                byte_level(),
                {"type": "Strip", "content": " ", "start": 9, "stop": 9},
            ],
        }
    ),
    "normalizes": setting(normalizer={"type": "NFKC"}),
    "lower case": setting(normalizer={"type": "Lowercase"}),
    "prefix space": setting(pre_tokenizer=byte_level(add_prefix_space=True)),
    "no type of model": lambda content: content["model"].pop("type"),
    "empty prefix": model(continuing_subword_prefix="", end_of_word_suffix=""),
    "lacks bytes that UTF-8 never has": without("À", "õ"),
    "ids with holes": add(added("fox", 601)),
    "no added tokens": setting(added_tokens=[]),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_tokenizer_that_keeps_text_is_accepted(content, write, name):
    changed = content()
    LOSSLESS[name](changed)
    loaded = data.Tokenizer.load(write(changed))
    lengths = loaded.byte_lengths()
    for text in (
        f"  fox  FOX 1234567890{{}}\n\n\tcafé cafe\u0301 \ufb01 Ġ <mask> {MARK}     ",
        "".join(map(chr, range(0x500))),
        "👩\u200d👩\u200d👧 漢字\u3000\x00",
    ):
        ids = loaded.encode(text)
        assert loaded.decode(ids) == text
        assert int(lengths[ids].sum()) == len(text.encode())
        assert loaded.document_mark not in ids


def test_loading_changes_no_hash(content, write, trained):
    # A hash identifies the tokenizer of a run: other bits would refuse its resume.
    plain = tokenizers.Tokenizer.from_str(trained.backend.to_str())
    assert data.Tokenizer.load(write(content())).hash == trained.hash
    assert trained.backend.to_str() == plain.to_str()


@pytest.mark.parametrize("text", ["word", "<|endoftext", "\ud7ff漢", " "])
def test_tokens_that_do_not_stand_for_the_text_are_refused(trained, text):
    ids = trained.encode(text)
    assert trained.count_bytes(text, ids, where="it") == len(text.encode())
    wrong = [[], ids[:-1], [*ids, 70], [trained.document_mark, *ids], [70] * len(ids)]
    for other in wrong:
        with pytest.raises(errors.UserError, match=r"^data.tokenizer: it: .* becomes"):
            trained.count_bytes(text, other, where="it")


def test_a_prompt_that_a_tokenizer_changes_is_refused(content, write):
    rare = content()
    rare["pre_tokenizer"] = sequence(split("zq[0-9]", "Removed"), byte_level())
    loaded = data.Tokenizer.load(write(rare))  # no probe has it
    assert loaded.decode(loaded.encode("zebra quiz 1")) == "zebra quiz 1"
    with pytest.raises(errors.UserError, match=r"'look: zq7!' becomes 'look: !'"):
        loaded.encode("look: zq7!")


# --- The same text has the same ids.


def test_dropout_is_off(content, write, trained):
    dropping = content()
    dropping["model"]["dropout"] = 0.5
    path = write(dropping)
    texts = [PROSE[start:] for start in range(50)]
    raw = tokenizers.Tokenizer.from_file(path)
    assert raw.encode(PROSE).ids != trained.encode(PROSE)  # it does drop merges
    loaded = [data.Tokenizer.load(path) for _ in range(2)]
    for tokenizer_ in loaded:
        assert tokenizer_.encode_batch(texts) == trained.encode_batch(texts)
        assert tokenizer_.encode(PROSE) == trained.encode(PROSE)
        assert tokenizer_.hash == trained.hash


def test_no_dropout_leaves_the_hash(content, write):
    none = content()
    none["model"]["dropout"] = 0.0
    path = write(none)
    raw = tokenizers.Tokenizer.from_file(path)
    loaded = data.Tokenizer.load(path)
    assert loaded.backend.to_str() == raw.to_str()
    assert loaded.encode(PROSE) == loaded.encode(PROSE)


# --- Special tokens.


def test_names_of_special_tokens_in_text_are_ordinary(content, write):
    names = ["<|im_start|>", "<pad>", "[UNK]", "</s>"]
    more = content()
    more["added_tokens"] += [
        added(name, 600 + number, special=True) for number, name in enumerate(names)
    ]
    loaded = data.Tokenizer.load(write(more))
    special = [loaded.document_mark, *range(600, 604)]
    text = f"{MARK}{''.join(names)} and {' '.join(names)}"
    ids = loaded.encode(text)
    assert loaded.decode(ids) == text
    assert not set(special) & set(ids)
    assert loaded.byte_lengths()[special].tolist() == [0] * 5
    assert loaded.decode(special) == f"{MARK}{''.join(names)}"


BEGIN, END, TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"


@pytest.mark.parametrize(
    ("before", "after", "mark", "stops"),
    [
        ([BEGIN], [], BEGIN, [END, TURN, BEGIN]),  # as Llama 3 has it
        ([], [TURN], END, [END, TURN]),
        ([], [], END, [END, TURN]),
    ],
)
def test_the_file_says_what_begins_a_text(content, write, before, after, mark, stops):
    ids = {END: 0, BEGIN: 600, TURN: 601}
    changed = content()
    changed["added_tokens"] = [added(n, i, special=True) for n, i in ids.items()]
    vocab = changed["model"]["vocab"]
    vocab[END] = vocab.pop(MARK)
    plain = data.Tokenizer.load(write(changed))
    pieces = [*before, "$A", *after]
    raw = tokenizers.Tokenizer.from_file(write(changed))
    raw.post_processor = tokenizers.processors.Sequence(
        [
            tokenizers.processors.ByteLevel(trim_offsets=False),
            tokenizers.processors.TemplateProcessing(
                single=pieces,
                special_tokens=[*ids.items()],
            ),
        ]
    )
    loaded = data.Tokenizer.load(write(raw.to_str()))
    name = loaded.backend.id_to_token
    assert name(loaded.document_mark) == mark
    assert [name(id_) for id_ in loaded.stops] == stops
    assert loaded.encode(PROSE) == plain.encode(PROSE)
    assert plain.document_mark == ids[END]
    # Other marks between documents are another preparation of the text.
    same = dataclasses.replace(loaded, document_mark=ids[END])
    assert (loaded.hash == same.hash) == (mark == END)


def test_a_tokenizer_of_ours_has_one_stop(trained):
    assert trained.stops == (trained.document_mark,)


def test_a_mark_that_text_can_spell_is_refused(content, write):
    # Its letters can be merged into it.
    spelled = content()
    del spelled["added_tokens"][0]
    vocab, merges = spelled["model"]["vocab"], spelled["model"]["merges"]
    del vocab[MARK]
    for left, right in (("<", "/"), ("</", "s"), ("</s", ">")):
        vocab.setdefault(left + right, 700 + len(left))
        merges.append([left, right])
    spelled["pre_tokenizer"]["use_regex"] = False
    assert "'</s>'" in refusal(write(spelled))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(ids=st.lists(st.integers(0, 610), max_size=30))
def test_decoding_agrees_with_the_library(trained, ids):
    """Bytes cut anywhere, special tokens and unused ids decode alike."""
    assert trained.decode(ids) == trained.backend.decode(ids, skip_special_tokens=False)
    assert trained.decode(np.array(ids, np.int32)) == trained.decode(ids)


@pytest.mark.parametrize("token", ["a b", "\u00ad", "é\u0080", "漢字", "Ġ\n", "ÿĀ"])
def test_entries_that_are_no_bytes_decode_as_in_the_library(content, write, token):
    """No text has them, but a model can predict them."""
    odd = content()
    odd["model"]["vocab"][token] = 700
    loaded = data.Tokenizer.load(write(odd))
    assert loaded.decode([700]) == loaded.backend.decode([700])


# --- Files that are no tokenizer.json.


def test_a_byte_order_mark_is_accepted(trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"\xef\xbb\xbf" + trained.backend.to_str().encode())
    assert data.Tokenizer.load(str(path)).hash == trained.hash


OTHER_FILES = {
    "tokenizer_config.json": (
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024}),
        "it is a tokenizer_config.json",
    ),
    "vocab.json": (json.dumps({"a": 0, "b": 1}), "it is a vocabulary alone"),
    "merges.txt": ("#version: 0.2\na b\n", "it is not JSON"),
    "model.json": (json.dumps({"model": [1]}), "it has no 'model'"),
    "list.json": ("[]", "it is not a JSON object"),
    "number.json": ("NaN", "it is not a JSON object"),
    "digits.json": ("1" * 5000, "it is not JSON"),
    "deep.json": ("[" * 100_000, "it is nested too deeply"),
    "deep_model.json": (
        '{"model": {}, "pre_tokenizer": ' + "[" * 900 + "]" * 900 + "}",
        "it is nested too deeply",
    ),
    "wide.json": ("{}".encode("utf-16"), "it is not UTF-8"),
    "binary.model": (bytes(range(256)), "it is not UTF-8"),
    "empty.json": ("", "it is not JSON"),
    "nul.json": ("\0" * 100, "it is not JSON"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
@pytest.mark.parametrize("is_beside", [True, False])
def test_another_file_is_refused_by_what_it_is(tmp_path, name, is_beside):
    text, word = OTHER_FILES[name]
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    whole = tmp_path / "tokenizer.json"
    if is_beside:
        whole.write_text("{}")
    message = refusal(tmp_path / name)
    assert f"is not a readable tokenizer.json ({word}" in message
    assert (f"name {str(whole)!r}" in message) == is_beside


def test_a_folder_a_pipe_and_a_huge_file_are_refused_at_once(tmp_path, write):
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "Is a directory" in refusal(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert f"name {str(folder / 'tokenizer.json')!r}" in refusal(folder)
    os.mkfifo(tmp_path / "pipe")
    assert "Not a regular file" in refusal(tmp_path / "pipe")
    assert "Not a regular file" in refusal("/dev/zero")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 40)
    assert "1,099,511,627,776 bytes" in refusal(tmp_path / "huge")
    assert "No such file" in refusal(tmp_path / "missing")
    assert "File name too long" in refusal("x" * 5000)


CORRUPT = {
    "id used twice": (
        lambda c: c["model"]["vocab"].update({"!": c["model"]["vocab"]["a"]}),
        "' and '",
    ),
    "id of another token": (add(added("fox", 5)), "id 5 is"),
    "negative id": (lambda c: c["model"]["vocab"].update({"zz": -1}), "-1"),
    "id of 2^32": (lambda c: c["model"]["vocab"].update({"zz": 1 << 32}), "4294967296"),
    "id far beyond": (
        lambda c: c["model"]["vocab"].update({"zz": 1 << 31}),
        "and one with id 2,147,483,648",
    ),
    "id with a fraction": (lambda c: c["model"]["vocab"].update({"zz": 1.5}), "1.5"),
    "id of text": (lambda c: c["model"]["vocab"].update({"zz": "1"}), "string"),
    "vocabulary of text": (model(vocab="abc"), "string"),
    "no vocabulary": (lambda c: c["model"].pop("vocab"), "ocab"),
    "merge of a missing token": (
        lambda c: c["model"]["merges"].append(["q", "zzz"]),
        "out of vocabulary",
    ),
    "merge of three": (lambda c: c["model"]["merges"].append(["a", "b", "c"]), "Merge"),
    "dropout of 2": (model(dropout=2.0), None),  # dropped
    "dropout of text": (model(dropout="x"), None),
    "unknown model": (model(type="BPF"), "Model"),
    "unknown splitter": (setting(pre_tokenizer={"type": "Splitt"}), ""),
    "regular expression": (
        setting(pre_tokenizer=sequence(split("(", "Isolated"), byte_level())),
        "",
    ),
    "added tokens of text": (setting(added_tokens=["a"]), ""),
    "half of a pair": (lambda c: c["model"]["vocab"].update({"\ud800": 700}), ""),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_tokenizer_is_refused(content, write, trained, name):
    change, word = CORRUPT[name]
    changed = content()
    change(changed)
    path = write(changed)
    if word is None:
        assert data.Tokenizer.load(path).hash == trained.hash
    else:
        message = refusal(path)
        assert word in message
        assert repr(path) in message


def test_an_expression_that_takes_too_long_is_an_error(write, content):
    # The library panics, which is no Exception.
    slow = content()
    slow["pre_tokenizer"] = sequence(split("(q+q+)+y", "Isolated"), byte_level())
    loaded = data.Tokenizer.load(write(slow))
    assert loaded.decode(loaded.encode("quiz")) == "quiz"
    with pytest.raises(errors.UserError, match=r"^data\.tokenizer: .* fails on a text"):
        loaded.encode("q" * 60)
    slow["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(x+x+)+y"
    assert "retry-limit" in refusal(write(slow))  # a probe has many


def test_an_interrupt_stays_one():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenizer_json.attempt(interrupt)


# --- Training.


def plainly_trained(texts, *, vocab_size) -> str:
    """Returns the tokenizer.json of the library's trainer alone."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[MARK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend.to_str()


def test_ordinary_text_trains_the_librarys_own_tokenizer():
    with open(string.__file__, encoding="utf-8") as file:
        source = file.read()
    texts = [source, "-" * 4000 + "\n" + " " * 4000 + "🙂" * 1000, "漢字" * 100]
    ours = tokenizer.Tokenizer.train(texts, vocab_size=700)
    assert ours.backend.to_str() == plainly_trained(texts, vocab_size=700)


RUNS = {
    "dashes": "-",
    "spaces": " ",
    "line ends": "\n",
    "emoji": "🙂",
    "joiners": "\u200d",
    "accents": "\u0301",
    "underscores": "_",
    "control": "\x1c",
    "letters": "a",
    "characters": "漢",
    "digits": "7",
    "emoji and joiners": "👩\u200d",
}


@pytest.mark.parametrize("name", RUNS)
def test_an_endless_run_is_trained_on_in_short_parts(name):
    """Merges within one word take time quadratic in its length."""
    text = RUNS[name] * 20_000
    trained = tokenizer.Tokenizer.train([text, PROSE], vocab_size=500)
    assert trained.byte_lengths().max() <= 4096
    assert trained.decode(trained.encode(text)) == text


def test_bytes_are_tokens():
    tokenizer = data.Tokenizer.find("bytes")
    text = "déjà vu\n  x<|endoftext|>\U0001f600"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == 257
    assert tokenizer.document_mark not in ids
    assert tokenizer.hash == data.Tokenizer.of_bytes().hash
    lengths = tokenizer.byte_lengths()
    assert lengths[tokenizer.document_mark] == 0
    assert sorted(lengths) == [0] + [1] * 256
