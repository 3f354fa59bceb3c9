"""A grid asks for what is missing, tunes arms alike, and survives being killed."""

import dataclasses
import errno
import json
import math
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time
import types

import pytest
from samples import SHAPE

from experiments.studies import compare, grid, store, summary
from experiments.studies import trial as trial_lib
from sct_jax import data, errors, optimizers
from sct_jax.training import accounting, config, metrics

BASE = config.ExperimentConfig(
    model=SHAPE,
    data=data.DataConfig(batch_size=4, seq_len=8),
    optimizer=optimizers.OptimizerConfig(schedule="wsd"),
    eval=config.EvalConfig(num_batches=2),
)
DENSE = grid.Arm(
    name="dense",
    rates=(0.01, 0.02, 0.04),
    overrides=(("model.spectral", "()"), ("optimizer.name", "adamw")),
)
OURS = grid.Arm(name="ours", rates=(0.1, 0.2, 0.4))


def comparison(**fields):
    return grid.Comparison(
        **{"base": BASE, "arms": (DENSE, OURS), "finalists": 1} | fields
    )


def row_of(trial, loss):
    """A finished row as `trial.run` gives it, as far as the grid reads it."""
    return {
        "arm": trial.arm,
        "rate": trial.rate,
        "seed": trial.experiment.seed,
        "definition": config.to_dict(trial),
        "results": {name: {"loss": loss} for name, _ in trial.horizons},
        "wall_seconds": 1.0,
    }


def fill(item, loss):
    """All rows of a comparison whose loss is a function of arm and rate."""
    rows, order = {}, []
    while missing := grid.missing(item, rows):
        trial = missing[0]
        order.append((trial.arm, trial.rate, trial.experiment.seed))
        rows[trial.key] = row_of(trial, loss(trial.arm, trial.rate))
    return rows, order


def test_middle_rates_come_first_and_seeds_last():
    best = {"dense": 0.02, "ours": 0.2}
    loss = lambda arm, rate: abs(math.log(rate / best[arm])) + (arm == "dense")
    _, order = fill(comparison(), loss)
    assert order == [
        ("dense", 0.02, 0),
        ("ours", 0.2, 0),
        ("dense", 0.01, 0),
        ("dense", 0.04, 0),
        ("ours", 0.1, 0),
        ("ours", 0.4, 0),
        ("ours", 0.2, 1),
        ("ours", 0.2, 2),
    ]


def test_rates_go_on_beyond_an_end_that_is_best():
    loss = lambda arm, rate: -rate if arm == "dense" else rate
    rows, order = fill(comparison(max_rates=5), loss)
    tried = {
        arm: sorted({rate for name, rate, _ in order if name == arm})
        for arm in ("dense", "ours")
    }
    assert tried == {
        "dense": [0.01, 0.02, 0.04, 0.08, 0.16],
        "ours": [0.025, 0.05, 0.1, 0.2, 0.4],
    }
    arms = summary.arms(list(rows.values()))
    assert [arm.at_edge("tokens 0.4") for arm in arms] == [True, True]


def test_every_protocol_has_its_rate_and_its_seeds():
    """At equal tokens .02 wins, at equal FLOPs the lower end: that goes on below."""
    rows = {}
    item = comparison(arms=(DENSE,), seeds=(0, 1))
    while missing := grid.missing(item, rows):
        trial = missing[0]
        row = row_of(trial, abs(math.log(trial.rate / 0.02)))
        row["results"]["flops 0.4"] = {"loss": abs(math.log(trial.rate / 0.009))}
        rows[trial.key] = row
    (arm,) = summary.arms(list(rows.values()))
    assert sorted(row["rate"] for row in arm.searched) == [0.005, 0.01, 0.02, 0.04]
    assert arm.setting("tokens 0.4").rate == 0.02
    assert arm.setting("flops 0.4").rate == 0.01
    assert arm.num_seeds("tokens 0.4") == arm.num_seeds("flops 0.4") == 2
    assert len(rows) == 4 + 2


def distance(trial, rate, adam_rate):
    """A loss that is 0 at these rates."""
    own = trial.rate if trial.adam_rate is None else trial.adam_rate
    return abs(math.log(trial.rate / rate)) + abs(math.log(own / adam_rate))


