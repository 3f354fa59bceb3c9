"""What the library should compute, in float64 numpy, from the formulas alone.

Nothing here imports sct_jax. Factors are (u, s, v) with W = u diag(s) v.T and any
leading axes.
"""

from collections.abc import Iterator

import jax
import jax.extend.core
import numpy as np


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def dense(u, s, v):
    u, s, v = float64((u, s, v))
    return (u * s[..., None, :]) @ v.swapaxes(-1, -2)


def spectral_norm(w):
    return np.linalg.norm(w, 2, axis=(-2, -1))


def composite_update_norm(old, new):
    """||W' - W||_2 per layer by an SVD of the dense difference."""
    return spectral_norm(dense(*new) - dense(*old))


def orthonormality_error(x):
    x = float64(x)
    return np.max(np.abs(x.swapaxes(-1, -2) @ x - np.eye(x.shape[-1])))


def signed_qr(x):
    """Q of the QR factorisation whose R has a positive diagonal (0 counts as one)."""
    q, r = np.linalg.qr(float64(x))
    diagonal = np.diagonal(r, axis1=-2, axis2=-1)
    return q * np.where(diagonal < 0, -1.0, 1.0)[..., None, :]


def polar(x):
    u, _, vt = np.linalg.svd(float64(x), full_matrices=False)
    return u @ vt


RETRACTIONS = {"qr": signed_qr, "cholesky_qr": signed_qr, "polar": polar}


def matrix_polynomial(x, scalar_function):
    """U f(sigma) V.T for x = U sigma V.T."""
    u, sigma, vt = np.linalg.svd(float64(x), full_matrices=False)
    return (u * scalar_function(sigma)[..., None, :]) @ vt


def gaussian_singular_values(fan_in, fan_out, *, draws, seed=0):
    """Mean over draws of the singular values of N(0, 1 / fan_in) matrices."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(draws, fan_in, fan_out)) / np.sqrt(fan_in)
    return np.linalg.svd(w, compute_uv=False).mean(0)


def next_token_cross_entropy(logits, targets, mask=None, z_loss=0.0):
    """Mean of -log softmax(logits)[target], position by position."""
    logits = float64(logits)
    total, weight = 0.0, 0.0
    for index in np.ndindex(targets.shape):
        row = logits[index]
        log_z = row.max() + np.log(np.sum(np.exp(row - row.max())))
        w = 1.0 if mask is None else float(mask[index])
        total += w * (log_z - row[targets[index]] + z_loss * log_z**2)
        weight += w
    return total / weight if weight else 0.0


def sct(
    params,
    gradient,
    rates,
    *,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    singular_value_rate=1.0,
    dense_rate=1.0,
    base_width=None,
):
    """SCT's Algorithm 1: one step per rate in `rates`; returns params after each.

    params: {name: {"u", "s", "v"} or {"a", "b"} or {"w"}} of float64 arrays, so that
    the kind of every array is its last key. gradient: from (step, params) to a tree of
    the same shape.
    """
    params = float64(params)
    m = {n: {k: np.zeros_like(x) for k, x in p.items()} for n, p in params.items()}
    v = {n: {k: np.zeros_like(x) for k, x in p.items()} for n, p in params.items()}
    history = []
    for step, rate in enumerate(rates):
        grads = gradient(step, params)
        new = {}
        for name, weight in params.items():
            new[name] = {}
            for kind, p in weight.items():
                g = np.asarray(grads[name][kind], np.float64)
                m[name][kind] = b1 * m[name][kind] + (1 - b1) * g
                v[name][kind] = b2 * v[name][kind] + (1 - b2) * g * g
                m_hat = m[name][kind] / (1 - b1 ** (step + 1))
                v_hat = v[name][kind] / (1 - b2 ** (step + 1))
                direction = m_hat / (np.sqrt(v_hat) + eps)
                if kind in ("s", "a", "b") or (kind == "w" and p.ndim >= 2):
                    direction = direction + weight_decay * p
                factor = {"s": singular_value_rate, "w": dense_rate}.get(kind, 1.0)
                if kind in ("u", "v") and base_width is not None:
                    factor = factor * np.sqrt(base_width / p.shape[-2])
                moved = p - rate * factor * direction
                new[name][kind] = signed_qr(moved) if kind in ("u", "v") else moved
        params = new
        history.append(params)
    return history


def equations(jaxpr) -> Iterator[jax.extend.core.JaxprEqn]:
    """Every equation of a jaxpr and of all jaxprs inside its equations."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def matmul_precisions(fn, *args):
    """The precision of every dot_general in the trace of fn(*args)."""
    return [
        equation.params["precision"]
        for equation in equations(jax.make_jaxpr(fn)(*args))
        if equation.primitive.name == "dot_general"
    ]
