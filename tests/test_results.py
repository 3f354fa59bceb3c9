"""The results that are kept are those of the configurations, and the README's."""

import functools
import json
import pathlib
import re

import pytest

from configs import ablation_retraction, compare_methods, rank_sweep
from experiments import grid, ledger, report, summary
from sct_jax import accounting, config, metrics

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
    return summary.arms(metrics.read_rows(RESULTS / folder / "cells.jsonl"))


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
    comparison, rows = FINISHED[name](), ledger.Ledger(RESULTS / name).rows()
    timed = "seconds" in comparison.protocols
    path = RESULTS / name / "seconds.json"
    seconds = json.loads(path.read_text()) if timed else None
    grid.check_same(comparison, rows, seconds=seconds)
    assert not grid.missing(comparison, rows, seconds=seconds)


@pytest.mark.parametrize("folder", FINISHED)
def test_a_report_is_that_of_its_rows(folder):
    text = (RESULTS / folder / "report.md").read_text()
    _, body = _table(folder)
    for cells in body:
        assert f"| {' | '.join(cells)} |" in text


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


@pytest.mark.parametrize("page", [ROOT / "README.md", RESULTS / "README.md"])
def test_every_number_with_an_error_is_that_of_a_report(page):
    pair = re.compile(r"(\d+\.\d+)\s±\s(\d+\.\d+)")
    reports = "\n".join(path.read_text() for path in RESULTS.glob("*/report.md"))
    known = {tuple(map(float, found)) for found in pair.findall(reports)}
    told = pair.findall(page.read_text())
    assert len(told) >= 20
    for texts in told:
        # Prose may have less digits.
        digits = [len(text.partition(".")[2]) for text in texts]
        rounded = {
            tuple(round(x, n) for x, n in zip(found, digits, strict=True))
            for found in known
        }
        assert tuple(map(float, texts)) in rounded, texts


@pytest.mark.parametrize(
    ("page", "folder", "protocol", "method", "others"),
    [
        (
            ROOT,
            "short",
            ("tokens", 0.4),
            "Stiefel Muon",
            {"dense Muon": "dense Muon", "dense AdamW": "dense AdamW"},
        ),
        (ROOT, "long_decay", ("flops", 10), "Stiefel Muon", {"dense AdamW": "it"}),
        (
            RESULTS,
            "short",
            ("tokens", 0.4),
            "Stiefel Muon",
            {
                "dense Muon": "dense Muon",
                "dense AdamW": "dense AdamW",
                "dense Muon (narrow)": "the narrow dense model",
            },
        ),
        (
            RESULTS,
            "short",
            ("tokens", 0.4),
            "Spectron (code)",
            {"dense AdamW": "dense AdamW"},
        ),
        (
            RESULTS,
            "long_decay",
            ("flops", 10),
            "Stiefel Muon",
            {
                "dense AdamW": "dense AdamW",
                "dense Muon": "dense Muon",
                "dense Muon (narrow)": "the narrow dense model",
            },
        ),
    ],
)
def test_who_leads_in_a_sentence_is_who_leads(page, folder, protocol, method, others):
    text = " ".join((page / "README.md").read_text().split())
    # In `long_decay` every method has the same variation behind its name.
    arms = {arm.name.split(":")[0]: arm for arm in _arms(f"compare_methods-{folder}")}
    for other, called in others.items():
        mean, error = summary.gap(arms[method], arms[other], summary.horizon(*protocol))
        side = "below" if mean < 0 else "above"
        assert f"{abs(mean):.3f} ± {error:.3f} {side} {called}" in text


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
