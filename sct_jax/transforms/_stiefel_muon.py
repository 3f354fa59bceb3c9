"""Stiefel Muon: orthogonalised momentum on u and v, Adam on s."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from sct_jax import linalg
from sct_jax.transforms import _common, _transport

COORDINATES = ("factors", "svd")


class SecondMoment(NamedTuple):
    """Second moment of s; u and v have none."""

    s: Float[Array, "*layers R"]


class StiefelMuonState(NamedTuple):
    """State of `scale_by_stiefel_muon`; a `MaskedNode` outside SpectralFactors.

    Attributes:
      count: number of updates seen.
      mu: mean of the gradients, SpectralFactors per weight. In the coordinates "svd",
        gradients of u and v are divided by s.
      nu: mean of the squared gradients of s, `SecondMoment` per weight.
    """

    count: Int[Array, ""]
    mu: optax.Updates
    nu: Any


def scale_by_stiefel_muon(
    b1: float | jax.Array = 0.95,
    *,
    nesterov: bool = True,
    newton_schulz_steps: int = 5,
    s_b1: float | jax.Array = 0.9,
    s_b2: float | jax.Array = 0.95,
    eps: float | jax.Array = 1e-8,
    coordinates: str = "factors",
    shares: tuple[float, float, float] = (0.4, 0.2, 0.4),
) -> optax.GradientTransformationExtraArgs:
    r"""Orthogonalises the momentum of u and v, and rescales s by Adam.

    M is the mean of the gradients, msign its orthogonal factor by Newton-Schulz. In the
    coordinates "factors",

    .. math::
      \Delta u = \mathrm{msign}(M_u), \qquad \Delta v = \mathrm{msign}(M_v), \qquad
      \Delta s = \mathrm{Adam}(G_s)

    so a learning rate eta rotates every column by about eta. In the coordinates "svd",
    M_u is the mean of G_u / s = G_W v, and the shares (a_u, a_s, a_v) split a step of W
    into

    .. math::
      \Delta u = a_u\,\mathrm{msign}(M_u)\,\mathrm{diag}(1/s), \qquad
      |\Delta s| \le a_s, \qquad \Delta v = a_v\,\mathrm{msign}(M_v)\,\mathrm{diag}(1/s)

    with 1/s damped. Before the retraction, a learning rate eta then changes W by at
    most eta (a_u + a_s + a_v) to first order, times the overshoot of Newton-Schulz.
    Combine it with `limit_rotation`, with `retract_by_svd`, which keeps s descending,
    and with the clip, which bounds the change by the retraction.

    The update rule is our own; the references cover its parts.

    Args:
      b1: decay of the mean of the gradients of u and v.
      nesterov: orthogonalise b1 M + (1 - b1) G instead of M.
      newton_schulz_steps: steps of Muon's quintic. Name it in the `static_args` of
        `optax.inject_hyperparams`.
      s_b1: decay of the first moment of s.
      s_b2: decay of the second moment of s.
      eps: added to the root of the second moment of s.
      coordinates: "factors" or "svd".
      shares: (a_u, a_s, a_v), for the coordinates "svd".

    Returns:
      A transformation that needs `params`. It passes all leaves but SpectralFactors.

    Raises:
      ValueError: for unknown coordinates, a decay outside [0, 1), a negative eps or
        share, or a number of steps that is no integer; at `init`, for blocks in the
        coordinates "svd".

    References:
      Jordan et al., Muon: an optimizer for hidden layers, 2024,
      https://kellerjordan.github.io/posts/muon
      Spectron, arXiv 2602.12429, 2026 (the bound on W)
    """
    if coordinates not in COORDINATES:
        raise ValueError(
            f"unknown coordinates {coordinates!r}: choose one of "
            f"{', '.join(COORDINATES)}"
        )
    for name, decay in {"b1": b1, "s_b1": s_b1, "s_b2": s_b2}.items():
        _common.check_number(name, decay, least=0, below=1)
    _common.check_number("eps", eps, least=0)
    for share in shares:
        _common.check_number("shares", share, least=0)
    _common.check_steps(newton_schulz_steps)
    a_u, a_s, a_v = shares

    def init_fn(params):
        _common.check_whole(params)
        if coordinates == "svd":
            _common.check_no_blocks(params, "the coordinates 'svd'")
        per_weight = lambda fn: _common.per_weight(
            fn, params, _common.is_whole_spectral
        )
        return StiefelMuonState(
            count=jnp.zeros([], jnp.int32),
            mu=per_weight(lambda w: jax.tree.map(jnp.zeros_like, w)),
            # A bfloat16 second moment that is rounded to nearest never decays.
            nu=per_weight(
                lambda w: SecondMoment(linalg.as_float32(jnp.zeros_like(w.s)))
            ),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        params = _common.require_params(params, "scale_by_stiefel_muon")
        count = jnp.asarray(optax.safe_increment(state.count))
        leaves, treedef = jax.tree.flatten(updates, is_leaf=_common.is_weight)
        chosen = [i for i, g in enumerate(leaves) if _common.is_whole_spectral(g)]
        weights, means, squares = (
            treedef.flatten_up_to(tree) for tree in (params, state.mu, state.nu)
        )

        mean, directions = _common.running_mean, []
        for i in chosen:
            g, m = leaves[i], means[i]
            if coordinates == "svd":
                inverse = _transport.damped_inverse(weights[i].s)[..., None, :]
                g = g._replace(u=g.u * inverse, v=g.v * inverse)
            u, v = mean(m.u, g.u, b1), mean(m.v, g.v, b1)
            means[i] = m._replace(u=u, s=mean(m.s, g.s, s_b1), v=v)
            square = jnp.square(linalg.as_float32(g.s))
            squares[i] = SecondMoment(mean(squares[i].s, square, s_b2))
            if nesterov:
                u, v = mean(u, g.u, b1), mean(v, g.v, b1)
            directions.append((u, v))
        directions = linalg.newton_schulz(directions, steps=newton_schulz_steps)
        correction_1, correction_2 = (
            _common.bias_correction(b, count) for b in (s_b1, s_b2)
        )
        for i, (u, v) in zip(chosen, directions, strict=True):
            mean_s = means[i].s / correction_1
            root = jnp.sqrt(squares[i].s / correction_2)
            s = mean_s / (root + eps)
            if coordinates == "svd":
                inverse = _transport.damped_inverse(weights[i].s)[..., None, :]
                s = a_s * jnp.clip(s, -1, 1)
                u, v = a_u * u * inverse, a_v * v * inverse
            update = weights[i]._replace(u=u, s=s, v=v)
            leaves[i] = jax.tree.map(lambda x, p: x.astype(p.dtype), update, weights[i])
        unflatten = lambda values: jax.tree.unflatten(treedef, values)
        return unflatten(leaves), StiefelMuonState(
            count, unflatten(means), unflatten(squares)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
