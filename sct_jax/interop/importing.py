"""Checkpoints of Hugging Face's Llama family as parameters, dense or truncated.

One tensor at a time: beside the result, memory holds a few copies of one matrix.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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
        errors.check_bounds(where, self, "rank_ratio", above=0)
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
      errors: ||W - W'|| / ||W|| in Frobenius norm, per layer; where text decided, that
        of the outputs on it.
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
      text: where the matrices of the layers are approximated, see
        `compression.truncate`, layer after layer; memory then holds one dense layer,
        and what the text is in front of it.
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
    found: dict[str, list[float]] = {name: [] for name in ranks}

    def replace(titles, key, weight, moment):
        factors, error = _truncate(np.asarray(weight), ranks[key], titles[key], moment)
        found[key].append(error)
        return factors

    def read_one_by_one(tensors, replace):
        read = {}
        for tensor in tensors:
            weight = source.read(tensor)
            if tensor.key in ranks:
                weight = replace(tensor.key, weight, None)
            read[tensor.key] = weight
        return read

    def of(tensors):
        return functools.partial(replace, {t.key: t.name for t in tensors})

    layers = []
    inputs = None if text is None else _inputs(source, text)
    for index, tensors in enumerate(_tensors_of_layers(source.config)):
        log(f"layer {index + 1} of {config.num_layers}")
        if inputs is None:
            layers.append(read_one_by_one(tensors, of(tensors)))
            continue
        dense = {t.key: source.read(t) for t in tensors}
        chosen = [key for key in dense if key in ranks]
        layers.append(
            compression.truncate_layer(dense, chosen, of(tensors), inputs=inputs)
        )
    ends = [t for t in names.tensors(source.config) if t.layer is None]
    params: model.Params = read_one_by_one(ends, of(ends))
    params[model.LAYERS] = tuple(layers)
    truncations = [
        Truncation(name, shapes[name], ranks[name], tuple(found[name]))
        for name in ranks
    ]
    return Imported(config, params, truncations, notes)


def _tensors_of_layers(config: model.ModelConfig) -> Iterator[list[names.Tensor]]:
    in_layers = (t for t in names.tensors(config) if t.layer is not None)
    for _, tensors in itertools.groupby(in_layers, key=lambda t: t.layer):
        yield list(tensors)


def _inputs(source: source_lib.Source, text: compression.Text) -> compression.Inputs:
    """The text before the first layer."""
    embedding = next(names.tensors(source.config))
    ends = {embedding.key: source.read(embedding)}
    return compression.Inputs(ends, text, source.config)


def _dense_layers(
    source: source_lib.Source,
    wanted: Collection[str],
    *,
    text: compression.Text | None,
    log: Callable[[str], None],
) -> Iterator[tuple[names.Tensor, Float[np.ndarray, "I O"], Any]]:
    """Every wanted matrix of the layers, and the second moment of its inputs."""
    inputs = None if text is None else _inputs(source, text)
    for tensors in _tensors_of_layers(source.config):
        moments = {}
        if inputs is None:
            read = {t.key: source.read(t) for t in tensors if t.key in wanted}
        else:
            read = {t.key: source.read(t) for t in tensors}
            moments = inputs.second_moments(read)
            inputs.advance(read)
        for tensor in tensors:
            if tensor.key in wanted:
                log(f"singular values of {tensor.name}")
                yield tensor, read[tensor.key], moments.get(tensor.key)


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
        for tensor, weight, moment in _dense_layers(
            source, by_energy, text=text, log=log
        ):
            s = _singular_values(weight, moment)
            needed = int(spectral.energy_rank(jnp.asarray(s), by_energy[tensor.key]))
            ranks[tensor.key] = max(ranks[tensor.key], needed)
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
    layers = _dense_layers(source, wanted, text=text, log=log)
    with jax.default_device(jax.devices("cpu")[0]):
        found = compression.spectra(
            ((t.key, jnp.asarray(w), m) for t, w, m in layers), config
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
    moment: Float[Array, "I I"] | None,
) -> tuple[spectral.SpectralFactors, float]:
    """The factors, and the relative error of the matrix, or of its outputs."""
    with jax.default_device(jax.devices("cpu")[0]):
        factors = spectral.from_dense(
            jnp.asarray(weight), rank=rank, second_moment=moment
        )
    u, s, v = map(np.asarray, factors)
    errors.check(
        name,
        all(bool(np.isfinite(x).all()) for x in (u, s, v)),
        "its singular value decomposition does not converge; leave it dense",
    )
    residual = (u * s) @ v.T
    np.subtract(weight, residual, out=residual)
    norm = _norm(weight, moment)
    return factors, _norm(residual, moment) / norm if norm else 0.0


def _norm(
    weight: Float[np.ndarray, "I O"], moment: Float[Array, "I I"] | None
) -> float:
    """The Frobenius norm, or the root of the mean square of outputs."""
    if moment is None:
        return float(np.linalg.norm(weight))
    return max(float(np.vdot(weight, np.asarray(moment) @ weight)), 0.0) ** 0.5