def test_adams_rate_is_searched_at_the_best_rates():
    """Ours wants twice the rate of its matrices, dense a quarter of its own one."""
    own = dataclasses.replace(DENSE, adam_rate=0.08)
    best = {"dense": (0.02, 0.02), "ours": (0.2, 0.4)}
    item = comparison(
        arms=(own, OURS), adam_rate_factors=(0.5, 1.0, 2.0), seeds=(0, 1), finalists=2
    )
    rows, order = {}, []
    while missing := grid.missing(item, rows):
        trial = missing[0]
        order.append((trial.arm, trial.rate, trial.adam_rate, trial.experiment.seed))
        rows[trial.key] = row_of(trial, distance(trial, *best[trial.arm]))
    assert set(order) == {
        *(("dense", rate, 0.08, 0) for rate in (0.01, 0.02, 0.04)),
        *(("dense", 0.02, rate, 0) for rate in (0.16, 0.04, 0.02, 0.01)),
        *(("dense", rate, 0.02, 0) for rate in (0.01, 0.04)),
        *(("ours", rate, None, 0) for rate in (0.1, 0.2, 0.4)),
        *(("ours", 0.2, rate, 0) for rate in (0.1, 0.4, 0.8)),
        ("ours", 0.1, 0.4, 0),  # at twice the rate it stands already
        ("dense", 0.02, 0.02, 1),
        ("ours", 0.2, 0.4, 1),
    }
    dense, ours = summary.arms(list(rows.values()))
    assert dense.setting("tokens 0.4") == (0.02, 0.02)
    assert not dense.at_edge("tokens 0.4") and not ours.at_edge("tokens 0.4")
    assert dense.num_seeds("tokens 0.4") == 2
    assert [rate for rate, _ in dense.tuning("tokens 0.4")] == [0.01, 0.02, 0.04]
    grid.check_same(item, rows)
    few = [row for row in rows.values() if row["definition"]["adam_rate"] != 0.01]
    assert summary.arms(few)[0].at_edge("tokens 0.4")


def test_a_line_that_wins_elsewhere_goes_on():
    """At equal tokens (.2, .1) wins, on the line that equal FLOPs had asked for.

    There it is the end, so the line goes on, though not for equal FLOPs.
    """
    tokens = {(0.1, None): 1.0, (0.2, None): 1.1}
    tokens |= {(0.2, 0.1): 0.9, (0.2, 0.05): 0.8, (0.2, 0.025): 0.85}
    flops = {(0.2, None): 1.0}
    item = comparison(arms=(OURS,), adam_rate_factors=(0.5, 1.0, 2.0), seeds=(0,))
    rows = {}
    while missing := grid.missing(item, rows):
        trial = missing[0]
        row = row_of(trial, 5.0)
        for name, losses in (("tokens 0.4", tokens), ("flops 0.4", flops)):
            row["results"][name] = {"loss": losses.get(summary.setting(row), 5.0)}
        rows[trial.key] = row
    assert set(map(summary.setting, rows.values())) == {
        *((rate, None) for rate in (0.05, 0.1, 0.2, 0.4)),
        *((0.1, rate) for rate in (0.05, 0.2)),
        *((0.2, rate) for rate in (0.4, 0.1, 0.05, 0.025)),
        *((0.4, rate) for rate in (0.2, 0.05)),  # across the two best ones
    }
    (arm,) = summary.arms(list(rows.values()))
    assert arm.setting("tokens 0.4") == (0.2, 0.05)
    assert not arm.at_edge("tokens 0.4")


