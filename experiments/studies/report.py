"""Writes what a comparison found: Markdown, figures, and one HTML page.

python -m experiments.report experiments/results/compare_methods-small

Reads runs.jsonl of the folder and writes report.md, figures/*.png and report.html,
which holds its figures, beside it. Only trials that were trained to the end are shown.
"""

import itertools
import math
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.studies import page, summary
from sct_jax import errors
from sct_jax.training import command_line, metrics

RESULTS = "Held-out loss: mean ± standard deviation over seeds"
DIFFERENCES = "Less the loss of {}, seed by seed: mean ± standard error"
NOTES = (
    "The best rate of a protocol is that with the least held-out loss of the first "
    "seed, on the text that the table is of; a second one is Adam's, of the embedding "
    "and norms, where it has its own. Arms with fewer seeds stand below the others: "
    "means over different seeds do not compare. The difference of two means within "
    "their deviations is not resolved.",
    "The first seed, which chooses the rates, counts among the others: that flatters "
    "every arm, and the more the more settings it had.",
    "Bits per byte, TFLOP, the largest change of a matrix in spectral norm, and loss "
    "spikes per run belong to the steps of the first horizon, as far as the longest "
    "run has them; - where it was not measured. A step at which most methods spike "
    "with the same seed is a hard batch of it. The last training loss is that of the "
    "longest run, over its last ten steps or more, on text that it had not seen, where "
    "the training text is longer: a second look on other text than the held-out one.",
    "FLOPs are the matrix products of forward and backward pass, head included; those "
    "of the optimizer are not counted, in favour of methods that have many: at the "
    "sizes of these studies Newton's and Schulz's iteration adds about a fifth to "
    "dense Muon, orthogonalisation and retraction 4 % to Stiefel Muon. Where ranks "
    "change, those of the start are charged.",
    "Runs of several lengths have the rates that are best for the first one.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    parser = command_line.FlagParser(__doc__ or "")
    parser.add_argument("results", help="folder of a comparison")
    flags = parser.parse_flags(sys.argv[1:] if argv is None else argv)
    try:
        written = write(pathlib.Path(flags.results))
    except errors.UserError as error:
        command_line.fail(str(error))
    print(f"written: {written}, {written.with_suffix('.html')}")
    return 0


def write(folder: pathlib.Path) -> pathlib.Path:
    """Returns the path of the report, written into the folder beside its figures.

    Raises:
      UserError: for a folder without finished trials, or without matplotlib.
    """
    rows = metrics.read_rows(folder / "runs.jsonl")
    errors.check("RESULTS", bool(rows), f"no finished trial in {folder}/runs.jsonl")
    arms = summary.arms(rows)
    errors.check(
        "RESULTS",
        len({arm.protocols for arm in arms}) == 1,
        "its trials are of different horizons, not of a comparison; the report of a "
        "scaling study is made by experiments.scaling_laws --fit_only",
    )
    report = contents(folder.name, rows, arms)
    return report._replace(figures=draw(arms)).write(folder)


def contents(
    title: str, rows: Sequence[summary.Row], arms: Sequence[summary.Arm]
) -> page.Page:
    """Returns the report of a comparison without its figures."""
    tables = [page.Table(RESULTS, *table(arms))]
    tables += [
        page.Table(DIFFERENCES.format(other.name), *differences(arms, other))
        for other in _references(arms)
    ]
    return page.Page(
        title=f"{title}: {len(arms)} methods, {len(rows)} trials",
        notes=NOTES,
        tables=[*tables, page.provenance(rows)],
        figures=[],
    )


def table(arms: Sequence[summary.Arm]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows: losses as mean and deviation, best arm first.

    What has one column and depends on the horizon is that of the first one.
    """
    protocols = arms[0].protocols
    first = protocols[0]
    choices = list(summary.firsts(protocols).values())
    header = ["method", "settings tried"]
    header += [f"rate, {summary.words(protocol)} (seeds)" for protocol in choices]
    header += [f"nats, {summary.words(protocol)}" for protocol in protocols]
    header += ["last training loss", "bits per byte", "parameters"]
    header += ["TFLOP (of the layers)", "MB"]
    header += ["max update", "spikes"]
    body = []
    for arm in summary.ranked(arms, first):
        row = arm.rows(first)[0]
        spent = row["results"][first]
        body.append(
            [
                arm.name,
                str(len(arm.searched)),
                *(arm.choice(protocol) for protocol in choices),
                *(arm.with_error(protocol) for protocol in protocols),
                _number(arm.last_train_loss(first), ".3f"),
                arm.with_error(first, "bits_per_byte"),
                f"{row['parameters']:,}",
                f"{spent['flops'] / 1e12:.2f} ({spent['block_flops'] / 1e12:.2f})",
                f"{row['train_bytes'] / 1e6:.1f}",
                _number(arm.largest_update(first), ".2g"),
                _number(arm.num_spikes(first), ".1f"),
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
    """The arms which the others are measured by: the first, and the dense ones.

    Not those that are variations of another one, named after it with a colon.
    """
    names = {arm.name for arm in arms}

    def is_variation(arm: summary.Arm) -> bool:
        plain, colon, _ = arm.name.partition(":")
        return bool(colon) and plain in names

    return [
        arm
        for arm in arms
        if arm is arms[0] or (arm.name.startswith("dense") and not is_variation(arm))
    ]


# Name of a file, caption, and a figure of `figures`, which is loaded for it alone.
Drawing = tuple[str, str, Any]


def draw(arms: Sequence[summary.Arm]) -> list[page.Figure]:
    """Returns every figure.

    Raises:
      UserError: where matplotlib is not installed.
    """
    from experiments.studies import figures

    # One is drawn and stored before the next: they are large.
    drawings = itertools.chain(
        _losses(arms), _searches(arms), _courses(arms), _gaps(arms)
    )
    return [
        page.Figure(_file_name(name), caption, figures.to_png(figure))
        for name, caption, figure in drawings
    ]


def _losses(arms: Sequence[summary.Arm]) -> Iterator[Drawing]:
    """The losses at each horizon."""
    from experiments.studies import figures

    for protocol in arms[0].protocols:
        caption = (
            f"Held-out loss at the best rate, {summary.words(protocol)}; bars: one "
            "standard deviation over seeds."
        )
        yield f"loss-{protocol}", caption, figures.losses(arms, protocol)


def _searches(arms: Sequence[summary.Arm]) -> Iterator[Drawing]:
    """The losses over the rates, of the arms that have more than one."""
    from experiments.studies import figures

    first = arms[0].protocols[0]
    if searched := [arm for arm in arms if len(arm.tuning(first)) > 1]:
        caption = (
            "Held-out loss of the first seed over the learning rate, "
            f"{summary.words(first)}; Adam's rate is that of the first search; rates "
            "that diverged are left out."
        )
        yield "tuning", caption, figures.tuning(searched, first)
    if searched := [arm for arm in arms if len(arm.tuning_of_others(first)) > 1]:
        caption = (
            "The same over the rate of the embedding and norms, at the best rate of "
            "the matrices."
        )
        figure = figures.tuning(searched, first, of_others=True)
        yield "tuning-of-others", caption, figure


def _courses(arms: Sequence[summary.Arm]) -> Iterator[Drawing]:
    """What is more than a point per method, of the methods that have all seeds."""
    from experiments.studies import figures

    protocols = arms[0].protocols
    first = protocols[0]
    compared = summary.repeated(arms, first)
    seeds = "; methods with all seeds" if len(compared) < len(arms) else ""
    caption = (
        "Training loss at the best rate, means of ten steps or more; bands: one "
        f"standard deviation over seeds{seeds}."
    )
    yield "curves", caption, figures.curves(compared, first)
    caption = f"Held-out loss over training FLOPs; left and below is better{seeds}."
    yield "flops", caption, figures.costs(compared, protocols)
    caption = (
        "Held-out loss over the memory of the training state, "
        f"{summary.words(first)}{seeds}."
    )
    yield "memory", caption, figures.memory(compared, first)
    caption = (
        "Largest change of a matrix per step, in spectral norm; crosses: loss "
        f"spikes{seeds}."
    )
    yield "update-norms", caption, figures.update_norms(compared, first)
    caption = (
        "Effective rank (exp of the entropy of the singular values) over time, as a "
        f"share of that of the start, mean of all kinds of matrices{seeds}."
    )
    yield "effective-ranks", caption, figures.effective_ranks(compared, first)
    caption = f"Singular values of the down projections at the end{seeds}."
    yield "spectra", caption, figures.spectra(compared, first)


def _gaps(arms: Sequence[summary.Arm]) -> Iterator[Drawing]:
    """The differences over the length of training, where there are several."""
    from experiments.studies import figures

    kinds, lengths = zip(*map(summary.kind_and_length, arms[0].protocols), strict=True)
    if len(set(lengths)) == 1:
        return
    for other in _references(arms):
        for kind in dict.fromkeys(kinds):
            caption = (
                f"Held-out loss less that of {other.name}, seed by seed, over the "
                f"length of training; {summary.PROTOCOLS[kind]}; bars: one standard "
                "error."
            )
            name = f"gap-to-{other.name}-{kind}"
            yield name, caption, figures.gaps(arms, other, kind)


def _file_name(text: str) -> str:
    """The text without signs that a shell, a link or a file system could misread."""
    return re.sub("[^A-Za-z0-9.]+", "-", text)


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
