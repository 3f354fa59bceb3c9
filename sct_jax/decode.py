"""Generates text token by token, with the keys and values so far in a cache.

`generate` is the whole of it. `prefill` reads prompts, `advance` reads one more token
per row; both are pure. The dense matrices of factors are never built.

Axes beside those of `model`: P length of the longest prompt, S slots of the cache, Q
query heads per kv head.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sct_jax import attention, errors, linalg, model, sampling, spectral

_SLOTS = 64
"""The cache and the prompts are padded to a multiple of it, so that programs of other
lengths need not be compiled."""

_linear = functools.partial(spectral.linear, flatten_rows=True)


class Cache(NamedTuple):
    """What the next tokens need to know of the tokens before.

    Attributes:
      keys: one array per layer: rotated keys (B, G, S, K), or in a latent cache what
        factors contract their input to, (B, S, R).
      values: values (B, G, S, K), or (B, S, R).
      lengths: tokens per row so far; token i is in slot i.
    """

    keys: tuple[Float[Array, "B G S K"] | Float[Array, "B S R"], ...]
    values: tuple[Float[Array, "B G S K"] | Float[Array, "B S R"], ...]
    lengths: Int[Array, " B"]


def prepare(params: model.Params, config: model.ModelConfig) -> model.Params:
    """Returns parameters to decode with: layers apart, in the compute dtype.

    Slices of stacked layers would be copied for every token. What is as it should be is
    not copied, so a second call costs nothing.
    """
    dtype = jnp.dtype(config.compute_dtype)
    cast = jax.tree.map(lambda p: p.astype(dtype), params)
    return model.unstack_layers(cast)


def init_cache(
    params: model.Params,
    config: model.ModelConfig,
    *,
    batch: int,
    slots: int,
    latent: bool = False,
) -> Cache:
    """Returns an empty cache.

    Args:
      params: from `prepare`; only shapes are read.
      config: architecture of the model.
      batch: B.
      slots: S, at least the tokens of the longest row.
      latent: whether to keep R numbers per token and factorised matrix k or v, in place
        of the G K of a key or value. Saves memory where R < G K, and costs the product
        with the other factor for all slots, at every token.

    Raises:
      UserError: for `latent` where k or v is in blocks, whose bottleneck is no smaller
        than a key.
    """
    for name in ("k", "v"):
        in_blocks = any(spectral.is_blocks(w[name]) for w in params[model.LAYERS])
        errors.check(
            "latent_cache",
            not (latent and in_blocks),
            f"matrix {name!r} is in blocks, whose bottleneck is as large as what a "
            "cache keeps otherwise; leave it out",
        )
    dtype = jnp.dtype(config.compute_dtype)

    def zeros(w):
        if latent and spectral.is_factors(w):
            return jnp.zeros((batch, slots, w[0].shape[-1]), dtype)
        shape = (batch, config.num_kv_heads, slots, config.head_size)
        return jnp.zeros(shape, dtype)

    layers = params[model.LAYERS]
    return Cache(
        tuple(zeros(layer["k"]) for layer in layers),
        tuple(zeros(layer["v"]) for layer in layers),
        jnp.zeros(batch, jnp.int32),
    )


def bytes_per_token(
    params: model.Params, config: model.ModelConfig, *, latent: bool = False
) -> int:
    """Returns the bytes that one token of one row takes in the caches of all layers.

    Arguments as in `init_cache`.
    """
    cache = jax.eval_shape(
        lambda: init_cache(params, config, batch=1, slots=1, latent=latent)
    )
    return sum(x.size * x.dtype.itemsize for x in (*cache.keys, *cache.values))


def prefill(
    params: model.Params,
    tokens_BP: Int[Array, "B P"],
    lengths_B: Int[Array, " B"],
    cache: Cache,
    config: model.ModelConfig,
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads prompts into an empty cache; returns logits of the token after each.

    Args:
      params: from `prepare`.
      tokens_BP: prompts, each followed by padding of any token.
      lengths_B: number of tokens of each prompt, at least 1.
      cache: empty, with S >= P.
      config: architecture of the model.
    """
    x_BPD = model.embed(params, tokens_BP, config)
    rope = model.rotary_table(tokens_BP.shape[1], config)
    keys, values = [], []
    for layer, k_slots, v_slots in zip(
        params[model.LAYERS], cache.keys, cache.values, strict=True
    ):
        q, k, v = model.attention_inputs(layer, x_BPD, config=config, linear=_linear)
        k = model.rotate(k, rope)
        attended = attention.attend(model.rotate(q, rope), k, v)
        latents = _latents(layer, x_BPD, config)
        keys.append(_fill(k_slots, _as_slots(k, latents, "k", like=k_slots)))
        values.append(_fill(v_slots, _as_slots(v, latents, "v", like=v_slots)))
        x_BPD = x_BPD + _linear(attended.reshape(*x_BPD.shape[:2], -1), layer["o"])
        x_BPD = model.add_mlp(layer, x_BPD, config=config, linear=_linear)
    last = jnp.take_along_axis(x_BPD, (lengths_B - 1)[:, None, None], axis=1)
    logits_BV = model.logits(params, last, config, linear=_linear)[:, 0]
    return logits_BV, Cache(tuple(keys), tuple(values), lengths_B)


