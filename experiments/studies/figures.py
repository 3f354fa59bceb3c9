"""Figures of comparisons and scaling laws, one per function.

Importing it raises UserError where matplotlib is not installed.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.studies import power_laws, summary
from experiments.studies import trial as trial_lib
from sct_jax import errors

try:
    import matplotlib
    import matplotlib.figure
    import matplotlib.pyplot as plt
    import PIL.Image
    from matplotlib import ticker
except ImportError as error:
    raise errors.UserError(
        "figures need matplotlib; install it with pip install -e '.[plots]'"
    ) from error

matplotlib.use("Agg")

# Okabe and Ito's colours, safe for the colour-blind. Line styles and markers alternate
# with them, so that no two methods share all three.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")

Figure = matplotlib.figure.Figure
Methods = Sequence[summary.MethodSummary]
Budget = trial_lib.Budget

_LOSS = "held-out loss, nats per token"
_DPI = 110
_PALETTE = 256  # colours per file: enough for lines and text, at a third of the size


def style(index: int) -> dict[str, Any]:
    """Returns colour, line style and marker of the method with this index."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index // len(COLOURS) % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def to_png(figure: Figure) -> bytes:
    """Returns the figure as a small PNG file, and closes it."""
    drawn, stored = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=_DPI, format="png")
    plt.close(figure)
    image = PIL.Image.open(drawn).convert("RGB").quantize(_PALETTE)
    image.save(stored, format="png", optimize=True)
    return stored.getvalue()


def shows_data(figure: Figure) -> bool:
    """Returns whether anything is drawn; closes a figure in which nothing is."""
    if any(axes.has_data() for axes in figure.axes):
        return True
    plt.close(figure)
    return False


def losses(methods: Methods, budget: Budget) -> Figure:
    """Returns held-out losses as points with one standard deviation, best on top.

    Methods with fewer seeds are below the others.
    """
    shown = [m for m in methods if math.isfinite(m.mean(budget))]
    shown = summary.ranked(shown, budget)[::-1]
    # Two lines, because one would be wider than the axes.
    figure, axes = _figure(f"{_LOSS}\n({budget})", "")
    for place, method in enumerate(shown):
        axes.errorbar(
            method.mean(budget),
            place,
            xerr=method.deviation(budget) if method.num_seeds(budget) > 1 else None,
            capsize=4,
            markersize=7,
            **style(method.index),
        )
    names = [f"{method.name} ({_seeds(method.num_seeds(budget))})" for method in shown]
    axes.set_yticks(range(len(shown)), names)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    _make_room(axes, names, line=0.34)
    axes.grid(axis="x", alpha=0.3)
    return figure


def tuning(
    methods: Methods,
    budget: Budget,
    *,
    non_matrix: bool = False,
) -> Figure:
    """Returns the loss of the tuning seed over a learning rate, per method.

    Args:
      methods: the methods.
      budget: of the losses.
      non_matrix: show the non-matrix learning rate, not the matrix one.
    """
    whose = "the embedding and norms" if non_matrix else "the matrices"
    figure, axes = _figure(f"peak learning rate of {whose}", _LOSS)
    for method in methods:
        line = method.non_matrix_tuning if non_matrix else method.tuning
        points = [(rate, loss) for rate, loss in line(budget) if math.isfinite(loss)]
        if points:
            axes.plot(
                *zip(*points, strict=True), label=method.name, **style(method.index)
            )
    _log_scale(axes, "{x:g}")
    _legend(axes)
    return figure


def curves(methods: Methods, budget: Budget) -> Figure:
    """Returns training losses at the best rate, with a band of one deviation."""
    figure, axes = _figure("step", "training loss, nats per token", log="x")
    for method in methods:
        steps, mean, deviation = method.train_loss(budget)
        if not len(steps):
            continue
        look = style(method.index) | {"marker": ""}
        axes.plot(steps, mean, label=method.name, **look)
        axes.fill_between(
            steps, mean - deviation, mean + deviation, color=look["color"], alpha=0.15
        )
    _legend(axes)
    return figure


