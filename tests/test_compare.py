"""A comparison asks for missing trials, tunes methods alike, and survives a kill."""

import contextlib
import dataclasses
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
from study_samples import row_of

from experiments.studies import compare, grid, methods, rows, search, store, summary
from experiments.studies import train as train_lib
from experiments.studies import trial as trial_lib
from sct_jax import data, errors, files
from sct_jax.training import accounting, config, optimizer_config, overrides

BASE = config.ExperimentConfig(
    model=SHAPE,
    data=data.DataConfig(batch_size=4, seq_len=8),
    optimizer=optimizer_config.Sct(schedule="wsd"),
    eval=config.EvalConfig(num_batches=2),
)
DENSE = grid.Method(
    name="dense",
    learning_rates=(0.01, 0.02, 0.04),
    change=methods.compose(methods.DENSE, methods.ADAMW),
)
OURS = grid.Method(name="ours", learning_rates=(0.1, 0.2, 0.4))
TOKENS, FLOPS = trial_lib.Budget("tokens", 0.4), trial_lib.Budget("flops", 0.4)


def comparison(**fields):
    fields = {"base": BASE, "methods": (DENSE, OURS), "finalists": 1} | fields
    return grid.Comparison(**fields)


def fill(item, loss):
    """All rows of a comparison whose loss is a function of the trial, in order."""
    found = {}
    while missing := search.missing(item, found):
        found[missing[0].identity] = row_of(missing[0], loss(missing[0]))
    return found


def away_from(**best):
    """A loss that is 0 at these learning rates."""
    return lambda trial: abs(math.log(trial.learning_rate / best[trial.method]))


def order_of(found):
    return [(t.method, t.learning_rate, t.experiment.seed) for t in found]


def test_middle_rates_come_first_and_seeds_last():
    loss = lambda trial: away_from(dense=0.02, ours=0.2)(trial) + trial.is_dense
    assert order_of(fill(comparison(), loss)) == [
        ("dense", 0.02, 0),
        ("ours", 0.2, 0),
        ("dense", 0.01, 0),
        ("dense", 0.04, 0),
        ("ours", 0.1, 0),
        ("ours", 0.4, 0),
        ("ours", 0.2, 1),
        ("ours", 0.2, 2),
    ]


def test_a_search_continues_beyond_an_end_that_is_best():
    sign = {"dense": -1, "ours": 1}
    loss = lambda trial: sign[trial.method] * trial.learning_rate
    found = fill(comparison(max_learning_rates=5), loss)
    tried = {
        name: sorted({rate for method, rate, _ in order_of(found) if method == name})
        for name in sign
    }
    assert tried == {
        "dense": [0.01, 0.02, 0.04, 0.08, 0.16],
        "ours": [0.025, 0.05, 0.1, 0.2, 0.4],
    }
    assert all(m.at_edge(TOKENS) for m in summary.summarize(found.values()))


def test_every_kind_of_budget_has_its_rate_and_its_seeds():
    """At equal tokens 0.02 wins; at equal FLOPs the lower end, so search on."""
    loss = lambda trial: {
        "tokens": away_from(dense=0.02)(trial),
        "flops": away_from(dense=0.009)(trial),
    }
    found = fill(comparison(methods=(DENSE,), seeds=(0, 1)), loss)
    (method,) = summary.summarize(found.values())
    tuned = sorted(row.trial.learning_rate for row in method.tuning_rows)
    assert tuned == [0.005, 0.01, 0.02, 0.04]
    assert method.setting(TOKENS).learning_rate == 0.02
    assert method.setting(FLOPS).learning_rate == 0.01
    assert method.num_seeds(TOKENS) == method.num_seeds(FLOPS) == 2
    assert len(found) == 4 + 2


