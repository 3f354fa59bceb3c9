"""Adaptive rank: ranks that change during training, based on spectral energy.

TSVD (arXiv 2605.28573, 2026) chooses the rank of each layer by its spectral energy.
`Deviation:` interval, floor, hysteresis, rounding and the treatment of the optimizer
state are our own design, since we had no access to the paper's.

A weight stores R columns for all its layers, and each layer uses the first `active` of
them. In the other columns s = 0, which `transforms.freeze_inactive_columns` maintains.
Weights are named by their path in the parameters, such as "layers/q" or "layers/3/q".
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, Shaped

from sct_jax import errors, linalg, sharding, spectral, stiefel, transforms

T = TypeVar("T")  # any pytree

ActiveRanks = Mapping[str, np.ndarray]  # name -> active columns, (*layers,)

# The last axis of all leaves in these nodes is the columns of a weight.
_COLUMN_NODES = (
    spectral.SpectralFactors,
    spectral.BlockSpectralFactors,
    transforms.SecondMoment,
    transforms.ActiveColumns,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveRankConfig:
    """When and by how much ranks change.

    Attributes:
      energy: tau, the fraction of sum(s^2) that the rank of a layer must reach. If
        None, ranks are constant.
      every: number of steps between decisions.
      warmup_steps: number of steps before the first decision. Early spectra are flat
        and carry no information.
      floor: minimum number of active columns per layer.
      max_rank: maximum stored rank. Defaults to min(fan_in, fan_out).
      multiple: stored ranks are rounded up to a multiple of this, so that shapes rarely
        change.
      headroom: spare columns, as a fraction of the necessary columns. A layer grows
        when it needs its spare columns.
      hysteresis: a layer shrinks only by more than this fraction of its columns.
      budget_neutral: whether to move rank between weights at the initial number of
        parameters. The largest common tau within this budget then replaces `energy`.
    """

    energy: float | None = None
    every: int = 100
    warmup_steps: int = 200
    floor: int = 16
    max_rank: int | None = None
    multiple: int = 16
    headroom: float = 0.05
    hysteresis: float = 0.1
    budget_neutral: bool = False

    def validate(self) -> None:
        """Raises UserError naming the first invalid field."""
        check = functools.partial(errors.check_bounds, "adaptive_rank.", self)
        check("energy", above=0, most=1)
        check("every", least=1)
        check("floor", "multiple", "max_rank", least=1, most=errors.MAX_INT32)
        check("warmup_steps", least=0)
        check("headroom", least=0, most=2**20)
        check("hysteresis", least=0, below=1)
        errors.check(
            "adaptive_rank.max_rank",
            self.max_rank is None or self.max_rank >= self.floor,
            f"{self.max_rank} must be >= adaptive_rank.floor = {self.floor}",
        )
        errors.check(
            "adaptive_rank.budget_neutral",
            not self.budget_neutral or self.energy is not None,
            "set adaptive_rank.energy too, which turns adaptive rank on",
        )

    def unused_fields(self) -> list[str]:
        """Returns a sentence for every field that is set but has no effect."""
        if self.energy is not None:
            return []
        return [
            f"adaptive_rank.{field.name}: has no effect without adaptive_rank.energy"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]

    def decides_at(self, step: int) -> bool:
        """Returns whether to decide on ranks after `step` updates."""
        return (
            self.energy is not None
            and step > self.warmup_steps
            and step % self.every == 0
        )


class WeightInfo(NamedTuple):
    """Shape and spectrum of one weight, the input of a decision.

    Attributes:
      fans: (fan_in, fan_out).
      s: singular values, unsorted; 0 in inactive columns.
      active: number of active columns per layer.
    """

    fans: tuple[int, int]
    s: Float[np.ndarray, "*layers R"]
    active: Int[np.ndarray, "*layers"]

    @property
    def rank(self) -> int:
        """Number of stored columns."""
        return self.s.shape[-1]

    def parameters(self, rank: int) -> int:
        """Returns the number of parameters at a given rank."""
        return math.prod(self.s.shape[:-1]) * rank * (sum(self.fans) + 1)


def weights(params: Any, opt_state: Any) -> dict[str, WeightInfo]:
    """Returns every SpectralFactors by name, with singular values on the host.

    Args:
      params: the parameters.
      opt_state: state of a chain with `transforms.freeze_inactive_columns`.

    Raises:
      UserError: if the state has no active columns for a weight.
    """
    marks, found = _marks(opt_state, params), {}
    for name, w in _named(params).items():
        _check_marked(name, marks)
        s, active = np.asarray(w.s), np.asarray(marks[name])
        fans = (w.u.shape[-2], w.v.shape[-2])
        found[name] = WeightInfo(fans, s, np.asarray(active.sum(-1)))
    return found


def stored_ranks(params: Any) -> dict[str, int]:
    """Returns the stored rank of every SpectralFactors by name."""
    return {name: w.s.shape[-1] for name, w in _named(params).items()}


def num_parameters(params: Any) -> int:
    """Returns the number of parameters in all SpectralFactors, abstract or not."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(_named(params)))


