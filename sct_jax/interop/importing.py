"""Checkpoints of Hugging Face's Llama family as parameters, dense or truncated.

One tensor at a time: beside the result, memory holds a few copies of one matrix.
"""

import dataclasses
import itertools
import math
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sct_jax import compression, errors, model, spectral
from sct_jax.interop import names
from sct_jax.interop import source as source_lib


class Rule(NamedTuple):
    """How the rank of a matrix is found; exactly one field is set.

    Attributes:
      rank: R, clamped to min(fan_in, fan_out).
      rank_ratio: R as a fraction of fan_in, clamped to 1..min(fan_in, fan_out).
      energy: fraction of the sum of s^2 to keep. All layers get the largest rank that
        any of them needs, so that they stack.
    """

    rank: int | None = None
    rank_ratio: float | None = None
    energy: float | None = None

    def validate(self, where: str) -> None:
        """Raises UserError, naming the setting after the prefix `where`."""
        given = [name for name in self._fields if getattr(self, name) is not None]
        errors.check(
            f"{where}rank",
            len(given) == 1,
            f"set one of {', '.join(self._fields)}, not "
            f"{' and '.join(given) or 'none of them'}",
        )
        errors.check_bounds(where, self, "rank", least=1)
        errors.check_bounds(where, self, "rank_ratio", above=0, most=2**20)
        errors.check_bounds(where, self, "energy", above=0, most=1)

    def wanted(self, fan_in: int) -> int | None:
        """Returns the rank before it is clamped; None if the energy decides."""
        if self.rank_ratio is not None:
            return max(1, int(self.rank_ratio * fan_in))
        return self.rank


