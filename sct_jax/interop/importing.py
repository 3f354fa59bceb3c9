"""Checkpoints of Hugging Face's Llama family as parameters, dense or truncated.

One tensor at a time: beside the result, memory holds a few copies of one matrix.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sct_jax import errors, model, spectral
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
      errors: ||W - W'|| / ||W|| in Frobenius norm, per layer.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    errors: tuple[float, ...]

    @property
    def energies(self) -> tuple[float, ...]:
        """Fraction of the sum of s^2 that was kept, per layer."""
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
    log: Callable[[str], None] = lambda line: None,
) -> Imported:
    """Returns the parameters of a checkpoint, in float32.

    Args:
      source: the checkpoint.
      rules: for the matrices that get factors; the others stay dense.
      scan_layers: layout that the configuration asks for. The parameters have separate
        layers in both cases.
      log: receives a line per layer.

    Raises:
      UserError: see `Source.read`, and for a rule that does not fit.
    """
    shapes = source.config.matrix_shapes()
    for name, rule in rules.items():
        errors.check_choice("--matrices", name, model.MATRICES)
        errors.check(
            f"matrix {name!r}",
            name in shapes,
            "the head of this model is its transposed embedding; leave it out",
        )
        rule.validate("")
    ranks, notes = _ranks(source, rules, log=log)
    config = _with_ranks(source.config, ranks, scan_layers=scan_layers)
    found: dict[str, list[float]] = {name: [] for name in ranks}
    blocks: list[model.Params] = [{} for _ in range(config.num_layers)]
    params: model.Params = {model.LAYERS: tuple(blocks)}
    for tensor in names.tensors(source.config):
        weight = source.read(tensor)
        _log_layer(tensor, config, log)
        if tensor.key in ranks:
            weight, error = _truncate(weight, ranks[tensor.key], tensor.name)
            found[tensor.key].append(error)
        (params if tensor.layer is None else blocks[tensor.layer])[tensor.key] = weight
    truncations = [
        Truncation(name, shapes[name], ranks[name], tuple(found[name]))
        for name in ranks
    ]
    return Imported(config, params, truncations, notes)


def _log_layer(
    tensor: names.Tensor, config: model.ModelConfig, log: Callable[[str], None]
) -> None:
    if tensor.layer is not None and tensor.key == next(iter(names.MODULES)):
        log(f"layer {tensor.layer + 1} of {config.num_layers}")


def _ranks(
    source: source_lib.Source,
    rules: Mapping[str, Rule],
    *,
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
    for tensor in names.tensors(source.config):
        energy = rules[tensor.key].energy if tensor.key in rules else None
        if energy is not None:
            log(f"singular values of {tensor.name}")
            needed = _energy_rank(source.read(tensor), energy)
            ranks[tensor.key] = max(ranks[tensor.key], needed)
    return ranks, notes


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


def _energy_rank(weight: Float[np.ndarray, "I O"], energy: float) -> int:
    with jax.default_device(jax.devices("cpu")[0]):
        s = jnp.linalg.svd(jnp.asarray(weight), compute_uv=False)
        return int(spectral.energy_rank(s, energy))


def _truncate(
    weight: Float[np.ndarray, "I O"], rank: int, name: str
) -> tuple[spectral.SpectralFactors, float]:
    """The factors, and their relative error."""
    with jax.default_device(jax.devices("cpu")[0]):
        factors = spectral.from_dense(jnp.asarray(weight), rank=rank)
    u, s, v = map(np.asarray, factors)
    errors.check(
        name,
        all(bool(np.isfinite(x).all()) for x in (u, s, v)),
        "its singular value decomposition does not converge; leave it dense",
    )
    residual = (u * s) @ v.T
    np.subtract(weight, residual, out=residual)
    norm = float(np.linalg.norm(weight))
    return factors, float(np.linalg.norm(residual)) / norm if norm else 0.0
