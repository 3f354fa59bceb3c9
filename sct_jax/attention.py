"""Causal attention with grouped queries and documents, in blocks or as XLA's own.

`attend` computes it, and `select` says which implementation a device should use. Those
of this module serve everywhere; `attention_kernels` has the kernels of accelerators.

Axes: B batch, L query and key length, H heads, G kv heads, R query heads of a group,
K head_dim; of one block Q queries and M keys; N number of blocks.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from sct_jax import attention_kernels, errors, linalg, remat

IMPLEMENTATIONS = ("xla", "chunked")
CHOICES = ("auto", *IMPLEMENTATIONS, *attention_kernels.KERNELS)

ROW = 128
"""Queries of a row: they see all keys up to the last of them at once."""

MAX_ROWS = 4
"""More rows than these are computed in a loop, by pairs of blocks."""

BLOCK = 256
"""Queries and keys of a pair."""

SAVED = "attention"
"""Name of what the backward pass reads, for policies of rematerialisation."""

MASKED = -1e30
"""The score of what is not seen; finite, as a block may mask a row as a whole."""

Groups = Float[Array, "B G R L K"]
Keys = Float[Array, "B G L K"]


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
        so for a block at a time, forward and backward, and skips what is above the
        diagonal: memory grows with L, not with L^2. "auto" takes "chunked". "cudnn",
        "triton" and "splash" are the kernels of `attention_kernels`; `select` knows
        where they serve.

    Raises:
      ValueError: for an unknown implementation, and for "cudnn" with `segment_ids`.
    """
    if implementation in attention_kernels.KERNELS:
        return attention_kernels.attend(
            implementation, q_BLHK, k_BLGK, v_BLGK, segment_ids
        )
    if implementation == "xla":
        mask = None
        if segment_ids is not None:
            mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        return jax.nn.dot_product_attention(
            q_BLHK, k_BLGK, v_BLGK, mask=mask, is_causal=True
        )
    if implementation not in ("auto", "chunked"):
        raise ValueError(f"attention must be one of {CHOICES}, got {implementation!r}")
    batch, length, _, size = q_BLHK.shape
    q = q_BLHK.reshape(batch, length, k_BLGK.shape[2], -1, size)
    by_blocks = _by_rows if length <= ROW * MAX_ROWS else _by_pairs
    out = by_blocks(
        q.transpose(0, 2, 3, 1, 4),
        k_BLGK.transpose(0, 2, 1, 3),
        v_BLGK.transpose(0, 2, 1, 3),
        segment_ids,
    )
    return out.transpose(0, 3, 1, 2, 4).reshape(q_BLHK.shape)


def select(implementation: str, work: attention_kernels.Workload) -> tuple[str, str]:
    """Returns an implementation that can serve, and why it, in a few words.

    Anything but "auto" is returned unchanged. "auto" takes "chunked" on CPU, for speed
    too. Elsewhere it takes "xla" for one block, then "cudnn" or "splash", and "chunked"
    where that cannot serve. It never takes "triton", which has not run on a GPU yet.

    Args:
      implementation: one of `CHOICES`.
      work: what attention is asked to do, and where.

    Raises:
      UserError: naming `model.attention`, for one that is unknown or cannot serve.
    """
    errors.check_choice("model.attention", implementation, CHOICES)
    chosen, reason = _select_for(work)
    if implementation == "auto":
        return chosen, f"auto: {reason}"
    if implementation in attention_kernels.KERNELS:
        obstacle = attention_kernels.obstacle(implementation, work)
        errors.check(
            "model.attention",
            obstacle is None,
            f"{implementation!r} {obstacle}; set it to 'auto', which takes {chosen!r} "
            "here",
        )
    return implementation, "as configured"


_DEVICES = {"cpu": "CPU", "cuda": "NVIDIA GPU", "rocm": "AMD GPU", "tpu": "TPU"}
_FIRST = {"cuda": "cudnn", "tpu": "splash"}


def _select_for(work: attention_kernels.Workload) -> tuple[str, str]:
    """What "auto" takes, and why."""
    device = _DEVICES.get(work.platform, work.platform)
    if work.platform == "cpu":
        return "chunked", device
    if work.seq_len <= BLOCK:
        return "xla", f"one block of {work.seq_len:,} tokens"
    kernel = _FIRST.get(work.platform)
    if kernel is None:
        return "chunked", f"{device}, {work.seq_len:,} > {BLOCK} tokens"
    if obstacle := attention_kernels.obstacle(kernel, work):
        return "chunked", f"{device}, {kernel} {obstacle}"
    return kernel, f"{device}, {work.dtype}" + ", documents" * work.documents


# --- By rows: queries of one block, and all keys that they see.