@dataclasses.dataclass(frozen=True)
class Truncation:
    """What became of one kind of matrix.

    Attributes:
      name: of the matrix.
      shape: (fan_in, fan_out).
      rank: of all its layers.
      errors: ||W - W'|| / ||W|| in Frobenius norm, per layer; with text, that of the
        outputs on it, ||y W - x W'|| / ||y W|| for inputs y in the checkpoint and x in
        the truncated model so far.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    errors: tuple[float, ...]

    @property
    def energies(self) -> tuple[float, ...]:
        """Fraction of the squared norm that was kept, per layer."""
        return tuple(1 - error**2 for error in self.errors)


class Imported(NamedTuple):
    """A model.

    Attributes:
      config: with the ranks that were found.
      params: on the host, with a tuple of layers.
      truncations: one per matrix that has factors.
      notes: a sentence for every rank that was clamped.
    """

    config: model.ModelConfig
    params: model.Params
    truncations: list[Truncation]
    notes: list[str]


def load(
    source: source_lib.Source,
    rules: Mapping[str, Rule],
    *,
    scan_layers: bool = False,
    text: compression.Text | None = None,
    budget: float | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Imported:
    """Returns the parameters of a checkpoint, in float32.

    Args:
      source: the checkpoint.
      rules: for the matrices that get factors; the others stay dense.
      scan_layers: layout that the configuration asks for. The parameters have separate
        layers in both cases.
      text: see `compression.truncate`; memory then holds one dense layer, and the
        residual streams before it.
      budget: fraction of the dense parameters that the factors may use. Ranks are then
        allocated by energy, and `rules` only name the matrices.
      log: receives a line per layer.

    Raises:
      UserError: see `Source.read`, and for a rule or a budget that does not fit.
    """
    shapes = source.config.matrix_shapes()
    for name, rule in rules.items():
        errors.check_choice("--matrices", name, model.MATRICES)
        errors.check(
            f"matrix {name!r}",
            name in shapes,
            "the head of this model is its transposed embedding; leave it out",
        )
        if budget is None:
            rule.validate("")
    if budget is None:
        ranks, notes = _ranks(source, rules, text=text, log=log)
    else:
        ranks = _allocated(source, tuple(rules), budget, text=text, log=log)
        notes = []
    config = _with_ranks(source.config, ranks, scan_layers=scan_layers)
    reader = _Reader(source, ranks)
    ends = (t for t in names.tensors(source.config) if t.layer is None)
    params: model.Params = reader.read(ends)
    inputs = None
    if text is not None:
        truncated = params["embedding"] if "embedding" in ranks else None
        inputs = _inputs(source, text, truncated=truncated)
    layers = []
    for index, tensors in enumerate(_tensors_of_layers(source.config)):
        log(f"layer {index + 1} of {config.num_layers}")
        layers.append(
            reader.read(tensors)
            if inputs is None
            else reader.read_layer(tensors, inputs)
        )
    params[model.LAYERS] = tuple(layers)
    truncations = [
        Truncation(name, shapes[name], ranks[name], tuple(reader.errors[name]))
        for name in ranks
    ]
    return Imported(config, params, truncations, notes)


class _Reader:
    """Reads matrices of some ranks as factors, and keeps their relative errors."""

    def __init__(self, source: source_lib.Source, ranks: Mapping[str, int]):
        self._source = source
        self._ranks = ranks
        self.errors: dict[str, list[float]] = {name: [] for name in ranks}

    def read(self, tensors: Iterable[names.Tensor]) -> model.Params:
        """Returns tensors by key, after plain truncation, one after the other."""
        params = {}
        for tensor in tensors:
            w = self._source.read(tensor)
            chosen = tensor.key in self._ranks
            params[tensor.key] = self._truncate(tensor, w, w, None) if chosen else w
        return params

    def read_layer(
        self, tensors: Iterable[names.Tensor], inputs: compression.Inputs
    ) -> model.Params:
        """Returns the tensors of a layer by key, and moves the text past it."""
        of = {tensor.key: tensor for tensor in tensors}
        dense = {key: self._source.read(tensor) for key, tensor in of.items()}

        def replace(key, wanted, moments):
            return self._truncate(of[key], dense[key], np.asarray(wanted), moments)

        chosen = [key for key in dense if key in self._ranks]
        return compression.truncate_layer(dense, chosen, replace, inputs=inputs)

    def _truncate(
        self,
        tensor: names.Tensor,
        original: Float[np.ndarray, "I O"],
        wanted: Float[np.ndarray, "I O"],
        moments: compression.Moments | None,
    ) -> spectral.SpectralFactors:
        rank = self._ranks[tensor.key]
        factors = _truncate(wanted, rank, tensor.name, moments)
        self.errors[tensor.key].append(_relative_error(original, factors, moments))
        return factors


def _tensors_of_layers(config: model.ModelConfig) -> Iterator[list[names.Tensor]]:
    in_layers = (t for t in names.tensors(config) if t.layer is not None)
    for _, tensors in itertools.groupby(in_layers, key=lambda t: t.layer):
        yield list(tensors)


def _inputs(
    source: source_lib.Source,
    text: compression.Text,
    *,
    truncated: spectral.SpectralFactors | None = None,
) -> compression.Inputs:
    """The text before the first layer, of the checkpoint and with another embedding."""
    dense = jnp.asarray(source.read(next(names.tensors(source.config))))
    if truncated is None:
        return compression.Inputs(dense, text, source.config)
    return compression.Inputs(truncated, text, source.config, original=dense)


def _matrices(
    source: source_lib.Source,
    wanted: Collection[str],
    *,
    text: compression.Text | None,
    log: Callable[[str], None],
) -> Iterator[compression.Matrix]:
    """Every wanted matrix of the layers, and the second moment of its inputs."""

    def layers() -> Iterator[model.Params]:
        for index, tensors in enumerate(_tensors_of_layers(source.config)):
            log(f"singular values of layer {index + 1} of {source.config.num_layers}")
            yield {
                t.key: source.read(t)
                for t in tensors
                if text is not None or t.key in wanted
            }

    inputs = None if text is None else _inputs(source, text)
    return compression.matrices_of(layers(), wanted, inputs=inputs)


def _ranks(
    source: source_lib.Source,
    rules: Mapping[str, Rule],
    *,
    text: compression.Text | None,
    log: Callable[[str], None],
) -> tuple[dict[str, int], list[str]]:
    """The rank of every matrix with factors, and a note for each that was clamped."""
    ranks: dict[str, int] = {}
    notes = []
    for name in filter(rules.__contains__, model.MATRICES):
        shape = source.config.matrix_shapes()[name]
        wanted = rules[name].wanted(shape[0])
        if wanted is None:
            ranks[name] = 1  # the least
            continue
        ranks[name] = min(wanted, *shape)
        if ranks[name] != wanted:
            notes.append(
                f"{name}: rank {wanted} is clamped to {ranks[name]}, as the matrix is "
                f"{shape[0]} x {shape[1]}"
            )
    by_energy = {n: rule.energy for n, rule in rules.items() if rule.energy is not None}
    if by_energy.keys() & set(model.BLOCK_MATRICES):
        in_layers = [name for name in by_energy if name in model.BLOCK_MATRICES]
        for name, weight, moment in _matrices(source, in_layers, text=text, log=log):
            s = _singular_values(np.asarray(weight), moment)
            needed = int(spectral.energy_rank(jnp.asarray(s), by_energy[name]))
            ranks[name] = max(ranks[name], needed)
    for tensor in names.tensors(source.config):
        if tensor.layer is None and tensor.key in by_energy:
            log(f"singular values of {tensor.name}")
            s = _singular_values(source.read(tensor), None)
            needed = int(spectral.energy_rank(jnp.asarray(s), by_energy[tensor.key]))
            ranks[tensor.key] = max(ranks[tensor.key], needed)
    return ranks, notes


def _allocated(
    source: source_lib.Source,
    wanted: Sequence[str],
    budget: float,
    *,
    text: compression.Text | None,
    log: Callable[[str], None],
) -> dict[str, int]:
    """The ranks that keep the most energy within a part of the dense parameters."""
    config, shapes = source.config, source.config.matrix_shapes()
    outside = sorted(set(wanted) - set(model.BLOCK_MATRICES))
    errors.check(
        "--budget",
        not outside,
        f"is shared by matrices of the layers alone, without {', '.join(outside)}",
    )
    dense = config.num_layers * sum(math.prod(shapes[name]) for name in wanted)
    matrices = _matrices(source, wanted, text=text, log=log)
    with jax.default_device(jax.devices("cpu")[0]):
        found = compression.spectra(
            ((name, jnp.asarray(w), moment) for name, w, moment in matrices), config
        )
    return compression.allocate(found, budget=int(budget * dense), field="--budget")


def _with_ranks(
    config: model.ModelConfig, ranks: Mapping[str, int], *, scan_layers: bool
) -> model.ModelConfig:
    changes = {"spectral": tuple(ranks), "scan_layers": scan_layers}
    if len(set(ranks.values())) == 1:
        changes["rank"] = next(iter(ranks.values()))
    elif ranks:
        changes["ranks"] = model.MatrixRanks(**ranks)
    config = dataclasses.replace(config, **changes)
    config.validate()
    return config


# --- On the processor, whatever else there is: a decomposition gains little elsewhere.


def _singular_values(
    weight: Float[np.ndarray, "I O"], moment: Float[Array, "I I"] | None
) -> Float[np.ndarray, " K"]:
    with jax.default_device(jax.devices("cpu")[0]):
        values = spectral.singular_values(jnp.asarray(weight), second_moment=moment)
    return np.asarray(values)


def _truncate(
    weight: Float[np.ndarray, "I O"],
    rank: int,
    name: str,
    moments: compression.Moments | None,
) -> spectral.SpectralFactors:
    moment = None if moments is None else moments.inputs
    with jax.default_device(jax.devices("cpu")[0]):
        factors = spectral.from_dense(
            jnp.asarray(weight), rank=rank, second_moment=moment
        )
    errors.check(
        name,
        all(bool(np.isfinite(x).all()) for x in factors),
        "its singular value decomposition does not converge; leave it dense",
    )
    return factors


def _relative_error(
    weight: Float[np.ndarray, "I O"],
    factors: spectral.SpectralFactors,
    moments: compression.Moments | None,
) -> float:
    """Of the factors in place of a matrix of the checkpoint, see `Truncation`."""
    u, s, v = map(np.asarray, factors)
    change = (u * s) @ v.T
    np.subtract(change, weight, out=change)
    if moments is None:
        norm = float(np.linalg.norm(weight))
        return float(np.linalg.norm(change)) / norm if norm else 0.0
    inputs, cross, originals = map(np.asarray, moments)
    # x (W + C) - y W = x C + (x - y) W, whose terms stay small where x and y are close.
    shift = inputs - cross
    square = np.vdot(change, inputs @ change + 2 * (shift @ weight))
    square += np.vdot(weight, (shift - cross.T + originals) @ weight)
    norm = float(np.vdot(weight, originals @ weight))
    return (max(float(square), 0.0) / norm) ** 0.5 if norm > 0 else 0.0
