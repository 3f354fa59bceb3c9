"""Writes what a comparison found: Markdown, figures, and one HTML page.

python -m experiments.report experiments/results/compare_methods-small

Reads cells.jsonl of the folder and writes report.md, figures/*.png and report.html,
which holds its figures, beside it. Only trials that were trained to the end are shown.
"""

import base64
import html
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from experiments import summary
from sct_jax import config, errors, metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    parser = config.FlagParser(__doc__ or "")
    parser.add_argument("results", help="folder of a comparison")
    flags = parser.parse_flags(sys.argv[1:] if argv is None else argv)
    try:
        page = write(pathlib.Path(flags.results))
    except errors.ConfigError as error:
        config.fail(str(error))
    print(f"written: {page}, {page.with_suffix('.html')}")
    return 0


def write(folder: pathlib.Path) -> pathlib.Path:
    """Returns the path of the report, written into the folder beside its figures.

    Raises:
      ConfigError: for a folder without finished trials, or without matplotlib.
    """
    rows = metrics.read_rows(folder / "cells.jsonl")
    errors.check("RESULTS", bool(rows), f"no finished trial in {folder}/cells.jsonl")
    arms = summary.arms(rows)
    drawn = draw(arms)
    (folder / "figures").mkdir(exist_ok=True)
    for name, _, png in drawn:
        (folder / "figures" / f"{name}.png").write_bytes(png)
    title = f"{folder.name}: {len(arms)} methods, {len(rows)} trials"
    tables = [("Results", *table(arms))]
    tables += [
        (f"Less the loss of {dense.name}, seed by seed", *differences(arms, dense))
        for dense in _references(arms)
    ]
    tables.append(("What was run", *provenance(rows)))
    (folder / "report.html").write_text(as_html(title, tables, drawn))
    page = folder / "report.md"
    page.write_text(as_markdown(title, tables, drawn))
    return page


def table(arms: Sequence[summary.Arm]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows: losses as mean and deviation, best arm first."""
    protocols = arms[0].protocols
    header = ["method", "rate", "tried", "seeds"]
    header += [summary.words(protocol) for protocol in protocols]
    header += ["bits per byte", "parameters", "TFLOP", "MB", "max update", "spikes"]
    first = protocols[0]
    body = []
    for arm in sorted(arms, key=lambda arm: arm.mean(first)):
        tried = f"{len(arm.searched)}{', best at the edge' if arm.at_edge else ''}"
        body.append(
            [
                arm.name,
                f"{arm.rate:g}",
                tried,
                str(arm.num_seeds),
                *(_with_error(arm, protocol, "loss") for protocol in protocols),
                _with_error(arm, first, "bits_per_byte"),
                f"{arm.rows[0]['parameters']:,}",
                f"{arm.results(first)[0]['flops'] / 1e12:.1f}",
                f"{arm.rows[0]['train_bytes'] / 1e6:.1f}",
                f"{arm.largest_update:.2g}",
                f"{arm.num_spikes:.1f}",
            ]
        )
    return header, body


def differences(
    arms: Sequence[summary.Arm], reference: summary.Arm
) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows: losses less those of one arm, with standard errors."""
    shared = [p for p in arms[0].protocols if p in reference.protocols]
    body = []
    for arm in arms:
        if arm is reference:
            continue
        cells = []
        for protocol in shared:
            mean, error = summary.gap(arm, reference, protocol)
            if not math.isfinite(mean):
                cells.append("-" if math.isnan(mean) else "diverged")
            else:
                cells.append(
                    f"{mean:+.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")
                )
        body.append([arm.name, *cells])
    return ["method", *map(summary.words, shared)], body


def _references(arms: Sequence[summary.Arm]) -> list[summary.Arm]:
    """The dense arms, which the others are measured by."""
    return [arm for arm in arms if arm.name.startswith("dense")]


