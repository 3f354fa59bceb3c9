"""Fits how the best model size grows with compute, for dense and low-rank models.

python -m experiments.scaling_laws --config=configs/scaling_laws.py

Trains every kind of model at several sizes for each budget of FLOPs, with the folder of
results, the resumption and the sharing of work of `experiments.compare`; then fits, per
kind and budget, a parabola of the held-out loss at the best rate in the logarithm of
the parameters, and through the least points of the parabolas the power laws N = k C^a
and D = k' C^b. Intervals are bootstrapped. Writes a report; `--fit_only` of what has
been trained.
"""

import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from experiments import huge_pages

if __name__ == "__main__":
    huge_pages.restart_with_huge_pages()


from experiments.studies import compare, iso_flop, page, power_laws, store, summary
from experiments.studies import trial as trial_lib
from sct_jax import data, errors
from sct_jax.training import command_line, config

NOTES = (
    "Of every size and budget the rate counts that is best for the first seed, "
    "searched until it has neighbours on both sides; Adam's, of the embedding and "
    "norms, is one for all. Parabolas are fitted to the held-out loss in the logarithm "
    "of the parameters, with the embedding; their least points count where they lie "
    "inside of the sizes. Intervals are those of a parametric bootstrap; a sample is "
    "whole with such a point for every budget that has one. The others are fitted to "
    "less budgets, or left out with less than two: with many of them the intervals are "
    "too narrow.",
    "FLOPs are the matrix products of forward and backward pass, head included; those "
    "of the optimizer are not counted, in favour of methods that have many.",
)


class Point(NamedTuple):
    """What was trained of one kind at one size for one budget."""

    horizon: str
    width: str
    arm: summary.Arm

    @property
    def rows(self) -> list[summary.Row]:
        """Rows at the best rate, one per seed."""
        return self.arm.rows(self.horizon)

    @property
    def runs(self) -> list[power_laws.Run]:
        """What a fit needs of them."""
        return [
            power_laws.Run(
                row["results"][self.horizon]["flops"],
                row["parameters"],
                row["results"][self.horizon]["tokens"],
                row["results"][self.horizon]["loss"],
                row["seed"],
            )
            for row in self.rows
        ]


def points_of(rows: Sequence[summary.Row]) -> dict[str, list[Point]]:
    """Returns the points of every kind; those that diverged are left out."""
    found: dict[str, list[Point]] = {}
    for horizon in dict.fromkeys(name for row in rows for name in row["results"]):
        of_budget = [row for row in rows if horizon in row["results"]]
        for arm in summary.arms(of_budget):
            # The name is that of `iso_flop.ScalingLaws.trial`.
            kind, _, width = arm.name.rpartition(", d ")
            if math.isfinite(arm.mean(horizon)):
                found.setdefault(kind, []).append(Point(horizon, width, arm))
    return found


def runs_of(points: Mapping[str, Sequence[Point]]) -> dict[str, list[power_laws.Run]]:
    """Returns the runs of every kind, of all its points."""
    return {
        kind: [run for point in own for run in point.runs]
        for kind, own in points.items()
    }


class Fit(NamedTuple):
    """The law of a kind, and the intervals of its exponents."""

    law: power_laws.Law
    intervals: power_laws.Intervals

    @property
    def has_intervals(self) -> bool:
        """Whether there were runs to tell the noise from."""
        return math.isfinite(self.intervals.whole)

    def as_json(self) -> dict[str, Any]:
        """Returns what laws.json says of it."""
        a, b, whole = self.intervals if self.has_intervals else (None, None, None)
        return {
            "N ~ C^a": self.law.a,
            "a, 90 %": a,
            "D ~ C^b": self.law.b,
            "b, 90 %": b,
            "samples with an optimum for every budget": whole,
            "optima": [best._asdict() for best in self.law.optima],
        }

    def exponents(self) -> tuple[str, str]:
        """Returns a and b with their intervals in brackets."""
        pairs = (self.law.a, self.intervals.a), (self.law.b, self.intervals.b)
        a, b = (
            f"{value:.3f} [{low:.3f}, {high:.3f}]"
            if self.has_intervals
            else f"{value:.3f} [no interval]"
            for value, (low, high) in pairs
        )
        return a, b

    def whole(self) -> str:
        """Returns the share of the samples with an optimum for every budget."""
        return f"{self.intervals.whole:.0%}" if self.has_intervals else "-"


def fits_of(kinds: Mapping[str, Sequence[power_laws.Run]]) -> dict[str, Fit]:
    """Returns the fit of every kind that has a law."""
    return {
        kind: Fit(law, power_laws.bootstrap(runs))
        for kind, runs in kinds.items()
        if (law := power_laws.fit(runs)) is not None
    }


def tables(
    points: Mapping[str, Sequence[Point]], fits: Mapping[str, Fit]
) -> list[page.Table]:
    """Returns the exponents, the optima, and the points that they were fitted to."""
    exponents = [[kind, *fit.exponents(), fit.whole()] for kind, fit in fits.items()]
    optima = [
        [
            kind,
            f"{best.flops:.3g}",
            f"{best.parameters:,.0f}",
            f"{best.tokens:,.0f}",
            f"{best.loss:.3f}",
        ]
        for kind, fit in fits.items()
        for best in fit.law.optima
    ]
    trained = [
        [
            kind,
            f"{run.flops:.3g}",
            point.width,
            f"{run.parameters:,}",
            f"{run.tokens:,.0f}",
            point.arm.choice(point.horizon),
            point.arm.with_error(point.horizon),
        ]
        for kind, own in points.items()
        for point in own
        for run in point.runs[:1]  # seeds differ in their loss alone
    ]
    of_run = ["FLOPs", "d_model", "parameters", "tokens", "rate (seeds)", "nats"]
    return [
        page.Table(
            "Exponents, in brackets 90 % intervals",
            ["kind", "parameters N ~ C^a", "tokens D ~ C^b", "whole samples"],
            exponents,
        ),
        page.Table(
            "The best size of a budget",
            ["kind", "FLOPs", "parameters", "tokens", "nats"],
            optima,
        ),
        page.Table(
            "Runs at their best rate: mean ± standard deviation over seeds",
            ["kind", *of_run],
            trained,
        ),
    ]