def test_the_non_matrix_rate_is_searched_at_the_best_rates():
    """Ours wants twice the rate of its matrices, dense a quarter of its own one."""
    own = dataclasses.replace(DENSE, non_matrix_lr=0.08)
    best = {"dense": (0.02, 0.02), "ours": (0.2, 0.4)}
    item = comparison(
        methods=(own, OURS),
        non_matrix_lr_factors=(0.5, 1.0, 2.0),
        seeds=(0, 1),
        finalists=2,
    )

    def loss(trial):
        pairs = zip(trial.rates, best[trial.method], strict=True)
        return sum(abs(math.log(rate / wanted)) for rate, wanted in pairs)

    found = fill(item, loss)
    assert {(t.method, *t.setting, t.experiment.seed) for t in found} == {
        *(("dense", rate, 0.08, 0) for rate in (0.01, 0.02, 0.04)),
        *(("dense", 0.02, rate, 0) for rate in (0.16, 0.04, 0.02, 0.01)),
        *(("dense", rate, 0.02, 0) for rate in (0.01, 0.04)),
        *(("ours", rate, None, 0) for rate in (0.1, 0.2, 0.4)),
        *(("ours", 0.2, rate, 0) for rate in (0.1, 0.4, 0.8)),
        ("ours", 0.1, 0.4, 0),  # at twice the rate it was trained already
        ("dense", 0.02, 0.02, 1),
        ("ours", 0.2, 0.4, 1),
    }
    dense, ours = summary.summarize(found.values())
    assert dense.setting(TOKENS) == (0.02, 0.02)
    assert not dense.at_edge(TOKENS) and not ours.at_edge(TOKENS)
    assert dense.num_seeds(TOKENS) == 2
    assert [rate for rate, _ in dense.tuning(TOKENS)] == [0.01, 0.02, 0.04]
    search.check_same(item, found)
    few = [row for row in found.values() if row.trial.non_matrix_lr != 0.01]
    assert summary.summarize(few)[0].at_edge(TOKENS)


def test_a_line_that_wins_for_another_budget_goes_on():
    """At equal tokens (0.2, 0.1) wins, on the line that equal FLOPs had asked for.

    It is the end of its line. That is searched on, but not for equal FLOPs.
    """
    tokens = {(0.1, None): 1.0, (0.2, None): 1.1}
    tokens |= {(0.2, 0.1): 0.9, (0.2, 0.05): 0.8, (0.2, 0.025): 0.85}
    loss = lambda trial: {
        "tokens": tokens.get(trial.setting, 5.0),
        "flops": 1.0 if trial.setting == (0.2, None) else 5.0,
    }
    item = comparison(
        methods=(OURS,), non_matrix_lr_factors=(0.5, 1.0, 2.0), seeds=(0,)
    )
    found = fill(item, loss)
    assert {trial.setting for trial in found} == {
        *((rate, None) for rate in (0.05, 0.1, 0.2, 0.4)),
        *((0.1, rate) for rate in (0.05, 0.2)),
        *((0.2, rate) for rate in (0.4, 0.1, 0.05, 0.025)),
        *((0.4, rate) for rate in (0.2, 0.05)),  # across the two best ones
    }
    (method,) = summary.summarize(found.values())
    assert method.setting(TOKENS) == (0.2, 0.05)
    assert not method.at_edge(TOKENS)


def test_both_rates_are_searched_until_neither_alone_is_better():
    """Far from the first rates, where the best rate grows with the non-matrix one."""

    def loss(trial):
        rate, other = trial.setting
        rate, other = math.log2(rate / 0.4), math.log2(other / 0.02)
        return 0.1 * (rate - other) ** 2 + 0.2 * (rate + other - 2) ** 2

    method = dataclasses.replace(OURS, non_matrix_lr=0.01)
    item = comparison(
        methods=(method,), non_matrix_lr_factors=(0.5, 1.0, 2.0), seeds=(0,)
    )
    found = fill(item, loss)
    (method,) = summary.summarize(found.values())
    # One search of each rate ends at (1.6, .04).
    assert method.setting(TOKENS) == (0.8, 0.04)
    assert not method.at_edge(TOKENS)
    lower = {(0.2, 0.04), (0.4, 0.04)}
    rest = [row for row in found.values() if row.trial.setting not in lower]
    assert summary.summarize(rest)[0].at_edge(TOKENS)


