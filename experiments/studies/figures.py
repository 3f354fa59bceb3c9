"""Figures of comparisons and scaling laws. Every function returns one figure.

Raises UserError when it is loaded where matplotlib is not installed.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.studies import power_laws, summary
from sct_jax import errors

try:
    import matplotlib
    import matplotlib.figure
    import matplotlib.pyplot as plt
    import PIL.Image
    from matplotlib import ticker
except ImportError as error:
    raise errors.UserError(
        "figures need matplotlib: pip install -e '.[plots]'"
    ) from error

matplotlib.use("Agg")

# Okabe and Ito's colours, safe for the colour-blind, in turn with line styles and
# markers, so that no two arms share all three.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")

Figure = matplotlib.figure.Figure

_DPI = 130
_PALETTE = 256  # colours of a file: lines and text need no more, and it is a third


def style(index: int) -> dict[str, Any]:
    """Returns colour, line and marker of the arm with this number."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index // len(COLOURS) % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def to_png(figure: Figure) -> bytes:
    """Returns the figure as a small file, and closes it."""
    drawn, stored = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=_DPI, format="png")
    plt.close(figure)
    image = PIL.Image.open(drawn).convert("RGB").quantize(_PALETTE)
    image.save(stored, format="png", optimize=True)
    return stored.getvalue()


def losses(arms: Sequence[summary.Arm], protocol: str) -> Figure:
    """Returns held-out losses as points with one standard deviation, best on top.

    Arms with fewer seeds stand below the others.
    """
    shown = [a for a in arms if math.isfinite(a.mean(protocol))]
    shown = summary.ranked(shown, protocol)[::-1]
    figure, axes = _figure()
    for place, arm in enumerate(shown):
        axes.errorbar(
            arm.mean(protocol),
            place,
            xerr=arm.deviation(protocol) if arm.num_seeds(protocol) > 1 else None,
            capsize=4,
            markersize=7,
            **style(arm.index),
        )
    names = [f"{arm.name} ({_seeds(arm.num_seeds(protocol))})" for arm in shown]
    axes.set_yticks(range(len(shown)), names)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    _make_room(axes, names, line=0.34)
    # The horizon has a line of its own: in one it is wider than the axes.
    axes.set_xlabel(f"held-out loss, nats per token\n({summary.words(protocol)})")
    axes.grid(axis="x", alpha=0.3)
    return figure


def tuning(
    arms: Sequence[summary.Arm], protocol: str, *, of_others: bool = False
) -> Figure:
    """Returns the loss of the first seed over a learning rate, per arm.

    That of the matrices, or that of others, the embedding above all.
    """
    figure, axes = _figure()
    for arm in arms:
        line = arm.tuning_of_others if of_others else arm.tuning
        points = [(rate, loss) for rate, loss in line(protocol) if math.isfinite(loss)]
        if points:
            axes.plot(*zip(*points, strict=True), label=arm.name, **style(arm.index))
    _log_scale(axes, "{x:g}")
    whose = "the embedding and norms" if of_others else "the matrices"
    axes.set_xlabel(f"peak learning rate of {whose}")
    axes.set_ylabel("held-out loss, nats per token")
    _legend(axes)
    return figure


def curves(arms: Sequence[summary.Arm], protocol: str) -> Figure:
    """Returns training losses at the best rate, with a band of one deviation."""
    figure, axes = _figure()
    for arm in arms:
        steps, mean, deviation = arm.curve("train_loss", protocol)
        if not len(steps):
            continue
        look = style(arm.index) | {"marker": ""}
        axes.plot(steps, mean, label=arm.name, **look)
        axes.fill_between(
            steps, mean - deviation, mean + deviation, color=look["color"], alpha=0.15
        )
    axes.set_xscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats per token")
    _legend(axes)
    return figure


def costs(arms: Sequence[summary.Arm], protocols: Sequence[str]) -> Figure:
    """Returns losses over total training FLOPs, a point per horizon."""
    figure, axes = _figure()
    for arm in arms:
        points = sorted(
            (arm.results(p)[0]["flops"], arm.mean(p), arm.deviation(p))
            for p in protocols
            if p in arm.protocols and math.isfinite(arm.mean(p))
        )
        if points:
            flops, mean, deviation = zip(*points, strict=True)
            axes.errorbar(
                flops, mean, yerr=deviation, label=arm.name, **style(arm.index)
            )
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs of forward and backward pass, head included")
    axes.set_ylabel("held-out loss, nats per token")
    _legend(axes)
    return figure


def gaps(arms: Sequence[summary.Arm], reference: summary.Arm, kind: str) -> Figure:
    """Returns how far arms are from one of them, over the tokens per parameter.

    Args:
      arms: the methods.
      reference: whose loss is subtracted, seed by seed.
      kind: the protocol that is shown, "tokens" for one.
    """
    figure, axes = _figure()
    trained = set()
    for arm in arms:
        points = []
        for protocol in arm.protocols:
            name, length = summary.kind_and_length(protocol)
            mean, error = summary.gap(arm, reference, protocol)
            if name == kind and math.isfinite(mean):
                points.append((float(length), mean, 0 if math.isnan(error) else error))
        if points:
            lengths, means, errors = zip(*sorted(points), strict=True)
            trained |= set(lengths)
            axes.errorbar(
                lengths, means, yerr=errors, label=arm.name, **style(arm.index)
            )
    axes.set_xscale("log")
    axes.set_xticks(sorted(trained), [f"{length:g}" for length in sorted(trained)])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("tokens per parameter of the dense model")
    # In one line a long name is wider than the figure is high.
    axes.set_ylabel(f"nats per token, held out,\nless those of {reference.name}")
    _legend(axes)
    return figure


