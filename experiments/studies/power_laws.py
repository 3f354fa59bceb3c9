"""Power laws of the best size and length of training, from losses at equal FLOPs."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class SizeResult(NamedTuple):
    """A finished run: compute C, parameters N, tokens D, held-out loss, and seed."""

    flops: float
    parameters: float
    tokens: float
    loss: float
    seed: int = 0


class Optimum(NamedTuple):
    """Minimum of a budget's parabola; `inside` if among the trained sizes."""

    flops: float
    parameters: float
    tokens: float
    loss: float
    inside: bool


class Law(NamedTuple):
    """Exponents of N ~ C^a and D ~ C^b, with the optima that they fit."""

    a: float
    b: float
    optima: list[Optimum]


def optimum(runs: Sequence[SizeResult]) -> Optimum | None:
    """Returns the minimum of the parabola through runs of one budget.

    Fits the loss as a quadratic of log N. None if it opens downwards, or below three
    sizes. Tokens at the optimum are interpolated in log N, because C / (N D) is not
    constant when C includes the head.
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


def log_sizes(runs: Sequence[SizeResult]) -> np.ndarray:
    """Returns log N of every run."""
    return np.log([run.parameters for run in runs])


def has_parabola(runs: Sequence[SizeResult]) -> bool:
    """Returns whether runs have the three sizes that a parabola needs."""
    return len({run.parameters for run in runs}) >= 3


def parabola(runs: Sequence[SizeResult]) -> np.polynomial.Polynomial:
    """Returns the least-squares quadratic in log N of the losses.

    The fit includes one offset per seed; the offsets sum to zero. If some sizes lack a
    seed, its offset therefore does not bias the slope.
    """
    return _least_squares(runs)[0]


def _least_squares(
    runs: Sequence[SizeResult],
) -> tuple[np.polynomial.Polynomial, np.ndarray, int]:
    """The parabola, the fitted loss of every run, and the degrees of freedom."""
    sizes = log_sizes(runs)
    basis = np.polynomial.Polynomial([0.0, 1.0], domain=[sizes.min(), sizes.max()])
    scaled = basis(sizes)
    seeds = sorted({run.seed for run in runs})
    own = np.array([[run.seed == seed for seed in seeds] for run in runs], float)
    offsets = own[:, :-1] - own[:, -1:]
    design = np.column_stack([np.vander(scaled, 3, increasing=True), offsets])
    losses = np.array([run.loss for run in runs])
    found, *_ = np.linalg.lstsq(design, losses, rcond=None)
    curve = np.polynomial.Polynomial(found[:3], domain=basis.domain)
    return curve, design @ found, len(runs) - design.shape[1]


def fit(runs: Sequence[SizeResult]) -> Law | None:
    """Returns the power laws through the optima inside the trained sizes.

    None below two of them. Runs share a budget if their FLOPs agree to 2 %.
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


class Intervals(NamedTuple):
    """Intervals of the exponents of a law; NaN where there are none.

    Attributes:
      a: of N ~ C^a, low and high.
      b: of D ~ C^b.
      whole: share of samples with an optimum for every budget of the law. The others
        count too if they have a law, fitted to fewer budgets.
    """

    a: tuple[float, float]
    b: tuple[float, float]
    whole: float


def bootstrap(
    runs: Sequence[SizeResult],
    *,
    samples: int = 1000,
    level: float = 0.9,
    seed: int = 0,
) -> Intervals:
    """Returns bootstrapped intervals of the exponents at a level.

    The bootstrap is parametric: noise has the variance of all residuals, with the tails
    of Student's t because few degrees of freedom remain. Samples without a law and
    budgets without a parabola are dropped. NaN without degrees of freedom.
    """
    generator = np.random.default_rng(seed)
    groups = [group for group in by_budget(runs) if has_parabola(group)]
    ordered = [run for group in groups for run in group]
    fits = [_least_squares(group) for group in groups]
    fitted = np.concatenate([np.zeros(0), *(values for _, values, _ in fits)])
    residuals = np.array([run.loss for run in ordered]) - fitted
    freedom = sum(free for _, _, free in fits)
    found = fit(runs)
    laws: list[Law] = []
    sigma = math.sqrt(np.square(residuals).sum() / freedom) if freedom > 0 else math.nan
    for _ in range(samples if freedom > 0 else 0):
        # One variance per sample, because one was estimated for all runs.
        scale = sigma * math.sqrt(freedom / generator.chisquare(freedom))
        losses = fitted + scale * generator.standard_normal(len(fitted))
        noisy = [
            run._replace(loss=float(loss))
            for run, loss in zip(ordered, losses, strict=True)
        ]
        law = fit(noisy)
        if law is not None:
            laws.append(law)
    if found is None or not laws:
        return Intervals((math.nan, math.nan), (math.nan, math.nan), math.nan)
    tail = 50 * (1 - level)
    ends = np.percentile([(law.a, law.b) for law in laws], [tail, 100 - tail], axis=0)
    (low_a, low_b), (high_a, high_b) = ends.tolist()
    whole = sum(len(law.optima) >= len(found.optima) for law in laws) / samples
    return Intervals((low_a, high_a), (low_b, high_b), whole)


def by_budget(runs: Sequence[SizeResult]) -> list[list[SizeResult]]:
    """Returns runs in groups of equal FLOPs, to 2 %, ascending."""
    groups: list[list[SizeResult]] = []
    for run in sorted(runs, key=lambda run: run.flops):
        if groups and run.flops <= 1.02 * groups[-1][0].flops:
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups
