"""Batches of tokens, at any step in O(1), from a corpus that is prepared once."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from sct_jax import errors, paths
from sct_jax.data import cache, patterns, settings, sources, splits, tokens
from sct_jax.data import tokenizer as tokenizer_lib

# More text hardly improves a tokenizer. Of a larger corpus it sees every k-th chunk.
# 100 MB take about 20 seconds on 2 cores.
_TRAINER_BYTES = 100_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenized corpus.

    Attributes:
      tokenizer: encodes and decodes its text.
      train: ids of the training documents, each after a document mark: (tokens,).
      validation: ids of the validation documents, likewise.
      documents: number in both splits.
      bytes: of UTF-8 text in both splits.
      hash: SHA-256 of the text of both splits, equal on every machine.
    """

    tokenizer: tokenizer_lib.Tokenizer
    train: np.memmap
    validation: np.memmap
    documents: int
    bytes: int
    hash: str


def prepare(
    config: settings.DataConfig, *, vocab_size: int, log: Callable[[str], None] = print
) -> Corpus:
    """Returns the tokenized corpus, from the cache or built and cached.

    Files with unchanged names, sizes and times count as unchanged and are not read (see
    `sources.Source`). Changed ones are hashed, and cached tokens of the same text and
    tokenizer are still used. Cached files are read in full each time, about half
    a second per GB; those that are not as they were written are made again.

    Args:
      config: the corpus and tokenizer.
      vocab_size: of the model. A tokenizer trained here gets exactly as many if
        the text has enough pairs to merge.
      log: receives a few lines: progress, counts of files, documents, bytes and tokens,
        skipped documents, the hash, and which cached file was damaged.

    Raises:
      UserError: a field has an invalid value.
    """
    config.validate()
    root = _cache_dir(config)
    given = None
    if config.tokenizer is not None:
        given = tokenizer_lib.Tokenizer.find(config.tokenizer)
        _check_vocab_size(given, vocab_size, path=config.tokenizer)
    recipe = given.hash if given else f"trained {vocab_size}"

    source = _open(config, root, log=log)
    lookup = os.path.join(root, "lookup", f"{_key(source.fingerprint, recipe)}.json")
    found = _look_up(lookup, log=log)
    if found is None:
        log(f"data: reading {patterns.shown(source.name)}")
        source, summary = sources.scan(source)
        folder = os.path.join(root, _key(summary.hash, recipe))

        def build(partial: str) -> None:
            tokenizer = given or tokens.kept_tokenizer(
                folder, text_hash=summary.hash, vocab_size=vocab_size
            )
            if tokenizer is None:
                tokenizer = _train(source, summary, vocab_size=vocab_size, log=log)
            total = sum(summary.bytes.values())
            log(f"data: encoding {total:,} bytes, once; kept in {folder}")
            tokens.build(
                partial,
                source,
                summary=summary,
                tokenizer=tokenizer,
                key=os.path.basename(folder),
            )
            if _open(config, root, log=log).fingerprint != source.fingerprint:
                raise errors.UserError(
                    f"data.source: files of {source.name!r} changed while they were "
                    "read; run again once they stop changing"
                )

        opened = cache.folder(folder, build=build, load=_load, log=log)
        record = {
            "lookup": os.path.basename(lookup),
            "folder": os.path.basename(folder),
            "summary": dataclasses.asdict(summary),
        }
        try:
            cache.write_record(lookup, record)
        except errors.UserError as error:  # tokens that others wrote, for all to read
            log(f"{error}; the next run reads the text again")
    else:
        summary, opened = found
    log(_describe(source.name, summary, opened))
    return Corpus(
        tokenizer=opened.tokenizer,
        train=opened.tokens["train"],
        validation=opened.tokens["validation"],
        documents=sum(summary.documents.values()),
        bytes=sum(summary.bytes.values()),
        hash=summary.hash,
    )


class _Opened(NamedTuple):
    """The tokenizer of a folder of tokens, and the tokens of each split."""

    tokenizer: tokenizer_lib.Tokenizer
    tokens: dict[str, np.memmap]


