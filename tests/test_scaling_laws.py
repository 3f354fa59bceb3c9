"""Known exponents are recovered; trials spend their budgets."""

import dataclasses
import functools
import json
import subprocess
import sys

import numpy as np
import pytest

from experiments.studies import iso_flop, power_laws, rows, scaling_laws
from sct_jax import errors
from sct_jax.training import overrides

SizeResult = power_laws.SizeResult


@pytest.fixture(scope="module")
def study():
    return overrides.load_as(iso_flop.ScalingLaws, "configs/studies/scaling_laws.py")


def synthetic(alpha, beta, *, noise=0.0, seed=0, num_budgets=4, num_sizes=5):
    """Losses E + A N^-alpha + B D^-beta at C = 6 N D, and the exponent of N."""
    generator = np.random.default_rng(seed)
    a_coefficient, b_coefficient = 400.0, 900.0
    runs = []
    for flops in (1e18 * 4.0**i for i in range(num_budgets)):
        ratio = alpha * a_coefficient / (beta * b_coefficient)
        best = (ratio * (flops / 6) ** beta) ** (1 / (alpha + beta))
        for n in best * np.geomspace(0.4, 2.5, num_sizes):
            d = flops / (6 * n)
            loss = 1.7 + a_coefficient * n**-alpha + b_coefficient * d**-beta
            runs.append(SizeResult(flops, n, d, loss + noise * generator.normal()))
    return runs, beta / (alpha + beta)


@pytest.mark.parametrize(("alpha", "beta"), [(0.34, 0.28), (0.5, 0.5), (0.3, 0.5)])
def test_known_exponents_are_recovered(alpha, beta):
    runs, expected = synthetic(alpha, beta)
    law = power_laws.fit(runs)
    assert law is not None
    assert law.a == pytest.approx(expected, abs=0.01)
    assert law.b == pytest.approx(1 - expected, abs=0.01)
    assert all(optimum.inside for optimum in law.optima)


@pytest.mark.parametrize(
    ("num_budgets", "num_sizes"),
    [(3, 4), pytest.param(4, 5, marks=pytest.mark.slow)],
)
def test_intervals_cover_the_true_exponent_at_their_level(num_budgets, num_sizes):
    hits, widths = 0, []
    for seed in range(60):
        runs, expected = synthetic(
            0.34,
            0.28,
            noise=0.003,
            seed=seed,
            num_budgets=num_budgets,
            num_sizes=num_sizes,
        )
        low, high = power_laws.bootstrap(runs, samples=60, seed=seed).a
        hits += low <= expected <= high
        widths.append(high - low)
    # 54 of 60 are expected at 90 %. At 77 %, 48 or more would occur once in four times.
    assert hits >= 48
    assert 0 < np.median(widths) < 1


def test_an_effect_of_a_seed_on_all_sizes_is_neither_slope_nor_noise():
    runs, expected = synthetic(0.34, 0.28)
    alone = power_laws.bootstrap(runs, samples=200).a
    for further in (runs[:2], runs):  # some of the first budget, and all
        both = runs + [r._replace(loss=r.loss + 0.03, seed=1) for r in further]
        law = power_laws.fit(both)
        assert law is not None
        assert law.a == pytest.approx(expected, abs=0.01)
        low, high = power_laws.bootstrap(both, samples=200).a
        assert high - low <= 1.1 * (alone[1] - alone[0])


def test_a_budget_of_two_sizes_changes_no_interval():
    runs, _ = synthetic(0.34, 0.28, noise=0.003)
    more = [SizeResult(9e18, 1e8, 1.5e10, 3.0), SizeResult(9e18, 2e8, 0.75e10, 3.1)]
    assert power_laws.fit([*runs, *more]) == power_laws.fit(runs)
    found = power_laws.bootstrap([*runs, *more], samples=40)
    assert found == power_laws.bootstrap(runs, samples=40)


def test_no_degree_of_freedom_gives_no_interval():
    runs, _ = synthetic(0.5, 0.5, num_sizes=3)
    found = power_laws.bootstrap(runs)
    assert np.isnan([*found.a, *found.b, found.whole]).all()
    law = power_laws.fit(runs)
    assert law is not None
    fit = scaling_laws.Fit(law, found)
    assert json.loads(json.dumps(fit.to_dict(), allow_nan=False))["a, 90 %"] is None
    assert fit.exponents()[0] == f"{law.a:.3f} [no interval]" and fit.whole() == "-"