def memory(arms: Sequence[summary.Arm], protocol: str) -> Figure:
    """Returns losses over the bytes of parameters, gradients and optimizer state."""
    figure, axes = _figure()
    for arm in arms:
        if math.isfinite(arm.mean(protocol)):
            look = style(arm.index) | {"linestyle": "none"}
            axes.errorbar(
                arm.rows(protocol)[0]["train_bytes"] / 1e6,
                arm.mean(protocol),
                yerr=arm.deviation(protocol) if arm.num_seeds(protocol) > 1 else None,
                markersize=8,
                label=arm.name,
                **look,
            )
    axes.set_xlabel("parameters, gradients and optimizer state, MB")
    axes.set_ylabel("held-out loss, nats per token")
    axes.grid(alpha=0.3)
    _legend(axes)
    return figure


def update_norms(arms: Sequence[summary.Arm], protocol: str) -> Figure:
    """Returns the largest ||W' - W||_2 over the first seed's run, spikes marked."""
    figure, axes = _figure()
    for arm in arms:
        row = arm.rows(protocol)[0]
        points = [p for p in row["update_norms"] if p[1]]
        if not points:
            continue
        steps, norms = np.array(points).T
        look = style(arm.index)
        axes.plot(steps, norms, label=arm.name, **(look | {"marker": ""}))
        spikes = row["spikes"] or []
        at = np.interp(spikes, steps, norms)
        axes.plot(spikes, at, "x", color=look["color"], markersize=9, mew=2)
    axes.set_yscale("log")
    axes.set_xlabel("step (crosses: loss spikes)")
    axes.set_ylabel("largest ||W' - W||, spectral norm")
    _legend(axes)
    return figure


def effective_ranks(arms: Sequence[summary.Arm], protocol: str) -> Figure:
    """Returns the effective rank over the run, as a share of that of the start.

    Mean of all kinds of matrices. Shares, as a dense matrix has several times the rank
    of factors, beside which nothing could be seen of these.
    """
    figure, axes = _figure()
    for arm in arms:
        kinds = list(arm.rows(protocol)[0]["effective_ranks"].values())
        if not kinds:
            continue
        steps = [point[0] for point in kinds[0]]
        ranks = np.array([[point[1] for point in kind] for kind in kinds])
        shares = np.mean(ranks / ranks[:, :1], axis=0)
        axes.plot(steps, shares, label=arm.name, **style(arm.index))
    axes.set_xlabel("step")
    axes.set_ylabel("effective rank, share of the start's")
    _legend(axes)
    return figure


def spectra(arms: Sequence[summary.Arm], protocol: str, matrix: str = "down") -> Figure:
    """Returns the final singular values of one kind of matrix, mean of layers."""
    figure, axes = _figure()
    for arm in arms:
        values = arm.rows(protocol)[0]["spectra"].get(matrix, ())
        if not len(values):
            continue
        look = style(arm.index) | {"marker": ""}
        axes.plot(np.arange(1, len(values) + 1), values, label=arm.name, **look)
    axes.set_yscale("log")
    axes.set_xlabel(f"index of the singular value ({matrix}, first seed)")
    axes.set_ylabel("singular value at the end, mean of layers")
    _legend(axes)
    return figure


def iso_flop(kinds: Mapping[str, Sequence[power_laws.Run]]) -> Figure:
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
    panels[0][0].set_ylabel("held-out loss, nats per token")
    panels[0][-1].legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=11
    )
    return figure


def best_sizes(optima: Mapping[str, Sequence[power_laws.Optimum]]) -> Figure:
    """Returns the loss of the best size over the FLOPs, a line per kind."""
    figure, axes = _figure()
    for index, (kind, found) in enumerate(optima.items()):
        flops = [best.flops for best in found]
        axes.plot(flops, [best.loss for best in found], label=kind, **style(index))
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs, head included")
    axes.set_ylabel("held-out loss of the best size,\nnats per token")
    _legend(axes)
    return figure


def _figure() -> tuple[Figure, Any]:
    figure, axes = plt.subplots(layout="constrained")
    _plain(axes)
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
    """Outside of the axes, where it covers no data."""
    legend = axes.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=11
    )
    names = [text.get_text() for text in legend.get_texts()]
    _make_room(axes, names, line=0.25, least=4.8)


def _make_room(axes, names: Sequence[str], *, line: float, least: float = 0) -> None:
    """Makes the figure so large that names beside the axes take nothing from them.

    Args:
      axes: of the figure.
      names: one below the other.
      line: height of one, in inches.
      least: height of the figure, in inches, at the least.
    """
    width = 6.5 + 0.085 * max(map(len, names), default=0)
    axes.figure.set_size_inches(width, max(least, 1.2 + line * len(names)))


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"