def _load(folder: str) -> _Opened:
    """Returns what a folder holds, once all of it is verified.

    Raises:
      Damaged: it is not as it was written, or not where it was written.
    """
    metadata = tokens.read_metadata(folder)
    if metadata.get("key") != os.path.basename(folder):
        raise cache.Damaged(f"{folder!r} holds other text, or tokens of another kind")
    return _Opened(*tokens.load(folder, metadata=metadata))


def _look_up(
    path: str, *, log: Callable[[str], None]
) -> tuple[sources.Summary, _Opened] | None:
    """Returns what the text had when it was read last, and its tokens.

    None if it has to be read: it is new, or its tokens are gone or damaged.
    """
    if not os.path.lexists(path):
        return None
    try:
        record = cache.read_record(path)
        if record.get("lookup") != os.path.basename(path):
            raise cache.Damaged(f"{path!r} is a copy of another file")
        summary = sources.Summary(**record["summary"])
        name = os.path.basename(record["folder"])
    except (cache.Damaged, KeyError, TypeError) as error:
        log(f"data: {error}; the text is read again")
        return None
    root = os.path.dirname(os.path.dirname(path))
    with contextlib.suppress(cache.Damaged):  # reported when it is built again
        return summary, _load(os.path.join(root, name))
    return None


def _cache_dir(config: settings.DataConfig) -> str:
    if config.cache_dir is not None:
        return os.path.abspath(paths.expand("data.cache_dir", config.cache_dir))
    return paths.user_cache("data.cache_dir")


def open_source(
    config: settings.DataConfig, *, log: Callable[[str], None] = print
) -> sources.Source:
    """Returns the source of a configuration, see `sources.open_source`.

    Raises:
      UserError: a field has an invalid value, or there is no such source.
    """
    config.validate()
    return _open(config, _cache_dir(config), log=log)


def _open(
    config: settings.DataConfig, root: str, *, log: Callable[[str], None]
) -> sources.Source:
    return sources.open_source(
        config.source,
        text_field=config.text_field,
        cache_dir=root,
        split=config.split or "pieces",
        log=log,
    )


def _key(*parts: str) -> str:
    text = json.dumps([tokens.FORMAT, *parts])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _check_vocab_size(
    tokenizer: tokenizer_lib.Tokenizer, vocab_size: int, *, path: str
) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise errors.UserError(
            f"data.tokenizer: {path!r} has token ids up to {tokenizer.vocab_size - 1}, "
            f"beyond model.vocab_size {vocab_size}; set model.vocab_size to at least "
            f"{tokenizer.vocab_size}"
        )


