"""A report shows finished trials, and only those."""

import dataclasses
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from samples import SHAPE
from study_samples import row_of

from experiments.studies import legacy, methods, report, rows, summary
from experiments.studies import trial as trial_lib
from sct_jax.training import config, optimizer_config

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
TOKENS, FLOPS = trial_lib.Budget("tokens", 0.4), trial_lib.Budget("flops", 0.4)
BASE = config.ExperimentConfig(
    model=SHAPE, optimizer=optimizer_config.Sct(schedule="wsd")
)


def row(method, rate, seed, loss, *, spikes=(), non_matrix_lr=None, longer=False):
    changes = [methods.optimizer(peak_learning_rate=rate)]
    if method.startswith("dense"):
        changes.append(methods.DENSE)
    experiment = methods.compose(*changes)(BASE)
    budgets = [TOKENS, FLOPS]
    budgets += [trial_lib.Budget(kind, 2.0) for kind in ("tokens", "flops")] * longer
    plain, colon, _ = method.partition(":")
    trial = trial_lib.Trial(
        method=method,
        experiment=dataclasses.replace(experiment, seed=seed),
        branches=tuple(trial_lib.Branch(budget, 100) for budget in budgets),
        non_matrix_lr=non_matrix_lr,
        variation_of=plain if colon else None,
    )
    steps = range(10, 111, 10)  # of a run that is longer than the budget
    return row_of(
        trial,
        {"tokens": loss, "flops": loss - 0.1},
        spikes=list(spikes),
        train_loss=[rows.Sample(s, 6 - s / 50 + seed / 10) for s in steps],
        update_norms=[rows.Sample(s, 0.1 + s / 1000) for s in steps],
        effective_ranks={"q": [rows.Sample(0, 8.0), rows.Sample(100, 6.0)]},
        spectra={"down": [3.0, 2.0, 1.0]},
        environment={"commit": "0123456789ab", "jax": "0.10.2"},
    )


ROWS = [
    row("dense Muon", 0.01, 0, 4.5),
    row("dense Muon", 0.02, 0, 4.0),
    row("dense Muon", 0.04, 0, math.inf),
    row("dense Muon", 0.02, 1, 4.2, spikes=[55, 105]),
    row("dense Muon", 0.02, 2, 4.4),
    row("ours <&>", 0.1, 0, 3.9),
]


def write(folder, found):
    lines = [json.dumps(rows.to_dict(r)) + "\n" for r in found]
    (folder / rows.FILE).write_text("".join(lines))


def test_the_best_rate_has_mean_and_deviation_over_its_seeds():
    muon, ours = summary.summarize(ROWS)
    assert muon.name == "dense Muon"
    assert (muon.setting(TOKENS).learning_rate, muon.num_seeds(TOKENS)) == (0.02, 3)
    assert muon.mean(TOKENS) == pytest.approx(4.2)
    assert muon.deviation(TOKENS) == pytest.approx(np.std([4, 4.2, 4.4], ddof=1))
    assert muon.mean(FLOPS) == pytest.approx(4.1)
    assert not muon.at_edge(TOKENS)
    assert muon.num_spikes(TOKENS) == pytest.approx(1 / 3)
    assert muon.largest_update(TOKENS) == pytest.approx(0.2)
    assert muon.final_train_loss(TOKENS) == pytest.approx(6 - 110 / 50 + 0.1)
    assert ours.deviation(TOKENS) == 0
    assert summary.with_most_seeds([muon, ours], TOKENS) == [muon]
    assert summary.with_most_seeds([ours], TOKENS) == [ours]
    steps, mean, deviation = muon.train_loss(TOKENS)
    np.testing.assert_allclose(mean, 6 - steps / 50 + 0.1)
    np.testing.assert_allclose(deviation, 0.1, atol=1e-9)
    # A row that repeats counts once.
    again, _ = summary.summarize([*ROWS, *ROWS])
    assert again.rows(TOKENS) == muon.rows(TOKENS)
    assert len(again.tuning_rows) == len(muon.tuning_rows) == 3


