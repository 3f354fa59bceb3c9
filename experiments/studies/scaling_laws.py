"""Fits how the best model size grows with compute, for dense and low-rank models.

python -m experiments.studies.scaling_laws
python -m experiments.studies.scaling_laws --fit_only

Trains every kind of model at several sizes per budget of FLOPs, into a results folder
that resumes and shares work as `experiments.studies.compare` does. Then it fits, per
kind and budget, a parabola of the held-out loss at the best learning rate in the
logarithm of the parameters, and through their minima the power laws N = k C^a and
D = k' C^b with bootstrapped intervals. `--fit_only` reports on finished trials.
"""

import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from sct_jax.training import huge_pages

if __name__ == "__main__":
    huge_pages.restart_with_huge_pages()


from experiments.studies import (
    compare,
    iso_flop,
    page,
    power_laws,
    search,
    store,
    summary,
)
from experiments.studies import rows as rows_lib
from experiments.studies import train as train_lib
from experiments.studies import trial as trial_lib
from sct_jax import data, errors, files
from sct_jax.training import overrides

NOTES = (
    "Every size and budget has its own best learning rate: the one of the first seed, "
    "searched until it has neighbours on both sides. All share one non-matrix learning "
    "rate, of the embedding and norms. Parabolas fit the held-out loss in the "
    "logarithm of the parameters, embedding included. Their minima count if they are "
    "inside the trained sizes. A parametric bootstrap gives the intervals. A sample is "
    "whole if every budget of the law has such a minimum; other samples are fitted to "
    "fewer budgets, or dropped below two. Many of them make the intervals too narrow.",
    "FLOPs are the matrix products of forward and backward pass, head included. The "
    "optimizer is not counted, which favours expensive ones.",
)

Kinds = Mapping[str, Sequence[power_laws.SizeResult]]


class Point(NamedTuple):
    """A kind of model at one size and budget."""

    budget: trial_lib.Budget
    method: summary.MethodSummary

    @property
    def d_model(self) -> int:
        """Width of the model."""
        return self.method.all_rows[0].trial.experiment.model.d_model

    @property
    def results(self) -> list[power_laws.SizeResult]:
        """Runs at the best learning rate, one per seed."""
        return [
            power_laws.SizeResult(
                row.results[self.budget].flops,
                row.parameters,
                row.results[self.budget].tokens,
                row.results[self.budget].loss,
                row.seed,
            )
            for row in self.method.rows(self.budget)
        ]


def points_of(rows: Sequence[rows_lib.Row]) -> dict[str, list[Point]]:
    """Returns the points of every kind, without those that diverged."""
    groups: dict[Any, list[rows_lib.Row]] = {}
    for row in rows:
        for budget in row.results:
            shape = row.trial.experiment.model
            groups.setdefault((budget, row.trial.method, shape), []).append(row)
    found: dict[str, list[Point]] = {}
    for budget in dict.fromkeys(budget for budget, _, _ in groups):
        for (other, kind, _), own in groups.items():
            (method,) = summary.summarize(own)
            if other == budget and math.isfinite(method.mean(budget)):
                found.setdefault(kind, []).append(Point(budget, method))
    return found


def results_of(points: Mapping[str, Sequence[Point]]) -> Kinds:
    """Returns the runs of every kind."""
    return {
        kind: [result for point in own for result in point.results]
        for kind, own in points.items()
    }


class Fit(NamedTuple):
    """The law of a kind, with the intervals of its exponents."""

    law: power_laws.Law
    intervals: power_laws.Intervals

    @property
    def has_intervals(self) -> bool:
        """Whether enough runs determine the noise."""
        return math.isfinite(self.intervals.whole)

    def to_dict(self) -> dict[str, Any]:
        """Returns the entry of laws.json."""
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
        """Returns a and b, with their intervals in brackets."""
        pairs = (self.law.a, self.intervals.a), (self.law.b, self.intervals.b)
        a, b = (
            f"{value:.3f} [{low:.3f}, {high:.3f}]"
            if self.has_intervals
            else f"{value:.3f} [no interval]"
            for value, (low, high) in pairs
        )
        return a, b

    def whole(self) -> str:
        """Returns the share of samples with an optimum for every budget."""
        return f"{self.intervals.whole:.0%}" if self.has_intervals else "-"


def fits_of(kinds: Kinds) -> dict[str, Fit]:
    """Returns the fit of every kind that has a law."""
    return {
        kind: Fit(law, power_laws.bootstrap(results))
        for kind, results in kinds.items()
        if (law := power_laws.fit(results)) is not None
    }


def tables(
    points: Mapping[str, Sequence[Point]], fits: Mapping[str, Fit]
) -> list[page.Table]:
    """Returns the exponents, the optima, and the fitted points."""
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
            f"{result.flops:.3g}",
            str(point.d_model),
            f"{result.parameters:,}",
            f"{result.tokens:,.0f}",
            point.method.choice(point.budget),
            point.method.with_error(point.budget),
        ]
        for kind, own in points.items()
        for point in own
        for result in point.results[:1]  # seeds differ only in their loss
    ]
    columns = ["FLOPs", "d_model", "parameters", "tokens"]
    columns += ["learning rate (seeds)", "nats"]
    return [
        page.Table(
            "Exponents, with 90 % intervals in brackets",
            ["kind", "parameters N ~ C^a", "tokens D ~ C^b", "whole samples"],
            exponents,
        ),
        page.Table(
            "The best size of each budget",
            ["kind", "FLOPs", "parameters", "tokens", "nats"],
            optima,
        ),
        page.Table(
            "Runs at their best learning rate: mean ± standard deviation over seeds",
            ["kind", *columns],
            trained,
        ),
    ]


