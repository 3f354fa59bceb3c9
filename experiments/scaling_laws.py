"""Fits how the best model size grows with compute, for dense and low-rank models.

python -m experiments.scaling_laws --config=configs/scaling_laws.py

Trains every kind of model at several sizes for each budget of FLOPs, with the folder of
results, the resumption and the sharing of work of `experiments.compare`; then fits, per
kind and budget, a parabola of the held-out loss at the best rate in the logarithm of
the parameters, and through the least points of the parabolas the power laws N = k C^a
and D = k' C^b.
Intervals are bootstrapped. `--fit_only` fits what has been trained.
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

import numpy as np

from experiments import compare, iso_flop, ledger, summary
from experiments import trial as trial_lib
from sct_jax import command_line, config, data, errors


class Run(NamedTuple):
    """One finished run: compute C, parameters N, tokens D, held-out loss."""

    flops: float
    parameters: float
    tokens: float
    loss: float


class Optimum(NamedTuple):
    """The least point of a budget's parabola; `inside` the sizes that were trained."""

    flops: float
    parameters: float
    tokens: float
    loss: float
    inside: bool


class Law(NamedTuple):
    """Exponents of N ~ C^a and D ~ C^b, and the optima that they were fitted to."""

    a: float
    b: float
    optima: list[Optimum]


def optimum(runs: Sequence[Run]) -> Optimum | None:
    """Returns the least point of the parabola through runs of one budget.

    Loss is fitted as a quadratic of log N; None where that opens downwards, or with
    less than three sizes. Tokens at the optimum follow from C / (N D), interpolated in
    log N: with the head included that is no constant.
    """
    if not has_parabola(runs):
        return None
    sizes, curve = log_sizes(runs), parabola(runs)
    if curve.deriv(2)(0.0) <= 0:
        return None
    (vertex,) = curve.deriv().roots()
    order = np.argsort(sizes)
    tokens = np.interp(vertex, sizes[order], np.log([runs[i].tokens for i in order]))
    return Optimum(
        flops=float(np.exp(np.mean(np.log([run.flops for run in runs])))),
        parameters=float(np.exp(vertex)),
        tokens=float(np.exp(tokens)),
        loss=float(curve(vertex)),
        inside=bool(sizes.min() <= vertex <= sizes.max()),
    )


def log_sizes(runs: Sequence[Run]) -> np.ndarray:
    """Returns log N of every run."""
    return np.log([run.parameters for run in runs])


def has_parabola(runs: Sequence[Run]) -> bool:
    """Returns whether there are the three sizes that a parabola needs."""
    return len({run.parameters for run in runs}) >= 3


def parabola(runs: Sequence[Run]) -> np.polynomial.Polynomial:
    """Returns the quadratic in log N that is nearest to the losses of runs."""
    losses = [run.loss for run in runs]
    return np.polynomial.Polynomial.fit(log_sizes(runs), losses, deg=2)


def fit(runs: Sequence[Run]) -> Law | None:
    """Returns the power laws through the optima inside of the sizes that were trained.

    None for less than two of them. Runs belong to one budget where their FLOPs agree to
    2 %.
    """
    found = [optimum(group) for group in by_budget(runs)]
    optima = [o for o in found if o is not None and o.inside]
    if len(optima) < 2:
        return None
    flops = np.log([o.flops for o in optima])
    a, b = (
        float(np.polyfit(flops, np.log([getattr(o, field) for o in optima]), 1)[0])
        for field in ("parameters", "tokens")
    )
    return Law(a, b, optima)