@jax.custom_vjp
def _by_rows(q: Groups, k: Keys, v: Keys, segments: Int[Array, "B L"] | None) -> Groups:
    return _rows_forward(q, k, v, segments)[0]


def _rows(length: int) -> list[tuple[int, int]]:
    return [(i, min(i + ROW, length)) for i in range(0, length, ROW)]


def _rows_forward(q, k, v, segments):
    """The result, and the logarithm of each query's sum of exponentials."""
    outs, log_zs = [], []
    for start, stop in _rows(q.shape[3]):
        scores = _row_scores(q, k, segments, start, stop)
        peak = jnp.max(scores, axis=-1, keepdims=True)
        p = jnp.exp(scores - peak)
        weight = jnp.sum(p, axis=-1, keepdims=True)
        total = linalg.einsum("bgrqm,bgmk->bgrqk", p.astype(v.dtype), v[:, :, :stop])
        outs.append((total / weight).astype(q.dtype))
        log_zs.append(peak + jnp.log(weight))
    return jnp.concatenate(outs, axis=3), jnp.concatenate(log_zs, axis=3)


def _rows_fwd(q, k, v, segments):
    out, log_z = checkpoint_name(_rows_forward(q, k, v, segments), SAVED)
    return out, (q, k, v, segments, out, log_z)


def _rows_bwd(residuals, d_out):
    q, k, v, segments, out, log_z = residuals
    shared = _shared(d_out, out)
    dqs, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for start, stop in _rows(q.shape[3]):
        row = lambda x, start=start, stop=stop: x[:, :, :, start:stop]
        missing = ((0, 0), (0, 0), (0, q.shape[3] - stop), (0, 0))
        scores = _row_scores(q, k, segments, start, stop)
        of_q, of_k, of_v = _gradients(
            scores - row(log_z),
            row(q),
            k[:, :, :stop],
            v[:, :, :stop],
            row(d_out),
            row(shared),
        )
        dqs.append(of_q.astype(q.dtype))
        dk, dv = dk + jnp.pad(of_k, missing), dv + jnp.pad(of_v, missing)
    return jnp.concatenate(dqs, axis=3), dk.astype(k.dtype), dv.astype(v.dtype), None


_by_rows.defvjp(_rows_fwd, _rows_bwd)


def _row_scores(q, k, segments, start, stop) -> Float[Array, "B G R Q M"]:
    seen = (jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None])[None]
    if segments is not None:
        queries, keys = segments[:, start:stop], segments[:, :stop]
        seen = seen & (queries[:, :, None] == keys[:, None, :])
    return _scores(q[:, :, :, start:stop], k[:, :, :stop], seen)


# --- By pairs: blocks of queries and keys in loops, for long sequences.


def _by_pairs(
    q: Groups, k: Keys, v: Keys, segments: Int[Array, "B L"] | None
) -> Groups:
    batch, *_, length, _ = q.shape
    missing = -length % BLOCK
    if segments is None:
        segments = jnp.zeros((batch, length), jnp.int32)
    # Keys beyond the end are after every query, so causality masks them.
    q, k, v = (
        _in_blocks(jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, missing), (0, 0)]), -2)
        for x in (q, k, v)
    )
    segments = _in_blocks(jnp.pad(segments, ((0, 0), (0, missing))), -1)
    out = jnp.moveaxis(_attend_pairs(q, k, v, segments), 0, -3)
    return out.reshape(*out.shape[:-3], -1, out.shape[-1])[..., :length, :]


