"""The names of first and second moments in an optimizer state.

optax and this package call the mean of the gradients `mu` and the mean of their squares
`nu`. Code that looks for moments in a state goes through this module.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

T = TypeVar("T")  # an optimizer state

_FIRST, _SECOND = "mu", "nu"


def map_first_moments(state: T, fn: Callable[[Any], Any]) -> T:
    """Returns `state` with `fn` applied to every field named `mu`.

    Finds the field at any depth of a chain or a partition.
    """

    def has_first_moment(x):
        return _FIRST in getattr(x, "_fields", ())

    def apply(x):
        if not has_first_moment(x):
            return x
        return x._replace(**{_FIRST: fn(getattr(x, _FIRST))})

    return jax.tree.map(apply, state, is_leaf=has_first_moment)


def is_second_moment(path: tuple[Any, ...]) -> bool:
    """Returns whether a key path of JAX leads through a field named `nu`."""
    return any(
        isinstance(key, jax.tree_util.GetAttrKey) and key.name == _SECOND
        for key in path
    )