def bootstrap(
    runs: Sequence[Run], *, samples: int = 1000, level: float = 0.9, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Returns intervals of the exponents "a" and "b" at a level.

    Parametric: the noise of a loss has the variance of the residuals of all parabolas,
    with the tails of Student's t, as few of them are free. A sample without a law is
    dropped, and budgets with less than three sizes are, which have no parabola. NaN
    where no residual is free.
    """
    generator = np.random.default_rng(seed)
    groups = [group for group in by_budget(runs) if has_parabola(group)]
    ordered = [run for group in groups for run in group]
    fitted = np.concatenate(
        [np.zeros(0), *(parabola(group)(log_sizes(group)) for group in groups)]
    )
    residuals = np.array([run.loss for run in ordered]) - fitted
    freedom = len(residuals) - 3 * len(groups)
    drawn: dict[str, list[float]] = {"a": [], "b": []}
    sigma = math.sqrt(np.square(residuals).sum() / freedom) if freedom > 0 else math.nan
    for _ in range(samples if freedom > 0 else 0):
        # One variance for a sample, as one was estimated for all.
        scale = sigma * math.sqrt(freedom / generator.chisquare(freedom))
        losses = fitted + scale * generator.standard_normal(len(fitted))
        noisy = [
            run._replace(loss=float(loss))
            for run, loss in zip(ordered, losses, strict=True)
        ]
        law = fit(noisy)
        if law is not None:
            drawn["a"].append(law.a)
            drawn["b"].append(law.b)
    tail = 50 * (1 - level)
    return {
        name: (
            (float(np.percentile(v, tail)), float(np.percentile(v, 100 - tail)))
            if v
            else (math.nan, math.nan)
        )
        for name, v in drawn.items()
    }


def by_budget(runs: Sequence[Run]) -> list[list[Run]]:
    """Returns the runs in groups of equal FLOPs, to 2 %, ascending."""
    groups: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: run.flops):
        if groups and run.flops <= 1.02 * groups[-1][0].flops:
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def runs_of(rows: Sequence[summary.Row]) -> dict[str, list[Run]]:
    """Returns the runs of every kind: of each size and seed the one at its best rate.

    Those that diverged are left out.
    """
    found: dict[str, dict[tuple[str, str, int], Run]] = {}
    for row in rows:
        ((budget, result),) = row["results"].items()
        if result["loss"] is not None:
            best = found.setdefault(row["arm"].rpartition(", d ")[0], {})
            run = Run(
                result["flops"], row["parameters"], result["tokens"], result["loss"]
            )
            point = row["arm"], budget, row["seed"]
            best[point] = min(best.get(point, run), run, key=lambda run: run.loss)
    return {kind: list(best.values()) for kind, best in found.items()}


def laws(kinds: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Any]]:
    """Returns exponents, intervals and optima of every kind that has a law."""
    found = {}
    for kind, runs in kinds.items():
        law = fit(runs)
        if law is not None:
            intervals = bootstrap(runs)
            found[kind] = {
                "N ~ C^a": law.a,
                "a, 90 %": intervals["a"],
                "D ~ C^b": law.b,
                "b, 90 %": intervals["b"],
                "optima": [o._asdict() for o in law.optima],
            }
    return found


def draw(kinds: Mapping[str, Sequence[Run]]) -> bytes:
    """Returns the losses over the parameters, with their parabolas, as a PNG."""
    from experiments import figures

    figure, panels = figures.plt.subplots(
        1, len(kinds), figsize=(5.2 * len(kinds), 4.6), sharey=True, squeeze=False
    )
    figure.set_layout_engine("constrained")
    for axes, (kind, runs) in zip(panels[0], kinds.items(), strict=True):
        for index, group in enumerate(by_budget(runs)):
            look = figures.style(index)
            sizes = np.array([run.parameters for run in group])
            losses = [run.loss for run in group]
            label = f"{group[0].flops:.1e} FLOPs"
            axes.plot(sizes, losses, label=label, **(look | {"linestyle": "none"}))
            if has_parabola(group):
                fine = np.geomspace(sizes.min(), sizes.max(), 60)
                axes.plot(fine, parabola(group)(np.log(fine)), color=look["color"])
        axes.set_xscale("log")
        axes.set_title(kind)
        axes.set_xlabel("parameters, embedding included")
        axes.legend(frameon=False, fontsize=11)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("held-out loss, nats per token")
    return figures.to_png(figure)


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
        book = ledger.Ledger(folder)
        if not flags.fit_only:
            train(study, book)
        write(folder, runs_of(rows_of(study, book)))
    except errors.ConfigError as error:
        command_line.fail(str(error))
    except KeyboardInterrupt:
        print(compare.INTERRUPTED)
        return 130
    return 0


def train(study: iso_flop.ScalingLaws, book: ledger.Ledger) -> None:
    """Returns once every trial of the study is in the ledger."""
    corpus = data.prepare(study.base.data, vocab_size=study.base.model.vocab_size)
    book.check_text(corpus)
    book.share_programs()
    ledger.fill(
        book,
        lambda rows: [t for t in study.trials() if t.key not in rows],
        lambda trial: trial_lib.run(trial, corpus),
    )


def rows_of(study: iso_flop.ScalingLaws, book: ledger.Ledger) -> list[summary.Row]:
    """Returns the rows of the study, and says how many others the folder holds."""
    rows, wanted = book.rows(), {trial.key for trial in study.trials()}
    others = len(rows.keys() - wanted)
    if others:
        print(f"left out: {others} trials in {book.folder} of other settings")
    return [row for key, row in rows.items() if key in wanted]


def write(folder: pathlib.Path, kinds: Mapping[str, Sequence[Run]]) -> None:
    """Prints the laws; writes laws.json and iso-flop.png into the folder.

    Raises:
      ConfigError: where nothing has been trained.
    """
    errors.check("--results", bool(kinds), f"no finished trial in {folder}")
    found = laws(kinds)
    (folder / "laws.json").write_text(json.dumps(found, indent=2) + "\n")
    for kind, runs in kinds.items():
        budgets = len(by_budget(runs))
        if kind not in found:
            print(
                f"{kind}: no law, as less than two of {budgets} budgets have their "
                "least loss inside of the sizes: train smaller or larger ones"
            )
            continue
        law = found[kind]
        print(
            f"{kind}: fitted to {len(law['optima'])} of {budgets} budgets, those with "
            "their least loss inside of the sizes"
        )
        low, high = law["a, 90 %"]
        print(f"{kind}: N ~ C^{law['N ~ C^a']:.3f} [{low:.3f}, {high:.3f}]")
        low, high = law["b, 90 %"]
        print(f"{kind}: D ~ C^{law['D ~ C^b']:.3f} [{low:.3f}, {high:.3f}]")
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / "iso-flop.png").write_bytes(draw(kinds))
    print(f"written: {folder}/laws.json, {folder}/figures/iso-flop.png")


if __name__ == "__main__":
    sys.exit(main())