def test_a_rate_is_chosen_at_the_first_length():
    item = comparison(tokens_per_parameter=(9.0, 2.0), budgets=("tokens",))
    found = []
    for rate, far, near in ((0.1, 3.0, 4.0), (0.2, 3.1, 3.5)):
        row = row_of(item.trial(OURS, rate, 0), 0.0)
        results = zip(row.results.items(), (far, near), strict=True)
        results = {b: dataclasses.replace(r, loss=loss) for (b, r), loss in results}
        found.append(dataclasses.replace(row, results=results))
    best = summary.best(found, trial_lib.Budget("tokens", 2.0))
    assert best.trial.learning_rate == 0.1


def test_only_wanted_methods_are_trained_but_all_are_ranked():
    loss = lambda trial: (
        away_from(dense=0.02, ours=0.02)(trial) + 10 * (not trial.is_dense)
    )
    item = comparison()
    tuning = {t: row for t, row in fill(item, loss).items() if row.seed == 0}
    # The better method is the one finalist.
    assert search.missing(item, tuning, methods=(OURS,)) == []
    assert len(search.missing(item, tuning, methods=(DENSE,))) == 2
    assert {t.method for t in search.missing(item, {}, methods=(OURS,))} == {"ours"}
    # Those that are not wanted need no time per step.
    timed = comparison(budgets=("tokens", "seconds"), reference="dense")
    untimed = dataclasses.replace(OURS, name="more")
    three = dataclasses.replace(timed, methods=(*timed.methods, untimed))
    seconds = {"dense": (1.0, 1.0), "ours": (2.0, 2.0)}
    wanted = search.missing(three, {}, methods=(OURS,), seconds=seconds)
    assert wanted == search.missing(timed, {}, methods=(OURS,), seconds=seconds) != []


def test_methods_marked_always_get_all_seeds():
    marked = dataclasses.replace(DENSE, always=True)
    loss = lambda trial: away_from(dense=0.02, ours=0.02)(trial) + 10 * trial.is_dense
    found = fill(comparison(methods=(marked, OURS)), loss)
    assert {(name, seed) for name, _, seed in order_of(found) if seed} == {
        ("dense", 1),
        ("dense", 2),
        ("ours", 1),
        ("ours", 2),
    }


def test_a_diverged_rate_is_never_the_best():
    item = comparison(methods=(DENSE,))
    losses = {0.01: math.inf, 0.02: 5.0, 0.04: 6.0}
    found = [row_of(item.trial(DENSE, rate, 0), loss) for rate, loss in losses.items()]
    (method,) = summary.summarize(found)
    assert method.setting(TOKENS).learning_rate == 0.02
    assert method.tuning(TOKENS)[0] == (0.01, math.inf)


def test_branches_spend_what_the_dense_reference_spends():
    larger = methods.changed(
        OURS,
        lambda e: dataclasses.replace(
            e,
            data=dataclasses.replace(e.data, batch_size=8),
            eval=dataclasses.replace(e.eval, num_batches=1),
        ),
        name="larger batches",
    )
    item = comparison(
        methods=(DENSE, OURS, larger),
        budgets=("tokens", "flops", "seconds"),
        reference="dense",
        tokens_per_parameter=(50.0, 100.0),
    )
    item.validate()
    seconds = {"dense": (0.3, 0.3), "ours": (0.2, 0.2), "larger batches": (0.4, 0.4)}
    ours, theirs, doubled = (
        {(*b.budget,): b.steps for b in item.trial(m, 0.1, 0, seconds=seconds).branches}
        for m in (OURS, DENSE, larger)
    )
    dense = accounting.dense_config(SHAPE)
    steps = round(50 * accounting.parameters(dense) / 32)
    assert ours["tokens", 50] == theirs["tokens", 50] == theirs["flops", 50] == steps
    ratio = accounting.flops_per_token(dense, seq_len=8) / accounting.flops_per_token(
        SHAPE, seq_len=8
    )
    assert ours["flops", 50] == pytest.approx(steps * ratio, abs=1)
    assert ours["seconds", 50] == pytest.approx(steps * 1.5, abs=1)
    assert ours["tokens", 100] == pytest.approx(2 * steps, abs=1)
    assert {
        b: pytest.approx(steps / 2, abs=0.5) for b, steps in ours.items()
    } == doubled


