"""Committed rows match the configurations, and all tables are made from them."""

import json
import pathlib
import re

import numpy as np
import pytest

from experiments.studies import (
    compare,
    grid,
    iso_flop,
    report,
    rows,
    scaling_laws,
    search,
    summary,
    tables,
)
from sct_jax.training import accounting, overrides

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "studies" / "results"
VARIANTS = (
    "short",
    "small",
    "long",
    "long_decay",
    "recipe",
    "recipe_long",
    "width",
    "triple",
)
# Configurations of comparisons that were trained to their end, by folder.
SPECS = {f"compare_methods-{name}": f"compare_methods.py:{name}" for name in VARIANTS}
SPECS |= {name: f"{name}.py" for name in ("ablation_retraction", "rank_sweep")}
STARTS = ("d64", "d128", "d128_longer", "d256", "healing", "extra")
SPECS |= {f"start-{name}": f"start.py:{name}" for name in STARTS}


def load(kind, spec):
    return overrides.load_as(kind, str(ROOT / "configs" / "studies" / spec))


@pytest.mark.parametrize("name", SPECS)
def test_a_finished_comparison_lacks_no_trial_and_has_its_report(name):
    comparison, folder = load(grid.Comparison, SPECS[name]), RESULTS / name
    found = rows.read(folder)
    by_trial = {row.trial.identity: row for row in found}
    assert len(by_trial) == len(found)
    seconds = None
    if "seconds" in comparison.budgets:
        seconds = compare.read_seconds(folder)
    search.check_same(comparison, by_trial, seconds=seconds)
    assert not search.missing(comparison, by_trial, seconds=seconds)
    text = (folder / "report.md").read_text()
    assert text.startswith(report.contents(name, found).as_markdown())
    # A row says itself what it varies.
    of_rows = {m.name: m.variation_of for m in summary.summarize(found)}
    of_config = {m.name: m.variation_of for m in comparison.methods}
    assert of_rows == {name: of_config[name] for name in of_rows}


def test_the_scaling_report_is_that_of_its_rows():
    folder = RESULTS / "scaling_laws"
    study = load(iso_flop.ScalingLaws, "scaling_laws.py")
    found, num_missing = scaling_laws.rows_of(study, rows.by_trial(folder))
    assert num_missing == 0
    points = scaling_laws.points_of(found)
    assert {kind: len(own) for kind, own in points.items()} == {
        kind.method.name: sum(map(len, kind.sizes)) for kind in study.kinds
    }
    fits = scaling_laws.fits_of(scaling_laws.results_of(points))
    contents = scaling_laws.contents("scaling_laws", found, points, fits)
    text = (folder / "report.md").read_text()
    assert text.startswith(contents.as_markdown())
    laws = json.loads((folder / "laws.json").read_text())
    assert (laws["trials"], laws["missing_trials"]) == (len(found), 0)
    assert set(laws["laws"]) == set(fits)
    for kind, fit in fits.items():
        ours, committed = fit.to_dict(), laws["laws"][kind]
        for key in ("a, 90 %", "b, 90 %"):
            np.testing.assert_allclose(ours[key], committed[key], rtol=1e-6)


def test_the_tables_of_the_readmes_are_made_of_the_rows(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_a_stale_table_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "READMES", ("README.md",))
    readme = tmp_path / "README.md"
    readme.write_text("A\n<!-- table: width -->\nold\n<!-- end -->\nB 1.234 ± 0.567\n")
    assert tables.main(["--check"]) == 1
    found = capsys.readouterr().out
    assert "README.md: width" in found and "1.234 ± 0.567 is in no table" in found
    assert "old" in readme.read_text()
    assert tables.main([]) == 0
    written = readme.read_text()
    assert written == f"A\n<!-- table: width -->\n{tables.width()}\n<!-- end -->\n" + (
        "B 1.234 ± 0.567\n"
    )
    readme.write_text("<!-- table: widht -->\n<!-- end -->\n")
    with pytest.raises(SystemExit):
        tables.main(["--check"])
    assert "did you mean 'width'" in capsys.readouterr().err


def test_no_file_is_large():
    kept = [path for path in RESULTS.rglob("*.*") if ".cache" not in path.parts]
    assert max(path.stat().st_size for path in kept) < 1_000_000


def test_the_start_table_of_the_readme_is_that_of_tiny():
    experiment = overrides.load(f"{ROOT / 'configs' / 'smollm_r128.py'}:tiny")
    tx = experiment.optimizer.build(experiment.num_steps)
    found = accounting.summary(experiment.model, tx, seq_len=experiment.data.seq_len)
    expected = {
        "parameters (stored)": f"{found['parameters']:,}",
        "parameters (dense equivalent)": f"{found['dense_equivalent_parameters']:,}",
    }
    readme = (ROOT / "README.md").read_text()
    quoted = dict(re.findall(r"│ (\w.*?) +│ ([\d,]+) +│", readme))
    assert {name: quoted.get(name) for name in expected} == expected
