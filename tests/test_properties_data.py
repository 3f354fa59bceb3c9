"""What holds for every text, every corpus and every shape of a batch."""

import dataclasses
import itertools
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sct_jax import data
from sct_jax.data import tokenizer, tokens

MARK = "<|endoftext|>"

quick = settings(derandomize=True, deadline=None, max_examples=100)
# Each example starts a thread that reads batches.
slow = settings(quick, max_examples=10)


@pytest.fixture(scope="module")
def trained():
    with open(__file__, encoding="utf-8") as file:
        return tokenizer.Tokenizer.train([file.read()] * 2, vocab_size=500)


# Any characters but surrogates, and what tokenizers treat apart.
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from(
            [
                MARK,
                "<|",
                "</s>",
                "def ",
                "    ",
                "\r\n",
                "0123",
                "e\u0301",
                "\ufeff",
                "Ġ",
            ]
        ),
        st.builds(lambda part, count: part * count, st.text(max_size=3), st.just(40)),
    ),
    max_size=8,
).map("".join)


# --- Tokenizers.


@quick
@given(text=TEXTS, chunk=st.integers(1, 50))
def test_any_text_survives_in_chunks_of_any_size(trained, text, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "_CHUNK_CHARACTERS", chunk)
        parts = list(tokenizer.chunks(text))
        ids = trained.encode(text)
    assert "".join(parts) == text
    assert all(0 < len(part) <= chunk for part in parts)
    assert trained.decode(ids) == text
    assert ids == [id_ for part in parts for id_ in trained.encode(part)]
    assert int(trained.byte_lengths()[ids].sum()) == len(text.encode())
    assert trained.document_mark not in ids
    assert all(0 <= id_ < trained.vocab_size for id_ in ids)


@settings(quick, max_examples=20)
@given(texts=st.lists(TEXTS, max_size=5), other=TEXTS)
def test_a_tokenizer_trained_on_any_text_keeps_any_other(texts, other):
    trained = tokenizer.Tokenizer.train(texts, vocab_size=300)
    assert 257 <= trained.vocab_size <= 300
    for text in (*texts, other):
        assert trained.decode(trained.encode(text)) == text


# --- Files of tokens.


@quick
@given(
    documents=st.lists(TEXTS.filter(bool), max_size=8),
    chunk=st.integers(1, 30),
    batch=st.integers(1, 60),
)
def test_documents_of_any_size_reach_the_file_unchanged(
    trained, documents, chunk, batch
):
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.NamedTemporaryFile() as file,
    ):
        patch.setattr(tokenizer, "_CHUNK_CHARACTERS", chunk)
        patch.setattr(tokens, "_BATCH_CHARACTERS", batch)
        written = tokens.write(
            file.name,
            iter(documents),
            tokenizer=trained,
            dtype=np.dtype(np.uint16),
            where="",
        )
        ids = np.fromfile(file.name, np.uint16)
    starts = np.flatnonzero(ids == trained.document_mark)
    assert len(starts) == len(documents)
    assert not len(ids) or starts[0] == 0
    parts = np.split(ids, starts[1:])
    assert [trained.decode(part[1:]) for part in parts if len(part)] == documents
    assert written.tokens == len(ids)
    assert written.largest_id == max(ids, default=0)
    assert written.bytes == len("".join(documents).encode())


@quick
@given(count=st.integers(0, 200), seq_len=st.integers(1, 30))
def test_every_token_but_the_first_is_a_target_once(count, seq_len):
    windows = tokens.Windows(np.arange(count), seq_len)
    found = [windows[i] for i in range(len(windows))]
    assert all(len(window) == seq_len + 1 for window in found)
    targets = [target for window in found for target in window[1:]]
    inputs = [token for window in found for token in window[:-1]]
    # All but an incomplete last window.
    assert targets == list(range(1, max(count, 1)))[: len(targets)]
    assert max(count - 1, 0) - len(targets) < seq_len
    assert inputs == [target - 1 for target in targets]


# --- Batches.


def corpus_of(trained, train, validation):
    def mapped(ids):
        with tempfile.TemporaryFile() as file:
            array = np.memmap(file, np.uint16, mode="w+", shape=len(ids))
        array[:] = ids
        return array

    return data.Corpus(
        tokenizer=dataclasses.replace(trained, document_mark=0, vocab_size=60_000),
        train=mapped(train),
        validation=mapped(validation),
        documents=1,
        bytes=1,
        hash="",
    )


@st.composite
def shapes(draw, least=1):
    """Draws a sequence length, a batch size, and enough tokens for `least` windows."""
    seq_len, batch_size = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    least = max(least, batch_size) * seq_len + 1
    return seq_len, batch_size, draw(st.integers(least, 4 * least))


# A shuffle of few windows takes long.
MANY = shapes(least=40)


@slow
@given(shape=MANY, seed=st.integers(0, 2**32 - 1), start=st.integers(0, 40))
def test_any_start_step_equals_skipping(trained, shape, seed, start):
    seq_len, batch_size, count = shape
    config = data.DataConfig(seq_len=seq_len, batch_size=batch_size)
    corpus = corpus_of(trained, range(1, count + 1), [1])
    steps = start + 5
    whole = [
        batch["inputs"]
        for batch in itertools.islice(
            data.train_batches(corpus, config, seed=seed), steps
        )
    ]
    rest = data.train_batches(corpus, config, seed=seed, start_step=start)
    for batch, expected in zip(itertools.islice(rest, 5), whole[start:], strict=True):
        np.testing.assert_array_equal(batch["inputs"], expected)
        np.testing.assert_array_equal(batch["targets"], expected + 1)
    # Every epoch has every window once.
    starts = np.concatenate(whole)[:, 0]
    epoch = (count - 1) // seq_len
    for first in range(0, len(starts) - epoch + 1, epoch):
        assert len(set(starts[first : first + epoch])) == epoch


@slow
@given(shape=MANY, step=st.integers(0, 10), data_=st.data())
def test_any_rows_are_those_of_the_whole_batch(trained, shape, step, data_):
    seq_len, batch_size, count = shape
    config = data.DataConfig(seq_len=seq_len, batch_size=batch_size)
    corpus = corpus_of(trained, range(1, count + 1), [1])
    rows = sorted(data_.draw(st.sets(st.integers(0, batch_size - 1), min_size=1)))

    def of_step(**kwargs):
        return next(
            data.train_batches(corpus, config, seed=1, start_step=step, **kwargs)
        )["inputs"]

    np.testing.assert_array_equal(of_step(rows=rows), of_step()[rows])


@quick
@given(shape=shapes(), num_batches=st.integers(1, 6))
def test_evaluation_spreads_over_the_split_in_order(trained, shape, num_batches):
    seq_len, batch_size, count = shape
    config = data.DataConfig(seq_len=seq_len, batch_size=batch_size)
    corpus = corpus_of(trained, [1], range(1, count + 1))
    batches = data.eval_batches(corpus, config, num_batches=num_batches)
    windows = (count - 1) // seq_len
    assert len(batches) == min(num_batches, windows // batch_size)
    starts = np.concatenate([batch["inputs"][:, 0] for batch in batches])
    assert starts[0] == 1
    places = (starts - 1) // seq_len
    steps = np.diff(places)
    assert np.all(steps > 0)
    assert windows - places[-1] <= -(-windows // len(places))  # none left at the end
    assert not len(steps) or steps.max() - steps.min() <= 1


@quick
@given(
    marks=st.lists(st.booleans(), min_size=13, max_size=60),
    seq_len=st.integers(1, 12),
    attends=st.booleans(),
)
def test_segments_number_the_documents_of_a_window(trained, marks, seq_len, attends):
    config = data.DataConfig(
        seq_len=seq_len, batch_size=1, cross_document_attention=attends
    )
    ids = [0 if mark else 7 for mark in marks]
    corpus = corpus_of(trained, [1], ids)
    for batch in data.eval_batches(corpus, config, num_batches=60):
        (row,), (segments,) = batch["inputs"], batch["segment_ids"]
        expected, segment = [], 1
        for place, id_ in enumerate(row):
            segment += id_ == 0 and place > 0
            expected.append(1 if attends else segment)
        assert segments.tolist() == expected