def costs(methods: Methods) -> Figure:
    """Returns losses over total training FLOPs, a point per budget."""
    figure, axes = _figure(
        "training FLOPs of forward and backward pass, head included", _LOSS
    )
    _log_scale(axes, ticker.EngFormatter(sep=""))
    for method in methods:
        points = sorted(
            (method.results(b)[0].flops, method.mean(b), method.deviation(b))
            for b in method.budgets
            if math.isfinite(method.mean(b))
        )
        if points:
            flops, mean, deviation = zip(*points, strict=True)
            axes.errorbar(
                flops, mean, yerr=deviation, label=method.name, **style(method.index)
            )
    _legend(axes)
    return figure


def gaps(
    methods: Methods,
    reference: summary.MethodSummary,
    kind: str,
) -> Figure:
    """Returns losses minus a reference, over the tokens per parameter.

    Args:
      methods: the methods.
      reference: subtracted seed by seed.
      kind: of the budgets to show, "tokens" for one.
    """
    # Two lines, because a long name would be wider than the figure is high.
    figure, axes = _figure(
        "tokens per parameter of the dense model",
        f"{_LOSS},\nminus {reference.name}",
        log="x",
    )
    trained = set()
    for method in methods:
        points = []
        for budget in method.budgets:
            mean, error = summary.gap(method, reference, budget)
            if budget.kind == kind and math.isfinite(mean):
                error = 0 if math.isnan(error) else error
                points.append((budget.amount, mean, error))
        if points:
            lengths, means, stderrs = zip(*sorted(points), strict=True)
            trained |= set(lengths)
            axes.errorbar(
                lengths, means, yerr=stderrs, label=method.name, **style(method.index)
            )
    axes.set_xticks(sorted(trained), [f"{length:g}" for length in sorted(trained)])
    axes.set_xticks([], minor=True)
    _legend(axes)
    return figure


def memory(methods: Methods, budget: Budget) -> Figure:
    """Returns losses over the bytes of parameters, gradients and optimizer state."""
    figure, axes = _figure("parameters, gradients and optimizer state, MB", _LOSS)
    for method in methods:
        if math.isfinite(method.mean(budget)):
            look = style(method.index) | {"linestyle": "none"}
            axes.errorbar(
                method.rows(budget)[0].train_bytes / 1e6,
                method.mean(budget),
                yerr=method.deviation(budget) if method.num_seeds(budget) > 1 else None,
                markersize=8,
                label=method.name,
                **look,
            )
    axes.grid(alpha=0.3)
    _legend(axes)
    return figure


def update_norms(methods: Methods, budget: Budget) -> Figure:
    """Returns the largest ||W' - W||_2 over the run of the first seed, and spikes."""
    figure, axes = _figure(
        "step (crosses: loss spikes)", "largest ||W' - W||, spectral norm", log="y"
    )
    for method in methods:
        row = method.rows(budget)[0]
        points = [s for s in row.update_norms if 0 < s.value < math.inf]
        if not points:
            continue
        steps, norms = np.array(points).T
        look = style(method.index)
        axes.plot(steps, norms, label=method.name, **(look | {"marker": ""}))
        spikes = row.spikes_of_training or []
        at = np.interp(spikes, steps, norms)
        axes.plot(spikes, at, "x", color=look["color"], markersize=9, mew=2)
    _legend(axes)
    return figure


def effective_ranks(methods: Methods, budget: Budget) -> Figure:
    """Returns the effective rank over the run, relative to the initial one.

    Mean over all kinds of matrices. A dense matrix has several times the rank of
    factors, so absolute ranks would hide how factors change.
    """
    figure, axes = _figure("step", "effective rank, relative to the start")
    for method in methods:
        kinds = list(method.rows(budget)[0].effective_ranks.values())
        if not kinds or len(kinds[0]) < 2:
            continue
        steps = [sample.step for sample in kinds[0]]
        ranks = np.array([[sample.value for sample in kind] for kind in kinds])
        shares = np.mean(ranks / ranks[:, :1], axis=0)
        axes.plot(steps, shares, label=method.name, **style(method.index))
    _legend(axes)
    return figure