def test_a_guide_is_charged_for_its_dense_path():
    method = grid.Method(
        name="guided",
        learning_rates=(0.01,),
        forward="self_guided",
        change=methods.compose(methods.LOW_RANK, methods.ADAMW),
    )
    item = comparison(methods=(DENSE, method), tokens_per_parameter=(50.0,))
    steps_of = lambda trial: {b.budget.kind: b.steps for b in trial.branches}
    dense, guided = (item.trial(m, 0.01, 0) for m in (DENSE, method))
    steps = steps_of(guided)["flops"]
    spent = dense.flops(steps_of(dense)["tokens"])
    assert guided.flops(steps) == pytest.approx(spent, rel=1e-3)
    plain = dataclasses.replace(guided, forward="plain")
    assert plain.flops(steps) < 0.97 * spent
    timed = dataclasses.replace(item, budgets=("tokens", "seconds"), reference="dense")
    seconds = {"dense": (0.3, 0.3), "guided": (0.2, 0.4)}
    lengths = steps_of(timed.trial(method, 0.01, 0, seconds=seconds))
    taken = 0.2 * lengths["seconds"] + 0.2 * guided.fade_steps
    assert taken == pytest.approx(0.3 * lengths["tokens"], abs=0.2)


def changed(**fields):
    """A dense method whose experiment has other fields, by group."""

    def change(experiment):
        groups = {
            name: dataclasses.replace(getattr(experiment, name), **group)
            for name, group in fields.items()
        }
        return dataclasses.replace(experiment, **groups)

    return {"methods": (methods.changed(DENSE, change),)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"methods": (DENSE, DENSE)}, "methods: a value repeats"),
        ({"methods": (dataclasses.replace(OURS, name="a, b"),)}, "has a comma"),
        ({"budgets": ()}, "budgets: must not be empty"),
        ({"budgets": ("flops", "flops")}, "budgets: a value repeats"),
        ({"budgets": ("tokens", "steps")}, "budgets: unknown value 'steps'"),
        ({"budgets": ("tokens", "seconds"), "reference": "dens"}, "'dense'"),
        (
            {"methods": (dataclasses.replace(DENSE, learning_rates=(0.2, 0.1)),)},
            r"methods\.dense\.learning_rates: must be ascending",
        ),
        ({"non_matrix_lr_factors": (0.5, 2.0)}, "must contain 1"),
        ({"non_matrix_lr_factors": (1.0, 0.5)}, "must be ascending"),
        ({"tokens_per_parameter": (0.4, -1.0)}, "must be positive"),
        ({"tokens_per_parameter": (0.4, 0.4)}, "a value repeats"),
        ({"seeds": ()}, "seeds: must not be empty"),
        ({"base": dataclasses.replace(BASE, seed=3)}, r"base\.seed: has no effect"),
        ({"base": dataclasses.replace(BASE, num_steps=3)}, r"base\.num_steps: has no"),
        (
            {"base": methods.optimizer(peak_learning_rate=0.1)(BASE)},
            r"base\.optimizer\.peak_learning_rate: has no effect; set learning_rates",
        ),
        *(
            (changed(**{group: {field: value}}), f"dense: {group}.{field}.* compare")
            for group, field, value in (
                ("data", "source", "other"),
                ("data", "seq_len", 16),
                ("eval", "num_batches", 3),
                ("model", "vocab_size", 64),
            )
        ),
    ],
)
def test_an_invalid_comparison_is_refused(fields, message):
    with pytest.raises(errors.UserError, match=message):
        comparison(**fields).validate()


