"""How likely a model finds given tokens.

Sequences may be longer than the window of the model: they are scored by a window that
slides. The logits of a batch never exist together.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sct_jax import losses, model, remat

TOKENS_PER_BATCH = 8192

_LENGTHS = 4
"""Numbers of lengths that windows are padded to: the whole, a half, a quarter, ..."""

_BATCHES_AHEAD = 16
"""Sequences are collected until they fill so many batches, so that few rows are
padding."""


class Request(NamedTuple):
    """A sequence to score.

    Attributes:
      tokens: N + 1 token ids.
      first: index of the first token to score, at least 1. Those before are context.
    """

    tokens: Sequence[int]
    first: int = 1


class Scores(NamedTuple):
    """Scores of the tokens from `Request.first` on.

    Attributes:
      nats: negative log-probability of each token.
      is_greedy: whether each is the likeliest token.
    """

    nats: Float[np.ndarray, " N"]
    is_greedy: Bool[np.ndarray, " N"]


class Window(NamedTuple):
    """The model reads tokens `start` to `end - 1`, and scores `begin` to `end`.

    All are indices into a sequence; `end` is included.
    """

    start: int
    begin: int
    end: int


def windows(
    num_tokens: int, *, first: int, seq_len: int, stride: int
) -> Iterator[Window]:
    """Yields windows that score every token from `first` on exactly once.

    The first window scores as many tokens as it holds, every other one at most
    `stride`. Each ends at the last token that it scores, so each token has at least
    `seq_len - stride` tokens before it, or all there are.

    Args:
      num_tokens: length of the sequence.
      first: index of the first token to score, at least 1.
      seq_len: tokens that the model reads at once.
      stride: in 1..seq_len.
    """
    last = num_tokens - 1
    begin = first
    while begin <= last:
        end = min(last, seq_len if begin <= seq_len else begin + stride - 1)
        yield Window(max(0, end - seq_len), begin, end)
        begin = end + 1


def score(
    params: model.Params,
    config: model.ModelConfig,
    requests: Iterable[Request],
    *,
    seq_len: int,
    stride: int,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> Iterator[Scores]:
    """Yields the scores of each request, in order.

    Few programs are compiled: for windows of at most four lengths. A result does not
    depend on what else is scored, up to rounding.

    Args:
      params: from `model.init`, a run or a checkpoint.
      config: architecture of the model. Its `attention` is not used.
      requests: read as they are needed.
      seq_len: tokens that the model reads at once.
      stride: as in `windows`. Smaller ones give more context, and cost more.
      tokens_per_batch: tokens that the model reads together, at least one window.

    Raises:
      ValueError: for a stride that is not in 1..seq_len, a token outside the
        vocabulary, or a first token without one before it.
    """
    if not 1 <= stride <= seq_len:
        raise ValueError(f"stride must be in 1..{seq_len}, got {stride}")
    config = dataclasses.replace(config, attention="auto", remat="none")
    group: list[Request] = []
    size = 0
    for request in requests:
        _check(request, config)
        group.append(request)
        size += len(request.tokens)
        if size >= _BATCHES_AHEAD * tokens_per_batch:
            yield from _score(params, config, group, seq_len, stride, tokens_per_batch)
            group, size = [], 0
    yield from _score(params, config, group, seq_len, stride, tokens_per_batch)


def _check(request: Request, config: model.ModelConfig) -> None:
    if request.first < 1:
        raise ValueError(f"first must be at least 1, got {request.first}")
    if len(request.tokens) == 0:
        return
    model.check_tokens(request.tokens, config)


def _score(params, config, group, seq_len, stride, tokens_per_batch):
    """The scores of a list of requests."""
    tokens = [np.asarray(request.tokens, np.int32) for request in group]
    found = [
        Scores(np.zeros(size, np.float32), np.zeros(size, bool))
        for size in (max(len(r.tokens) - r.first, 0) for r in group)
    ]
    by_length: dict[int, list[tuple[int, Window]]] = {}
    for number, request in enumerate(group):
        for window in windows(
            len(request.tokens), first=request.first, seq_len=seq_len, stride=stride
        ):
            length = _padded(window.end - window.start, seq_len)
            by_length.setdefault(length, []).append((number, window))
    for length, rows in sorted(by_length.items()):
        size = max(1, tokens_per_batch // length)
        for at in range(0, len(rows), size):
            batch = rows[at : at + size]
            inputs = np.zeros((size, length), np.int32)
            targets = np.zeros((size, length), np.int32)
            for row, (number, window) in enumerate(batch):
                read = tokens[number][window.start : window.end + 1]
                inputs[row, : len(read) - 1] = read[:-1]
                targets[row, : len(read) - 1] = read[1:]
            nats, is_greedy = jax.device_get(
                _token_scores(params, inputs, targets, config)
            )
            for row, (number, window) in enumerate(batch):
                shift = 1 + window.start
                these = slice(window.begin - shift, window.end + 1 - shift)
                first = group[number].first
                those = slice(window.begin - first, window.end + 1 - first)
                found[number].nats[those] = nats[row, these]
                found[number].is_greedy[those] = is_greedy[row, these]
    yield from found


def _padded(length: int, seq_len: int) -> int:
    """The least length with a program of its own that holds a window."""
    lengths = [-(-seq_len // 2**halvings) for halvings in range(_LENGTHS)]
    return min(each for each in lengths if each >= length)


@functools.partial(jax.jit, static_argnames="config")
def _token_scores(
    params: model.Params,
    inputs_BL: Int[Array, "B L"],
    targets_BL: Int[Array, "B L"],
    config: model.ModelConfig,
) -> tuple[Float[Array, "B L"], Bool[Array, "B L"]]:
    """Nats of each target, and whether it is the likeliest token.

    Padding follows what counts, so attention, which is causal, does not see it.
    """
    x_BLD = model.hidden(params, inputs_BL, config)
    batch, length = targets_BL.shape
    size = min(length, -(-losses.TOKENS_PER_CHUNK // batch))

    def of_chunk(_, chunk):
        x_BCD, targets_BC = chunk
        logits_BCV = model.logits(params, x_BCD, config)
        log_p_BCV = jax.nn.log_softmax(logits_BCV, axis=-1)
        chosen_BC1 = jnp.take_along_axis(log_p_BCV, targets_BC[..., None], axis=-1)
        is_greedy = jnp.argmax(logits_BCV, axis=-1) == targets_BC
        return None, (-chosen_BC1[..., 0], is_greedy)

    chunks = tuple(remat.in_chunks(array, size) for array in (x_BLD, targets_BL))
    _, found = jax.lax.scan(of_chunk, None, chunks)
    whole = lambda x: x.swapaxes(0, 1).reshape(batch, -1)[:, :length]
    nats_BL, is_greedy_BL = map(whole, found)
    return nats_BL, is_greedy_BL
