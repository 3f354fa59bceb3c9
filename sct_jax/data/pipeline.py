"""Batches of tokens, at any step in O(1), from a corpus that is prepared once."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from sct_jax import errors
from sct_jax.data import cache, settings, sources, tokens
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
    tokenizer are still used.

    Args:
      config: the corpus and tokenizer.
      vocab_size: of the model. A tokenizer trained here gets exactly as many if
        the text has enough pairs to merge.
      log: receives a few lines: progress, counts of files, documents, bytes and tokens,
        skipped documents, and the hash.

    Raises:
      UserError: a field has an invalid value.
    """
    config.validate()
    root = _cache_dir(config)
    given = None
    if config.tokenizer is not None:
        given = tokenizer_lib.Tokenizer.load(os.path.expanduser(config.tokenizer))
        _check_vocab_size(given, vocab_size, path=config.tokenizer)
    recipe = given.hash if given else f"trained {vocab_size}"

    source = _open(config, root)
    lookup = os.path.join(root, "lookup", _key(source.fingerprint, recipe))
    folder = _read_lookup(lookup)
    metadata = tokens.read_metadata(folder) if folder else None
    if not folder or metadata is None:
        log(f"data: reading {source.name}")
        source, summary = sources.scan(source)
        folder = os.path.join(root, _key(summary.hash, recipe))

        def build(partial: str) -> None:
            tokenizer = given or _train(source, summary, vocab_size=vocab_size, log=log)
            total = sum(summary.bytes.values())
            log(f"data: encoding {total:,} bytes, once; kept in {folder}")
            tokens.build(partial, source, summary=summary, tokenizer=tokenizer)
            if _open(config, root).fingerprint != source.fingerprint:
                raise errors.UserError(
                    f"data.source: files of {source.name!r} changed while they were "
                    "read; run again once they stop changing"
                )

        cache.folder(
            folder,
            build=build,
            is_complete=lambda path: tokens.read_metadata(path) is not None,
        )
        cache.write_text(lookup, os.path.basename(folder))
        metadata = tokens.read_metadata(folder)
        if metadata is None:
            raise errors.UserError(
                f"data.cache_dir: another program changed {folder!r} while it was in "
                "use; run again, or name another folder"
            )
    tokenizer, mapped = tokens.load(folder, metadata=metadata)
    log(_describe(source.name, tokenizer, metadata))
    return Corpus(
        tokenizer=tokenizer,
        train=mapped["train"],
        validation=mapped["validation"],
        documents=sum(metadata["documents"].values()),
        bytes=sum(metadata["bytes"].values()),
        hash=metadata["hash"],
    )


def _cache_dir(config: settings.DataConfig) -> str:
    if config.cache_dir is not None:
        return os.path.abspath(os.path.expanduser(config.cache_dir))
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(os.path.abspath(user), "sct_jax")


def _open(config: settings.DataConfig, root: str) -> sources.Source:
    return sources.open_source(
        config.source,
        text_field=config.text_field,
        cache_dir=root,
        split=config.split or "pieces",
    )


def _key(*parts: str) -> str:
    text = json.dumps([tokens.FORMAT, *parts])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read_lookup(path: str) -> str | None:
    """Returns the folder of tokens named in the file `path`; it may not exist."""
    try:
        with open(path, encoding="utf-8") as file:
            name = file.read()
    except (OSError, UnicodeDecodeError):
        return None
    return os.path.join(os.path.dirname(os.path.dirname(path)), os.path.basename(name))


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


def _describe(
    name: str, tokenizer: tokenizer_lib.Tokenizer, metadata: dict[str, Any]
) -> str:
    files = f"{metadata['files']:,} files, " if metadata["files"] else ""
    skipped = sources.describe_skipped(metadata["skipped"])
    return (
        f"data: {name}: {files}{sum(metadata['documents'].values()):,} documents, "
        f"{sum(metadata['bytes'].values()):,} bytes, "
        f"{f'skipped {skipped}, ' if skipped else ''}"
        f"hash {metadata['hash'][:16]}; {metadata['tokens']['train']:,} tokens to "
        f"train on, {metadata['tokens']['validation']:,} to validate, a vocabulary of "
        f"{tokenizer.vocab_size:,}"
    )


def train_batches(
    corpus: Corpus,
    config: settings.DataConfig,
    *,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Returns endless batches from `start_step` on, reshuffled every epoch.

    `seed` determines one endless order of windows. Step k takes windows k batch_size to
    (k + 1) batch_size, so any step is reached in O(1). The rows of all processes,
    concatenated, do not depend on the number of processes.

    A batch has `inputs`, `targets` and `segment_ids` (see `eval_batches`), each
    (batch_size / process_count, seq_len) int32.

    Raises:
      UserError: the training windows do not fill one batch, `process_count` does not
        divide `data.batch_size`, or the seed is not in [0, 2^32).
    """
    if not 0 <= seed < 1 << 32:
        raise errors.UserError(f"seed: must be in [0, 2^32), not {seed}")
    rows = _rows_per_process(config, process_count)
    windows = _windows(corpus.train, config, split="training")
    dataset = (
        grain.MapDataset.source(windows)
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(rows, drop_remainder=True)
        # Consecutive batches of `rows` belong to processes 0, 1, ...
        .slice(slice(start_step * process_count + process_index, None, process_count))
        .map(lambda window_rows: _batch(window_rows, corpus, config))
    )
    # Forked workers deadlock beside JAX. One thread is enough to read memory.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(dataset.to_iter_dataset(options))


def eval_batches(
    corpus: Corpus,
    config: settings.DataConfig,
    *,
    num_batches: int,
    process_index: int = 0,
    process_count: int = 1,
) -> list[dict[str, np.ndarray]]:
    """Returns `num_batches` batches of evenly spaced validation windows, in order.

    The same ones in every call. Even spacing makes a few batches represent the whole
    split. Short text gives fewer batches.

    `segment_ids` number the documents within a window from 1; with
    `data.cross_document_attention` all are 1.

    Raises:
      UserError: the validation windows do not fill one batch, or `process_count` does
        not divide `data.batch_size`.
    """
    rows = _rows_per_process(config, process_count)
    windows = _windows(corpus.validation, config, split="validation")
    num_batches = min(num_batches, len(windows) // config.batch_size)
    count = num_batches * config.batch_size
    chosen = (np.arange(count) * len(windows) // count).reshape(num_batches, -1)
    chosen = chosen[:, process_index * rows : (process_index + 1) * rows]
    return [
        _batch(np.stack([windows[int(i)] for i in batch]), corpus, config)
        for batch in chosen
    ]


def _rows_per_process(config: settings.DataConfig, process_count: int) -> int:
    if config.batch_size % process_count:
        raise errors.UserError(
            f"data.batch_size: {config.batch_size} is not a multiple of the "
            f"{process_count} processes; change either"
        )
    return config.batch_size // process_count


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
            f"vocabulary of {corpus.tokenizer.vocab_size}; the cache is damaged: "
            f"remove the folder of {getattr(corpus.train, 'filename', '')}"
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
