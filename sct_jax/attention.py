"""Causal attention with grouped queries and documents, in blocks or as XLA's own.

Axes: B batch, L query and key length, H heads, G kv heads, K head_dim; in blocks N
number of blocks, Q the queries of one block for the H / G heads of a group, M keys.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IMPLEMENTATIONS = ("xla", "chunked")
CHOICES = ("auto", *IMPLEMENTATIONS)

# Scores of one block pair stay in a core's cache; larger blocks waste more of the
# diagonal, smaller ones more time between products.
BLOCK = 256

_MASKED = -1e30  # finite: a row may be masked as a whole in one block


def attend(
    q_BLHK: Float[Array, "B L H K"],
    k_BLGK: Float[Array, "B L G K"],
    v_BLGK: Float[Array, "B L G K"],
    *,
    segment_ids: Int[Array, "B L"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B L H K"]:
    """Returns softmax(q k.T / sqrt(K)) v over the positions up to each query.

    Args:
      q_BLHK: queries.
      k_BLGK: keys; each serves H / G query heads.
      v_BLGK: values.
      segment_ids: document of each position. Attention does not cross documents.
      implementation: "xla" computes all L x L scores of a head at once. "chunked" does
        so for a pair of blocks at a time, forward and backward, and skips the pairs
        above the diagonal: memory grows with L, not with L^2. "auto" takes "xla" if
        there is one block.

    Raises:
      ValueError: for an unknown implementation.
    """
    if implementation == "auto":
        implementation = "xla" if q_BLHK.shape[1] <= BLOCK else "chunked"
    if implementation == "xla":
        mask = None
        if segment_ids is not None:
            mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        return jax.nn.dot_product_attention(
            q_BLHK, k_BLGK, v_BLGK, mask=mask, is_causal=True
        )
    if implementation != "chunked":
        raise ValueError(f"attention must be one of {CHOICES}, got {implementation!r}")
    return _chunked(q_BLHK, k_BLGK, v_BLGK, segment_ids)


def _chunked(q, k, v, segment_ids):
    batch, length, heads, size = q.shape
    groups = k.shape[2]
    block = min(BLOCK, length)
    missing = -length % block
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
    # Keys beyond the end are after every query, so causality masks them.
    q, k, v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (q, k, v))
    segments = jnp.pad(segment_ids, ((0, 0), (0, missing)))
    number = q.shape[1] // block
    q = q.reshape(batch, number, block, groups, -1, size)
    q = q.transpose(1, 0, 3, 4, 2, 5).reshape(number, batch, groups, -1, size)
    k, v = (
        x.reshape(batch, number, block, groups, size).transpose(1, 0, 3, 2, 4)
        for x in (k, v)
    )
    segments = segments.reshape(-1, number, block).swapaxes(0, 1)
    out = _attend_blocks(q, k, v, segments)
    out = out.reshape(number, batch, groups, heads // groups, block, size)
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, size)
    return out[:, :length]


@jax.custom_vjp
def _attend_blocks(
    q: Float[Array, "N B G Q K"],
    k: Float[Array, "N B G M K"],
    v: Float[Array, "N B G M K"],
    segments: Int[Array, "N B M"],
) -> Float[Array, "N B G Q K"]:
    return _forward(q, k, v, segments)[0]


def _forward(q, k, v, segments):
    """The result, and the logarithm of each row's sum of exponentials."""
    rows = (*q.shape[1:4], 1)

    def attend_one(i):
        def add(j, carry):
            total, peak, weight = carry
            scores = _scores(q[i], k[j], segments, i, j)
            new = jnp.maximum(peak, jnp.max(scores, axis=-1, keepdims=True))
            p = jnp.exp(scores - new)
            shrink = jnp.exp(peak - new)
            weight = weight * shrink + jnp.sum(p, axis=-1, keepdims=True)
            return total * shrink + _times(p.astype(v.dtype), v[j]), new, weight

        start = (
            jnp.zeros(q.shape[1:], jnp.float32),
            jnp.full(rows, _MASKED, jnp.float32),
            jnp.zeros(rows, jnp.float32),
        )
        total, peak, weight = jax.lax.fori_loop(0, i + 1, add, start)
        return (total / weight).astype(q.dtype), peak + jnp.log(weight)

    return jax.lax.map(attend_one, jnp.arange(q.shape[0]))


def _forward_fwd(q, k, v, segments):
    out, log_z = _forward(q, k, v, segments)
    return out, (q, k, v, segments, out, log_z)


def _backward(residuals, d_out):
    q, k, v, segments, out, log_z = residuals
    number = q.shape[0]
    scale = 1 / math.sqrt(q.shape[-1])
    # Of each row: the gradient of its scores, on average.
    shared = jnp.sum(
        d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True
    )

    def add_keys(dq, j):
        def add(i, carry):
            dq, dk, dv = carry
            p = jnp.exp(_scores(q[i], k[j], segments, i, j) - log_z[i])
            dv = dv + _times(p.astype(v.dtype), d_out[i], transpose=True)
            dp = _times(d_out[i], v[j].swapaxes(-1, -2))
            ds = (p * (dp - shared[i]) * scale).astype(q.dtype)
            dk = dk + _times(ds, q[i], transpose=True)
            return dq.at[i].add(_times(ds, k[j])), dk, dv

        zeros = jnp.zeros(k.shape[1:], jnp.float32)
        dq, dk, dv = jax.lax.fori_loop(j, number, add, (dq, zeros, zeros))
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq, (dk, dv) = jax.lax.scan(
        add_keys, jnp.zeros(q.shape, jnp.float32), jnp.arange(number)
    )
    return dq.astype(q.dtype), dk, dv, None


_attend_blocks.defvjp(_forward_fwd, _backward)


def _scores(
    q: Float[Array, "B G Q K"],
    k: Float[Array, "B G M K"],
    segments: Int[Array, "N B M"],
    i: Int[Array, ""],
    j: Int[Array, ""],
) -> Float[Array, "B G Q M"]:
    """Scaled scores of query block i and key block j, in float32."""
    scores = _times(q, k.swapaxes(-1, -2)) / math.sqrt(q.shape[-1])
    block = k.shape[-2]
    places = jnp.arange(block)
    before = (i > j) | (places[:, None] >= places)
    seen = before & (segments[i][:, :, None] == segments[j][:, None, :])
    repeats = q.shape[-2] // block  # the query heads of a group
    seen = jnp.tile(seen, (1, repeats, 1))[:, None]
    return jnp.where(seen, scores, _MASKED)


def _times(x: Array, y: Array, *, transpose: bool = False) -> Array:
    """X @ y, or x.T @ y, accumulated in float32."""
    contract = (x.ndim - 2 if transpose else x.ndim - 1, y.ndim - 2)
    batch = tuple(range(x.ndim - 2))
    return jax.lax.dot_general(
        x,
        y,
        (((contract[0],), (contract[1],)), (batch, batch)),
        preferred_element_type=jnp.float32,
    )