def decide(
    found: Mapping[str, WeightInfo],
    config: AdaptiveRankConfig,
    *,
    budget: int | None = None,
) -> dict[str, np.ndarray]:
    """Returns the number of columns that each layer of each weight should use.

    Let k be the smallest number of columns whose s^2 reach the fraction tau of their
    sum. A layer then asks for k (1 + headroom) columns. By default tau is `energy`.
    With `budget_neutral`, tau is the largest value for which the rounded ranks fit into
    `budget` parameters. A layer with a NaN or an infinity in s keeps its columns.

    Args:
      found: result of `weights`.
      config: the rule.
      budget: number of parameters in all SpectralFactors, for `budget_neutral`.

    Raises:
      ValueError: if `budget_neutral` is set without a budget.
    """
    # On the host, where forty values of tau take no time.
    reached = {
        name: np.asarray(spectral.cumulative_energy(jnp.asarray(w.s)))
        for name, w in found.items()
    }

    def at(energy: float) -> dict[str, np.ndarray]:
        return {
            name: _wanted(w, reached[name], energy, config) for name, w in found.items()
        }

    if not config.budget_neutral:
        return at(1.0 if config.energy is None else config.energy)
    if budget is None:
        raise ValueError("budget_neutral needs a budget")

    def cost(active: ActiveRanks) -> int:
        return sum(
            w.parameters(stored_rank(w, active[name], config))
            for name, w in found.items()
        )

    low, high = 0.0, 1.0
    if cost(at(high)) <= budget:
        return at(high)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) <= budget else (low, middle)
    chosen = at(low)
    # If the floors alone exceed the budget, no rank can move.
    return chosen if cost(chosen) <= budget else {n: w.active for n, w in found.items()}


class Change(NamedTuple):
    """New ranks, the input of `resize`.

    Attributes:
      active: number of active columns per weight and layer.
      ranks: stored rank per weight.
    """

    active: dict[str, np.ndarray]
    ranks: dict[str, int]


def next_change(
    params: Any,
    opt_state: Any,
    config: AdaptiveRankConfig,
    *,
    budget: int | None = None,
) -> Change | None:
    """Returns the change that `resize` should make now, or None for no change.

    See `decide` for the rule and its errors.
    """
    found = weights(params, opt_state)
    active = decide(found, config, budget=budget)
    if all(np.array_equal(active[name], w.active) for name, w in found.items()):
        return None
    ranks = {name: stored_rank(w, active[name], config) for name, w in found.items()}
    return Change(active, ranks)


def stored_rank(w: WeightInfo, active: np.ndarray, config: AdaptiveRankConfig) -> int:
    """Returns the stored rank: the largest of `active`, rounded up to `multiple`."""
    rounded = math.ceil(int(np.max(active)) / config.multiple) * config.multiple
    return min(rounded, _limit(w, config))