def test_rows_of_another_comparison_are_refused():
    item = comparison()
    trial = item.trial(OURS, 0.1, 0)
    found = {trial.identity: row_of(trial, 5.0)}
    search.check_same(item, found)
    other = methods.optimizer(b2=0.9)(BASE)
    with pytest.raises(errors.UserError, match=r"experiment\.optimizer\.b2"):
        search.check_same(comparison(base=other), found)
    search.check_same(comparison(base=other, methods=(DENSE,)), found)
    slower = item.trial(dataclasses.replace(OURS, non_matrix_lr=0.01), 0.1, 0)
    found = {slower.identity: row_of(slower, 5.0)}
    with pytest.raises(errors.UserError, match="another non_matrix_lr"):
        search.check_same(item, found)
    search.check_same(comparison(non_matrix_lr_factors=(1.0, 2.0)), found)


# --- The store.


def tiny_trials(count=3):
    item = comparison()
    return [item.trial(OURS, rate, 0) for rate in OURS.learning_rates[:count]]


def wanted_of(trials):
    return lambda found: [trial for trial in trials if trial.identity not in found]


def test_a_row_survives_its_file(tmp_path):
    (trial,) = tiny_trials(1)
    row = row_of(
        trial,
        {"tokens": 5.0, "flops": math.inf},
        spikes=[7],
        train_loss=[rows.Sample(10, 6.0), rows.Sample(20, math.inf)],
        update_norms=[rows.Sample(10, 0.1)],
        effective_ranks={"q": [rows.Sample(0, 4.0)]},
        spectra={"down": [1.0, 0.5]},
        ranks=[[5, {"layers/q": 2}]],
        environment={"commit": "abc"},
    )
    results = store.Store(tmp_path)
    results.add(row)
    assert results.rows() == {trial.identity: row}


def test_a_trial_of_another_folder_is_copied_with_its_environment(tmp_path):
    trials = tiny_trials(2)
    old = store.Store(tmp_path / "old")
    old.add(row_of(trials[0], 5.0, environment={"commit": "old"}))
    results = store.Store(tmp_path / "new", reuse=str(tmp_path / "old"))
    trained = []

    def train(trial):
        trained.append(trial)
        return row_of(trial, 4.0)

    store.fill(results, wanted_of(trials), train, log=lambda text: None)
    assert trained == trials[1:]
    first, second = results.rows().values()
    assert first.environment == {"commit": "old"}
    assert second.environment["jax"]
    lines = []
    store.fill(results, wanted_of(trials), train, log=lines.append)
    assert len(lines) == 1 and "nothing is missing" in lines[0]
    with pytest.raises(errors.UserError, match="--reuse: no finished trial"):
        store.Store(tmp_path / "new", reuse=str(tmp_path / "nothing"))


def test_rows_on_another_text_are_refused(tmp_path):
    old = store.Store(tmp_path / "old")
    old.add(row_of(*tiny_trials(1), 5.0, corpus="0123"))
    this, other = (types.SimpleNamespace(hash=text) for text in ("0123", "4567"))
    old.check_text(this)
    with pytest.raises(errors.UserError, match=r"--results: .*0123.*4567"):
        old.check_text(other)
    with pytest.raises(errors.UserError, match="--reuse: contains"):
        store.Store(tmp_path / "new", reuse=str(old.folder)).check_text(other)


def test_a_torn_line_is_dropped_and_a_damaged_one_is_an_error(tmp_path):
    results, trials = store.Store(tmp_path), tiny_trials(2)
    results.add(row_of(trials[0], 5.0))
    path = tmp_path / rows.FILE
    with path.open("a") as file:
        file.write('{"trial": {"meth')
    assert list(results.rows()) == [trials[0].identity]
    results.add(row_of(trials[1], 4.0))
    assert list(results.rows()) == [trial.identity for trial in trials]
    whole = path.read_text()
    assert len(whole.splitlines()) == 2
    path.write_text('{"trial": \n' + whole)
    with pytest.raises(errors.UserError, match=r"runs\.jsonl:1"):
        results.rows()
    path.write_text(whole.replace('"forward":', '"colour":', 1))
    with pytest.raises(errors.UserError, match=r"runs\.jsonl: row 1 .* 'colour'"):
        results.rows()