def draw(kinds: Kinds, fits: Mapping[str, Fit]) -> list[page.Image]:
    """Returns images of losses over parameters, and of the best losses over FLOPs.

    Raises:
      UserError: matplotlib is missing.
    """
    from experiments.studies import figures

    drawn = [
        page.Image(
            "iso-flop",
            "Held-out loss over the parameters, a curve per budget of FLOPs: parabolas "
            "in the logarithm of the parameters.",
            figures.to_png(figures.iso_flop(kinds)),
        )
    ]
    if fits:
        optima = {kind: fit.law.optima for kind, fit in fits.items()}
        drawn.append(
            page.Image(
                "best-sizes",
                "Held-out loss of the best size over the training FLOPs.",
                figures.to_png(figures.best_sizes(optima)),
            )
        )
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 bad input, 130 interrupted."""
    parser = overrides.FlagParser(__doc__ or "")
    parser.add_argument(
        "--config",
        default="configs/studies/scaling_laws.py",
        help="config file (default: %(default)s)",
    )
    parser.add_argument(
        "--results", help=f"folder (default: {compare.RESULTS}/<file>-<variant>)"
    )
    parser.add_argument("--fit_only", action="store_true", help="train nothing")
    flags, pairs = parser.parse(sys.argv[1:] if argv is None else argv)
    try:
        with overrides.notes_on_renames():
            study = overrides.load_as(iso_flop.ScalingLaws, flags.config, pairs)
        folder = pathlib.Path(compare.results_folder(flags.config, flags.results))
        if flags.fit_only:
            errors.check("--results", folder.is_dir(), f"there is no folder {folder}")
        else:
            train(study, store.Store(folder))
        write(folder, *rows_of(study, rows_lib.by_trial(folder)))
    except errors.UserError as error:
        overrides.fail(str(error))
    except KeyboardInterrupt:
        print(compare.INTERRUPTED)
        return 130
    return 0


def train(study: iso_flop.ScalingLaws, results: store.Store) -> None:
    """Trains every missing trial of the study."""
    corpus = data.prepare(study.base.data, vocab_size=study.base.model.vocab_size)
    results.check_text(corpus)
    results.share_programs()
    store.fill(
        results,
        lambda rows: [t for t in study.trials(rows) if t.identity not in rows],
        lambda trial: train_lib.run(trial, corpus),
    )


def rows_of(
    study: iso_flop.ScalingLaws, rows: search.Rows
) -> tuple[list[rows_lib.Row], int]:
    """Returns the rows of the study and how many it lacks; prints what is left."""
    wanted = {trial.identity for trial in study.trials(rows)}
    others, missing = len(rows.keys() - wanted), len(wanted - rows.keys())
    if others:
        print(f"left out: {others} trials of other settings")
    return [row for identity, row in rows.items() if identity in wanted], missing


def write(
    folder: pathlib.Path, rows: Sequence[rows_lib.Row], num_missing: int = 0
) -> None:
    """Prints the laws; writes laws.json, the report and its figures into the folder.

    Args:
      folder: results folder.
      rows: finished trials.
      num_missing: how many trials are known to be missing.

    Raises:
      UserError: nothing has been trained, or matplotlib is missing.
    """
    points = points_of(rows)
    errors.check("--results", bool(points), f"no finished trial in {folder}")
    kinds = results_of(points)
    fits = fits_of(kinds)
    laws = {
        "trials": len(rows),
        "missing_trials": num_missing,
        "laws": {kind: fit.to_dict() for kind, fit in fits.items()},
    }
    files.replace_text(
        folder / "laws.json", json.dumps(laws, indent=2, allow_nan=False) + "\n"
    )
    report = contents(folder.name, rows, points, fits)
    if num_missing:
        unfinished = f"Not finished: {num_missing} trials or more are missing."
        print(unfinished)
        report = report._replace(notes=(unfinished, *NOTES))
    for kind, results in kinds.items():
        print(f"{kind}: {_in_words(fits.get(kind), power_laws.by_budget(results))}")
    written = report._replace(images=draw(kinds, fits)).write(folder)
    print(f"written: {written}, {written.with_suffix('.html')}, {folder}/laws.json")


def contents(
    title: str,
    rows: Sequence[rows_lib.Row],
    points: Mapping[str, Sequence[Point]],
    fits: Mapping[str, Fit],
) -> page.Page:
    """Returns the report of a finished study without its figures."""
    return page.Page(
        title=f"{title}: {len(points)} kinds, {len(rows)} trials",
        notes=NOTES,
        tables=[*tables(points, fits), page.provenance(rows)],
        images=[],
    )


def _in_words(
    fit: Fit | None, budgets: Sequence[Sequence[power_laws.SizeResult]]
) -> str:
    if fit is None:
        return (
            f"no law, because fewer than two of {len(budgets)} budgets have their "
            "minimum inside the sizes; train smaller or larger ones"
        )
    a, b = fit.exponents()
    return (
        f"N ~ C^{a}, D ~ C^{b}, fitted to {len(fit.law.optima)} of {len(budgets)} "
        "budgets, those with their minimum inside the sizes"
    )


if __name__ == "__main__":
    sys.exit(main())
