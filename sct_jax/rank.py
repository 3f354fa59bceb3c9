"""Ranks that change during training, by spectral energy.

TSVD (arXiv 2605.28573, 2026) chooses the rank of each layer by the share of its
spectral energy. `Deviation:` how often, with what floor, hysteresis and rounding, and
how the optimizer state follows, is our own design; the paper's is not public in a form
that we could read.

A weight stores R columns for all its layers, and each layer uses the first `active` of
them: what it does not use has s = 0, held there by `transforms.freeze_inactive_columns`. Weights
are named by their path in the parameters, as "layers/q" or "layers/3/q".
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sct_jax import errors, linalg, sharding, spectral, stiefel, transforms

T = TypeVar("T")  # any pytree

ActiveRanks = Mapping[str, np.ndarray]  # name -> columns in use, (*layers,)

# Nodes whose leaves all have the columns of a weight as their last axis.
_OF_COLUMNS = (
    spectral.SpectralFactors,
    transforms.SecondMoment,
    transforms.ActiveColumns,
)
# The field that optax, and the chains here, keep second moments in.
_SECOND_MOMENT = "nu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveRankConfig:
    """When and how far ranks change.

    Attributes:
      energy: tau, the share of sum(s^2) that the rank of a layer must hold; None: ranks
        stay as they are.
      every: steps between decisions.
      warmup_steps: no decision up to here; early on every spectrum is flat, and says
        nothing.
      floor: no layer uses fewer columns.
      max_rank: none stores more; None: min(fan_in, fan_out).
      multiple: stored ranks are rounded up to it, so that shapes rarely change.
      headroom: share of the columns found necessary that is kept beside them; a
        layer that uses up its headroom grows.
      hysteresis: a layer shrinks only by more than this share of its columns.
      budget_neutral: move rank between weights under the parameters of the start, at
        the largest common tau that fits them, in the place of `energy`.
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
        """Raises UserError, naming the field."""
        check = functools.partial(errors.check_bounds, "rank.", self)
        check("energy", above=0, most=1)
        check("every", "floor", "multiple", least=1)
        check("warmup_steps", "headroom", least=0)
        check("hysteresis", least=0, below=1)
        errors.check(
            "rank.max_rank",
            self.max_rank is None or self.max_rank >= self.floor,
            f"{self.max_rank} is below rank.floor = {self.floor}",
        )
        errors.check(
            "rank.budget_neutral",
            not self.budget_neutral or self.energy is not None,
            "needs rank.energy, which says that ranks change at all",
        )

    def without_effect(self) -> list[str]:
        """Returns a sentence for every field that is set, but in vain."""
        if self.energy is not None:
            return []
        return [
            f"rank.{field.name}: has no effect without rank.energy"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]

    def decides_at(self, step: int) -> bool:
        """Returns whether ranks are decided after `step` updates."""
        return (
            self.energy is not None
            and step > self.warmup_steps
            and step % self.every == 0
        )


class Weight(NamedTuple):
    """What a decision needs to know of one weight.

    Attributes:
      fans: (fan_in, fan_out).
      s: singular values, unsorted, 0 where a column is not in use.
      active: columns in use, per layer.
    """

    fans: tuple[int, int]
    s: Float[np.ndarray, "*layers R"]
    active: Int[np.ndarray, "*layers"]

    @property
    def rank(self) -> int:
        """Stored columns."""
        return self.s.shape[-1]

    def parameters(self, rank: int) -> int:
        """Returns how many numbers it stores at a rank."""
        return math.prod(self.s.shape[:-1]) * rank * (sum(self.fans) + 1)


def weights(params: Any, opt_state: Any) -> dict[str, Weight]:
    """Returns every SpectralFactors of a model by name, singular values on the host."""
    named = _named(params, spectral.is_spectral)
    marks, found = _marks(opt_state, tuple(named)), {}
    for name, w in named.items():
        _check_marked(name, marks)
        s, active = np.asarray(w.s), np.asarray(marks[name])
        fans = (w.u.shape[-2], w.v.shape[-2])
        found[name] = Weight(fans, s, active.sum(-1))
    return found


def stored_ranks(params: Any) -> dict[str, int]:
    """Returns the stored rank of every SpectralFactors by name."""
    return {
        name: w.s.shape[-1] for name, w in _named(params, spectral.is_spectral).items()
    }


def num_parameters(params: Any) -> int:
    """Returns how many numbers all SpectralFactors hold; abstract arrays will do."""
    factors = _named(params, spectral.is_spectral)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(factors))


