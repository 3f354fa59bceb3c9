"""Truncation of a trained model: its matrices become factors, or factors of less rank.

With text, the error of a matrix is weighted by its inputs: the error of its outputs is
the least that its rank allows. One layer is handled at a time.
"""

import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sct_jax import blocks as blocks_lib
from sct_jax import errors, linalg, model, sharding, spectral

SecondMoments = dict[str, Float[Array, "I I"]]  # by the name of a matrix of a layer

GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
"""The matrices of a layer in the order of computation, by the inputs that they read."""

_SWEEPS = 50  # of `blocks.from_dense`


class Text(NamedTuple):
    """Text to measure the inputs of matrices on.

    Attributes:
      tokens: ids, (B, L) per batch.
      segment_ids: of the documents, (B, L) per batch; None for one document per row.
    """

    tokens: Sequence[Int[Array, "B L"]]
    segment_ids: Sequence[Int[Array, "B L"]] | None = None


class Moments(NamedTuple):
    """Sums over the inputs x of a matrix, and the y that it had in the original model.

    Attributes:
      inputs: x.T x.
      cross: x.T y.
      originals: y.T y.
    """

    inputs: Float[Array, "I I"]
    cross: Float[Array, "I I"]
    originals: Float[Array, "I I"]


class Inputs:
    """The residual stream of some text before the layer that comes next.

    Attributes:
      streams: (B, L, D) per batch of text.
      originals: the same in the original model; the list `streams` itself until that
        model and the new one differ.
    """

    def __init__(
        self,
        embedding: spectral.Weight,
        text: Text,
        config: model.ModelConfig,
        *,
        original: spectral.Weight | None = None,
        linear: model.Linear = spectral.linear,
        placement: sharding.Placement = sharding.UNPLACED,
    ):
        """Puts the text in front of the first layer.

        Args:
          embedding: gives `streams`.
          text: what flows through the layers.
          config: architecture of the model.
          original: gives `originals`, if it is not `embedding`.
          linear: multiplies by every matrix.
          placement: where arrays are on a mesh; by default, XLA chooses.
        """
        # Each layer runs alone, so nothing is to be recomputed.
        config = dataclasses.replace(config, remat="none", attention="auto")
        self._segments = text.segment_ids or [None] * len(text.tokens)
        self._layer = functools.partial(
            _apply, config=config, linear=linear, placement=placement
        )
        self._moments = functools.partial(
            _moments, config=config, linear=linear, placement=placement
        )
        embed = jax.jit(
            functools.partial(model.embed, config=config, placement=placement)
        )
        streams_of = lambda w: [embed({"embedding": w}, x) for x in text.tokens]
        self.streams = streams_of(embedding)
        self.originals = self.streams if original is None else streams_of(original)
        self._rope = model.rotary_table(text.tokens[0].shape[1], config)
        self._index = 0  # of the layer

    def second_moments(self, layer: model.Params) -> SecondMoments:
        """Returns sums of x.T x over the inputs x of every matrix of a layer.

        Raises:
          UserError: where an input is not finite.
        """
        names = tuple(group[0] for group in GROUPS)
        found = self._sum(names, layer)
        return {n: x for g, (x,) in zip(GROUPS, found, strict=True) for n in g}

    def moments(
        self, layer: model.Params, original: model.Params, name: str
    ) -> Moments:
        """Returns the moments of the inputs of a matrix.

        Args:
          layer: gives x, past the layers of `streams`.
          original: gives y, past the layers of `originals`.
          name: of the matrix.

        Raises:
          UserError: where an input is not finite.
        """
        (found,) = self._sum((name,), layer, original)
        return Moments(*found)

    def _sum(self, names, layer, original=None) -> list[tuple[Array, ...]]:
        total: Any = None
        for stream, other, segments in zip(
            self.streams, self.originals, self._segments, strict=True
        ):
            pairs = [(layer, stream)]
            if original is not None:
                pairs.append((original, other))
            found = self._moments(pairs, self._rope, segments, names=names)
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        for name, finite in zip(names, np.asarray(_are_finite(total)), strict=True):
            errors.check(
                f"{name!r} of layer {self._index + 1}",
                bool(finite),
                "its inputs on this text are not finite; check text and model, or "
                'truncate without text (truncation.method = "plain"; no --text)',
            )
        return total

    def advance(
        self, layer: model.Params, original: model.Params | None = None
    ) -> None:
        """Moves `streams` past a layer, and `originals` past the original layer."""
        if original is None and self.originals is self.streams:
            self._pass(layer, self.streams)
        else:
            self.originals = list(self.originals)
            self._pass(layer, self.streams)
            self._pass(layer if original is None else original, self.originals)
        self._index += 1

    def _pass(self, layer: model.Params, streams: list[Array]) -> None:
        for index, segments in enumerate(self._segments):  # no second copy of them all
            streams[index] = self._layer(layer, streams[index], self._rope, segments)


