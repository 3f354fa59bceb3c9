import dataclasses

import numpy as np
import pytest
import samples

from sct_jax import data, errors
from sct_jax.training import config as config_lib
from sct_jax.training import overrides, resuming

BASE = config_lib.ExperimentConfig(
    num_steps=100, data=data.DataConfig(batch_size=8, seq_len=16, split="pieces")
)


def changed(**pairs):
    names = {name.replace("__", "."): str(value) for name, value in pairs.items()}
    return overrides.apply(BASE, names.items())


def record(step=10, **values):
    return {"step": step, "config": config_lib.to_dict(BASE), **values}


# --- What may change.


def test_a_change_that_is_not_allowed_is_refused():
    new = changed(data__batch_size=16, seed=3)
    with pytest.raises(errors.UserError, match=r"^workdir: there belongs") as caught:
        resuming.check_same_run(BASE, new, "there", allowed=("seed",))
    assert "data.batch_size: 8" in str(caught.value)
    assert "seed: " not in str(caught.value)
    resuming.check_same_run(BASE, new, "there", allowed=("seed", "data.batch_size"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer.peak_learning_rate", "0.5"),
        ("optimizer.schedule", "wsd"),
        ("optimizer.b1", "0.8"),
        ("model.norm_eps", "1e-4"),
        ("data.seq_len", "32"),
        ("num_steps", "50"),
    ],
)
def test_values_may_change(field, value):
    new = overrides.override(BASE, field, value)
    resuming.check_same_run(BASE, new, "there", allowed=(field,))
    # Whatever the layout of the layers, which no run is asked about.
    apart = overrides.override(new, "model.scan_layers", "false")
    resuming.check_same_run(BASE, apart, "there", allowed=(field,))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.rank", "64"),
        ("model.d_ff", "1024"),
        ("model.vocab_size", "300"),
        ("model.qk_norm", "true"),
        ("optimizer.name", "stiefel_muon"),
        ("optimizer.moment_dtype", "bfloat16"),
    ],
)
def test_what_shapes_the_arrays_stays(field, value):
    new = overrides.override(BASE, field, value)
    allowed = [d.field for d in config_lib.changes(BASE, new)]
    with pytest.raises(errors.UserError, match=r"^--allow-change: ") as caught:
        resuming.check_same_run(BASE, new, "there", allowed=allowed)
    assert field in str(caught.value)


# --- Where the text goes on.


@pytest.mark.parametrize(
    ("changes", "taken", "expected"),
    [
        ({}, {}, 0),
        ({}, {"data_position": 80}, 0),
        ({"data__batch_size": 16}, {}, 80 - 160),
        ({"data__batch_size": 2}, {"data_position": 80}, 80 - 20),
        # After a change of its own: 5 steps of 8 windows and 5 of 2.
        ({"data__batch_size": 2}, {"data_position": 50}, 50 - 20),
        # As many tokens, rounded down to a window.
        ({"data__seq_len": 32}, {}, 40 - 80),
        ({"data__seq_len": 24}, {}, 53 - 80),
    ],
    ids=str,
)
def test_a_run_continues_where_it_was_in_the_text(changes, taken, expected):
    assert resuming.windows_before(record(**taken), changed(**changes)) == expected


def test_a_new_run_starts_at_the_first_window():
    assert resuming.windows_before(None, BASE) == 0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    source = samples.write_corpus(root / "corpus")
    config = data.DataConfig(source=source, cache_dir=str(root / "cache"))
    return data.prepare(config, vocab_size=300, log=lambda line: None)


def rows(batches, count):
    return np.concatenate([next(batches)["inputs"] for _ in range(count)])


@pytest.mark.parametrize(("before", "now"), [(8, 4), (4, 8), (6, 4)])
def test_another_batch_size_takes_the_same_windows(corpus, before, now):
    config = dataclasses.replace(BASE.data, batch_size=before)
    whole = rows(data.train_batches(corpus, config, seed=3), 20)
    then = dataclasses.replace(BASE.data, batch_size=now)
    rest = data.train_batches(
        corpus, then, seed=3, start_step=10, windows_before=10 * (before - now)
    )
    found = rows(rest, 10 * before // now)
    assert (found == whole[10 * before : 10 * before + len(found)]).all()


def test_processes_share_the_windows_of_another_batch_size(corpus):
    config = dataclasses.replace(BASE.data, batch_size=4)
    alone = data.train_batches(corpus, config, seed=3, start_step=2, windows_before=5)
    parts = [
        data.train_batches(
            corpus,
            config,
            seed=3,
            start_step=2,
            windows_before=5,
            rows=rows,
        )
        for rows in ([0, 1], [2, 3])
    ]
    for _ in range(5):
        together = np.concatenate([next(part)["inputs"] for part in parts])
        assert (together == next(alone)["inputs"]).all()


# --- What is said.


def lines(new, **values):
    return resuming.describe(record(**values), BASE, new)


def test_nothing_is_said_of_the_same_run():
    assert lines(BASE) == []
    assert lines(changed(log_every=3, mesh__fsdp=1)) == []


def test_a_change_says_what_was_what_is_and_what_follows():
    said = "\n".join(
        lines(changed(data__batch_size=16, optimizer__peak_learning_rate=0.5))
    )
    assert "data.batch_size: 8 before, 16 now" in said
    assert "optimizer.peak_learning_rate: 0.001 before, 0.5 now" in said
    assert "continues at sequence 80" in said and "256 tokens, not 128" in said
    assert "learning rate at this step changes from 9.78e-04 to 4.89e-01" in said


def test_schedules_count_the_steps_that_were_applied():
    new = changed(optimizer__peak_learning_rate=0.5)
    saved = record()
    (said,) = resuming.describe(saved, BASE, new, skipped=3)[1:]
    applied = saved["step"] - 3
    was, now = (float(c.optimizer.learning_rate(100)(applied)) for c in (BASE, new))
    assert said.endswith(f"from {was:.2e} to {now:.2e}")
    assert said not in lines(new)


def test_another_order_of_the_text_is_told():
    assert any("another order" in line for line in lines(changed(seed=5)))
    (said,) = (x for x in lines(changed(data__seq_len=32)) if "another order" in x)
    assert "sequence 40 of 32 tokens" in said


def test_a_longer_run_tells_its_learning_rate():
    first, second = lines(changed(num_steps=200))
    assert first == "num_steps changed from 100 to 200"
    assert second.startswith("the learning rate at this step changes")
