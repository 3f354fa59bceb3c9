"""Reference results in float64 numpy, written from the formulas of the papers.

Nothing here imports sct_jax. Factors are (u, s, v) with W = u diag(s) v.T and any
leading axes. The last part walks jaxprs.
"""

from collections.abc import Iterator

import jax
import jax.extend.core
import numpy as np

# The precision of both operands that `matmul_precisions` should find.
HIGHEST = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def dense(u, s, v):
    u, s, v = float64((u, s, v))
    return (u * s[..., None, :]) @ v.swapaxes(-1, -2)


def block_diagonal(x):
    """(B n, B m) from (B, n, m)."""
    blocks, n, m = np.shape(x)
    wide = np.zeros((blocks * n, blocks * m))
    for b in range(blocks):
        wide[b * n : (b + 1) * n, b * m : (b + 1) * m] = x[b]
    return wide


def block_parts(u, s, v):
    """U P (I, B R), s (B R) and V (O, B R) with W = U P diag(s) V.T, for one layer.

    Flat index f of the output side is column f // B of block f % B of the input.
    """
    u, s, v = float64((u, s, v))
    blocks, rank = s.shape
    columns = block_diagonal(u)
    order = [(f % blocks) * rank + f // blocks for f in range(blocks * rank)]
    return columns[:, order], s.reshape(-1), block_diagonal(v)


def block_dense(u, s, v):
    columns, s, v = block_parts(u, s, v)
    return (columns * s) @ v.T


def block_gradients(u, s, v, g):
    """Gradients by u, s and v of a function with the gradient g by W."""
    columns, wide_s, wide_v = block_parts(u, s, v)
    blocks, fan_in, rank = np.shape(u)
    fan_out = np.shape(v)[1]
    g_columns, g_v = (g @ wide_v) * wide_s, (g.T @ columns) * wide_s
    g_u, new_v = np.zeros(np.shape(u)), np.zeros(np.shape(v))
    for f in range(blocks * rank):
        i, r = f % blocks, f // blocks
        j, q = f // rank, f % rank
        g_u[i, :, r] = g_columns[i * fan_in : (i + 1) * fan_in, f]
        new_v[j, :, q] = g_v[j * fan_out : (j + 1) * fan_out, f]
    g_s = np.sum(columns * (g @ wide_v), axis=0).reshape(blocks, rank)
    return g_u, g_s, new_v


def spectral_norm(w):
    return np.linalg.norm(w, 2, axis=(-2, -1))


def composite_update_norm(old, new):
    """||W' - W||_2 per layer, from the SVD of the dense difference."""
    return spectral_norm(dense(*new) - dense(*old))


def orthonormality_error(x):
    x = float64(x)
    return np.max(np.abs(x.swapaxes(-1, -2) @ x - np.eye(x.shape[-1])))


def signed_qr(x):
    """Q of the QR factorisation where R has a positive diagonal, or 0."""
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
    singular_value_lr_multiplier=1.0,
    dense_lr_multiplier=1.0,
    base_width=None,
):
    """SCT's Algorithm 1: one step per rate in `rates`; returns params after each.

    params: {name: {"u", "s", "v"} or {"a", "b"} or {"w"}} of float64 arrays: the last
    key is the kind of the array. gradient: maps (step, params) to a tree of the same
    structure.
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
                factor = {
                    "s": singular_value_lr_multiplier,
                    "w": dense_lr_multiplier,
                }.get(kind, 1.0)
                if kind in ("u", "v") and base_width is not None:
                    factor = factor * np.sqrt(base_width / p.shape[-2])
                moved = p - rate * factor * direction
                new[name][kind] = signed_qr(moved) if kind in ("u", "v") else moved
        params = new
        history.append(params)
    return history


QUINTIC = (3.4445, -4.7750, 2.0315)


def newton_schulz(x, steps=5, coefficients=QUINTIC):
    """Muon's iteration as published, on x itself."""
    a, b, c = coefficients
    x = float64(x)
    if x.shape[-2] < x.shape[-1]:
        return newton_schulz(x.swapaxes(-1, -2), steps, coefficients).swapaxes(-1, -2)
    norm = np.sqrt(np.sum(x**2, axis=(-2, -1), keepdims=True))
    x = x / np.where(norm > 0, norm, 1)
    for _ in range(steps):
        g = x.swapaxes(-1, -2) @ x
        x = a * x + x @ (b * g + c * g @ g)
    return x


