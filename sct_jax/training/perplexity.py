"""Loss, perplexity and bits per byte of a model on whole documents."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sct_jax import data, errors, model, scoring


class DocumentScore(NamedTuple):
    """What a model makes of one document.

    Attributes:
      nats: negative log-probability of its tokens, given the document mark.
      tokens: their number.
      bytes: of its text in UTF-8.
    """

    nats: float
    tokens: int
    bytes: int


class Estimate(NamedTuple):
    """A figure with its standard error, None where one document cannot tell it."""

    value: float
    standard_error: float | None


class Figures(NamedTuple):
    """What a model makes of a text.

    Attributes:
      loss: nats per token.
      perplexity: e to the loss.
      bits_per_byte: of UTF-8; does not depend on the tokenizer.
      documents: their number.
      tokens: number of scored tokens.
      bytes: of the text in UTF-8.
    """

    loss: Estimate
    perplexity: Estimate
    bits_per_byte: Estimate
    documents: int
    tokens: int
    bytes: int


def score_documents(
    params: model.Params,
    config: model.ModelConfig,
    tokenizer: data.Tokenizer,
    texts: Iterable[str],
    *,
    seq_len: int,
    stride: int,
) -> Iterator[DocumentScore]:
    """Yields the score of each document, in order.

    Every token is scored once, by the sliding window of `scoring.windows`. A document
    begins with its mark, which is read but not scored, and sees no other document.

    Args:
      params: the model.
      config: its architecture.
      tokenizer: of the model.
      texts: the documents; read as they are needed.
      seq_len: tokens that the model reads at once.
      stride: tokens that the window moves on, in 1..seq_len.

    Raises:
      UserError: the tokenizer changes a text.
    """
    sizes: list[int] = []  # of documents that are not scored yet

    def requests() -> Iterator[scoring.Request]:
        for text in texts:
            sizes.append(len(text.encode()))
            ids = tokenizer.encode(text)
            yield scoring.Request([tokenizer.document_mark, *ids])

    for scores in scoring.score(
        params, config, requests(), seq_len=seq_len, stride=stride
    ):
        nats = float(np.sum(scores.nats, dtype=np.float64))
        yield DocumentScore(nats, len(scores.nats), sizes.pop(0))


def summarise(documents: Sequence[DocumentScore]) -> Figures:
    """Returns the figures of a text.

    The loss is the ratio r = sum_i y_i / sum_i x_i of nats y and tokens x (or bytes)
    over n documents. Tokens of one document are not independent, documents are: each
    is a cluster, and the variance that of a ratio estimator,

      var(r) = n / (n - 1) * sum_i (y_i - r x_i)^2 / (sum_i x_i)^2

    to first order in 1 / n. The standard error of the perplexity exp(r) is exp(r) times
    that of r.

    Raises:
      UserError: there is no document with a token.

    References:
      Cochran, Sampling Techniques, third edition, 1977, section 2.11
    """
    nats, tokens, size = np.array(documents, np.float64).reshape(-1, 3).T
    errors.check("--data", bool(tokens.sum() > 0), "has no text to score; name more")
    loss = _ratio(nats, tokens)
    perplexity = math.exp(min(loss.value, 700.0))
    return Figures(
        loss=loss,
        perplexity=_scaled(Estimate(1.0, loss.standard_error), perplexity),
        bits_per_byte=_scaled(_ratio(nats, size), 1 / math.log(2)),
        documents=len(documents),
        tokens=int(tokens.sum()),
        bytes=int(size.sum()),
    )


def _ratio(y: np.ndarray, x: np.ndarray) -> Estimate:
    ratio, count = y.sum() / x.sum(), len(x)
    if count < 2:
        return Estimate(float(ratio), None)
    spread = np.sum(np.square(y - ratio * x)) * count / (count - 1)
    return Estimate(float(ratio), float(np.sqrt(spread) / x.sum()))


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    value, error = estimate
    return Estimate(value * factor, None if error is None else error * factor)