def _train(
    source: sources.Source,
    summary: sources.Summary,
    *,
    vocab_size: int,
    log: Callable[[str], None],
) -> tokenizer_lib.Tokenizer:
    every = -(-summary.bytes["train"] // _TRAINER_BYTES)
    part = f"1/{every} of " if every > 1 else ""
    log(
        f"data: training a tokenizer of {vocab_size:,} tokens, once, on "
        f"{part}{summary.bytes['train']:,} bytes"
    )
    return tokenizer_lib.Tokenizer.train(
        tokens.sample(source, every=every), vocab_size=vocab_size
    )


def _describe(name: str, summary: sources.Summary, opened: _Opened) -> str:
    train, validation = (len(opened.tokens[split]) for split in splits.SPLITS)
    return (
        f"data: {patterns.shown(name)}: {sources.describe(summary)}, "
        f"hash {summary.hash[:16]}; {train:,} tokens to train on, {validation:,} to "
        f"validate, a vocabulary of {opened.tokenizer.vocab_size:,}"
    )


def train_batches(
    corpus: Corpus,
    config: settings.DataConfig,
    *,
    seed: int,
    start_step: int = 0,
    windows_before: int = 0,
    rows: Sequence[int] | np.ndarray | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Returns endless batches from `start_step` on, reshuffled every epoch.

    `seed` determines one endless order of windows. Step k takes windows k batch_size to
    (k + 1) batch_size, so any step is reached in O(1). A run whose batch size has
    changed continues where it was by `windows_before`, which is added to both.

    A batch has `inputs`, `targets` and `segment_ids` (see `eval_batches`), each
    (rows, seq_len) int32.

    Args:
      corpus: the text.
      config: of the data.
      seed: of the order.
      start_step: number of steps so far.
      windows_before: see above.
      rows: numbers of the rows to read of each batch, if other processes read the
        rest; all by default.

    Raises:
      UserError: the training windows do not fill one batch, or the seed is not in
        [0, 2^32).
    """
    if not 0 <= seed < 1 << 32:
        raise errors.UserError(f"seed: must be in [0, 2^32), not {seed}")
    windows = _windows(corpus.train, config, split="training")
    order = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    batches = _Batches(
        order,
        first=start_step * config.batch_size + windows_before,
        size=config.batch_size,
        rows=range(config.batch_size) if rows is None else rows,
    )
    dataset = grain.MapDataset.source(batches).map(
        lambda window_rows: _batch(window_rows, corpus, config)
    )
    # Forked workers deadlock beside JAX. One thread is enough to read memory.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(dataset.to_iter_dataset(options))


class _Batches:
    """Some rows of each batch of windows, as a source of grain."""

    def __init__(
        self,
        windows: grain.MapDataset,
        *,
        first: int,
        size: int,
        rows: Sequence[int] | np.ndarray,
    ):
        self._windows, self._first, self._size = windows, first, size
        self._rows = [int(row) for row in rows]

    def __len__(self) -> int:
        return (len(self._windows) - self._first) // self._size

    def __getitem__(self, index: int) -> np.ndarray:
        start = self._first + index * self._size
        return np.stack([np.asarray(self._windows[start + row]) for row in self._rows])


def eval_batches(
    corpus: Corpus, config: settings.DataConfig, *, num_batches: int
) -> list[dict[str, np.ndarray]]:
    """Returns `num_batches` batches of evenly spaced validation windows, in order.

    The same ones in every call. Even spacing makes a few batches represent the whole
    split. Short text gives fewer batches.

    `segment_ids` number the documents within a window from 1; with
    `data.cross_document_attention` all are 1.

    Raises:
      UserError: the validation windows do not fill one batch.
    """
    windows = _windows(corpus.validation, config, split="validation")
    num_batches = min(num_batches, len(windows) // config.batch_size)
    count = num_batches * config.batch_size
    chosen = (np.arange(count) * len(windows) // count).reshape(num_batches, -1)
    return [
        _batch(np.stack([windows[int(i)] for i in batch]), corpus, config)
        for batch in chosen
    ]


def _windows(
    split_tokens: np.ndarray, config: settings.DataConfig, *, split: str
) -> tokens.Windows:
    windows = tokens.Windows(split_tokens, config.seq_len)
    if len(windows) < config.batch_size:
        raise errors.UserError(
            f"data.batch_size: the {split} split of {config.source!r} has "
            f"{len(split_tokens):,} tokens: {len(windows)} sequences of data.seq_len "
            f"{config.seq_len}, but a batch has {config.batch_size}; lower either, or "
            "name more text in data.source"
        )
    return windows


def _batch(
    window_rows: np.ndarray, corpus: Corpus, config: settings.DataConfig
) -> dict[str, np.ndarray]:
    """Returns the batch of windows (rows, seq_len + 1)."""
    largest = int(window_rows.max())
    if largest >= corpus.tokenizer.vocab_size:
        # An embedding would clamp it silently.
        raise errors.UserError(
            f"data.cache_dir: cached tokens contain id {largest}, beyond the "
            f"vocabulary of {corpus.tokenizer.vocab_size}: they were changed while "
            "they were in use; run again, and they are made again"
        )
    ids = window_rows.astype(np.int32)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    if config.cross_document_attention:
        segment_ids = np.ones_like(inputs)
    else:
        is_mark = (inputs == corpus.tokenizer.document_mark).astype(np.int32)
        segment_ids = np.cumsum(is_mark, axis=1, dtype=np.int32) + 1 - is_mark[:, :1]
    return {
        "inputs": np.ascontiguousarray(inputs),
        "targets": np.ascontiguousarray(targets),
        "segment_ids": segment_ids,
    }
