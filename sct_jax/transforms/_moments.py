"""Where an optimizer state mirrors the parameters, and which mirrors are moments.

A state holds trees with one entry per parameter. They are found by their structure, as
parameters may have any names, "mu" and "nu" included. optax and this package call the
mean of the gradients `mu` and the mean of their squares `nu`: the name of the field
that holds the whole tree.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from sct_jax import spectral
from sct_jax.transforms import _common

T = TypeVar("T")  # an optimizer state

_FIRST, _SECOND = "mu", "nu"


def map_mirrors(
    state: T,
    params: Any,
    fn: Callable[[str | None, Any], Any],
    *,
    is_entry: Callable[[Any], bool] = spectral.is_spectral,
) -> T:
    """Returns `state` with every mirror of the parameters replaced by fn(field, node).

    A mirror has the keys of the parameters at every level, and an entry for every
    SpectralFactors. `optax.masked` and `optax.partition` may have removed weights, or
    whole subtrees. The field is the name of the attribute that holds the mirror, None
    if another container does. Mirrors are found at any depth.

    Args:
      state: optimizer state, or any tree that holds one.
      params: the parameters.
      fn: (field, node) -> replacement.
      is_entry: whether a node may stand for a SpectralFactors.
    """

    def is_mirror(node):
        return not _common.is_masked(node) and _mirrors(node, params, is_entry)

    def change(path, node):
        if not is_mirror(node):
            return node
        attribute = path and isinstance(path[-1], jax.tree_util.GetAttrKey)
        return fn(path[-1].name if attribute else None, node)

    return jax.tree_util.tree_map_with_path(change, state, is_leaf=is_mirror)


def map_first_moments(state: T, params: Any, fn: Callable[[Any], Any]) -> T:
    """Returns `state` with `fn` applied to every mirror of `params` named `mu`.

    Finds it at any depth of a chain or a partition.
    """
    return map_mirrors(
        state, params, lambda field, node: fn(node) if field == _FIRST else node
    )


def is_second_moment(field: str | None) -> bool:
    """Returns whether a mirror of the parameters in this field is a second moment."""
    return field == _SECOND


def key_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Returns the names in a key path; a mirror has the names of the parameters."""
    return tuple(
        str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))))
        for key in path
    )


def _mirrors(node: Any, params: Any, is_entry: Callable[[Any], bool]) -> bool:
    if _common.is_masked(node):
        return True
    if spectral.is_spectral(params):
        return is_entry(node)
    below = _children(params)
    if below is None or spectral.is_factors(params):  # one entry of any other kind
        return not any(map(is_entry, jax.tree.leaves(node, is_leaf=is_entry)))
    found = _children(node)
    return (
        found is not None
        and found.keys() == below.keys()
        and all(_mirrors(found[key], below[key], is_entry) for key in below)
    )


def _children(node: Any) -> dict[tuple[str, ...], Any] | None:
    """The children of a node by name, None for a leaf."""
    pairs = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
    if len(pairs) == 1 and not pairs[0][0]:
        return None
    return {key_names(path): child for path, child in pairs}
