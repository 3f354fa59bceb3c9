"""A report shows the trials that were trained, and only those."""

import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest

from experiments.studies import report, summary
from sct_jax.training import metrics

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)


def row(arm, rate, seed, loss, *, spikes=(), size=100):
    steps = range(10, 111, 10)  # of a run that is longer than the horizon
    result = {
        "steps": 100,
        "tokens": 3200,
        "flops": 1e12,
        "block_flops": 5e11,
        "loss": loss,
        "bits_per_byte": None if loss is None else loss / 2,
    }
    return {
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "definition": {"experiment": {"optimizer": {"dense_lr_multiplier": 1.0}}},
        "parameters": size,
        "train_bytes": 16e6,
        "wall_seconds": 1.0,
        "results": {
            "tokens 0.4": result,
            "flops 0.4": result | {"flops": 2e12, "loss": loss and loss - 0.1},
        },
        "spikes": list(spikes),
        "train_loss": [[s, 6 - s / 50 + seed / 10] for s in steps],
        "update_norms": [[s, 0.1 + s / 1000] for s in steps],
        "effective_ranks": {"q": [[0, 8.0], [100, 6.0]]},
        "spectra": {"down": [3.0, 2.0, 1.0]},
        "environment": {"commit": "0123456789ab", "jax": "0.10.2"},
    }


ROWS = [
    row("dense Muon", 0.01, 0, 4.5),
    row("dense Muon", 0.02, 0, 4.0),
    row("dense Muon", 0.04, 0, None),
    row("dense Muon", 0.02, 1, 4.2, spikes=[55, 105]),
    row("dense Muon", 0.02, 2, 4.4),
    row("ours <&>", 0.1, 0, 3.9, size=50),
]


@pytest.fixture
def folder(tmp_path):
    text = "".join(json.dumps(r) + "\n" for r in ROWS)
    (tmp_path / "runs.jsonl").write_text(text)
    return tmp_path


def test_a_row_that_stands_twice_counts_once():
    (muon, _), (again, _) = summary.arms(ROWS), summary.arms([*ROWS, *ROWS])
    assert again.rows("tokens 0.4") == muon.rows("tokens 0.4")
    assert len(again.searched) == len(muon.searched) == 3


def test_the_best_rate_has_mean_and_deviation_over_its_seeds():
    muon, ours = summary.arms(ROWS)
    first = "tokens 0.4"
    assert muon.name == "dense Muon"
    assert (muon.setting(first).rate, muon.num_seeds(first)) == (0.02, 3)
    assert muon.mean("tokens 0.4") == pytest.approx(4.2)
    assert muon.deviation("tokens 0.4") == pytest.approx(np.std([4, 4.2, 4.4], ddof=1))
    assert muon.mean("flops 0.4") == pytest.approx(4.1)
    assert not muon.at_edge(first)
    assert muon.num_spikes(first) == pytest.approx(1 / 3)
    assert muon.largest_update(first) == pytest.approx(0.2)
    assert muon.last_train_loss(first) == pytest.approx(6 - 110 / 50 + 0.1)
    assert ours.deviation("tokens 0.4") == 0
    assert summary.repeated([muon, ours], first) == [muon]
    assert summary.repeated([ours], first) == [ours]
    steps, mean, deviation = muon.curve("train_loss", first)
    np.testing.assert_allclose(mean, 6 - steps / 50 + 0.1)
    np.testing.assert_allclose(deviation, 0.1, atol=1e-9)


def test_the_gap_is_taken_seed_by_seed():
    muon, ours = summary.arms(ROWS)
    mean, error = summary.gap(ours, muon, "tokens 0.4")
    assert mean == pytest.approx(-0.1) and math.isnan(error)
    shifted = [
        r | {"arm": "worse", "results": {"tokens 0.4": {"loss": loss + 0.3}}}
        for r in ROWS[:5]
        if (loss := r["results"]["tokens 0.4"]["loss"])
    ]
    worse = summary.arms(shifted)[0]
    mean, error = summary.gap(worse, muon, "tokens 0.4")
    assert mean == pytest.approx(0.3) and error == pytest.approx(0, abs=1e-9)