_STATIC = ("config", "linear", "placement")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _apply(layer, stream, rope, segments, *, config, linear, placement):
    return model.block(
        layer,
        stream,
        rope,
        segments,
        config=config,
        linear=linear,
        placement=placement,
    )


@functools.partial(jax.jit, static_argnames=(*_STATIC, "names"))
def _moments(
    pairs, rope, segments, *, names, linear, **static
) -> list[tuple[Array, ...]]:
    """Sums over the inputs of some matrices, in one or two pairs of layer and stream.

    Of x in the first pair and y in the second: x.T x, and of two x.T y and y.T y.
    """

    def inputs_of(layer, stream) -> dict[str, Array]:
        found: list[Array] = []

        def observe(x: Array, w: spectral.Weight) -> Array:
            found.append(x.reshape(-1, x.shape[-1]).astype(jnp.float32))
            return linear(x, w)

        model.block(layer, stream, rope, segments, linear=observe, **static)
        return dict(zip(model.BLOCK_MATRICES, found, strict=True))

    seen = [inputs_of(layer, stream) for layer, stream in pairs]
    return [
        tuple(
            linalg.gram(x[name], y[name])
            for x, y in itertools.combinations_with_replacement(seen, 2)
        )
        for name in names
    ]


@jax.jit
def _are_finite(sums: list[tuple[Array, ...]]) -> Bool[Array, " N"]:
    finite = [[jnp.all(jnp.isfinite(x)) for x in found] for found in sums]
    return jnp.all(jnp.array(finite), axis=-1)


def truncate(
    params: model.Params,
    config: model.ModelConfig,
    wanted: model.ModelConfig,
    *,
    text: Text | None = None,
    sequential: bool = True,
    linear: model.Linear = spectral.linear,
    placement: sharding.Placement = sharding.UNPLACED,
) -> model.Params:
    """Returns parameters whose matrices have the ranks of another configuration.

    A matrix that is dense or has factors in both, of equal rank, stays as it is.

    Args:
      params: in either layout, which the result shares.
      config: of these parameters.
      wanted: the same shapes, with more factors or smaller ranks.
      text: the errors of the matrices of the layers are weighted by their inputs on it;
        plain errors if None, as always of embedding and head.
      sequential: see `truncate_layer`.
      linear: see `Inputs`.
      placement: see `Inputs`.

    Raises:
      UserError: see `check`.

    References:
      Wang et al., SVD-LLM, arXiv 2403.07378, 2024, section 3
    """
    check(config, wanted)
    stacked = not isinstance(params[model.LAYERS], tuple)
    changed = changed_matrices(config, wanted)
    replace = functools.partial(_truncated, wanted=wanted)
    result = {
        name: replace(name, w, None) if name in changed else w
        for name, w in params.items()
        if name != model.LAYERS
    }
    inputs = None
    if text is not None:
        original = params["embedding"]
        inputs = Inputs(
            result["embedding"] if sequential else original,
            text,
            config,
            original=original if sequential and "embedding" in changed else None,
            linear=linear,
            placement=placement,
        )
    result[model.LAYERS] = tuple(
        truncate_layer(
            layer,
            [name for name in changed if name in model.BLOCK_MATRICES],
            replace,
            inputs=inputs,
            sequential=sequential,
        )
        for layer in layers_of(params)
    )
    return model.stack_layers(result) if stacked else result


def changed_matrices(config: model.ModelConfig, wanted: model.ModelConfig) -> list[str]:
    """Returns the matrices that `truncate` replaces, of models that `check` passes."""
    return [
        name
        for name in config.matrix_shapes()
        if config.matrix_rank(name) != wanted.matrix_rank(name)
    ]