def test_a_gap_is_paired_by_seed():
    muon, ours = summary.summarize(ROWS)
    mean, error = summary.gap(ours, muon, TOKENS)
    assert mean == pytest.approx(-0.1) and math.isnan(error)
    shifted = [row("worse", 0.02, s, loss) for s, loss in enumerate((4.3, 4.5, 4.7))]
    (worse,) = summary.summarize(shifted)
    mean, error = summary.gap(worse, muon, TOKENS)
    assert mean == pytest.approx(0.3) and error == pytest.approx(0, abs=1e-9)


def test_references_are_the_first_method_and_the_dense_ones():
    names = ("ours", "dense", "dense: decay .9", "dense B: decay .9")
    found = summary.summarize([row(name, 0.1, 0, 4.0) for name in names])
    references = [method.name for method in summary.references(found)]
    # The plain form of the last one is not in the study.
    assert references == ["ours", "dense", "dense B: decay .9"]


def test_markdown_and_page_have_the_same_tables_and_images(tmp_path, capsys):
    extra = [
        row("dense Muon", 0.02, 0, 4.3, non_matrix_lr=0.007),
        row("dense Muon", 0.02, 0, 3.99, non_matrix_lr=0.06),
        row("worst", 1.0, 0, math.inf),
    ]
    write(tmp_path, [*ROWS, *extra])
    assert report.main([str(tmp_path)]) == 0
    assert "report.md" in capsys.readouterr().out
    text = (tmp_path / "report.md").read_text()
    assert "| ours <&> | 1 | 0.1 (1) | 0.1 (1) | 3.900 | 3.800 |" in text
    assert "| dense Muon | 5 | 0.02 / 0.06 (1, at the edge) |" in text
    assert re.search(r"\| worst \| 1 \|.* diverged \|", text)
    for note in report.NOTES:
        assert note in text
    assert "## Loss minus dense Muon, paired by seed" in text
    assert "| ours <&> | -0.090 | -0.090 |" in text
    assert "| 9 | 0123456789ab | 0.10.2 |" in text
    page = (tmp_path / "report.html").read_text()
    assert "ours &lt;&amp;&gt;" in page and "<&>" not in page
    assert "0.02 / 0.06 (1, at the edge)" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    named = re.findall(r"\(figures/(.+?)\)", text)
    assert len(named) == len(set(named)) == page.count("<img") == 10
    for name in named:
        png = (tmp_path / "figures" / name).read_bytes()
        assert png.startswith(b"\x89PNG") and len(png) < 300_000
    muon = summary.summarize(rows.read(tmp_path))[0]
    assert muon.tuning(TOKENS) == [(0.01, 4.5), (0.02, 4.0), (0.04, math.inf)]
    others = muon.non_matrix_tuning(TOKENS)
    assert others == [(0.007, 4.3), (0.02, 4.0), (0.06, 3.99)]


def test_methods_with_fewer_seeds_come_last():
    header, body = report.table(summary.summarize(ROWS))
    assert [cells[0] for cells in body] == ["dense Muon", "ours <&>"]
    assert body[0][4].startswith("4.200 ± 0.200")
    assert len(header) == len(body[0])


def test_several_lengths_have_figures_of_the_gaps(tmp_path):
    longer = [
        row(name, 0.02, 0, loss, longer=True)
        for name, loss in (("dense Muon", 4.0), ("ours", 3.9))
    ]
    names = [image.name for image in report.draw(summary.summarize(longer))]
    assert {"gap-to-dense-Muon-tokens", "gap-to-dense-Muon-flops"} <= set(names)
    assert {"loss-tokens-2", "effective-ranks"} <= set(names)


def test_figures_without_data_are_left_out():
    """Of one method there is no gap, and of one effective rank no change."""
    alone = row("dense Muon", 0.02, 0, 4.0, longer=True)
    one_rank = {"q": [rows.Sample(90, 8.0)]}
    alone = dataclasses.replace(alone, effective_ranks=one_rank, update_norms=[])
    names = [image.name for image in report.draw(summary.summarize([alone]))]
    assert "spectra" in names and "curves" in names
    assert not {"effective-ranks", "update-norms"} & set(names)
    assert not [name for name in names if name.startswith("gap")]


def test_what_a_truncation_does_to_the_loss_is_no_spike():
    cut = dataclasses.replace(
        row("dense Muon", 0.02, 0, 4.0, spikes=[5, 20, 21, 70, 71]),
        # Of a shorter run, and of the longest one, which spikes are counted in.
        switches=[rows.Switch(50, 4, 3.0, 4.0), rows.Switch(100, 20, 3.0, 4.0)],
    )
    assert cut.spikes_of_training == [5, 20, 71]
    (method,) = summary.summarize([cut])
    assert method.num_spikes(TOKENS) == 3
    assert dataclasses.replace(cut, spikes=None).spikes_of_training is None


@pytest.mark.parametrize("text", ["", '{"trial": "torn'])
def test_a_folder_without_trials_exits_with_2(tmp_path, capfd, text):
    if text:
        (tmp_path / rows.FILE).write_text(text)
    with pytest.raises(SystemExit) as ended:
        report.main([str(tmp_path)])
    assert ended.value.code == 2
    assert "no finished trial" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arm", "horizon", "method", "variation_of", "budget"),
    [
        ("dense Muon", "tokens 0.4", "dense Muon", None, TOKENS),
        (
            "Stiefel Muon: lossless",
            "flops 0.4",
            "Stiefel Muon: svd retraction",
            "Stiefel Muon",
            FLOPS,
        ),
        (
            "Stiefel Muon (svd gauge)",
            "seconds 2",
            "Stiefel Muon (svd coordinates)",
            None,
            trial_lib.Budget("seconds", 2.0),
        ),
        (
            "dense Muon, d 56",
            "budget 1e+12",
            "dense Muon",
            None,
            trial_lib.Budget("total_flops", 1e12),
        ),
    ],
)
def test_a_row_of_an_earlier_version_is_upgraded(
    arm, horizon, method, variation_of, budget
):
    result = {"steps": 5, "tokens": 40, "flops": 1.0, "block_flops": 0.5}
    old = {
        "environment": {"commit": "abc"},
        "arm": arm,
        "rate": 0.1,
        "seed": 3,
        "definition": {
            "arm": arm,
            "experiment": {
                "seed": 3,
                "step": "whole",
                "data": {"source": "stdlib", "batch_size": 4},
                "optimizer": {
                    "name": "tsvd",
                    "peak_learning_rate": 0.1,
                    "retraction_every": 1_000_000_000,
                    "retraction_tolerance": None,
                    "gauge": "factors",
                    "dense_rate": 0.5,
                    "b2": None,
                },
                "rank": {"energy": None},
            },
            "horizons": [[horizon, 5]],
            "method": "unit_spectrum",
            "adam_rate": 0.003,
        },
        "parameters": 7,
        "results": {horizon: result | {"loss": None, "bits_per_byte": None}},
        "spikes": None,
        "train_loss": [[10, None]],
        "update_norms": [],
        "effective_ranks": {},
        "spectra": {},
    }
    row = rows.from_dict(old)
    assert legacy.is_legacy(old) and not legacy.is_legacy(rows.to_dict(row))
    trial = row.trial
    assert (trial.method, trial.variation_of) == (method, variation_of)
    assert trial.branches == (trial_lib.Branch(budget, 5),)
    assert (trial.forward, trial.setting) == ("unit_spectrum", (0.1, 0.003))
    assert trial.experiment == config.ExperimentConfig(
        seed=3,
        data=dataclasses.replace(BASE.data, batch_size=4, split="files"),
        optimizer=optimizer_config.Sct(
            peak_learning_rate=0.1, retraction="none", dense_lr_multiplier=0.5
        ),
    )
    assert row.results[budget].layer_flops == 0.5
    assert row.loss(budget) == row.train_loss[0].value == math.inf
    assert rows.from_dict(rows.to_dict(row)) == row


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_every_image(tmp_path):
    """The page reports, once loaded, how many of its images have been decoded."""
    write(tmp_path, ROWS)
    report.main([str(tmp_path)])
    page = tmp_path / "report.html"
    probe = (
        "<script>onerror = e => document.title = 'error ' + e;"
        "onload = () => document.title = 'drawn ' + [...document.images].filter("
        "i => i.complete && i.naturalWidth > 400).length;</script>"
    )
    page.write_text(page.read_text().replace("</head>", probe + "</head>"))
    seen = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--virtual-time-budget=5000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "<title>drawn 9</title>" in seen.stdout
    assert "CONSOLE" not in seen.stderr
