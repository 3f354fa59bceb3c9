"""What a trial records of its run: curves, loss spikes, norms, singular values."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.studies import forward_variants, rows
from sct_jax import linalg, model, spectral
from sct_jax.training import step as step_lib

DIAGNOSE_EVERY = 10  # steps between measured norms of updates
CURVE_SAMPLES = 64  # at most, per curve of a row
KEPT_SPECTRA = ("down",)  # kinds of matrices; the others have an effective rank only
SPIKE_WINDOW = 100  # trailing steps, at most, that define trend and deviation
SPIKE_DEVIATIONS = 4.0
_MIN_WINDOW = 50  # trailing steps below which no finite loss is a spike
_NUM_SPECTRA = 5  # measurements of the singular values, spread over the run


class Record:
    """The curves of a trial's longest branch.

    Attributes:
      is_linear: whether weights multiply by a W that has a norm and singular values.
      losses: training loss of every step.
      update_norms: largest ||W' - W||_2 of single steps.
      ranks: stored ranks after each decision of an adaptive rank.
      switches: truncations between phases, of all branches.
    """

    def __init__(self, num_steps: int, *, is_linear: bool):
        """Starts empty.

        Args:
          num_steps: planned length of the run.
          is_linear: see the attribute.
        """
        self.is_linear = is_linear
        self._num_steps = num_steps
        self._measured_at = {
            round(num_steps * i / (_NUM_SPECTRA - 1)) for i in range(_NUM_SPECTRA)
        }
        self.losses: list[float] = []
        self.update_norms: list[rows.Sample] = []
        self.ranks: list[tuple[int, dict[str, int]]] = []
        self.switches: list[rows.Switch] = []
        self._effective_ranks: dict[str, list[rows.Sample]] = {}
        self._spectra: dict[str, list[float]] = {}

    def measure(self, step: int, params: model.Params) -> None:
        """Takes the singular values, where this step is one of the few to measure."""
        if step not in self._measured_at or not self.is_linear:
            return
        if not optax.tree.norm(params) < math.inf:
            return  # a diverged model has no decomposition
        for name, spectrum in spectra(params).items():
            samples = self._effective_ranks.setdefault(name, [])
            samples.append(rows.Sample(step, round(effective_rank(spectrum), 2)))
            if name in KEPT_SPECTRA:
                self._spectra[name] = [float(f"{x:.5g}") for x in spectrum]

    def fields(self) -> dict[str, Any]:
        """Returns the fields of a row."""
        # All rows of a method have samples at the same steps, diverged ones too.
        thinned = math.ceil(self._num_steps / (DIAGNOSE_EVERY * CURVE_SAMPLES))
        norms = self.update_norms
        groups = [norms[i : i + thinned] for i in range(0, len(norms), thinned)]
        return {
            "spikes": spikes(self.losses),
            "train_loss": _means(self.losses, thinned * DIAGNOSE_EVERY),
            "update_norms": [
                rows.Sample(group[-1].step, float(np.max([s.value for s in group])))
                for group in groups
            ],
            "effective_ranks": self._effective_ranks,
            "spectra": self._spectra,
            "ranks": self.ranks,
            "switches": self.switches,
        }


def _means(losses: Sequence[float], n: int) -> list[rows.Sample]:
    """Means of n consecutive steps, each with its last step."""
    return [
        rows.Sample(stop, float(np.mean(losses[stop - n : stop])))
        for stop in range(n, len(losses) + 1, n)
    ]


def spikes(losses: Sequence[float]) -> list[int]:
    """Returns the steps whose loss exceeds the trailing trend by four deviations.

    The trend is a line in the logarithm of the step, because the mean of a falling loss
    would hide its spikes. Consecutive high steps are one spike, and stay out of the
    trailing window.
    """
    found, calm, inside = [], [], False
    for step, loss in enumerate(losses, 1):
        before = calm[-SPIKE_WINDOW:]
        if len(before) < _MIN_WINDOW:
            high = not math.isfinite(loss)
        else:
            at, values = np.transpose(before)
            line = np.polynomial.Polynomial.fit(np.log(at), values, deg=1)
            sigma = np.std(values - line(np.log(at)), ddof=2)
            high = not loss <= line(math.log(step)) + SPIKE_DEVIATIONS * sigma
        if high and not inside:
            found.append(step)
        inside = high
        if not high:
            calm.append((step, loss))
    return found


def diagnose(old: Any, new: Any) -> step_lib.Metrics:
    """Returns `step.diagnose` with dense matrices in `composite_update_norm`."""
    found = step_lib.diagnose(old, new)
    of_factors = found.get("composite_update_norm", 0.0)
    largest = jnp.maximum(of_factors, dense_update_norm(old, new))
    return found | {"composite_update_norm": largest}


def dense_update_norm(old: model.Params, new: model.Params) -> jax.Array:
    """Returns the largest ||W' - W||_2 of the dense matrices of the layers, or 0."""
    largest = jnp.zeros([])
    pairs = [
        (before[name], after[name])
        for before, after in zip(blocks(old), blocks(new), strict=True)
        for name in model.BLOCK_MATRICES
    ]
    for before, after in pairs:
        if not isinstance(before, jax.Array):
            continue
        change = (after - before).reshape(-1, *before.shape[-2:])
        if change.shape[-2] < change.shape[-1]:
            change = linalg.transpose(change)
        radius = linalg.spectral_radius_bound(linalg.gram(change), squarings=8)
        largest = jnp.maximum(largest, jnp.sqrt(jnp.max(radius)))
    return largest


def blocks(params: model.Params) -> Sequence[model.Params]:
    """Returns the layers as stored: one stacked tree, or a tree per layer."""
    layers = params["layers"]
    return layers if isinstance(layers, tuple) else (layers,)


def spectra(params: model.Params) -> dict[str, np.ndarray]:
    """Returns descending singular values by kind of matrix, averaged over layers.

    For analysis: a dense matrix costs its full decomposition.
    """
    found = {}
    for name in model.BLOCK_MATRICES:
        values = [np.atleast_2d(_singular_values(b[name])) for b in blocks(params)]
        shortest = min(each.shape[-1] for each in values)
        joined = np.concatenate([each[:, :shortest] for each in values])
        found[name] = np.mean(joined, axis=0)
    return found


def _singular_values(w: Any) -> np.ndarray:
    if isinstance(w, forward_variants.Guided):
        w = w.factors
    if spectral.is_blocks(w):
        w = spectral.to_dense(w)
    if isinstance(w, spectral.SpectralFactors):
        # Without a retraction u and v need not be orthonormal.
        w = spectral.to_low_rank(w)
    if isinstance(w, spectral.LowRankFactors):
        # W = Q_a (R_a R_b.T) Q_b.T has the singular values of its core.
        cores = [np.linalg.qr(np.asarray(x), mode="r") for x in (w.a, w.b)]
        w = cores[0] @ np.swapaxes(cores[1], -1, -2)
    return np.linalg.svd(np.asarray(w), compute_uv=False)


def effective_rank(spectrum: np.ndarray) -> float:
    """Returns exp of the entropy of the singular values, as shares of their sum.

    References:
      Roy and Vetterli, The effective rank, EUSIPCO 2007
    """
    shares = spectrum / max(float(spectrum.sum()), 1e-30)
    shares = shares[shares > 0]
    return float(np.exp(-np.sum(shares * np.log(shares))))