def test_fields_added_later_do_not_lose_a_row(tmp_path):
    (trial,) = tiny_trials(1)
    values = rows.to_dict(row_of(trial, 5.0))
    del values["trial"]["experiment"]["optimizer"]["transport_moments"]
    del values["trial"]["variation_of"], values["trial"]["non_matrix_lr"]
    (tmp_path / rows.FILE).write_text(json.dumps(values) + "\n")
    results = store.Store(tmp_path)
    assert list(results.rows()) == [trial.identity]
    results.add(row_of(tiny_trials(2)[1], 5.0))
    assert len(results.rows()) == 2


def _hold(folder, trial, held):
    with store.Store(folder).claim(trial) as claimed:
        assert claimed
        held.set()
        time.sleep(60)


def test_a_claimed_trial_is_left_to_its_process_until_that_dies(tmp_path):
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    (trial,) = tiny_trials(1)
    other = context.Process(target=_hold, args=(tmp_path, trial, held))
    other.start()
    results = store.Store(tmp_path)
    try:
        assert held.wait(60)
        with results.claim(trial) as claimed:
            assert not claimed
    finally:
        other.kill()
        other.join(30)
    with results.claim(trial) as claimed:
        assert claimed
    results.add(row_of(trial, 5.0))
    with results.claim(trial) as claimed:
        assert not claimed  # it is finished


def test_a_file_system_without_locks_causes_a_warning(tmp_path, monkeypatch):
    unsupported = lambda path, *, wait: contextlib.nullcontext("unsupported")
    monkeypatch.setattr(files, "lock", unsupported)
    results, trials = store.Store(tmp_path), tiny_trials()
    with pytest.warns(UserWarning, match="has no file locks"):
        store.fill(results, wanted_of(trials), lambda trial: row_of(trial, 5.0))
    assert len(results.rows()) == len(trials)


# --- The command.

CONFIG = """
    from experiments.studies import grid, methods
    from sct_jax import data, model
    from sct_jax.training import config, optimizer_config

    def get_config():
        base = config.ExperimentConfig(
            model=model.ModelConfig(
                d_model=16, d_ff=24, num_layers=2, num_heads=2, num_kv_heads=2,
                vocab_size=300, spectral=(),
            ),
            data=data.DataConfig(
                source={source!r}, cache_dir={cache!r}, batch_size=4, seq_len=8
            ),
            optimizer=optimizer_config.AdamW(schedule="wsd"),
            eval=config.EvalConfig(num_batches=2),
        )
        return grid.Comparison(
            base=base,
            methods=(
                grid.Method(name="dense", learning_rates=(0.01, 0.02)),
                grid.Method(
                    name="muon", learning_rates=(0.01, 0.02), change=methods.MUON
                ),
            ),
            seeds=(0, 1),
            tokens_per_parameter=({length},),
            budgets=("tokens", "flops", "seconds"),
            reference="dense",
            max_learning_rates=2,
            finalists=1,
        )
"""