def truncate_layer(
    layer: model.Params,
    names: Collection[str],
    replace: Callable[[str, spectral.Weight, Moments | None], spectral.Weight],
    *,
    inputs: Inputs | None,
    sequential: bool = True,
) -> model.Params:
    """Returns a layer with some matrices replaced, and moves the text past it.

    Args:
      layer: one layer.
      names: of the matrices.
      replace: from the name of a matrix, what it should be, and the moments of its
        inputs, to what takes its place.
      inputs: the text before the layer; None for plain errors.
      sequential: whether every replaced matrix sees its inputs as those before it make
        them, and makes up for their error. It should be the W' that maps these inputs x
        closest to the original outputs y W: W' = W + (x.T x + c)^-1 (x.T y - x.T x) W
        with a little damping c. Otherwise all see the original inputs, and W' = W.

    Raises:
      UserError: where an input is not finite.
    """
    if inputs is None:
        return layer | {name: replace(name, layer[name], None) for name in names}
    if not sequential:
        moments = inputs.second_moments(layer)
        inputs.advance(layer)
        return layer | {
            n: replace(n, layer[n], Moments(*[moments[n]] * 3)) for n in names
        }
    new = dict(layer)
    for group in GROUPS:
        chosen = [name for name in group if name in names]
        if chosen:
            moments = inputs.moments(new, layer, chosen[0])
            change = _correction(moments)
            for name in chosen:
                new[name] = replace(name, _corrected(layer[name], change), moments)
    inputs.advance(new, layer)
    return new


_RIDGE = 1e-2
"""Damping of the correction, relative to the mean square of an input."""


@jax.jit
def _correction(moments: Moments) -> Float[Array, "I I"]:
    """The K of W' = W + K W."""
    second, cross, _ = moments
    damping = _RIDGE * jnp.mean(jnp.diagonal(second))
    eye = jnp.eye(len(second), dtype=second.dtype)
    return jnp.linalg.solve(second + linalg.safe_divisor(damping) * eye, cross - second)


@jax.jit
def _corrected(w: Any, change: Array) -> spectral.Weight:
    if not spectral.is_factors(w):
        return w + linalg.matmul(change, w)
    left = w.a if isinstance(w, spectral.LowRankFactors) else w.u * w.s[..., None, :]
    return spectral.LowRankFactors(left + linalg.matmul(change, left), w[-1])


def layers_of(params: model.Params) -> Iterator[model.Params]:
    """Yields the layers of parameters in either layout, one at a time."""
    layers = params[model.LAYERS]
    if isinstance(layers, tuple):
        yield from layers
        return
    for index in range(len(jax.tree.leaves(layers)[0])):
        yield jax.tree.map(lambda x, index=index: x[index], layers)


def check(config: model.ModelConfig, wanted: model.ModelConfig) -> None:
    """Raises UserError, naming field and matrix, for what truncation cannot do."""
    for name in config.matrix_shapes():
        before, after = config.matrix_rank(name), wanted.matrix_rank(name)
        blocks = config.matrix_blocks(name), wanted.matrix_blocks(name)
        errors.check(
            "model.spectral",
            before is None or after is not None,
            f"{name!r} has factors of rank {before} and cannot become dense; name it "
            "there",
        )
        same = before == after and blocks[0] == blocks[1]
        errors.check(
            f"model.blocks.{name}",
            before is None or same or blocks == (1, 1),
            f"{name!r} has rank {before} in {blocks[0]} blocks and cannot get rank "
            f"{after} in {blocks[1]}: only dense matrices become blocks; set rank and "
            "blocks as they are",
        )
        most = min(config.matrix_shapes()[name]) // blocks[1]
        errors.check(
            wanted.rank_setting(name),
            same or after is None or after % blocks[1] == 0,
            f"rank {after} of {name!r} is no multiple of its {blocks[1]} blocks, which "
            "a dense matrix needs to become them; choose "
            + _nearest_multiples(after or 0, blocks[1], most=most),
        )
        errors.check(
            wanted.rank_setting(name),
            before is None or after is None or after <= before,
            f"{after} is above the rank {before} that {name!r} has; truncation only "
            "lowers ranks",
        )
    errors.check(
        "model.factors",
        wanted.factors == config.factors or not config.spectral,
        f"{wanted.factors!r} differs from {config.factors!r}, which the matrices have; "
        f"set it to {config.factors!r}",
    )


def _nearest_multiples(value: int, factor: int, *, most: int) -> str:
    below = value // factor * factor
    near = [str(x) for x in (below, below + factor) if factor <= x <= most]
    return " or ".join(near) or f"at most {math.isqrt(most * factor)} blocks"


@functools.partial(jax.jit, static_argnames="rank")
def _best(w, moment, *, rank: int) -> spectral.SpectralFactors:
    return spectral.truncate(w, rank, second_moment=moment)