def test_markdown_and_page_hold_the_same_figures(folder, capsys):
    assert report.main([str(folder)]) == 0
    assert "report.md" in capsys.readouterr().out
    text = (folder / "report.md").read_text()
    assert "| ours <&> | 1 | 0.1 (1) | 0.1 (1) | 3.900 | 3.800 |" in text
    assert "| dense Muon | 3 | 0.02 (3) | 0.02 (3) | 4.200 ± 0.200 | 4.100 ± " in text
    # One seed does not rank above three.
    assert text.index("| dense Muon | 3 |") < text.index("| ours <&> | 1 |")
    for note in report.NOTES:
        assert note in text
    assert "over seeds; methods with all seeds." in text
    assert "| 6 | 0123456789ab | 0.10.2 |" in text
    page = (folder / "report.html").read_text()
    assert "ours &lt;&amp;&gt;" in page and "<&>" not in page
    assert "4.200 ± 0.200" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    named = re.findall(r"\(figures/(.+?)\)", text)
    assert len(named) == len(set(named)) == page.count("<img") == 9
    for name in named:
        png = (folder / "figures" / name).read_bytes()
        assert png.startswith(b"\x89PNG")
        assert len(png) < 300_000


def test_a_second_search_has_a_figure_and_a_place_in_the_table(folder):
    with (folder / "runs.jsonl").open("a") as file:
        for adam_rate, loss in ((0.007, 4.3), (0.06, 3.9)):
            searched = row("dense Muon", 0.02, 0, loss)
            searched["definition"]["adam_rate"] = adam_rate
            file.write(json.dumps(searched) + "\n")
    report.main([str(folder)])
    text = (folder / "report.md").read_text()
    assert "| dense Muon | 5 | 0.02 / 0.06 (1, at the edge) |" in text
    assert "(figures/tuning-of-others.png)" in text
    muon, _ = summary.arms(metrics.read_rows(folder / "runs.jsonl"))
    assert muon.tuning("tokens 0.4") == [(0.01, 4.5), (0.02, 4.0), (0.04, math.inf)]
    others = muon.tuning_of_others("tokens 0.4")
    assert others == [(0.007, 4.3), (0.02, 4.0), (0.06, 3.9)]


def test_differences_to_the_dense_arms_are_told(folder):
    report.main([str(folder)])
    text = (folder / "report.md").read_text()
    assert "## Less the loss of dense Muon, seed by seed" in text
    assert "| ours <&> | -0.100 | -0.100 |" in text


def test_differences_to_the_first_arm_are_told_though_another_is_dense(tmp_path):
    rows = "".join(json.dumps(r) + "\n" for r in reversed(ROWS))
    (tmp_path / "runs.jsonl").write_text(rows)
    text = report.write(tmp_path).read_text()
    for name in ("ours <&>", "dense Muon"):
        assert f"## Less the loss of {name}, seed by seed" in text


def test_several_lengths_show_how_a_gap_goes_on(folder):
    longer = [
        r | {"results": r["results"] | {"tokens 2": r["results"]["tokens 0.4"]}}
        for r in ROWS
    ]
    arms = summary.arms(longer)
    names = [name for name, _, _ in report.draw(arms)]
    assert {"gap-to-dense-Muon-tokens", "gap-to-dense-Muon-flops"} <= set(names)


def test_a_diverged_arm_is_named_so(folder):
    text = json.dumps(row("worst", 1.0, 0, None)) + "\n"
    with (folder / "runs.jsonl").open("a") as file:
        file.write(text)
    report.main([str(folder)])
    assert re.search(
        r"\| worst \| 1 \|.* diverged \|", (folder / "report.md").read_text()
    )


@pytest.mark.parametrize("rows", ["", '{"arm": "torn'])
def test_a_folder_without_trials_ends_with_2(tmp_path, capfd, rows):
    if rows:
        (tmp_path / "runs.jsonl").write_text(rows)
    with pytest.raises(SystemExit) as ended:
        report.main([str(tmp_path)])
    assert ended.value.code == 2
    assert "no finished trial" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_every_figure(folder):
    """The page reports, once loaded, how many of its figures have been decoded."""
    report.main([str(folder)])
    page = folder / "report.html"
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