def decide(
    found: Mapping[str, Weight],
    config: AdaptiveRankConfig,
    *,
    budget: int | None = None,
) -> dict[str, np.ndarray]:
    """Returns how many columns each layer of each weight should use.

    With k the least number of largest s^2 that hold the share tau of their sum, a layer
    wants k (1 + headroom) columns. Without `budget_neutral` tau is `energy`; with it,
    the largest for which the rounded ranks fit into `budget` parameters.

    Args:
      found: from `weights`.
      config: the rule.
      budget: parameters in all SpectralFactors, for `budget_neutral`.

    Raises:
      ValueError: where `budget_neutral` has no budget.
    """

    def at(energy: float) -> dict[str, np.ndarray]:
        return {name: _wanted(w, energy, config) for name, w in found.items()}

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
    # Floors alone may be more than the budget; then nothing can move.
    return chosen if cost(chosen) <= budget else {n: w.active for n, w in found.items()}


class Change(NamedTuple):
    """A decision that differs from what is in use.

    Attributes:
      active: columns to use, per weight and layer.
      ranks: columns to store, per weight.
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
    """Returns what `resize` should do now; None where all stays as it is.

    See `decide` for the rule and its errors.
    """
    found = weights(params, opt_state)
    active = decide(found, config, budget=budget)
    if all(np.array_equal(active[name], w.active) for name, w in found.items()):
        return None
    ranks = {name: stored_rank(w, active[name], config) for name, w in found.items()}
    return Change(active, ranks)


def stored_rank(w: Weight, active: np.ndarray, config: AdaptiveRankConfig) -> int:
    """Returns the rank to store for so many columns in use: the largest, rounded up."""
    rounded = math.ceil(int(np.max(active)) / config.multiple) * config.multiple
    return min(rounded, _limit(w, config))


def resize(
    params: T,
    opt_state: Any,
    *,
    active: Mapping[str, Int[Array, "*layers"]],
    ranks: Mapping[str, int],
    key: PRNGKeyArray,
) -> tuple[T, Any]:
    """Returns params and optimizer state with other ranks, changed together.

    Columns are sorted by |s|. A layer that shrinks keeps its largest ones: W loses what
    the Eckart-Young theorem says, no more. One that grows keeps W, exactly: its new
    columns are random, orthogonal to the old ones, with s = 0. Moments of columns that
    go are dropped. Of new ones the first moments are zero and the second ones the mean
    of the other columns'; one that was stored, but not in use, keeps its own: Adam's
    count is that of all columns, so that from zero its first steps would be up to six
    times too long.

    Meant for jit, with `ranks` static.

    Args:
      params: the parameters.
      opt_state: state of a chain with `transforms.freeze_inactive_columns`.
      active: columns in use, per weight and layer; names as from `weights`. Weights
        that are not named stay as they are.
      ranks: stored rank per weight, of the same names.
      key: for the new columns.

    Raises:
      UserError: naming the weight, for one that params do not have, a rank that it
        cannot have, or a state that does not mark its columns.
    """
    _check_ranks(params, opt_state, active, ranks)
    changed = {
        name: w
        for name, w in _named(params, spectral.is_spectral).items()
        if name in ranks
    }
    orders = {name: jnp.argsort(-jnp.abs(w.s), axis=-1) for name, w in changed.items()}
    missing = {name: ranks[name] - w.s.shape[-1] for name, w in changed.items()}
    grown = _complements(
        key, {n: ((w.u, w.v), missing[n]) for n, w in changed.items() if missing[n] > 0}
    )

    def in_use(name: str) -> Array:
        return jnp.arange(ranks[name]) < active[name][..., None]

    def sort(name: str, x: Array, *, of_rows: bool) -> Array:
        order = orders[name]
        x = jnp.take_along_axis(x, order[..., None, :] if of_rows else order, axis=-1)
        x = x[..., : ranks[name]]
        missing = ranks[name] - x.shape[-1]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])

    def resize_params(name: str, w: spectral.SpectralFactors, path: Any):
        del path
        if name not in ranks:
            return w
        u, v = sort(name, w.u, of_rows=True), sort(name, w.v, of_rows=True)
        if name in grown:
            u = u.at[..., w.s.shape[-1] :].set(grown[name][0])
            v = v.at[..., w.s.shape[-1] :].set(grown[name][1])
        s = jnp.where(in_use(name), sort(name, w.s, of_rows=False), 0)
        return spectral.SpectralFactors(u, s, v)

    def resize_state(name: str, node: Any, path: Any) -> Any:
        if name not in ranks:
            return node
        used = in_use(name)
        if isinstance(node, transforms.ActiveColumns):
            return transforms.ActiveColumns(used)
        wide = used[..., None, :]

        second = any(getattr(key, "name", "") == _SECOND_MOMENT for key in path)

        def moment(x: Array) -> Array:
            of_rows = x.ndim > used.ndim
            x = sort(name, x, of_rows=of_rows)
            if second:
                x = jnp.where(x > 0, x, _mean_of_positive(x))
            return jnp.where(wide if of_rows else used, x, 0)

        return jax.tree.map(moment, node)

    names = tuple(stored_ranks(params))
    return (
        _map_columns(params, names, resize_params),
        _map_columns(opt_state, names, resize_state),
    )


def with_ranks(tree: T, ranks: Mapping[str, int]) -> T:
    """Returns a tree of abstract arrays with the last axis of its columns as named."""

    def change(name: str, node: Any, path: Any) -> Any:
        del path
        return jax.tree.map(
            lambda x: x.update(shape=(*x.shape[:-1], ranks[name])), node
        )

    return _map_columns(tree, tuple(ranks), change)


def _wanted(w: Weight, energy: float, config: AdaptiveRankConfig) -> np.ndarray:
    """Columns that each layer should use at this tau."""
    necessary = np.asarray(spectral.energy_rank(jnp.asarray(w.s), energy))
    wanted = np.ceil(necessary * (1 + config.headroom)).astype(int)
    limit = _limit(w, config)
    wanted = np.clip(wanted, min(config.floor, limit), limit)
    stays = (wanted <= w.active) & (wanted >= (1 - config.hysteresis) * w.active)
    stays &= w.active <= limit
    return np.where(stays, w.active, wanted)


def _limit(w: Weight, config: AdaptiveRankConfig) -> int:
    return min(*w.fans, config.max_rank or max(w.fans))


def _complements(
    key: PRNGKeyArray, wanted: Mapping[str, tuple[tuple[Array, Array], int]]
) -> dict[str, tuple[Array, Array]]:
    """So many orthonormal columns, random but orthogonal to u and v, by name."""
    points = {
        name: jax.tree.map(linalg.as_float32, pair)
        for name, (pair, _) in wanted.items()
    }
    new = {
        name: tuple(
            jax.random.normal(
                jax.random.fold_in(key, 2 * index + side),
                (*x.shape[:-1], wanted[name][1]),
            )
            for side, x in enumerate(pair)
        )
        for index, (name, pair) in enumerate(points.items())
    }

    def improve(_, new):
        apart = jax.tree.map(lambda x, y: spectral.split_along(x, y)[1], points, new)
        return stiefel.cholesky_qr_retraction(apart)

    # The second time removes what rounding left.
    return jax.lax.fori_loop(0, 2, improve, new) if new else {}


def _named(tree: Any, is_node: Callable[[Any], bool]) -> dict[str, Any]:
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_node)
    return {sharding.path_name(path): node for path, node in nodes if is_node(node)}


def _weight_at(path: str, names: tuple[str, ...]) -> str | None:
    """The weight that a path of the parameters, or of a mirror of them, means."""
    # Attributes and keys alike: what is the root of params is within a state.
    below = "/" + path.replace(".", "/")
    found = [
        name
        for name in names
        if not name or below.endswith("/" + name.replace(".", "/"))
    ]
    return max(found, key=len, default=None)


def _marks(opt_state: Any, names: tuple[str, ...]) -> dict[str | None, Array]:
    """Which columns are in use, by weight, as the state of the chain has it."""
    is_marks = lambda x: isinstance(x, transforms.ActiveColumns)
    return {
        _weight_at(path, names): columns.active
        for path, columns in _named(opt_state, is_marks).items()
    }


def _check_marked(name: str, marks: Container[str | None]) -> None:
    errors.check(
        "optimizer.name",
        name in marks,
        f"the state marks no columns of {name or 'the weight'}: its chain must be "
        "optimizers.tsvd, or have transforms.freeze_inactive_columns",
    )


def _check_ranks(
    params: Any,
    opt_state: Any,
    active: Mapping[str, Any],
    ranks: Mapping[str, int],
) -> None:
    """Raises UserError for what `resize` cannot do."""
    named = _named(params, spectral.is_spectral)
    marks = _marks(opt_state, tuple(named))
    for name in {**active, **ranks}:
        errors.check_choice("ranks", name, tuple(named))
        errors.check("ranks", name in active, f"{name} has no number of active columns")
        errors.check("ranks", name in ranks, f"{name} has no stored rank")
        most = min(named[name].u.shape[-2], named[name].v.shape[-2])
        errors.check(
            f"ranks.{name}",
            1 <= ranks[name] <= most,
            f"{ranks[name]} of at most {most}",
        )
        _check_marked(name, marks)


def _mean_of_positive(x: Float[Array, "*rows R"]) -> Float[Array, "*rows 1"]:
    """The mean of the positive numbers of each row; 0 where there are none."""
    count = jnp.sum(x > 0, axis=-1, keepdims=True)
    return jnp.sum(x, axis=-1, keepdims=True) / jnp.maximum(count, 1)


def _map_columns(
    tree: T, names: tuple[str, ...], fn: Callable[[str, Any, Any], Any]
) -> T:
    """The tree with fn(name, node, path) for every node that has a weight's columns."""

    def change(path, node):
        if not isinstance(node, _OF_COLUMNS):
            return node
        name = _weight_at(sharding.path_name(path), names)
        return node if name is None else fn(name, node, path)

    return jax.tree_util.tree_map_with_path(
        change, tree, is_leaf=lambda x: isinstance(x, _OF_COLUMNS)
    )
