"""Writes the report of a comparison: Markdown, figures, and one HTML page.

python -m experiments.studies.report experiments/studies/results/compare_methods-small

Reads the rows of the folder and writes report.md, figures/*.png and report.html, which
embeds the figures. Only finished trials appear.
"""

import math
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.studies import page, summary
from experiments.studies import rows as rows_lib
from experiments.studies import trial as trial_lib
from sct_jax import errors
from sct_jax.training import overrides

RESULTS = "Held-out loss: mean ± standard deviation over seeds"
TRUNCATIONS = "Held-out loss around truncations: mean over seeds"
DIFFERENCES = "Loss minus {}, paired by seed: mean ± standard error"
NOTES = (
    "Every kind of budget has its own best learning rate: the one with the lowest "
    "held-out loss of the first seed, on the text that the table reports. Where a "
    "second rate follows a slash, it is the non-matrix learning rate, of the embedding "
    "and norms. Methods with fewer seeds come last, because means over different seeds "
    "do not compare. A difference within the deviations is not resolved.",
    "The tuning seed is included, which biases results towards heavily tuned methods.",
    "Bits per byte, TFLOP, the largest change of a matrix in spectral norm, and loss "
    "spikes per run refer to the steps of the first budget. A dash means that nothing "
    "was measured. A step at which most methods spike with the same seed is a hard "
    f"batch; the {rows_lib.AFTER_SWITCH} steps after a truncation do not count. The "
    "final training loss is the mean over the last ten or more steps of the longest "
    "run, on text that the run had not seen: a second opinion beside the held-out "
    "text.",
    "FLOPs are the matrix products of forward and backward pass, head included. The "
    "optimizer is not counted. At these sizes, orthogonalisation adds 13 to 29 % to "
    "dense Muon, and with the retraction 4 % to Stiefel Muon. Methods whose ranks "
    "change are charged for their initial ranks.",
    "Runs of several lengths use the learning rates that are best at the first length.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    parser = overrides.FlagParser(__doc__ or "")
    parser.add_argument("results", help="folder of a comparison")
    flags = parser.parse_flags(sys.argv[1:] if argv is None else argv)
    try:
        written = write(pathlib.Path(flags.results))
    except errors.UserError as error:
        overrides.fail(str(error))
    print(f"written: {written}, {written.with_suffix('.html')}")
    return 0


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes the report and its figures into the folder and returns its path.

    Raises:
      UserError: the folder has no finished trials, or matplotlib is missing.
    """
    rows = rows_lib.read(folder)
    found = rows_lib.path_in(folder)
    errors.check("RESULTS", bool(rows), f"no finished trial in {found}")
    methods = summary.summarize(rows)
    errors.check(
        "RESULTS",
        len({method.budgets for method in methods}) == 1,
        "its trials have different budgets, so it is not a comparison; for a scaling "
        "study use experiments.studies.scaling_laws --fit_only",
    )
    report = contents(folder.name, rows)
    return report._replace(images=draw(methods)).write(folder)


def contents(title: str, rows: Sequence[rows_lib.Row]) -> page.Page:
    """Returns the report of a comparison without its figures."""
    methods = summary.summarize(rows)
    return page.Page(
        title=f"{title}: {len(methods)} methods, {len(rows)} trials",
        notes=NOTES,
        tables=[
            page.Table(RESULTS, *table(methods)),
            *(
                [page.Table(TRUNCATIONS, *truncations(methods))]
                if any(row.switches for row in rows)
                else []
            ),
            *(
                page.Table(DIFFERENCES.format(r.name), *differences(methods, r))
                for r in summary.references(methods)
            ),
            page.provenance(rows),
        ],
        images=[],
    )


def table(
    methods: Sequence[summary.MethodSummary],
) -> tuple[list[str], list[list[str]]]:
    """Returns header and body of the losses, best method first.

    Columns that depend on the budget but appear once belong to the first budget.
    """
    budgets = methods[0].budgets
    first = budgets[0]
    choices = list(summary.first_of_each_kind(budgets).values())
    header = [
        "method",
        "settings tried",
        *(f"learning rate, {budget} (seeds)" for budget in choices),
        *(f"nats, {budget}" for budget in budgets),
        *("final training loss", "bits per byte", "parameters"),
        *("TFLOP (of the layers)", "MB", "max update", "spikes"),
    ]
    body = []
    for method in summary.ranked(methods, first):
        row = method.rows(first)[0]
        spent = row.results[first]
        body.append(
            [
                method.name,
                str(len(method.tuning_rows)),
                *(method.choice(budget) for budget in choices),
                *(method.with_error(budget) for budget in budgets),
                _number(method.final_train_loss(first), ".3f"),
                method.with_error(first, "bits_per_byte"),
                f"{row.parameters:,}",
                f"{spent.flops / 1e12:.2f} ({spent.layer_flops / 1e12:.2f})",
                summary.megabytes(row),
                _number(method.largest_update(first), ".2g"),
                _number(method.num_spikes(first), ".1f"),
            ]
        )
    return header, body


def truncations(
    methods: Sequence[summary.MethodSummary],
) -> tuple[list[str], list[list[str]]]:
    """Returns header and body of the losses around every truncation."""
    body = []
    for method in methods:
        for budget in method.budgets:
            rows = method.rows(budget)
            steps = rows[0].results[budget].steps
            around = [[s for s in row.switches if s.length == steps] for row in rows]
            for switches in zip(*around, strict=True):
                before, after = summary.around(switches)
                body.append(
                    [
                        method.name,
                        str(budget),
                        f"{switches[0].step} of {steps}",
                        f"{before:.3f}",
                        f"{after:.3f} (+{after - before:.3f})",
                        method.with_error(budget),
                    ]
                )
    return ["method", "budget", "step", "before", "after", "at the end"], body


def differences(
    methods: Sequence[summary.MethodSummary], reference: summary.MethodSummary
) -> tuple[list[str], list[list[str]]]:
    """Returns header and body of the losses minus one reference method."""
    budgets = [b for b in methods[0].budgets if b in reference.budgets]
    body = [
        [method.name, *(summary.gap_text(method, reference, b) for b in budgets)]
        for method in methods
        if method is not reference
    ]
    return ["method", *map(str, budgets)], body


def draw(methods: Sequence[summary.MethodSummary]) -> list[page.Image]:
    """Returns every figure as an image.

    Raises:
      UserError: matplotlib is missing.
    """
    from experiments.studies import figures

    # Figures are large: each is stored before the next is drawn.
    return [
        page.Image(_file_name(name), caption, figures.to_png(figure))
        for name, caption, figure in _drawings(methods)
    ]


def _drawings(
    methods: Sequence[summary.MethodSummary],
) -> Iterator[tuple[str, str, Any]]:
    """Name, caption and figure, in the order of the report."""
    from experiments.studies import figures

    budgets = methods[0].budgets
    first = budgets[0]
    for budget in budgets:
        yield (
            f"loss-{budget.kind}-{budget.amount:g}",
            f"Held-out loss at the best learning rate, {budget}; bars: one standard "
            "deviation over seeds.",
            figures.losses(methods, budget),
        )
    if searched := [m for m in methods if len(m.tuning(first)) > 1]:
        yield (
            "tuning",
            f"Held-out loss of the first seed over the learning rate, {first}. The "
            "non-matrix learning rate comes from the first search; diverged runs are "
            "left out.",
            figures.tuning(searched, first),
        )
    if searched := [m for m in methods if len(m.non_matrix_tuning(first)) > 1]:
        yield (
            "tuning-of-others",
            "The same over the non-matrix learning rate, of the embedding and norms, "
            "at the best learning rate of the matrices.",
            figures.tuning(searched, first, non_matrix=True),
        )
    compared = summary.with_most_seeds(methods, first)
    seeds = "; methods with all seeds" if len(compared) < len(methods) else ""
    for name, caption, draw_one in (
        (
            "curves",
            "Training loss at the best learning rate, means of ten or more steps; "
            "bands: one standard deviation over seeds",
            figures.curves,
        ),
        (
            "flops",
            "Held-out loss over training FLOPs; lower left is better",
            lambda methods, _: figures.costs(methods),
        ),
        (
            "memory",
            f"Held-out loss over the memory of the training state, {first}",
            figures.memory,
        ),
        (
            "update-norms",
            "Largest change of a matrix per step, in spectral norm; crosses: loss "
            "spikes",
            figures.update_norms,
        ),
        (
            "effective-ranks",
            "Effective rank (exp of the entropy of the singular values) over time, "
            "relative to the initial one, mean over all kinds of matrices",
            figures.effective_ranks,
        ),
        (
            "spectra",
            "Final singular values of the down projections",
            figures.spectra,
        ),
    ):
        figure = draw_one(compared, first)
        if figures.shows_data(figure):
            yield name, f"{caption}{seeds}.", figure
    if len({budget.amount for budget in budgets}) == 1 or len(methods) == 1:
        return
    for reference in summary.references(methods):
        for kind in summary.first_of_each_kind(budgets):
            yield (
                f"gap-to-{reference.name}-{kind}",
                f"Held-out loss minus {reference.name}, paired by seed, over "
                f"the length of training; {trial_lib.EQUAL[kind]}; bars: one standard "
                "error.",
                figures.gaps(methods, reference, kind),
            )


def _file_name(text: str) -> str:
    """The text without characters that a shell, link or file system could misread."""
    return re.sub("[^A-Za-z0-9.]+", "-", text)


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