def resize(
    params: T,
    opt_state: Any,
    *,
    active: Mapping[str, Shaped[ArrayLike, "..."]],
    ranks: Mapping[str, int],
    key: PRNGKeyArray,
) -> tuple[T, Any]:
    """Returns params and optimizer state with new ranks.

    Columns are sorted by |s|. A layer that shrinks keeps the largest ones, so the error
    in W is the smallest possible (Eckart-Young theorem). A layer that grows keeps W
    exactly: new columns are random and orthogonal to the old ones, with s = 0.

    Moments of removed columns are dropped. New columns start with zero first moments.
    Their second moments are the mean over the other columns, because Adam's step count
    is shared by all columns: from zero, their first steps would be up to six times too
    long. Columns that were stored but inactive keep their second moments.

    Meant for jit, with `ranks` static.

    Args:
      params: the parameters.
      opt_state: state of a chain with `transforms.freeze_inactive_columns`.
      active: number of active columns per weight and layer, integers in 1..rank, with
        names from `weights`. Other weights do not change.
      ranks: stored rank per weight, with the same names.
      key: random key for the new columns.

    Raises:
      UserError: if a weight is missing in params, a rank or a number of columns is not
        possible, or the state has no active columns for a weight, or holds factors of
        none; names the weight.
    """
    _check_change(params, opt_state, active, ranks)
    changed = {name: w for name, w in _named(params).items() if name in ranks}
    orders = {name: jnp.argsort(-jnp.abs(w.s), axis=-1) for name, w in changed.items()}
    missing = {name: ranks[name] - w.s.shape[-1] for name, w in changed.items()}
    grown = _complements(
        key, {n: ((w.u, w.v), missing[n]) for n, w in changed.items() if missing[n] > 0}
    )

    def in_use(name: str) -> Array:
        shape = (*changed[name].s.shape[:-1], ranks[name])
        columns = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
        return columns < jnp.asarray(active[name])[..., None]

    def sort(name: str, x: Array, *, of_rows: bool) -> Array:
        order = orders[name]
        x = jnp.take_along_axis(x, order[..., None, :] if of_rows else order, axis=-1)
        x = x[..., : ranks[name]]
        missing = ranks[name] - x.shape[-1]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])

    def resize_params(entry: _Entry) -> Any:
        name, w = entry.name, entry.weight
        if name not in ranks:
            return w
        u, v = sort(name, w.u, of_rows=True), sort(name, w.v, of_rows=True)
        if name in grown:
            new_u, new_v = grown[name]
            u = u.at[..., w.s.shape[-1] :].set(new_u.astype(u.dtype))
            v = v.at[..., w.s.shape[-1] :].set(new_v.astype(v.dtype))
        s = jnp.where(in_use(name), sort(name, w.s, of_rows=False), 0)
        return spectral.SpectralFactors(u, s, v)

    def resize_state(entry: _Entry) -> Any:
        name = entry.name
        if name not in ranks:
            return entry.node
        used = in_use(name)
        if isinstance(entry.node, transforms.ActiveColumns):
            return transforms.ActiveColumns(used)
        wide = used[..., None, :]
        second = transforms.is_second_moment(entry.field)

        def moment(x: Array) -> Array:
            of_rows = x.ndim > used.ndim
            x = sort(name, x, of_rows=of_rows)
            if second:
                x = jnp.where(x > 0, x, _mean_of_positive(x))
            return jnp.where(wide if of_rows else used, x, 0)

        return entry.map_columns(moment)

    return (
        _map_entries(params, params, resize_params),
        _map_entries(opt_state, params, resize_state),
    )


def with_ranks(tree: T, ranks: Mapping[str, int], *, params: Any) -> T:
    """Returns a tree of abstract arrays with the given stored ranks.

    Args:
      tree: holds the parameters, an optimizer state, or both.
      ranks: stored rank per weight. Other weights do not change.
      params: the parameters, as they are now.

    Raises:
      UserError: if a rank is not possible; names the weight.
    """

    def change(entry: _Entry) -> Any:
        name = entry.name
        if name not in ranks:
            return entry.node
        _check_rank(name, entry.weight, ranks[name])
        return entry.map_columns(lambda x: x.update(shape=(*x.shape[:-1], ranks[name])))

    return _map_entries(tree, params, change)