def spectra(
    methods: Methods,
    budget: Budget,
    matrix: str = "down",
) -> Figure:
    """Returns the final singular values of one kind of matrix, mean of layers."""
    figure, axes = _figure(
        f"index of the singular value ({matrix}, first seed)",
        "singular value at the end, mean of layers",
        log="y",
    )
    for method in methods:
        values = method.rows(budget)[0].spectra.get(matrix, ())
        if not len(values):
            continue
        look = style(method.index) | {"marker": ""}
        axes.plot(np.arange(1, len(values) + 1), values, label=method.name, **look)
    _legend(axes)
    return figure


def iso_flop(kinds: Mapping[str, Sequence[power_laws.SizeResult]]) -> Figure:
    """Returns losses over the parameters with their parabolas, a panel per kind."""
    figure, panels = plt.subplots(
        1,
        len(kinds),
        figsize=(4.4 * len(kinds) + 2.2, 4.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, (kind, runs) in zip(panels[0], kinds.items(), strict=True):
        for index, group in enumerate(power_laws.by_budget(runs)):
            look = style(index)
            sizes = np.array([run.parameters for run in group])
            axes.plot(
                sizes,
                [run.loss for run in group],
                label=f"{group[0].flops:.2g} FLOPs",
                **(look | {"linestyle": "none"}),
            )
            if power_laws.has_parabola(group):
                fine = np.geomspace(sizes.min(), sizes.max(), 60)
                curve = power_laws.parabola(group)(np.log(fine))
                axes.plot(fine, curve, color=look["color"])
        _log_scale(axes, ticker.EngFormatter(sep=""))
        axes.set_title(kind, fontsize=13)
        axes.set_xlabel("parameters, embedding included")
        _plain(axes)
    panels[0][0].set_ylabel(_LOSS)
    panels[0][-1].legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=11
    )
    return figure


def best_sizes(optima: Mapping[str, Sequence[power_laws.Optimum]]) -> Figure:
    """Returns the loss of the best size over the FLOPs, a line per kind."""
    figure, axes = _figure(
        "training FLOPs, head included",
        "held-out loss of the best size,\nnats per token",
        log="x",
    )
    for index, (kind, found) in enumerate(optima.items()):
        flops = [best.flops for best in found]
        axes.plot(flops, [best.loss for best in found], label=kind, **style(index))
    _legend(axes)
    return figure


def _figure(xlabel: str, ylabel: str, *, log: str = "") -> tuple[Figure, Any]:
    """A figure and its axes; `log` names the axis with a logarithmic scale."""
    figure, axes = plt.subplots(layout="constrained")
    _plain(axes)
    axes.set(xlabel=xlabel, ylabel=ylabel, **({f"{log}scale": "log"} if log else {}))
    return figure, axes


def _plain(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=12)
    axes.xaxis.label.set_fontsize(13)
    axes.yaxis.label.set_fontsize(13)


def _log_scale(axes, formatter: str | ticker.Formatter) -> None:
    """A logarithmic x axis, labelled at 1, 2 and 5 of each decade."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(formatter)
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def _legend(axes) -> None:
    """A legend outside the axes, where it covers no data; none if there is no data."""
    if not axes.has_data():
        return
    legend = axes.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=11
    )
    names = [text.get_text() for text in legend.get_texts()]
    _make_room(axes, names, line=0.25, least=4.8)


def _make_room(axes, names: Sequence[str], *, line: float, least: float = 0) -> None:
    """Enlarges the figure so that labels beside the axes do not shrink the plot.

    Args:
      axes: of the figure.
      names: one per line.
      line: height of a line, in inches.
      least: minimum height of the figure, in inches.
    """
    width = 6.5 + 0.085 * max(map(len, names), default=0)
    axes.figure.set_size_inches(width, max(least, 1.2 + line * len(names)))


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"