def test_both_rates_are_searched_until_neither_alone_is_better():
    """Far from the first rates, where the best rate grows with Adam's own."""

    def loss(rate, adam_rate):
        rate, adam_rate = math.log2(rate / 0.4), math.log2(adam_rate / 0.02)
        return 0.1 * (rate - adam_rate) ** 2 + 0.2 * (rate + adam_rate - 2) ** 2

    arm = dataclasses.replace(OURS, adam_rate=0.01)
    item = comparison(arms=(arm,), adam_rate_factors=(0.5, 1.0, 2.0), seeds=(0,))
    rows = {}
    while missing := grid.missing(item, rows):
        rows[missing[0].key] = row_of(
            missing[0], loss(missing[0].rate, missing[0].adam_rate)
        )
    (arm,) = summary.arms(list(rows.values()))
    # One search of each rate ends at (1.6, .04).
    assert arm.setting("tokens 0.4") == (0.8, 0.04)
    assert not arm.at_edge("tokens 0.4")
    less = {(0.2, 0.04), (0.4, 0.04)}
    rest = [row for row in rows.values() if summary.setting(row) not in less]
    assert summary.arms(rest)[0].at_edge("tokens 0.4")


def test_a_rate_is_chosen_at_the_first_length():
    result = lambda loss: {"loss": loss}
    rows = [
        {
            "rate": rate,
            "definition": config.to_dict(comparison().trial(OURS, rate, 0)),
            "results": {"tokens 9": result(far), "tokens 2": result(near)},
        }
        for rate, far, near in ((0.1, 3.0, 4.0), (0.2, 3.1, 3.5))
    ]
    assert summary.best(rows, "tokens 2")["rate"] == 0.1


def test_arms_that_are_not_asked_for_are_ranked_but_not_trained():
    loss = lambda arm, rate: abs(math.log(rate / 0.02)) + 10 * (arm == "ours")
    item = comparison()
    rows, _ = fill(item, loss)
    searched = {k: row for k, row in rows.items() if row["seed"] == 0}
    # The better arm is the one finalist.
    assert grid.missing(item, searched, arms=(OURS,)) == []
    assert len(grid.missing(item, searched, arms=(DENSE,))) == 2
    assert {t.arm for t in grid.missing(item, {}, arms=(OURS,))} == {"ours"}


def test_arms_that_are_not_asked_for_need_not_be_timed():
    item = comparison(protocols=("tokens", "seconds"), reference="dense")
    three = dataclasses.replace(
        item, arms=(*item.arms, dataclasses.replace(OURS, name="more"))
    )
    seconds = {"dense": (1.0, 1.0), "ours": (2.0, 2.0)}
    wanted = grid.missing(three, {}, arms=(OURS,), seconds=seconds)
    assert wanted == grid.missing(item, {}, arms=(OURS,), seconds=seconds) != []


def test_marked_arms_get_all_seeds():
    marked = dataclasses.replace(DENSE, always=True)
    loss = lambda arm, rate: abs(math.log(rate / 0.02)) + 10 * (arm == "dense")
    _, order = fill(comparison(arms=(marked, OURS)), loss)
    assert {(arm, seed) for arm, _, seed in order if seed} == {
        ("dense", 1),
        ("dense", 2),
        ("ours", 1),
        ("ours", 2),
    }


def test_a_diverged_rate_is_never_the_best():
    item = comparison(arms=(DENSE,))
    rows = {}
    for rate, loss in ((0.01, None), (0.02, 5.0), (0.04, 6.0)):
        trial = item.trial(DENSE, rate, 0)
        rows[trial.key] = row_of(trial, loss)
    (arm,) = summary.arms(list(rows.values()))
    assert arm.setting("tokens 0.4").rate == 0.02
    assert arm.tuning("tokens 0.4")[0] == (0.01, math.inf)


def test_horizons_spend_what_the_dense_model_spends():
    item = comparison(
        protocols=("tokens", "flops", "seconds"),
        reference="dense",
        tokens_per_parameter=(50.0, 100.0),
    )
    seconds = {"dense": (0.3, 0.3), "ours": (0.2, 0.2)}
    dense = accounting.dense_config(SHAPE)
    tokens = 50 * accounting.parameters(dense)
    steps = round(tokens / 32)
    ours = dict(item.trial(OURS, 0.1, 0, seconds=seconds).horizons)
    theirs = dict(item.trial(DENSE, 0.1, 0, seconds=seconds).horizons)
    assert ours["tokens 50"] == theirs["tokens 50"] == theirs["flops 50"] == steps
    ratio = accounting.flops_per_token(dense, seq_len=8) / accounting.flops_per_token(
        SHAPE, seq_len=8
    )
    assert ours["flops 50"] == pytest.approx(steps * ratio, abs=1)
    assert ours["seconds 50"] == pytest.approx(steps * 1.5, abs=1)
    assert ours["tokens 100"] == pytest.approx(2 * steps, abs=1)