def test_samples_without_an_optimum_inside_are_counted():
    runs, _ = synthetic(0.5, 0.5, noise=0.0005)
    assert power_laws.bootstrap(runs, samples=50).whole == 1.0
    # The best size of the first budget is now near the smallest one.
    cut = sorted(runs, key=lambda run: (run.flops, run.parameters))[2:]
    law = power_laws.fit(cut)
    assert law is not None and len(law.optima) == 4
    assert 0.2 < power_laws.bootstrap(cut, samples=50).whole < 0.9


def test_a_budget_with_a_maximum_has_no_optimum():
    runs = [SizeResult(1e12, n, 1e12 / n, loss) for n, loss in ((1, 3), (2, 4), (4, 3))]
    assert power_laws.optimum(runs) is None
    assert power_laws.optimum(runs[:2]) is None
    assert power_laws.fit(runs) is None


def test_an_optimum_outside_the_sizes_is_marked():
    sizes = np.array([1.0, 2.0, 4.0])
    runs = [SizeResult(1e12, n, 1e12 / n, (np.log(n) - 5) ** 2) for n in sizes]
    found = power_laws.optimum(runs)
    assert found is not None and not found.inside
    both = [*runs, *(run._replace(flops=2e12) for run in runs)]
    assert power_laws.fit(both) is None
    assert found.parameters == pytest.approx(np.exp(5))


def test_every_trial_spends_its_budget(study):
    trials = study.trials({})
    assert len({t.identity for t in trials}) == 2 * 4 * 3 * 3  # kinds, sizes, budgets
    for trial in trials:
        ((budget, steps),) = trial.branches
        assert budget.kind == "total_flops"
        assert trial.flops(steps) == pytest.approx(budget.amount, rel=0.02)
        shape = trial.experiment.model
        assert shape.rank == round(shape.d_model / 4) or trial.is_dense


def finished(trial, loss):
    """A row of a trial that reached so much more than a known law."""
    ((budget, steps),) = trial.branches
    shape = trial.experiment.model
    n = shape.d_model**2 * (40 if trial.is_dense else 10)
    flops = trial.flops(steps)
    d = flops / (6 * n)
    result = rows.Result(
        steps=steps,
        tokens=d,
        flops=flops,
        layer_flops=flops,
        loss=loss + 1 + 64 * n**-0.5 + 400 * d**-0.5,
        bits_per_byte=1.0,
    )
    environment = {"commit": "abc"}
    return rows.Row(
        trial=trial, results={budget: result}, parameters=n, environment=environment
    )


def all_finished(trials, loss):
    return {t.identity: finished(t, loss(t)) for t in trials}


def test_a_search_continues_beyond_an_end_that_is_best(study):
    dense = lambda found: [
        t for t in found if t.is_dense and t.experiment.model.d_model == 56
    ]
    rates = study.kinds[0].method.learning_rates
    trials = dense(study.trials({}))
    known = all_finished(trials, lambda t: -t.learning_rate)
    found = [t.learning_rate for t in dense(study.trials(known))]
    assert sorted({*found} - {*rates}) == [0.08]
    assert len(found) == len(trials) + len(study.budgets)


def test_further_seeds_are_trained_at_the_best_rate_alone(study):
    assert study.seeds == (0, 1, 2)
    first = study.trials({})
    assert {t.experiment.seed for t in first} == {0}
    rates = study.kinds[0].method.learning_rates
    known = all_finished(first, lambda t: abs(t.learning_rate - rates[1]))
    # The best rate of one point may differ from all others.
    moved = first[0]
    known[moved.identity] = finished(moved, -1)
    beyond = [t for t in study.trials(known) if t.identity not in known]
    known |= all_finished(beyond, lambda t: 0)
    further = [t for t in study.trials(known) if t.experiment.seed]
    assert len(further) == 2 * 2 * 4 * 3  # seeds, kinds, sizes, budgets
    point = lambda t: (t.method, t.experiment.model, t.branches)
    for trial in further:
        own = moved.learning_rate if point(trial) == point(moved) else rates[1]
        assert trial.learning_rate == own


