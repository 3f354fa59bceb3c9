"""The data section of a configuration. Loads no library that reads data."""

import dataclasses

from sct_jax import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A corpus, its tokenizer, and the shape of batches.

    Attributes:
      source: "stdlib" (source text of the Python standard library), "tfds:<name>" for
        a prepared dataset, or a path or glob of text or JSON-lines files.
      batch_size: sequences per optimizer step, over all devices and micro-batches.
      seq_len: tokens per sequence.
      num_microbatches: sequential parts of each step's batch.
      tokenizer: path of a tokenizer.json, or "bytes" for a token per byte (257 with the
        mark of documents); None trains one with the model's vocabulary size.
      cache_dir: folder of tokenizers and tokens; None is `sct_jax` in the user's cache
        folder (XDG_CACHE_HOME or ~/.cache).
      text_field: key of the text in TFDS examples and JSON lines.
      cross_document_attention: attend to earlier documents of the same window.
      split: how the source is divided into training and validation text. None is the
        first value below for a new run; a resumed run keeps its own.
        "stdlib" has two values. "pieces" holds out pieces of about 8 KB, at most two
        per file. "files" holds out whole files; nearly half of that validation text is
        one file of English prose.
        All other sources have two values of their own. "documents" holds out documents
        by a hash of their text, so equal ones stay together; where these are less than
        2 % or more than 8 % of the bytes, it holds out others, and cuts one if it must.
        A TFDS dataset keeps its validation split, or the last 4 % of its examples,
        without the training documents that are in it too. "paths" holds out documents
        by a hash of their name, and is kept for runs that began before "documents"
        existed.
    """

    source: str = "stdlib"
    batch_size: int = 32
    seq_len: int = 256
    num_microbatches: int = 1
    tokenizer: str | None = None
    cache_dir: str | None = None
    text_field: str = "text"
    cross_document_attention: bool = False
    split: str | None = None

    @property
    def kinds_of_split(self) -> tuple[str, str]:
        """Returns the values of `split` for this source; a new run takes the first."""
        if self.source == "stdlib":
            return "pieces", "files"
        return "documents", "paths"

    @property
    def tokens_per_step(self) -> int:
        """Returns the tokens per optimizer step, over all devices."""
        return self.batch_size * self.seq_len

    def validate(self) -> None:
        """Checks every field, as far as possible without reading data.

        Raises:
          UserError: a field has an invalid value.
        """
        errors.check_bounds(
            "data.", self, "batch_size", "seq_len", "num_microbatches", least=1
        )
        errors.check(
            "data.batch_size",
            self.tokens_per_step <= errors.MAX_INT32,
            f"{self.batch_size} sequences of data.seq_len {self.seq_len} are more than "
            f"{errors.MAX_INT32:,} tokens per step; lower either",
        )
        errors.check(
            "data.num_microbatches",
            self.batch_size % self.num_microbatches == 0,
            f"{self.num_microbatches} does not divide data.batch_size "
            f"{self.batch_size}; make one a multiple of the other",
        )
        for name in ("source", "text_field", "tokenizer", "cache_dir"):
            value = getattr(self, name)
            errors.check(f"data.{name}", value != "", "must not be empty")
            errors.check(
                f"data.{name}",
                value is None or "\0" not in value,
                "must not contain a zero byte",
            )
        choices = (None, "pieces", "files", "documents", "paths")
        errors.check_choice("data.split", self.split, choices)
        errors.check(
            "data.split",
            self.source != "stdlib" or self.split in choices[:3],
            f"{self.split!r} does not divide \"stdlib\"; choose 'pieces' or 'files'",
        )