def test_an_arm_of_larger_batches_spends_the_same():
    large = dataclasses.replace(
        OURS,
        name="large",
        overrides=(("data.batch_size", "8"), ("eval.num_batches", "1")),
    )
    item = comparison(
        arms=(DENSE, OURS, large),
        protocols=("tokens", "flops", "seconds"),
        reference="dense",
        tokens_per_parameter=(50.0,),
    )
    item.validate()
    seconds = {"dense": (0.3, 0.3), "ours": (0.2, 0.2), "large": (0.4, 0.4)}
    ours, other = (
        dict(item.trial(arm, 0.1, 0, seconds=seconds).horizons) for arm in (OURS, large)
    )
    assert other.keys() == ours.keys()
    for name, steps in ours.items():
        assert other[name] == pytest.approx(steps / 2, abs=0.5)


def test_a_guide_is_charged_for_its_dense_path():
    arm = grid.Arm(
        name="guided",
        rates=(0.01,),
        method="self_guided",
        overrides=(("model.factors", "low_rank"), ("optimizer.name", "adamw")),
    )
    item = comparison(arms=(DENSE, arm), tokens_per_parameter=(50.0,))
    dense = item.trial(DENSE, 0.01, 0)
    guided = item.trial(arm, 0.01, 0)
    steps = dict(guided.horizons)["flops 50"]
    spent = dense.flops(dict(dense.horizons)["tokens 50"])
    assert guided.flops(steps) == pytest.approx(spent, rel=1e-3)
    plain = dataclasses.replace(guided, method="plain")
    assert plain.flops(steps) < 0.97 * spent
    timed = dataclasses.replace(
        item, protocols=("tokens", "seconds"), reference="dense"
    )
    seconds = {"dense": (0.3, 0.3), "guided": (0.2, 0.4)}
    lengths = dict(timed.trial(arm, 0.01, 0, seconds=seconds).horizons)
    steps, fade = lengths["tokens 50"], guided.fade_steps
    taken = 0.2 * lengths["seconds 50"] + 0.2 * fade
    assert taken == pytest.approx(0.3 * steps, abs=0.2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arms": (DENSE, DENSE)}, "arms: a name stands twice"),
        (
            {"arms": (dataclasses.replace(OURS, name="a, b"),)},
            "arms: a name has a comma",
        ),
        ({"protocols": ("flops",)}, 'the first must be "tokens"'),
        ({"protocols": ("tokens", "steps")}, "protocols"),
        ({"protocols": ("tokens", "seconds"), "reference": "dens"}, "'dense'"),
        (
            {"arms": (dataclasses.replace(DENSE, rates=(0.2, 0.1)),)},
            "arms.dense.rates: not sorted",
        ),
        ({"adam_rate_factors": (0.5, 2.0)}, "with 1 among them"),
        ({"tokens_per_parameter": (0.4, -1.0)}, "must be positive"),
        ({"tokens_per_parameter": (0.4, 0.4)}, "one stands twice"),
        ({"base": dataclasses.replace(BASE, seed=3)}, "base.seed: has no effect"),
        ({"base": dataclasses.replace(BASE, num_steps=3)}, "base.num_steps: has no"),
        (
            {
                "base": dataclasses.replace(
                    BASE, optimizer=optimizers.OptimizerConfig(peak_learning_rate=0.1)
                )
            },
            r"base\.optimizer\.peak_learning_rate: has no effect beside arms\.rates",
        ),
        ({"adam_rate_factors": (1.0, 0.5)}, "adam_rate_factors: not sorted"),
        (
            {"arms": (dataclasses.replace(DENSE, overrides=(("model.rnk", "4"),)),)},
            "did you mean 'rank'",
        ),
        *(
            (
                {"arms": (dataclasses.replace(DENSE, overrides=((field, text),)),)},
                f"arms.dense: {field}.*: .*losses of two texts",
            )
            for field, text in (
                ("data.source", "other"),
                ("data.seq_len", "16"),
                ("eval.num_batches", "3"),
                ("model.vocab_size", "64"),
            )
        ),
    ],
)
def test_what_is_no_comparison_is_refused(fields, message):
    with pytest.raises(errors.UserError, match=message):
        comparison(**fields).validate()