def _truncated(
    name: str,
    w: spectral.Weight,
    moments: Moments | None,
    *,
    wanted: model.ModelConfig,
) -> spectral.Weight:
    moment = None if moments is None else moments.inputs
    rank, blocks = wanted.matrix_rank(name), wanted.matrix_blocks(name)
    assert rank is not None
    if blocks > 1:
        return _nearest_blocks(w, moment, rank=rank, blocks=blocks)
    factors = _best(w, moment, rank=rank)
    return factors if wanted.factors == "spectral" else spectral.to_low_rank(factors)


@functools.partial(jax.jit, static_argnames=("rank", "blocks"))
def _nearest_blocks(w, moment, *, rank, blocks) -> spectral.BlockSpectralFactors:
    return blocks_lib.from_dense(
        w, blocks=blocks, rank=rank, second_moment=moment, sweeps=_SWEEPS
    )


class Spectrum(NamedTuple):
    """What each further rank of a matrix keeps.

    Attributes:
      squares: s^2 per layer, descending, as parts of their sum; (layers, R), for ranks
        at which factors have fewer parameters than the matrix.
      cost: parameters of all layers per rank.
    """

    squares: Float[np.ndarray, "N R"]
    cost: int


Matrix = tuple[str, spectral.Weight, Array | None]
"""Name, weight of one layer, and second moment of its inputs."""


def matrices_of(
    layers: Iterable[model.Params],
    names: Collection[str],
    *,
    inputs: Inputs | None = None,
) -> Iterator[Matrix]:
    """Yields matrices of layers, for `spectra`.

    Args:
      layers: one at a time.
      names: of the matrices.
      inputs: the text before the first layer, which moves past them all.
    """
    for layer in layers:
        moments: SecondMoments = {}
        if inputs:
            moments = inputs.second_moments(layer)
            inputs.advance(layer)
        for name in names:
            yield name, layer[name], moments.get(name)


def spectra(
    matrices: Iterable[Matrix], config: model.ModelConfig
) -> dict[str, Spectrum]:
    """Returns what each rank of matrices of the layers keeps, for `allocate`.

    Args:
      matrices: from `matrices_of`, of all layers.
      config: of their model.
    """
    squares: dict[str, list[np.ndarray]] = {}
    for name, w, moment in matrices:
        energy = np.square(np.asarray(_singular_values(w, moment), np.float64))
        share = energy / max(energy.sum(), np.finfo(float).tiny)
        squares.setdefault(name, []).append(share)
    found = {}
    for name, shares in squares.items():
        fan_in, fan_out = config.matrix_shapes()[name]
        per_rank = fan_in + fan_out + 1
        most = max(fan_in * fan_out // per_rank, 1)
        found[name] = Spectrum(np.stack(shares)[:, :most], len(shares) * per_rank)
    return found


@jax.jit
def _singular_values(w, moment):
    return spectral.singular_values(w, second_moment=moment)


def allocate(
    spectra: Mapping[str, Spectrum],
    *,
    budget: int,
    multiple: int = 1,
    field: str = "budget",
) -> dict[str, int]:
    """Returns the ranks that keep the most energy within a number of parameters.

    All layers of a matrix get one rank. Each multiple goes where a parameter keeps the
    most. As spectra fall, no other ranks of as many parameters keep more.

    Args:
      spectra: by matrix.
      budget: parameters of all factors together.
      multiple: of which ranks are, as far as the shape allows.
      field: what set the budget, for messages.

    Raises:
      UserError: where the budget is below one multiple per matrix.
    """
    ranks = dict.fromkeys(spectra, 0)
    left = budget

    def gain(name: str) -> tuple[float, str, int]:
        squares, cost = spectra[name]
        stop = min(ranks[name] + multiple, squares.shape[1])
        kept = float(np.sum(squares[:, ranks[name] : stop]))
        size = max((stop - ranks[name]) * cost, 1)
        return -kept / size, name, stop

    for name in spectra:  # the least, whatever it keeps
        stop = gain(name)[2]
        left -= stop * spectra[name].cost
        ranks[name] = stop
    least = budget - left
    errors.check(
        field,
        left >= 0,
        f"{budget:,} parameters are too few: rank {multiple} in each of "
        f"{', '.join(spectra)} takes {least:,}; raise it",
    )
    queue = [gain(name) for name in spectra]
    heapq.heapify(queue)
    while queue:
        _, name, stop = heapq.heappop(queue)
        added = (stop - ranks[name]) * spectra[name].cost
        if stop == ranks[name] or added > left:
            continue  # no further rank, or none that fits
        left -= added
        ranks[name] = stop
        heapq.heappush(queue, gain(name))
    return ranks
