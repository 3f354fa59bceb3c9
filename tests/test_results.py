"""The results that are kept are those of the configurations, and the README's."""

import functools
import json
import pathlib

import pytest

from configs.studies import ablation_retraction, compare_methods, rank_sweep
from configs.studies import scaling_laws as scaling_laws_config
from experiments.studies import grid, report, scaling_laws, store, summary
from sct_jax.training import accounting, config, metrics

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
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
# By folder, the comparison that was trained to its end.
FINISHED = {
    **{
        f"compare_methods-{variant}": functools.partial(
            compare_methods.get_config, variant
        )
        for variant in VARIANTS
    },
    "ablation_retraction": ablation_retraction.get_config,
    "rank_sweep": rank_sweep.get_config,
}


def _arms(folder):
    return summary.arms(metrics.read_rows(RESULTS / folder / "runs.jsonl"))


def _table(folder):
    return report.table(_arms(folder))


def _losses(folder, length):
    """By method, its losses at equal tokens and at equal FLOPs, best first."""
    header, body = _table(folder)
    columns = [
        header.index(f"nats, {summary.words(summary.horizon(kind, length))}")
        for kind in ("tokens", "flops")
    ]
    return {cells[0]: [cells[i] for i in columns] for cells in body}


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_comparison_lacks_no_trial(name):
    comparison, rows = FINISHED[name](), store.Store(RESULTS / name).rows()
    timed = "seconds" in comparison.protocols
    path = RESULTS / name / "seconds.json"
    seconds = json.loads(path.read_text()) if timed else None
    grid.check_same(comparison, rows, seconds=seconds)
    assert not grid.missing(comparison, rows, seconds=seconds)


@pytest.mark.parametrize("folder", FINISHED)
def test_a_report_is_that_of_its_rows(folder):
    rows = metrics.read_rows(RESULTS / folder / "runs.jsonl")
    text = (RESULTS / folder / "report.md").read_text()
    assert text.startswith(report.contents(folder, rows, _arms(folder)).as_markdown())


def test_the_scaling_report_is_that_of_its_rows():
    folder = RESULTS / "scaling_laws"
    study = scaling_laws_config.get_config()
    rows, num_missing = scaling_laws.rows_of(study, store.Store(folder))
    assert num_missing == 0
    points = scaling_laws.points_of(rows)
    assert {kind: len(own) for kind, own in points.items()} == {
        kind.arm.name: sum(map(len, kind.sizes)) for kind in study.kinds
    }
    fits = scaling_laws.fits_of(scaling_laws.runs_of(points))
    assert set(fits) == set(points)
    contents = scaling_laws.contents("scaling_laws", rows, points, fits)
    text = (folder / "report.md").read_text()
    assert text.startswith(contents.as_markdown())
    laws = json.loads((folder / "laws.json").read_text())
    assert (laws["trials"], laws["missing_trials"]) == (len(rows), 0)
    # Prose has the losses of the best sizes, and the exponents.
    prose = " ".join((RESULTS / "README.md").read_text().split())
    losses = {
        kind: "{:.3f}, {:.3f} and {:.3f}".format(*(o.loss for o in fit.law.optima))
        for kind, fit in fits.items()
    }
    said = "the losses are {} for dense Muon, {} for Stiefel Muon"
    assert said.format(losses["dense Muon"], losses["Stiefel Muon"]) in prose
    exponents = [fits[kind].exponents()[0] for kind in ("dense Muon", "Stiefel Muon")]
    assert "N ~ C^a are {} and {},".format(*exponents) in prose


def test_the_gaps_of_the_readme_are_those_of_the_report():
    arms = _arms("compare_methods-long")
    (muon,) = (arm for arm in arms if arm.name == "dense Muon")
    header, body = report.differences(arms, muon)
    columns = [
        header.index(summary.words(summary.horizon("flops", length)))
        for length in (0.4, 2, 10)
    ]
    readme = (ROOT / "README.md").read_text()
    for name, *cells in body:
        line = [name, *(cells[i - 1] for i in columns)]
        assert f"| {' | '.join(line)} |" in readme


def test_the_summary_of_the_readme_is_that_of_the_reports():
    readme = (ROOT / "README.md").read_text()
    found = [_losses("compare_methods-short", 0.4), _losses("compare_methods-long", 10)]
    assert len(found[1]) == 6
    for name in found[1]:
        cells = [name, *(cell for losses in found for cell in losses[name])]
        assert f"| {' | '.join(cells)} |" in readme


def test_the_table_of_all_methods_is_that_of_the_report():
    header, body = _table("compare_methods-small")
    parameters = {cells[0]: cells[header.index("parameters")] for cells in body}
    losses = _losses("compare_methods-small", 0.4)
    lines = [
        f"| {' | '.join([name, parameters[name], *cells])} |"
        for name, cells in losses.items()
        if "±" in cells[-1]
    ]
    assert len(lines) >= 6
    assert "\n".join(lines) in (RESULTS / "README.md").read_text()


def test_no_file_is_large():
    kept = [path for path in RESULTS.rglob("*.*") if ".cache" not in path.parts]
    assert max(path.stat().st_size for path in kept) < 1_000_000


def _summary(variant):
    """What the start table of a variant says."""
    experiment = config.load(f"{ROOT / 'configs' / 'smollm_r128.py'}:{variant}")
    tx = experiment.optimizer.build(experiment.num_steps)
    return accounting.summary(experiment.model, tx, seq_len=experiment.data.seq_len)


def test_the_bytes_of_the_default_are_those_of_the_readme():
    found = _summary("1.7b")
    readme = (ROOT / "README.md").read_text()
    assert f"bytes, total                   {found['bytes']['total']:,} (" in readme


def test_the_start_table_of_the_readme_is_that_of_tiny():
    found = _summary("tiny")
    readme = (ROOT / "README.md").read_text()
    for name in ("parameters", "dense_equivalent_parameters", "flops_per_token"):
        assert f"│ {found[name]:,} " in readme
    for size in found["bytes"].values():
        assert f"│ {size:,} (" in readme