def test_finished_trials_are_fitted_and_drawn(study, tmp_path, capsys, monkeypatch):
    few = functools.partial(power_laws.bootstrap, samples=30)
    monkeypatch.setattr(power_laws, "bootstrap", few)
    known = {}
    best = lambda t: 0.01 if t.experiment.model.d_model > 70 else 0.02
    # Seeds and rates beyond ends come later.
    while lacking := [t for t in study.trials(known) if t.identity not in known]:
        known |= all_finished(lacking, lambda t: 0.3 * (t.learning_rate != best(t)))
    # A row of other settings is no part of the study.
    kind = study.kinds[0]
    other = study.trial(kind, kind.sizes[0][0], 7e11, 0, 0.01)
    written_rows = [finished(other, 0), *known.values()]
    lines = [json.dumps(rows.to_dict(row)) + "\n" for row in written_rows]
    (tmp_path / rows.FILE).write_text("".join(lines))
    words = ["--fit_only", f"--results={tmp_path}"]
    assert scaling_laws.main(words) == 0
    written = json.loads((tmp_path / "laws.json").read_text())
    assert written["missing_trials"] == 0
    assert written["trials"] == len(known)
    laws = written["laws"]
    assert set(laws) == {"dense Muon", "Stiefel Muon"}
    printed = capsys.readouterr().out
    assert "left out: 1 trials" in printed and "Not finished" not in printed
    for kind, law in laws.items():
        assert law["N ~ C^a"] == pytest.approx(0.5, abs=0.05)
        assert f"{kind}: N ~ C^{law['N ~ C^a']:.3f}" in printed
    report = (tmp_path / "report.md").read_text()
    for kind, law in laws.items():
        assert f"| {kind} | {law['N ~ C^a']:.3f} [" in report
    # Of all rates of a size and budget one line.
    (runs,) = (part for part in report.split("\n## ") if part.startswith("Runs at"))
    assert runs.count("\n|") == 2 + 2 * 4 * 3
    assert "| 0.01 / " in runs and "| 0.02 / " in runs and "edge" not in runs
    assert runs.count(" (3) |") == runs.count(" ± 0.000 |") == 2 * 4 * 3
    for name in ("iso-flop", "best-sizes"):
        assert f"(figures/{name}.png)" in report
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size < 300_000
    # Without its last row the report says what it lacks.
    (tmp_path / rows.FILE).write_text("".join(lines[:-1]))
    monkeypatch.setattr(scaling_laws, "draw", lambda kinds, fits: [])
    assert scaling_laws.main(words) == 0
    assert "Not finished: 1 trials" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "laws.json").read_text())["missing_trials"] == 1


def test_nothing_trained_is_nothing_to_fit(tmp_path):
    # As a command: what its file defines is there under another name than a
    # configuration imports.
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.studies.scaling_laws"),
            *("--fit_only", f"--results={tmp_path}"),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 2
    assert "no finished trial" in ended.stderr


def test_a_folder_that_is_not_there_is_not_made(tmp_path, capsys):
    folder = tmp_path / "typo"
    with pytest.raises(SystemExit):
        scaling_laws.main(["--fit_only", f"--results={folder}"])
    assert "there is no folder" in capsys.readouterr().err
    assert not folder.exists()


def test_an_invalid_study_is_refused(study):
    kind = study.kinds[0]
    with_sizes = lambda sizes: {"kinds": (dataclasses.replace(kind, sizes=sizes),)}
    with_method = lambda **fields: {
        "kinds": (
            dataclasses.replace(
                kind, method=dataclasses.replace(kind.method, **fields)
            ),
        )
    }
    two_sizes = tuple(sizes[:2] for sizes in kind.sizes)
    of_dense = r"kinds\.dense Muon\."
    for fields, message in (
        (with_sizes(two_sizes), f"{of_dense}sizes: a parabola needs three"),
        (with_sizes(kind.sizes[:2]), f"{of_dense}sizes: 2 for 3 budgets"),
        ({"budgets": (1e12,)}, "budgets: an exponent needs two"),
        ({"budgets": (3e12, 1e12, 2e12)}, "budgets: must be ascending"),
        ({"seeds": ()}, "seeds: must not be empty"),
        ({"kinds": ()}, "kinds: must not be empty"),
        (with_method(learning_rates=()), f"{of_dense}learning_rates: must not be"),
        (with_method(learning_rates=(0.2, 0.1)), "learning_rates: must be ascending"),
        (with_method(forward="self_guided"), f"{of_dense}forward: .* dense path"),
    ):
        with pytest.raises(errors.UserError, match=message):
            dataclasses.replace(study, **fields).validate()
