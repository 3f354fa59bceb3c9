"""What a configuration says about data; needs none of the libraries that read it."""

import dataclasses

from sct_jax import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it is cut into batches.

    Attributes:
        source: "stdlib" (the Python standard library's own source), "tfds:<name>" of a
            prepared dataset, or a path or glob of text or JSON-lines files.
        batch_size: sequences per optimizer step, over all devices and micro-batches.
        seq_len: tokens per sequence.
        num_microbatches: parts that a step's batch is computed in, one after the other.
        tokenizer: path of a tokenizer.json; None trains one of the model's vocabulary.
        cache_dir: for tokenizers and tokens; None is `sct_jax` in the user's cache
            folder (XDG_CACHE_HOME or ~/.cache).
        text_field: the key of the text in TFDS examples and JSON lines.
        cross_document_attention: attend to earlier documents of the same window.
    """

    source: str = "stdlib"
    batch_size: int = 32
    seq_len: int = 256
    num_microbatches: int = 1
    tokenizer: str | None = None
    cache_dir: str | None = None
    text_field: str = "text"
    cross_document_attention: bool = False

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step learns from, over all devices."""
        return self.batch_size * self.seq_len

    def validate(self) -> None:
        """Every field can be used, as far as that shows without reading any data.

        Raises:
            UserError: one cannot.
        """
        for name in ("batch_size", "seq_len", "num_microbatches"):
            if getattr(self, name) < 1:
                raise errors.UserError(
                    f"data.{name}: must be at least 1, not {getattr(self, name)}"
                )
        if self.batch_size % self.num_microbatches:
            raise errors.UserError(
                f"data.num_microbatches: {self.num_microbatches} does not divide "
                f"data.batch_size {self.batch_size}"
            )
        for name in ("source", "text_field", "tokenizer", "cache_dir"):
            if getattr(self, name) == "":
                raise errors.UserError(f"data.{name}: must not be empty")