def spectron(
    a,
    b,
    gradients,
    rates,
    *,
    b1=0.95,
    nesterov=False,
    shape_factor=False,
    weight_decay=0.0,
):
    """Spectron's Algorithm 1 for one weight a @ b.T; returns (a, b) after each step.

    gradients: maps (step, a, b) to (g_a, g_b).
    """
    factors = [float64(a), float64(b)]
    means = [np.zeros_like(x) for x in factors]
    vectors = [np.full(x.shape[-1], x.shape[-1] ** -0.5) for x in factors]
    history = []
    for step, rate in enumerate(rates):
        grads = gradients(step, *factors)
        norms = []
        for i, x in enumerate(factors):
            y = x.T @ (x @ vectors[i])
            vectors[i] = y / np.linalg.norm(y)
            norms.append(np.linalg.norm(x @ vectors[i]))
        radius = rate / (sum(norms) + 1)
        new = []
        for i, x in enumerate(factors):
            means[i] = b1 * means[i] + (1 - b1) * grads[i]
            ahead = b1 * means[i] + (1 - b1) * grads[i] if nesterov else means[i]
            direction = newton_schulz(ahead)
            if shape_factor:
                direction = direction * np.sqrt(max(1, x.shape[0] / x.shape[1]))
            new.append(x - radius * direction - rate * weight_decay * x)
        factors = new
        history.append(tuple(factors))
    return history


def damped_inverse(s, damping=0.1):
    return s / (s**2 + (damping * np.max(np.abs(s))) ** 2)


def stiefel_muon(
    u,
    s,
    v,
    gradients,
    rates,
    *,
    momentum=0.95,
    nesterov=True,
    coordinates="factors",
    shares=(0.4, 0.2, 0.4),
    max_rotation=0.1,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
):
    """Stiefel Muon with the QR retraction; returns (u, s, v) after each step."""
    u, s, v = float64((u, s, v))
    m_u, m_v, m_s, n_s = (np.zeros_like(x) for x in (u, v, s, s))
    history = []
    for step, rate in enumerate(rates):
        g_u, g_s, g_v = gradients(step, u, s, v)
        inverse = damped_inverse(s)
        if coordinates == "svd":
            g_u, g_v = g_u * inverse, g_v * inverse
        m_u = momentum * m_u + (1 - momentum) * g_u
        m_v = momentum * m_v + (1 - momentum) * g_v
        m_s, n_s = b1 * m_s + (1 - b1) * g_s, b2 * n_s + (1 - b2) * g_s**2
        ahead = [
            momentum * m + (1 - momentum) * g if nesterov else m
            for m, g in ((m_u, g_u), (m_v, g_v))
        ]
        d_u, d_v = (newton_schulz(m) for m in ahead)
        d_s = m_s / (1 - b1 ** (step + 1))
        d_s = d_s / (np.sqrt(n_s / (1 - b2 ** (step + 1))) + eps)
        if coordinates == "svd":
            d_u, d_v = shares[0] * d_u * inverse, shares[2] * d_v * inverse
            d_s = shares[1] * np.clip(d_s, -1, 1)
        steps = [rate * d_u, rate * d_v]
        if coordinates == "svd":
            for i, d in enumerate(steps):
                length = np.linalg.norm(d, axis=0)
                steps[i] = d * np.minimum(1, max_rotation / length)
        u, s, v = signed_qr(u - steps[0]), s - rate * d_s, signed_qr(v - steps[1])
        history.append((u, s, v))
    return history


def lossless(u, s, v, d_u, d_s, d_v):
    """The SVD of (u + du) diag(s + ds) (v + dv).T, with the signs nearest to u."""
    u, s, v, d_u, d_s, d_v = float64((u, s, v, d_u, d_s, d_v))
    w = ((u + d_u) * (s + d_s)) @ (v + d_v).T
    left, values, right = np.linalg.svd(w, full_matrices=False)
    rank = s.shape[0]
    left, values, right = left[:, :rank], values[:rank], right[:rank].T
    sign = np.where(np.sum(left * u, axis=0) < 0, -1.0, 1.0)
    return left * sign, values, right * sign


def equations(jaxpr) -> Iterator[jax.extend.core.JaxprEqn]:
    """All equations of a jaxpr, including nested jaxprs."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


# Primitives that call LAPACK or another library.
FACTORISATIONS = {"cholesky", "eig", "eigh", "lu", "qr", "schur", "svd"}
FACTORISATIONS |= {"geqrf", "householder_product", "triangular_solve"}


def factorisations(jaxpr):
    """Names of the primitives in a jaxpr that factorise a matrix in a library."""
    return {e.primitive.name for e in equations(jaxpr)} & FACTORISATIONS


def matmul_precisions(fn, *args):
    """Precisions of all dot_generals in the trace of fn(*args)."""
    return [
        equation.params["precision"]
        for equation in equations(jax.make_jaxpr(fn)(*args))
        if equation.primitive.name == "dot_general"
    ]