def test_rows_of_another_comparison_are_refused():
    item = comparison()
    trial = item.trial(OURS, 0.1, 0)
    rows = {trial.key: row_of(trial, 5.0)}
    grid.check_same(item, rows)
    changed = dataclasses.replace(
        BASE, optimizer=dataclasses.replace(BASE.optimizer, b2=0.9)
    )
    with pytest.raises(errors.UserError, match=r"experiment\.optimizer\.b2"):
        grid.check_same(comparison(base=changed), rows)
    grid.check_same(comparison(base=changed, arms=(DENSE,)), rows)
    slower = dataclasses.replace(OURS, adam_rate=0.01)
    trial = item.trial(slower, 0.1, 0)
    rows = {trial.key: row_of(trial, 5.0)}
    with pytest.raises(errors.UserError, match="another adam_rate"):
        grid.check_same(item, rows)
    grid.check_same(comparison(adam_rate_factors=(1.0, 2.0)), rows)


def test_a_trial_of_another_folder_is_taken_over_as_it_is(tmp_path):
    item = comparison()
    trials = [item.trial(OURS, rate, 0) for rate in (0.1, 0.2)]
    old = store.Store(tmp_path / "old")
    old.add(row_of(trials[0], 5.0) | {"environment": {"commit": "old"}})
    book = store.Store(tmp_path / "new", reuse=str(tmp_path / "old"))
    trained = []

    def train(trial):
        trained.append(trial)
        return row_of(trial, 4.0)

    plan = lambda rows: [t for t in trials if t.key not in rows]
    store.fill(book, plan, train, log=lambda text: None)
    assert trained == trials[1:]
    first, second = book.rows().values()
    assert first["environment"] == {"commit": "old"}
    assert second["environment"]["jax"]
    with pytest.raises(errors.UserError, match="--reuse: no finished trial"):
        store.Store(tmp_path / "new", reuse=str(tmp_path / "nothing"))


def test_rows_on_another_text_are_refused(tmp_path):
    item = comparison()
    row = row_of(item.trial(OURS, 0.1, 0), 5.0)
    old = store.Store(tmp_path / "old")
    old.add(row | {"corpus": "0123"})
    this, other = (types.SimpleNamespace(hash=text) for text in ("0123", "4567"))
    old.check_text(this)
    with pytest.raises(errors.UserError, match=r"--results: holds .*0123.*4567"):
        old.check_text(other)
    with pytest.raises(errors.UserError, match="--reuse: holds"):
        store.Store(tmp_path / "new", reuse=str(old.folder)).check_text(other)


def test_a_folder_that_lacks_nothing_says_so(tmp_path):
    lines = []
    store.fill(store.Store(tmp_path), lambda rows: [], None, log=lines.append)
    assert len(lines) == 1 and "nothing is missing" in lines[0]


def test_a_torn_line_goes_and_the_rest_stays(tmp_path):
    book = store.Store(tmp_path)
    item = comparison()
    trials = [item.trial(OURS, rate, 0) for rate in OURS.rates]
    book.add(row_of(trials[0], 5.0))
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"arm": "our')
    assert list(book.rows()) == [trials[0].key]
    book.add(row_of(trials[1], 4.0))
    assert list(book.rows()) == [t.key for t in trials[:2]]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 2


def test_a_damaged_line_within_is_an_error(tmp_path):
    (tmp_path / "runs.jsonl").write_text('{"arm": \n{"arm": "x"}\n')
    with pytest.raises(errors.UserError, match=r"cells\.jsonl:1"):
        store.Store(tmp_path).rows()