def _wanted(
    w: WeightInfo,
    reached: Float[np.ndarray, "*layers R"],
    energy: float,
    config: AdaptiveRankConfig,
) -> np.ndarray:
    """Returns the number of columns that each layer should use.

    Args:
      w: the weight.
      reached: its `spectral.cumulative_energy`.
      energy: tau; necessary are as many columns as in `spectral.energy_rank`.
      config: the rule.
    """
    necessary = np.argmax(reached >= energy * reached[..., -1:], axis=-1) + 1
    wanted = np.ceil(necessary * (1 + config.headroom))
    limit = _limit(w, config)
    wanted = np.clip(wanted, min(config.floor, limit), limit).astype(int)
    stays = (wanted <= w.active) & (wanted >= (1 - config.hysteresis) * w.active)
    stays |= ~np.all(np.isfinite(w.s), axis=-1)
    return np.where(stays, np.minimum(w.active, limit), wanted)


def _limit(w: WeightInfo, config: AdaptiveRankConfig) -> int:
    return min(*w.fans, config.max_rank or max(w.fans))


def _complements(
    key: PRNGKeyArray, wanted: Mapping[str, tuple[tuple[Array, Array], int]]
) -> dict[str, tuple[Array, Array]]:
    """Returns new orthonormal columns by name, random and orthogonal to u and v.

    Args:
      key: random key.
      wanted: ((u, v), number of new columns) by name.
    """
    points = {
        name: jax.tree.map(linalg.as_float32, pair)
        for name, (pair, _) in wanted.items()
    }
    new = {
        name: tuple(
            jax.random.normal(
                jax.random.fold_in(key, 2 * index + side),
                (*x.shape[:-1], wanted[name][1]),
                x.dtype,
            )
            for side, x in enumerate(pair)
        )
        for index, (name, pair) in enumerate(points.items())
    }

    def improve(_, new):
        apart = jax.tree.map(lambda x, y: spectral.split_along(x, y)[1], points, new)
        return stiefel.cholesky_qr_retraction(apart)

    # The second pass removes rounding errors of the first.
    return jax.lax.fori_loop(0, 2, improve, new) if new else {}


class _Entry(NamedTuple):
    """What a tree holds for one weight."""

    name: str
    weight: spectral.SpectralFactors | spectral.BlockSpectralFactors
    node: Any  # in place of the weight
    field: str | None  # that holds the mirror of the parameters

    def map_columns(self, fn: Callable[[Any], Any]) -> Any:
        """Returns the node with fn(x) for every array x with a column per column."""

        def change(x: Any, like: Any) -> Any:
            if x.shape == like.shape:
                return fn(x)
            errors.check(
                "opt_state",
                math.prod(x.shape) == 1,
                f"holds an array {x.shape} for {self.name or 'the weight'} in "
                f"{self.field or 'a mirror of the parameters'}, whose part has shape "
                f"{like.shape}: ranks cannot change under this optimizer; use "
                "optimizers.tsvd",
            )
            return x

        parts = {}
        for part in self.node._fields:
            like = getattr(self.weight, part, self.weight.s)
            parts[part] = jax.tree.map(
                functools.partial(change, like=like), getattr(self.node, part)
            )
        return self.node._replace(**parts)


def _is_entry(x: Any) -> bool:
    return isinstance(x, _COLUMN_NODES)


def _map_entries(tree: T, params: Any, fn: Callable[[_Entry], Any]) -> T:
    """Replaces what `tree` holds for every weight, in every mirror of `params`."""
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=spectral.is_spectral)
    weights = {
        transforms.key_names(path): (sharding.path_name(path), w)
        for path, w in nodes
        if spectral.is_spectral(w)
    }

    def of_mirror(field: str | None, mirror: Any) -> Any:
        def change(path, node):
            if not _is_entry(node):
                return node
            return fn(_Entry(*weights[transforms.key_names(path)], node, field))

        return jax.tree_util.tree_map_with_path(change, mirror, is_leaf=_is_entry)

    return transforms.map_mirrors(tree, params, of_mirror, is_entry=_is_entry)


