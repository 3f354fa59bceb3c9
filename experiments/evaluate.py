"""Evaluates a trained model on text: loss, perplexity and bits per byte.

python -m experiments.evaluate --workdir=runs/smollm_r128-tiny
python -m experiments.evaluate --workdir=runs/smollm_r128-tiny --data='/my/text/*.txt'

Every token of every document is scored once, by a window that slides over the
document. The exit code is 0, or 2 for bad input.
"""

from sct_jax.training import process

if __name__ == "__main__":
    process.start("experiments.evaluate")

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from experiments import json_file
from sct_jax import errors
from sct_jax.data import pipeline, sources, splits
from sct_jax.training import (
    checkpoint,
    overrides,
    perplexity,
    workdir,
)

SPLITS = (*splits.SPLITS, "all")
MAX_SEQ_LEN = 2**20

_SECONDS_BETWEEN_LINES = 10.0


class Text(NamedTuple):
    """Documents to evaluate on.

    Attributes:
      source: as in `data.source`.
      split: "train", "validation" or "all".
      documents: read as they are needed.
      corpus: hash of both splits; None where the source was not divided.
    """

    source: str
    split: str
    documents: Iterable[str]
    corpus: str | None


class Result(NamedTuple):
    """What was found.

    Attributes:
      figures: of the whole text.
      documents: the score of each document, in order.
      seq_len: tokens that the model read at once.
      stride: tokens that the window moved on.
    """

    figures: perplexity.Figures
    documents: list[perplexity.DocumentScore]
    seq_len: int
    stride: int


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    flags = _parser().parse_flags(sys.argv[1:] if argv is None else argv)
    try:
        errors.check(
            "--documents",
            flags.json is not None or not flags.documents,
            "needs --json, the file that they go to",
        )
        _check_positive("--max_documents", flags.max_documents)
        run, record = workdir.load_with_record(flags.workdir)
        seq_len, stride = window(
            run,
            seq_len=flags.seq_len,
            stride=flags.stride,
            beyond_context=flags.beyond_context,
        )
        text = open_text(
            run,
            source=flags.data,
            split=flags.split,
            text_field=flags.text_field,
            max_documents=flags.max_documents,
            log=process.say,
        )
        if text.source == run.config.data.source:
            _note_on_changes(record, text)
        result = evaluate(run, text, seq_len=seq_len, stride=stride, log=process.say)
        print(describe(text, result))
        if flags.json is not None:
            values = to_json(text, result, documents=flags.documents)
            json_file.write(flags.json, values)
    except errors.UserError as error:
        overrides.fail(str(error))
    return 0


def _parser() -> overrides.FlagParser:
    parser = overrides.FlagParser(__doc__ or "")
    parser.add_argument("--workdir", help="a run, with a checkpoint", required=True)
    parser.add_argument(
        "--data", help="text, as in data.source (default: that of the run)"
    )
    parser.add_argument(
        "--split",
        choices=SPLITS,
        help="part of it (default: all of other files, else validation)",
    )
    parser.add_argument(
        "--text_field", help="key of the text in JSON lines (default: that of the run)"
    )
    parser.add_argument(
        "--seq_len",
        type=int,
        help="tokens that the model reads at once (default: as in training)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        help="tokens that the window moves on (default: half of --seq_len); smaller "
        "ones give each token more context, and cost more",
    )
    parser.add_argument(
        "--beyond_context",
        action="store_true",
        help="allow a --seq_len above that of training",
    )
    parser.add_argument(
        "--max_documents", type=int, help="evaluate so many, evenly spaced"
    )
    json_file.add_flag(parser)
    parser.add_argument(
        "--documents",
        action="store_true",
        help="with --json: nats, tokens and bytes of every document too",
    )
    return parser