def test_fields_added_since_do_not_lose_a_row(tmp_path):
    book = store.Store(tmp_path)
    trial = comparison().trial(OURS, 0.1, 0)
    row = row_of(trial, 5.0)
    del row["definition"]["experiment"]["optimizer"]["max_rotation"]
    del row["definition"]["adam_rate"]
    book.add(row)
    assert list(book.rows()) == [trial.key]


def test_a_row_of_another_version_is_named(tmp_path):
    book = store.Store(tmp_path)
    row = row_of(comparison().trial(OURS, 0.1, 0), 5.0)
    row["definition"]["colour"] = "red"
    book.add(row)
    with pytest.raises(errors.UserError, match=r"cells\.jsonl: a trial of 'ours'"):
        book.rows()


def _hold(folder, key, held, release):
    with store.Store(folder).claim(key) as mine:
        assert mine
        held.set()
        release.wait(30)


def test_a_claimed_trial_is_left_to_its_process(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    trial = comparison().trial(OURS, 0.1, 0)
    other = context.Process(target=_hold, args=(tmp_path, trial.key, held, release))
    other.start()
    try:
        assert held.wait(60)
        with store.Store(tmp_path).claim(trial.key) as mine:
            assert not mine
    finally:
        release.set()
        other.join(30)
    with store.Store(tmp_path).claim(trial.key) as mine:
        assert mine


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(store.fcntl, "flock", refuse)
    book, item = store.Store(tmp_path), comparison(arms=(OURS,), seeds=(0,))
    with pytest.warns(UserWarning, match="no file locks .No locks available"):
        store.fill(
            book,
            lambda rows: grid.missing(item, rows),
            lambda trial: row_of(trial, abs(trial.rate - 0.2)),
        )
    assert len(book.rows()) == len(OURS.rates)


def test_a_finished_trial_cannot_be_claimed(tmp_path):
    book = store.Store(tmp_path)
    trial = comparison().trial(OURS, 0.1, 0)
    book.add(row_of(trial, 5.0))
    with book.claim(trial.key) as mine:
        assert not mine


CONFIG = """
    from experiments.studies import grid
    from sct_jax.training import config
    from sct_jax import data, model, optimizers

    def get_config():
        base = config.ExperimentConfig(
            model=model.ModelConfig(
                d_model=16, d_ff=24, num_layers=2, num_heads=2, num_kv_heads=2,
                vocab_size=300, spectral=(),
            ),
            data=data.DataConfig(
                source={source!r}, cache_dir={cache!r}, batch_size=4, seq_len=8
            ),
            optimizer=optimizers.OptimizerConfig(name="adamw", schedule="wsd"),
            eval=config.EvalConfig(num_batches=2),
        )
        return grid.Comparison(
            base=base,
            arms=(
                grid.Arm(name="dense", rates=(0.01, 0.02)),
                grid.Arm(
                    name="muon",
                    rates=(0.01, 0.02),
                    overrides=(("optimizer.name", "muon"),),
                ),
            ),
            seeds=(0, 1),
            tokens_per_parameter=({length},),
            protocols=("tokens", "flops", "seconds"),
            reference="dense",
            max_rates=2,
            finalists=1,
        )
"""


def write_config(folder, text_files, *, length):
    path = folder / "tiny.py"
    text = textwrap.dedent(CONFIG)
    path.write_text(
        text.format(source=text_files, cache=str(folder / "cache"), length=length)
    )
    return path


def command(path, folder):
    words = [f"--config={path}", f"--results={folder}"]
    return [sys.executable, "-m", "experiments.compare", *words]


def test_a_killed_grid_goes_on(tmp_path, text_files):
    """Killed after its second row, then run to the end: every cell stands once."""
    path = write_config(tmp_path, text_files, length=0.5)
    folder = tmp_path / "results"
    environment = os.environ | {"GLIBC_TUNABLES": ""}
    process = subprocess.Popen(command(path, folder), env=environment)
    cells = folder / "runs.jsonl"
    deadline = time.monotonic() + 240
    while not cells.exists() or len(cells.read_text().splitlines()) < 2:
        assert process.poll() is None, "ended early"
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    before = cells.read_text()
    subprocess.run(command(path, folder), env=environment, timeout=240, check=True)
    assert cells.read_text().startswith(before[: before.rfind("\n") + 1])
    rows = metrics.read_rows(cells)
    cells_trained = sorted((row["arm"], row["rate"], row["seed"]) for row in rows)
    assert len(cells_trained) == len(set(cells_trained))
    searched = {(arm, rate) for arm, rate, seed in cells_trained if seed == 0}
    finalists = {(arm, rate) for arm, rate, seed in cells_trained if seed == 1}
    assert len(searched) == 4 and finalists <= searched
    assert len({arm for arm, _ in finalists}) == 1
    words = f"python -m experiments.compare --config={path} --results={folder}"
    assert {row["environment"]["command"] for row in rows} == {words}
    names = set(rows[0]["results"])
    assert names == {"tokens 0.5", "flops 0.5", "seconds 0.5"}
    assert set(json.loads((folder / "seconds.json").read_text())) == {"dense", "muon"}
    # Once more: nothing is missing.
    again = subprocess.run(
        command(path, folder),
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "training" not in again.stdout
    assert metrics.read_rows(cells) == rows


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--config"),
        (["--config=configs/compare_method.py"], "did you mean"),
        (["--config=configs/compare_methods.py:smal"], "did you mean 'small'"),
        (["--config=configs/smollm_r128.py:tiny"], "no Comparison"),
        (
            ["--config=configs/compare_methods.py", "--arms=dense Moun"],
            "did you mean 'dense Muon'",
        ),
        (
            ["--config=configs/compare_methods.py", "--config.seeds=a"],
            "config.seeds|seeds: 'a'",
        ),
        (
            ["--config=configs/compare_methods.py", "--config.arms=x"],
            "arms",
        ),
        (["--config=configs/compare_methods.py", "--result=x"], "--results"),
    ],
)
def test_bad_input_ends_with_2(words, message, capfd):
    with pytest.raises(SystemExit) as ended:
        compare.main(words)
    assert ended.value.code == 2
    assert re.search(message, capfd.readouterr().err)