def draw(
    kinds: Mapping[str, Sequence[power_laws.Run]], fits: Mapping[str, Fit]
) -> list[page.Figure]:
    """Returns the losses over the parameters, and those of the best sizes over FLOPs.

    Raises:
      UserError: where matplotlib is not installed.
    """
    from experiments.studies import figures

    drawn = [
        page.Figure(
            "iso-flop",
            "Held-out loss over the parameters, a curve per budget of FLOPs: parabolas "
            "in the logarithm of the parameters.",
            figures.to_png(figures.iso_flop(kinds)),
        )
    ]
    if fits:
        optima = {kind: fit.law.optima for kind, fit in fits.items()}
        drawn.append(
            page.Figure(
                "best-sizes",
                "Held-out loss of the best size over the training FLOPs.",
                figures.to_png(figures.best_sizes(optima)),
            )
        )
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 bad input, 130 interrupted."""
    parser = command_line.FlagParser(__doc__ or "")
    parser.add_argument("--config", default="configs/scaling_laws.py")
    parser.add_argument("--results", help="folder (default: as of experiments.compare)")
    parser.add_argument("--fit_only", action="store_true", help="train nothing")
    flags, overrides = parser.parse(sys.argv[1:] if argv is None else argv)
    try:
        study = config.load_as(iso_flop.ScalingLaws, flags.config, overrides)
        folder = pathlib.Path(compare.results_folder(flags.config, flags.results))
        if flags.fit_only:
            errors.check("--results", folder.is_dir(), f"there is no folder {folder}")
        book = store.Store(folder)
        if not flags.fit_only:
            train(study, book)
        write(folder, *rows_of(study, book))
    except errors.UserError as error:
        command_line.fail(str(error))
    except KeyboardInterrupt:
        print(compare.INTERRUPTED)
        return 130
    return 0


def train(study: iso_flop.ScalingLaws, book: store.Store) -> None:
    """Returns once every trial of the study is in the store."""
    corpus = data.prepare(study.base.data, vocab_size=study.base.model.vocab_size)
    book.check_text(corpus)
    book.share_programs()
    store.fill(
        book,
        lambda rows: [t for t in study.trials(rows) if t.key not in rows],
        lambda trial: trial_lib.run(trial, corpus),
    )


def rows_of(
    study: iso_flop.ScalingLaws, book: store.Store
) -> tuple[list[summary.Row], int]:
    """Returns the rows of the study and how many it lacks; says how many are others."""
    rows = book.rows()
    wanted = {trial.key for trial in study.trials(rows)}
    others, missing = len(rows.keys() - wanted), len(wanted - rows.keys())
    if others:
        print(f"left out: {others} trials in {book.folder} of other settings")
    return [row for key, row in rows.items() if key in wanted], missing


def write(
    folder: pathlib.Path, rows: Sequence[summary.Row], num_missing: int = 0
) -> None:
    """Prints the laws; writes laws.json, the report and its figures into the folder.

    Args:
      folder: of the results.
      rows: what has been trained.
      num_missing: how many trials are known to be lacking, which is told.

    Raises:
      UserError: where nothing has been trained, or matplotlib is not installed.
    """
    points = points_of(rows)
    errors.check("--results", bool(points), f"no finished trial in {folder}")
    kinds = runs_of(points)
    fits = fits_of(kinds)
    laws = {
        "trials": len(rows),
        "missing_trials": num_missing,
        "laws": {kind: fit.as_json() for kind, fit in fits.items()},
    }
    (folder / "laws.json").write_text(
        json.dumps(laws, indent=2, allow_nan=False) + "\n"
    )
    notes = NOTES
    if num_missing:
        lacking = f"Not finished: {num_missing} trials or more are to be trained."
        print(lacking)
        notes = (lacking, *NOTES)
    report = contents(folder.name, rows, points, fits)
    for kind, runs in kinds.items():
        print(f"{kind}: {_in_words(fits.get(kind), power_laws.by_budget(runs))}")
    figures = draw(kinds, fits)
    written = report._replace(notes=notes, figures=figures).write(folder)
    print(f"written: {written}, {written.with_suffix('.html')}, {folder}/laws.json")


def contents(
    title: str,
    rows: Sequence[summary.Row],
    points: Mapping[str, Sequence[Point]],
    fits: Mapping[str, Fit],
) -> page.Page:
    """Returns the report of a finished study without its figures."""
    return page.Page(
        title=f"{title}: {len(points)} kinds, {len(rows)} trials",
        notes=NOTES,
        tables=[*tables(points, fits), page.provenance(rows)],
        figures=[],
    )


def _in_words(fit: Fit | None, budgets: Sequence[Sequence[power_laws.Run]]) -> str:
    if fit is None:
        return (
            f"no law, as less than two of the {len(budgets)} budgets that were trained "
            "have their least loss inside of the sizes: train smaller or larger ones"
        )
    a, b = fit.exponents()
    return (
        f"N ~ C^{a}, D ~ C^{b}, fitted to {len(fit.law.optima)} of {len(budgets)} "
        "budgets, those with their least loss inside of the sizes"
    )


if __name__ == "__main__":
    sys.exit(main())