@pytest.mark.slow
def test_a_killed_study_resumes(tmp_path, text_files):
    """Killed after its second row, then run to the end: every trial has one row."""
    path, folder = tmp_path / "tiny.py", tmp_path / "results"
    cache = str(tmp_path / "cache")
    text = textwrap.dedent(CONFIG).format(source=text_files, cache=cache, length=0.5)
    path.write_text(text)
    flags = [f"--config={path}", f"--results={folder}"]
    command = [sys.executable, "-m", "experiments.studies.compare", *flags]
    environment = os.environ | {"GLIBC_TUNABLES": ""}
    process = subprocess.Popen(command, env=environment)
    file, deadline = folder / rows.FILE, time.monotonic() + 240
    while not file.exists() or len(file.read_text().splitlines()) < 2:
        assert process.poll() is None, "ended early"
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    before = file.read_text()
    subprocess.run(command, env=environment, timeout=240, check=True)
    assert file.read_text().startswith(before[: before.rfind("\n") + 1])
    found = rows.read(folder)
    trained = [(r.trial.method, r.trial.learning_rate, r.seed) for r in found]
    assert len(trained) == len(set(trained))
    tuned = {(method, rate) for method, rate, seed in trained if seed == 0}
    finalists = {(method, rate) for method, rate, seed in trained if seed == 1}
    assert len(tuned) == 4 and finalists <= tuned
    assert len({method for method, _ in finalists}) == 1
    words = f"python -m experiments.studies.compare {' '.join(flags)}"
    assert {row.environment["command"] for row in found} == {words}
    kinds = [budget.kind for budget in found[0].results]
    assert kinds == ["tokens", "flops", "seconds"]
    assert compare.read_seconds(folder).keys() == {"dense", "muon"}
    again = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "nothing is missing" in again.stdout
    assert rows.read(folder) == found


STUDY = "configs/studies/compare_methods.py"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--config"),
        (["--config=configs/studies/compare_method.py"], "did you mean"),
        ([f"--config={STUDY}:smal"], "did you mean 'small'"),
        (["--config=configs/smollm_r128.py:tiny"], "not Comparison"),
        ([f"--config={STUDY}", "--methods=dense Moun"], "did you mean 'dense Muon'"),
        ([f"--config={STUDY}", "--config.seeds=a"], "seeds: 'a'"),
        ([f"--config={STUDY}", "--config.methods=x"], "methods"),
        ([f"--config={STUDY}", "--result=x"], "--results"),
    ],
)
def test_bad_input_exits_with_2(words, message, capfd):
    with pytest.raises(SystemExit) as ended:
        compare.main(words)
    assert ended.value.code == 2
    assert re.search(message, capfd.readouterr().err)


def test_a_new_method_is_timed_beside_the_reference(tmp_path, monkeypatch):
    item = comparison(budgets=("tokens", "seconds"), reference="dense")
    results = store.Store(tmp_path)
    # The machine of the first call is twice as fast.
    speed = iter((1.0, 2.0))

    def measure(trials, corpus):
        taken = next(speed)
        return {n: (taken * (1 + (n == "ours")), 3 * taken) for n in trials}

    monkeypatch.setattr(train_lib, "seconds_per_step", measure)
    first = compare.time_steps(item, (DENSE,), results, None)
    assert first == {"dense": [1.0, 3.0]}
    both = compare.time_steps(item, item.methods, results, None)
    assert both == {"dense": [1.0, 3.0], "ours": [2.0, 3.0]}
    assert compare.time_steps(item, item.methods, results, None) == both
    results.add(row_of(item.trial(OURS, 0.1, 0, seconds=both), 5.0))
    (tmp_path / "seconds.json").unlink()
    with pytest.raises(errors.UserError, match=r"seconds\.json is missing"):
        compare.time_steps(item, item.methods, results, None)


def test_an_interruption_exits_with_130(monkeypatch, tmp_path, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run", interrupt)
    assert compare.main([f"--config={STUDY}", f"--results={tmp_path}"]) == 130
    assert "the same command resumes" in capsys.readouterr().out


def test_a_study_takes_overrides_and_names_its_folder():
    pairs = [("seeds", "3,4"), ("tokens_per_parameter", "0.1")]
    pairs += [("base.data.batch_size", "8")]
    item = overrides.load_as(grid.Comparison, f"{STUDY}:small", pairs)
    assert item.seeds == (3, 4)
    assert item.tokens_per_parameter == (0.1,)
    assert item.base.data.batch_size == 8
    default = pathlib.Path("experiments/studies/results/compare_methods-short")
    assert pathlib.Path(compare.results_folder(STUDY, None)) == default
    assert compare.results_folder(STUDY, "here") == "here"