def provenance(rows: Sequence[summary.Row]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows: which trials were made with what."""
    counts: dict[tuple[str, ...], int] = {}
    header = list(dict.fromkeys(name for row in rows for name in row["environment"]))
    for row in rows:
        made_with = tuple(str(row["environment"].get(name, "")) for name in header)
        counts[made_with] = counts.get(made_with, 0) + 1
    body = [[str(count), *made_with] for made_with, count in counts.items()]
    return ["trials", *header], body


def draw(arms: Sequence[summary.Arm]) -> list[tuple[str, str, bytes]]:
    """Returns file name, caption and PNG of every figure.

    Raises:
      ConfigError: where matplotlib is not installed.
    """
    from experiments import figures

    protocols = arms[0].protocols
    first = protocols[0]
    wanted: list[tuple[str, str, Callable[[], Any]]] = [
        (
            f"loss-{protocol.replace(' ', '-')}",
            f"Held-out loss at the best rate, {summary.words(protocol)}; bars: one "
            "standard deviation over seeds.",
            lambda protocol=protocol: figures.losses(arms, protocol),
        )
        for protocol in protocols
    ]
    wanted += [
        (
            "tuning",
            "Held-out loss of the first seed over the learning rate, "
            f"{summary.words(first)}.",
            lambda: figures.tuning(arms, first),
        ),
        (
            "curves",
            "Training loss at the best rate, means of ten steps; bands: one standard "
            "deviation over seeds.",
            lambda: figures.curves(arms),
        ),
        (
            "flops",
            "Held-out loss over total training FLOPs; left and below is better.",
            lambda: figures.costs(arms, protocols),
        ),
        (
            "memory",
            "Held-out loss over the memory of the training state, "
            f"{summary.words(first)}.",
            lambda: figures.memory(arms, first),
        ),
        (
            "update-norms",
            "Largest change of a matrix per step, in spectral norm; crosses: loss "
            "spikes.",
            lambda: figures.update_norms(arms),
        ),
        (
            "effective-ranks",
            "Effective rank (exp of the entropy of the singular values) over time.",
            lambda: figures.effective_ranks(arms),
        ),
        (
            "spectra",
            "Singular values of the down projections at the end.",
            lambda: figures.spectra(arms),
        ),
    ]
    kinds, lengths = zip(*map(summary.kind_and_length, protocols), strict=True)
    if len(set(lengths)) > 1:
        wanted += [
            (
                f"gap-to-{dense.name.replace(' ', '-')}-{kind}",
                f"Held-out loss less that of {dense.name}, seed by seed, over the "
                f"length of training; {summary.PROTOCOLS[kind]}.",
                lambda dense=dense, kind=kind: figures.gaps(arms, dense, kind),
            )
            for dense in _references(arms)
            for kind in dict.fromkeys(kinds)
        ]
    return [(name, caption, figures.to_png(make())) for name, caption, make in wanted]


def as_markdown(title: str, tables, drawn) -> str:
    """Returns the report as Markdown, with links to its figures."""
    lines = [f"# {title}", ""]
    for heading, header, body in tables:
        lines += [f"## {heading}", ""]
        lines += [_row(header), _row(["---"] * len(header)), *map(_row, body), ""]
    for name, caption, _ in drawn:
        lines += [f"![{caption}](figures/{name}.png)", "", caption, ""]
    return "\n".join(lines)


def as_html(title: str, tables, drawn) -> str:
    """Returns the report as one page that needs no other file."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<link rel="icon" href="data:,">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for heading, header, body in tables:
        cells = lambda tag, row: "".join(
            f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row
        )
        parts += [
            f"<h2>{html.escape(heading)}</h2><div class='wide'><table>",
            f"<tr>{cells('th', header)}</tr>",
            *(f"<tr>{cells('td', row)}</tr>" for row in body),
            "</table></div>",
        ]
    for _, caption, png in drawn:
        source = base64.b64encode(png).decode()
        text = html.escape(caption, quote=True)
        parts.append(
            f'<figure><img alt="{text}" src="data:image/png;base64,{source}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _with_error(arm: summary.Arm, protocol: str, field: str) -> str:
    mean = arm.mean(protocol, field)
    if not math.isfinite(mean):
        return "diverged"
    if arm.num_seeds == 1:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {arm.deviation(protocol, field):.3f}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; color: #111; background: #fff; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ccc; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 2rem 0; } img { max-width: 100%; height: auto; }
figcaption { color: #444; }
"""

if __name__ == "__main__":
    sys.exit(main())