def _in_blocks(x: Array, axis: int) -> Array:
    """Moves the number of blocks of an axis to the front."""
    axis += x.ndim
    x = x.reshape(*x.shape[:axis], -1, BLOCK, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


@jax.custom_vjp
def _attend_pairs(
    q: Float[Array, "N B G R Q K"],
    k: Float[Array, "N B G M K"],
    v: Float[Array, "N B G M K"],
    segments: Int[Array, "N B M"],
) -> Float[Array, "N B G R Q K"]:
    return _pairs_forward(q, k, v, segments)[0]


def _pairs_forward(q, k, v, segments):
    """The result, and the logarithm of each query's sum of exponentials.

    References:
      Milakov, Gimelshein, Online normalizer calculation for softmax, arXiv 1805.02867,
      2018, algorithm 3
    """

    def attend_one(i):
        def add(j, carry):
            total, peak, weight = carry
            scores = _pair_scores(q, k, segments, i, j)
            new = jnp.maximum(peak, jnp.max(scores, axis=-1, keepdims=True))
            p = jnp.exp(scores - new)
            shrink = jnp.exp(peak - new)
            weight = weight * shrink + jnp.sum(p, axis=-1, keepdims=True)
            more = linalg.einsum("bgrqm,bgmk->bgrqk", p.astype(v.dtype), _at(v, j))
            return total * shrink + more, new, weight

        start = (
            jnp.zeros(q.shape[1:], jnp.float32),
            jnp.full((*q.shape[1:-1], 1), MASKED, jnp.float32),
            jnp.zeros((*q.shape[1:-1], 1), jnp.float32),
        )
        total, peak, weight = jax.lax.fori_loop(0, i + 1, add, start)
        return (total / weight).astype(q.dtype), peak + jnp.log(weight)

    return jax.lax.map(attend_one, jnp.arange(q.shape[0]))


def _pairs_fwd(q, k, v, segments):
    out, log_z = checkpoint_name(_pairs_forward(q, k, v, segments), SAVED)
    return out, (q, k, v, segments, out, log_z)


def _pairs_bwd(residuals, d_out):
    q, k, v, segments, out, log_z = residuals
    number = q.shape[0]

    def add_keys(dq, j):
        def add(i, carry):
            dq, dk, dv = carry
            scores = _pair_scores(q, k, segments, i, j)
            d_out_i = _at(d_out, i)
            of_q, of_k, of_v = _gradients(
                scores - log_z[i],
                _at(q, i),
                _at(k, j),
                _at(v, j),
                d_out_i,
                _shared(d_out_i, _at(out, i)),
            )
            return dq.at[i].add(of_q), dk + of_k, dv + of_v

        zeros = jnp.zeros(k.shape[1:], jnp.float32)
        dq, dk, dv = jax.lax.fori_loop(j, number, add, (dq, zeros, zeros))
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq, (dk, dv) = jax.lax.scan(
        add_keys, jnp.zeros(q.shape, jnp.float32), jnp.arange(number)
    )
    return dq.astype(q.dtype), dk, dv, None


_attend_pairs.defvjp(_pairs_fwd, _pairs_bwd)


def _pair_scores(q, k, segments, i, j) -> Float[Array, "B G R Q M"]:
    places = jnp.arange(BLOCK)
    seen = (i > j) | (places[:, None] >= places[None])
    seen = seen[None] & (segments[i][:, :, None] == segments[j][:, None, :])
    return _scores(_at(q, i), _at(k, j), seen)


def _at(x: Array, i: Int[Array, ""]) -> Array:
    """x[i], without a float32 copy of x on CPU."""
    return remat.unpack(remat.pack(x)[i], x.dtype)


# --- Of one block.


def _scores(
    q: Float[Array, "B G R Q K"],
    k: Float[Array, "B G M K"],
    seen: Bool[Array, "#B Q M"],
) -> Float[Array, "B G R Q M"]:
    """Scaled scores in float32."""
    scores = linalg.einsum("bgrqk,bgmk->bgrqm", q, k) / math.sqrt(q.shape[-1])
    return jnp.where(seen[:, None, None], scores, MASKED)


def _gradients(
    log_p: Float[Array, "B G R Q M"],
    q: Float[Array, "B G R Q K"],
    k: Float[Array, "B G M K"],
    v: Float[Array, "B G M K"],
    d_out: Float[Array, "B G R Q K"],
    shared: Float[Array, "B G R Q 1"],
) -> tuple[Float[Array, "B G R Q K"], Float[Array, "B G M K"], Float[Array, "B G M K"]]:
    """What a block adds to the gradients of q, k and v, in float32."""
    scale = 1 / math.sqrt(q.shape[-1])
    p = jnp.exp(log_p)
    dp = linalg.einsum("bgrqk,bgmk->bgrqm", d_out, v)
    ds = (p * (dp - shared)).astype(q.dtype)
    return (
        scale * linalg.einsum("bgrqm,bgmk->bgrqk", ds, k),
        scale * _times_over_queries(ds, q),
        _times_over_queries(p.astype(v.dtype), d_out),
    )


def _times_over_queries(
    scores: Float[Array, "B G R Q M"], x: Float[Array, "B G R Q K"]
) -> Float[Array, "B G M K"]:
    # The other way, XLA on CPU would first write the scores transposed.
    product = linalg.einsum("bgrqk,bgrqm->bgkm", x, scores)
    return linalg.transpose(jax.lax.optimization_barrier(product))


def _shared(d_out: Array, out: Array) -> Array:
    """Of each query: the gradient of its scores, on average."""
    # As a product of matrices: XLA on CPU is slow to sum products of arrays that have
    # an axis of size 1.
    d_out, out = d_out.astype(jnp.float32), out.astype(jnp.float32)
    average = linalg.einsum("bgrqk,bgrqk->bgrq", d_out, out, precision=linalg.HIGHEST)
    return average[..., None]