def _named(
    params: Any,
) -> dict[str, spectral.SpectralFactors | spectral.BlockSpectralFactors]:
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=spectral.is_spectral)
    named = {}
    for path, node in nodes:
        if spectral.is_spectral(node):
            name = sharding.path_name(path)
            errors.check("params", name not in named, f"two weights are called {name}")
            named[name] = node
    return named


def _marks(opt_state: Any, params: Any) -> dict[str, Array]:
    """Returns the mask of active columns of every weight from an optimizer state."""
    marks = {}

    def collect(entry: _Entry) -> Any:
        if isinstance(entry.node, transforms.ActiveColumns):
            marks[entry.name] = entry.node.active
        return entry.node

    _map_entries(opt_state, params, collect)
    return marks


def _check_marked(name: str, marks: Container[str]) -> None:
    errors.check(
        "optimizer.name",
        name in marks,
        f"the state has no active columns for {name or 'the weight'}: use "
        "optimizers.tsvd, or a chain with transforms.freeze_inactive_columns",
    )


def _check_rank(
    name: str,
    w: spectral.SpectralFactors | spectral.BlockSpectralFactors,
    rank: Any,
) -> None:
    fan_in, fan_out = w.u.shape[-2], w.v.shape[-2]
    is_integer = isinstance(rank, int | np.integer) and not isinstance(rank, bool)
    errors.check(
        f"ranks.{name}",
        is_integer and bool(1 <= rank <= min(fan_in, fan_out)),
        f"{rank} must be an integer in 1..{min(fan_in, fan_out)}, for a weight of "
        f"shape {fan_in} x {fan_out}",
    )


def _check_active(
    name: str,
    w: spectral.SpectralFactors | spectral.BlockSpectralFactors,
    active: Any,
    rank: int,
) -> None:
    layers = w.s.shape[:-1]
    is_integer = jnp.issubdtype(jnp.result_type(active), jnp.integer)
    errors.check(
        f"active.{name}",
        np.shape(active) == layers and is_integer,
        f"must be integers of shape {layers}, one per layer",
    )
    try:
        known = np.asarray(active)
    except jax.errors.TracerArrayConversionError:
        return
    errors.check(
        f"active.{name}",
        bool(np.all((known >= 1) & (known <= rank))),
        f"{known} must be in 1..{rank}, the stored rank",
    )


def _check_change(
    params: Any,
    opt_state: Any,
    active: Mapping[str, Any],
    ranks: Mapping[str, int],
) -> None:
    """Raises UserError if `resize` cannot make this change."""
    named, marks = _named(params), _marks(opt_state, params)
    for name in {**active, **ranks}:
        errors.check_choice("ranks", name, tuple(named))
        errors.check("ranks", name in active, f"{name} is missing in `active`")
        errors.check("ranks", name in ranks, f"{name} is missing in `ranks`")
        errors.check(
            f"ranks.{name}",
            not spectral.is_blocks(named[name]),
            "cannot change: the shuffle between blocks depends on the rank; use plain "
            "factors (model.num_blocks = 1)",
        )
        _check_rank(name, named[name], ranks[name])
        _check_active(name, named[name], active[name], ranks[name])
        _check_marked(name, marks)
    known = _map_entries(opt_state, params, lambda _: None)
    for path, node in jax.tree_util.tree_leaves_with_path(known, is_leaf=_is_entry):
        errors.check(
            "opt_state",
            not _is_entry(node),
            f"{sharding.path_name(path)} belongs to no weight of params: pass the "
            "parameters that the state was initialised with",
        )


def _mean_of_positive(x: Float[Array, "*rows R"]) -> Float[Array, "*rows 1"]:
    """Returns the mean over the positive entries of each row, 0 if there are none."""
    count = jnp.sum(x > 0, axis=-1, keepdims=True)
    return jnp.sum(x, axis=-1, keepdims=True) / jnp.maximum(count, 1)