def test_an_arm_that_is_new_is_timed_beside_the_reference(tmp_path, monkeypatch):
    item = comparison(protocols=("tokens", "seconds"), reference="dense")
    book = store.Store(tmp_path)
    # The machine of the first call is twice as fast.
    speed = iter((1.0, 2.0))

    def measure(trials, corpus):
        taken = next(speed)
        return {n: (taken * (1 + (n == "ours")), 3 * taken) for n in trials}

    monkeypatch.setattr(trial_lib, "seconds_per_step", measure)
    first = compare._seconds(item, (DENSE,), book, None)
    assert first == {"dense": [1.0, 3.0]}
    both = compare._seconds(item, item.arms, book, None)
    assert both == {"dense": [1.0, 3.0], "ours": [2.0, 3.0]}
    assert compare._seconds(item, item.arms, book, None) == both
    book.add(row_of(item.trial(OURS, 0.1, 0, seconds=both), 5.0))
    (tmp_path / "seconds.json").unlink()
    with pytest.raises(errors.UserError, match=r"seconds\.json is gone"):
        compare._seconds(item, item.arms, book, None)


def test_an_interruption_ends_with_130(monkeypatch, tmp_path, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run", interrupt)
    words = ["--config=configs/compare_methods.py", f"--results={tmp_path}"]
    assert compare.main(words) == 130
    assert "the same command goes on" in capsys.readouterr().out


def test_seeds_can_be_overridden():
    item = config.load_as(
        grid.Comparison,
        "configs/compare_methods.py:small",
        [
            ("seeds", "3,4"),
            ("tokens_per_parameter", "0.1"),
            ("base.data.batch_size", "8"),
        ],
    )
    assert item.seeds == (3, 4)
    assert item.tokens_per_parameter == (0.1,)
    assert item.base.data.batch_size == 8


def test_the_folder_is_named_by_the_config():
    spec = "configs/compare_methods.py"
    default = pathlib.Path("experiments/results/compare_methods-short")
    assert pathlib.Path(compare.results_folder(spec, None)) == default
    assert compare.results_folder(spec, "here") == "here"
