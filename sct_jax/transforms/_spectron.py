"""Spectron: orthogonalised momentum, divided by the norms of the factors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from sct_jax import linalg, spectral
from sct_jax.transforms import _common


class PowerVectors(NamedTuple):
    """Estimates of the top right singular vectors of a and b, kept between steps."""

    right_a: Float[Array, "*layers R"]
    right_b: Float[Array, "*layers R"]


class SpectronState(NamedTuple):
    """State of `scale_by_spectron`; a `MaskedNode` outside LowRankFactors.

    Attributes:
      mu: mean of the gradients, LowRankFactors per weight.
      vectors: `PowerVectors` per weight.
    """

    mu: optax.Updates
    vectors: Any


def scale_by_spectron(
    b1: float | jax.Array = 0.95,
    *,
    newton_schulz_steps: int = 5,
    nesterov: bool = False,
    shape_factor: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Orthogonalises the momentum of a and b, and divides by their spectral norms.

    .. math::
      M_A \leftarrow b_1 M_A + (1 - b_1) G_A, \qquad
      \Delta A = \frac{\mathrm{NS}(M_A)}{\|A\|_2 + \|B\|_2 + 1}

    B is updated likewise. With `optax.scale_by_learning_rate(eta)` after it, this is
    Algorithm 1, and W = A B.T changes by at most eta to first order.

    `Deviation:` Newton-Schulz runs in float32 on the Gram matrix, which differs from
    the paper by rounding only. The bound is as loose as in the paper: five quintic
    steps leave singular values in about [.5, 1.5], and one power iteration
    underestimates the norm.

    Args:
      b1: decay of the mean of the gradients.
      newton_schulz_steps: steps of Muon's quintic. Name it in the `static_args` of
        `optax.inject_hyperparams`.
      nesterov: orthogonalise b1 M + (1 - b1) G instead of M, as in the authors' code.
      shape_factor: multiply by sqrt(max(1, rows / columns)), as in the authors' code.

    Returns:
      A transformation that needs `params`. It passes all leaves but LowRankFactors.

    Raises:
      ValueError: for a decay outside [0, 1), or a number of steps that is no integer.

    Example:
      >>> import jax, optax
      >>> from sct_jax import spectral, transforms
      >>> w = spectral.to_low_rank(spectral.init(jax.random.key(0), 16, 24, 4))
      >>> tx = optax.chain(
      ...     transforms.scale_by_spectron(), optax.scale_by_learning_rate(0.05)
      ... )
      >>> updates, _ = tx.update({"w": w}, tx.init({"w": w}), {"w": w})

    References:
      Spectron, arXiv 2602.12429, 2026, Algorithm 1
    """
    _common.check_number("b1", b1, least=0, below=1)
    _common.check_steps(newton_schulz_steps)

    def init_fn(params):
        _common.check_whole(params)

        def vectors(w):
            shape = (*w.a.shape[:-2], w.a.shape[-1])
            # A state that holds one array twice cannot be donated.
            start = lambda: jnp.full(shape, w.a.shape[-1] ** -0.5, jnp.float32)
            return PowerVectors(start(), start())

        return SpectronState(
            mu=_common.per_weight(
                lambda w: jax.tree.map(jnp.zeros_like, w), params, _is_low_rank
            ),
            vectors=_common.per_weight(vectors, params, _is_low_rank),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        params = _common.require_params(params, "scale_by_spectron")
        leaves, treedef = jax.tree.flatten(updates, is_leaf=_common.is_weight)
        chosen = [i for i, g in enumerate(leaves) if _is_low_rank(g)]
        weights, means, vectors = (
            treedef.flatten_up_to(tree) for tree in (params, state.mu, state.vectors)
        )

        def mean(m, g):
            return _common.running_mean(m, g, b1)

        for i in chosen:
            means[i] = jax.tree.map(mean, means[i], leaves[i])
        directions = [
            jax.tree.map(mean, means[i], leaves[i]) if nesterov else means[i]
            for i in chosen
        ]
        directions = linalg.newton_schulz(directions, steps=newton_schulz_steps)
        for i, direction in zip(chosen, directions, strict=True):
            radius, vectors[i] = _radius(weights[i], vectors[i])
            factors = [_shape_factor(x) if shape_factor else 1.0 for x in direction]
            leaves[i] = spectral.LowRankFactors(
                *(
                    (x * (radius * factor)).astype(x.dtype)
                    for x, factor in zip(direction, factors, strict=True)
                )
            )
        unflatten = lambda values: jax.tree.unflatten(treedef, values)
        return unflatten(leaves), SpectronState(unflatten(means), unflatten(vectors))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_low_rank(x: Any) -> bool:
    return isinstance(x, spectral.LowRankFactors) and not any(map(_common.is_masked, x))


def _radius(
    w: spectral.LowRankFactors, vectors: PowerVectors
) -> tuple[Float[Array, "*L 1 1"], PowerVectors]:
    """1 / (||a|| + ||b|| + 1) by one power iteration each, and the new vectors."""
    w = jax.tree.map(linalg.as_float32, w)
    norm_a, right_a = linalg.power_iteration(w.a, vectors.right_a)
    norm_b, right_b = linalg.power_iteration(w.b, vectors.right_b)
    radius = 1 / (norm_a + norm_b + 1)
    kept = PowerVectors(right_a, right_b)
    return radius[..., None, None], jax.tree.map(
        lambda x, old: x.astype(old.dtype), kept, vectors
    )


def _shape_factor(x: Float[Array, "*L n R"]) -> float:
    return max(1.0, x.shape[-2] / x.shape[-1]) ** 0.5
