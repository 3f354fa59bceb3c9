"""Random factors for the cases, and what is measured of them in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.faults import cases
from sct_jax import spectral


def generator(context: cases.Context) -> np.random.Generator:
    """Returns a source of random arrays for a case."""
    return np.random.default_rng(context.rng.getrandbits(64))


def point(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Returns random matrices with orthonormal columns, in float64."""
    q, r = np.linalg.qr(rng.normal(size=shape))
    return q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]


def factors(
    rng: np.random.Generator, s: Any, fans: tuple[int, int], *layers: int
) -> spectral.SpectralFactors:
    """Returns random factors.

    Args:
      rng: source.
      s: singular values.
      fans: (fan_in, fan_out).
      *layers: leading dimensions.
    """
    s = np.broadcast_to(np.asarray(s, np.float64), (*layers, len(s)))
    u, v = (point(rng, *layers, fan, s.shape[-1]) for fan in fans)
    return spectral.SpectralFactors(*as_float32((u, s, v)))


def as_float32(tree: Any) -> Any:
    """Returns the arrays of a tree in float32."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def dense(w: Any) -> np.ndarray:
    """Returns W = u diag(s) v.T per layer."""
    u, s, v = (np.asarray(x, np.float64) for x in w)
    return (u * s[..., None, :]) @ v.swapaxes(-1, -2)


def distance(old: Any, new: Any) -> np.ndarray:
    """Returns ||W' - W||_2 per layer."""
    return np.linalg.norm(dense(new) - dense(old), ord=2, axis=(-2, -1))


def orthonormality_error(x: Any) -> float:
    """Returns the largest entry of |x.T x - I|."""
    x = np.asarray(x, np.float64)
    gram = x.swapaxes(-1, -2) @ x
    return float(np.max(np.abs(gram - np.eye(x.shape[-1]))))


def is_finite(tree: Any) -> bool:
    """Returns whether every number in a tree is finite."""
    return all(bool(np.all(np.isfinite(x))) for x in jax.tree.leaves(tree))


@functools.partial(jax.jit, static_argnums=0)
def apply(tx: optax.GradientTransformation, w: Any, d: Any) -> Any:
    """Returns a weight after one update d through a new transformation."""
    updates, _ = tx.update(d, tx.init(w), w)
    return optax.apply_updates(w, updates)


def steps(
    tx: optax.GradientTransformation, params: Any, grads: list[Any]
) -> tuple[Any, Any]:
    """Returns parameters and state after a step per gradient."""
    state, step = tx.init(params), jax.jit(tx.update)
    for grad in grads:
        updates, state = step(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params, state