def window(
    run: workdir.LoadedRun,
    *,
    seq_len: int | None,
    stride: int | None,
    beyond_context: bool = False,
) -> tuple[int, int]:
    """Returns the sizes of the window, with their defaults.

    Raises:
      UserError: for a window longer than in training, unless that is asked for, and
        for a stride that is not in 1..seq_len.
    """
    context = run.config.data.seq_len
    _check_positive("--seq_len", seq_len)
    errors.check(
        "--seq_len",
        seq_len is None or seq_len <= MAX_SEQ_LEN,
        f"{seq_len} is above {MAX_SEQ_LEN}, beyond any window; lower it",
    )
    seq_len = context if seq_len is None else seq_len
    errors.check(
        "--seq_len",
        beyond_context or seq_len <= context,
        f"{seq_len} is above the context of {context} that the model was trained with; "
        "lower it, or add --beyond_context",
    )
    if stride is None:
        stride = -(-seq_len // 2)
    errors.check(
        "--stride",
        1 <= stride <= seq_len,
        f"{stride} must be in 1..{seq_len}: a window of {seq_len} tokens that moves on "
        "by more would leave tokens out",
    )
    return seq_len, stride


def open_text(
    run: workdir.LoadedRun,
    *,
    source: str | None = None,
    split: str | None = None,
    text_field: str | None = None,
    max_documents: int | None = None,
    log: Callable[[str], None] = print,
) -> Text:
    """Returns the documents of a source.

    Args:
      run: its configuration says what is not given here.
      source: as in `data.source`.
      split: "train", "validation" or "all"; None for validation, or all of files other
        than those of the run.
      text_field: as in `data.text_field`.
      max_documents: most documents, evenly spaced; None for all.
      log: receives a line if cached text is damaged, and written again.

    Raises:
      UserError: there is no such source, or no document in it.
    """
    config = run.config.data
    if text_field is not None:
        config = dataclasses.replace(config, text_field=text_field)
    own = source in (None, config.source)
    if not own:
        config = dataclasses.replace(config, source=source, split=None)
    if split is None:
        is_files = config.source != "stdlib" and not config.source.startswith("tfds:")
        split = "all" if is_files and not own else "validation"
    opened = pipeline.open_source(config, log=log)
    corpus = None
    if split == "all":
        opened = dataclasses.replace(opened, cut=None)
    else:
        opened, summary = sources.scan(opened)
        corpus = summary.hash
    parts = splits.SPLITS if split == "all" else (split,)
    read = lambda: (text for part in parts for text in sources.documents(opened, part))
    count = None if max_documents is None else sum(1 for _ in read())
    return Text(config.source, split, _spaced(read(), count, max_documents), corpus)


def _spaced(
    documents: Iterator[str], count: int | None, most: int | None
) -> Iterator[str]:
    """Yields at most so many of `count` documents, evenly spaced."""
    if count is None or most is None or most >= count:
        yield from documents
        return
    chosen = {k * count // most for k in range(most)}
    yield from (text for at, text in enumerate(documents) if at in chosen)


def evaluate(
    run: workdir.LoadedRun,
    text: Text,
    *,
    seq_len: int,
    stride: int,
    log: Callable[[str], None] = print,
) -> Result:
    """Returns the figures of a text, and of each document.

    Args:
      run: the model.
      text: the documents.
      seq_len: tokens that the model reads at once.
      stride: tokens that the window moves on.
      log: receives a line about the progress now and then.

    Raises:
      UserError: there is no text, or the tokenizer changes it.
    """
    scores: list[perplexity.DocumentScore] = []
    told = time.monotonic()
    for score in perplexity.score_documents(
        run.params,
        run.config.model,
        run.tokenizer,
        text.documents,
        seq_len=seq_len,
        stride=stride,
    ):
        scores.append(score)
        if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            tokens = sum(each.tokens for each in scores)
            log(f"so far: {tokens:,} tokens, documents: {len(scores):,}")
    return Result(perplexity.summarise(scores), scores, seq_len, stride)


def describe(text: Text, result: Result) -> str:
    """Returns the figures in words."""
    figures = result.figures
    return (
        f"{text.source} ({text.split}): {figures.documents:,} documents, "
        f"{figures.tokens:,} tokens, {figures.bytes:,} bytes; window {result.seq_len}, "
        f"stride {result.stride}\n"
        f"loss           {_shown(figures.loss)} nats per token\n"
        f"perplexity     {_shown(figures.perplexity)}\n"
        f"bits per byte  {_shown(figures.bits_per_byte)}"
    )


def _shown(estimate: perplexity.Estimate) -> str:
    value, error = estimate
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def to_json(text: Text, result: Result, *, documents: bool) -> dict[str, Any]:
    """Returns the figures as JSON holds them, with each document if asked."""
    figures = result.figures._asdict()
    for name, value in figures.items():
        if isinstance(value, perplexity.Estimate):
            figures[name] = value._asdict()
    found = {
        "source": text.source,
        "split": text.split,
        "seq_len": result.seq_len,
        "stride": result.stride,
        **figures,
    }
    if documents:
        found["per_document"] = [score._asdict() for score in result.documents]
    return found


def _note_on_changes(record: checkpoint.Record, text: Text) -> None:
    """Says so if the source of the run has other text now."""
    if text.corpus not in (None, record.get("corpus", text.corpus)):
        process.say(
            f"note: {text.source!r} has other text than the run began with, so some of "
            "its validation text may have been trained on"
        )


def _check_positive(flag: str, value: int | None) -> None:
    errors.check(flag, value is None or value >= 1, f"{value} must be at least 1")