def advance(
    params: model.Params,
    tokens_B: Int[Array, " B"],
    cache: Cache,
    config: model.ModelConfig,
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads one token per row; returns the logits of the next and the cache.

    Args:
      params: from `prepare`.
      tokens_B: the token after those in the cache.
      cache: with a free slot in every row.
      config: architecture of the model.
    """
    x_B1D = model.embed(params, tokens_B[:, None], config)
    position_B = cache.lengths
    rope = _rotary_at(position_B[:, None], config)
    slot_rope = model.rotary_table(cache.keys[0].shape[-2], config)
    keys, values = [], []
    for layer, k_slots, v_slots in zip(
        params[model.LAYERS], cache.keys, cache.values, strict=True
    ):
        q, k, v = model.attention_inputs(layer, x_B1D, config=config, linear=_linear)
        latents = _latents(layer, x_B1D, config)
        k_new = _as_slots(model.rotate(k, rope), latents, "k", like=k_slots)
        v_new = _as_slots(v, latents, "v", like=v_slots)
        attended = _attend_slots(
            model.rotate(q, rope)[:, 0],
            (k_slots, v_slots),
            (k_new, v_new),
            (slot_rope, rope),
            layer,
            position_B,
            config,
        )
        k_new, v_new = _after(attended, k_new), _after(attended, v_new)
        x_B1D = x_B1D + _linear(attended[:, None], layer["o"])
        x_B1D = model.add_mlp(layer, x_B1D, config=config, linear=_linear)
        keys.append(_write(k_slots, k_new, position_B))
        values.append(_write(v_slots, v_new, position_B))
    logits_BV = model.logits(params, x_B1D, config, linear=_linear)[:, 0]
    return logits_BV, Cache(tuple(keys), tuple(values), position_B + 1)


def _rotary_at(positions: Int[Array, "B L"], config: model.ModelConfig):
    angles = positions[..., None] * model.rotary_frequencies(config)[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def _latents(layer, x_BLD, config) -> dict[str, Float[Array, "B L R"]]:
    """What k and v contract their input to; nothing for dense ones."""
    h_BLD = model.rms_norm(x_BLD, layer["attention_norm"], config.norm_eps)
    return {
        name: spectral.contract(h_BLD, layer[name])
        for name in ("k", "v")
        if spectral.is_factors(layer[name]) and not spectral.is_blocks(layer[name])
    }


def _as_slots(heads_BLGK, latents, name, *, like):
    """Tokens in the form of slots: (B, G, L, K), or latents (B, L, R)."""
    new = latents[name] if like.ndim == 3 else heads_BLGK.swapaxes(1, 2)
    return new.astype(like.dtype)


def _fill(slots, new):
    """Slots with the first tokens of every row."""
    missing = slots.shape[-2] - new.shape[-2]
    padding = [(0, 0)] * (new.ndim - 2) + [(0, missing), (0, 0)]
    return jnp.pad(new, padding)


def _write(slots, new, position_B):
    """Slots with one more token per row."""

    def put(slots, new, position):
        start = (*[0] * (slots.ndim - 2), position, 0)
        return jax.lax.dynamic_update_slice(slots, new, start)

    if slots.shape[0] == 1:  # vmap would make it a scatter
        return put(slots[0], new[0], position_B[0])[None]
    return jax.vmap(put)(slots, new, position_B)


def _after(other_BX, x):
    """x, computed after other_BX. Slots that are no longer read are written in place.

    XLA on CPU does not keep the order of an optimization barrier, and copies the cache.
    """
    zero_B = other_BX[:, 0] * 0
    return x + jnp.expand_dims(zero_B, tuple(range(1, x.ndim))).astype(x.dtype)


def _attend_slots(q_BHK, slots, new, ropes, layer, position_B, config):
    """Attention of one query per row over the slots before it and itself, (B, H K)."""
    batch, heads, size = q_BHK.shape
    groups = config.num_kv_heads
    q = q_BHK.reshape(batch, groups, heads // groups, size)
    keys = (slots[0], new[0])
    if slots[0].ndim == 3:
        keys = [
            _keys_of(latents, rope, layer, config)
            for latents, rope in zip(keys, ropes, strict=True)
        ]
    past, own = (linalg.einsum("bgqk,bgsk->bgqs", q, k) / math.sqrt(size) for k in keys)
    seen_BS = jnp.arange(past.shape[-1])[None] < position_B[:, None]
    past = jnp.where(seen_BS[:, None, None], past, attention.MASKED)
    p = jax.nn.softmax(jnp.concatenate([past, own], axis=-1), axis=-1).astype(q.dtype)
    values = (slots[1], new[1])
    axes = "bgqs,bgsk->bgqk" if slots[1].ndim == 4 else "bgqs,bsr->bgqr"
    past, own = (
        linalg.einsum(axes, p, v)
        for p, v in zip((p[..., :-1], p[..., -1:]), values, strict=True)
    )
    out = (past + own).astype(q.dtype)
    if slots[1].ndim == 3:  # values are linear in latents, so their sum came first
        out = _values_of(out, layer["v"], config)
    return out.reshape(batch, heads * size)


def _values_of(latents_BGQR, w, config):
    """Values (B, G, Q, K) of sums of latents."""
    if spectral.is_spectral(w):
        latents_BGQR = latents_BGQR * jnp.expand_dims(w.s, (0, 1, 2))
    last = w[-1].reshape(config.num_kv_heads, config.head_size, -1)
    out = linalg.einsum("bgqr,gkr->bgqk", latents_BGQR, last.astype(latents_BGQR.dtype))
    return out.astype(latents_BGQR.dtype)


def _keys_of(latents_BSR, rope, layer, config):
    """Rotated keys (B, G, S, K) of tokens."""
    batch, slots, rank = latents_BSR.shape
    k = spectral.expand(latents_BSR.reshape(-1, rank), layer["k"])
    k_BSGK = k.reshape(batch, slots, config.num_kv_heads, config.head_size)
    if config.qk_norm:
        k_BSGK = model.rms_norm(k_BSGK, layer["k_norm"], config.norm_eps)
    return model.rotate(k_BSGK, rope).swapaxes(1, 2)


# --- The loop.


class _Progress(NamedTuple):
    """Carried from token to token."""

    cache: Cache
    logits: Float[Array, "B V"]
    seen: Bool[Array, "B V"]
    ended: Bool[Array, " B"]


def generate(
    params: model.Params,
    config: model.ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    key: PRNGKeyArray,
    sampler: sampling.SamplingConfig = sampling.PLAIN,
    stop: Collection[int] = (),
    latent: bool = False,
) -> list[list[int]]:
    """Returns the tokens that follow each prompt, up to and without a stop token.

    Arguments and errors as in `stream`.
    """
    found: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(
        params,
        config,
        prompts,
        num_tokens=num_tokens,
        key=key,
        sampler=sampler,
        stop=stop,
        latent=latent,
    ):
        for row, token in zip(found, tokens, strict=True):
            if token is not None:
                row.append(token)
    return found


def stream(
    params: model.Params,
    config: model.ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    num_tokens: int,
    key: PRNGKeyArray,
    sampler: sampling.SamplingConfig = sampling.PLAIN,
    stop: Collection[int] = (),
    latent: bool = False,
) -> Iterator[list[int | None]]:
    """Yields the next token of each prompt; None for those that ended.

    Prompts may differ in length. Each gets what it would get alone, up to rounding. The
    first token comes after the prompts were read, and none comes before it is asked
    for.

    Args:
      params: from `model.init`, a run or a checkpoint; `prepare` is called here.
      config: architecture of the model. Its `attention` is not used.
      prompts: token ids, at least one per prompt.
      num_tokens: most tokens per prompt.
      key: random key.
      sampler: how tokens are drawn.
      stop: tokens that end a row; they are not returned.
      latent: as in `init_cache`.

    Raises:
      ValueError: for no prompt, an empty one, a token outside the vocabulary, or
        num_tokens below 1.
      UserError: for an invalid sampler, and as `init_cache`.
    """
    if not prompts or not all(map(len, prompts)):
        raise ValueError("every prompt must have at least one token")
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    for prompt in prompts:
        model.check_tokens(prompt, config)
    sampler.validate()
    return _stream(
        params, config, prompts, num_tokens, key, sampler, tuple(sorted(stop)), latent
    )


def _stream(params, config, prompts, num_tokens, key, sampler, stop, latent):
    config = dataclasses.replace(config, attention="auto", remat="none")
    params = prepare(params, config)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    width = _padded(int(lengths.max()))
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    slots = _padded(int(lengths.max()) + num_tokens)
    progress = _start(params, tokens, lengths, config, max(slots, width), latent)
    ahead: Any = None  # asked for before the host reads the last one
    for number in range(num_tokens):
        progress, drawn = _continue(
            params, progress, jax.random.fold_in(key, number), config, sampler, stop
        )
        if ahead is not None:
            yield from _read(ahead)
            if bool(np.all(np.asarray(ahead) < 0)):
                return
        ahead = drawn
    yield from _read(ahead)


def _read(drawn: Int[Array, " B"]) -> list[list[int | None]]:
    """The tokens of a step, or nothing if all rows have ended."""
    tokens = [None if token < 0 else token for token in np.asarray(drawn).tolist()]
    return [tokens] if any(token is not None for token in tokens) else []


def _padded(length: int) -> int:
    return -(-length // _SLOTS) * _SLOTS


@functools.partial(jax.jit, static_argnames=("config", "slots", "latent"))
def _start(params, tokens_BP, lengths_B, config, slots, latent):
    batch, width = tokens_BP.shape
    cache = init_cache(params, config, batch=batch, slots=slots, latent=latent)
    logits_BV, cache = prefill(params, tokens_BP, lengths_B, cache, config)
    rows = jnp.arange(batch)[:, None]
    is_prompt = jnp.arange(width)[None] < lengths_B[:, None]
    seen = jnp.zeros(logits_BV.shape, bool).at[rows, tokens_BP].max(is_prompt)
    return _Progress(cache, logits_BV, seen, jnp.zeros(batch, bool))


@functools.partial(
    jax.jit, static_argnames=("config", "sampler", "stop"), donate_argnames="progress"
)
def _continue(params, progress, key, config, sampler, stop):
    """One more token per row, -1 for rows that have ended."""
    drawn = sampling.draw(key, progress.logits, progress.seen, sampler)
    ended = progress.ended | jnp.isin(drawn, jnp.array(stop, jnp.int32))
    seen = progress.seen.at[jnp.arange(drawn.shape[0]), drawn].set(True)
    logits_BV, cache = advance(params, drawn, progress.cache, config)
    after = _Progress(cache, logits_BV, seen, ended)
    return after, jnp.where(ended, -1, drawn)
