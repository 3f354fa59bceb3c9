"""The README.md of an exported model: what it is, and how it is loaded."""

import importlib.metadata
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from sct_jax import model
from sct_jax.interop import exporting
from sct_jax.training import accounting, checkpoint, metrics, workdir

_PAGE = """\
---
license: unknown
pipeline_tag: text-generation
tags:
- sct_jax
---

# {name}

A language model, trained with sct_jax {version} and exported as `{architecture}` in
{dtype}. No license was chosen.

{facts}

## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
prompt = tokenizer("def main(", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```

Every text begins with `{mark}`, as in training; the tokenizer puts it there. The model
ends a text with it too. A `{mark}` written in a text is encoded as text.

## Format

{about}"""

_DENSE = """\
The tensors have the names and shapes of `{architecture}`. No code comes with them.
"""

_MERGED = (
    """\
Factorised matrices were multiplied out, so they take the memory of dense ones.
"""
    + _DENSE
)

_FACTORS = """\
A matrix W (fan_in, fan_out) of rank R is two linear layers: `a` from fan_in to R, then
`b` from R to fan_out. W is never built. For W = u diag(s) v.T, `a` is u and `b` is
v diag(s), so |s| are the norms of the columns of `b`. The classes are in
`modeling_spectral.py` beside the tensors, and need torch and transformers alone.

They follow what the Transformers backend of vLLM asks of a model, and were tested in
transformers, not in vLLM.
"""

_BLOCKS = """
A matrix of B blocks has B such pairs. Pair i of `a` reads the i-th part of the input,
the B R results are transposed as a B x R matrix, and pair j of `b` reads row j of what
is then, read as B x R, and writes the j-th part of the output. W has rank B R.
"""

_OWN_HEAD = """\
That backend makes a dense head of its own, so it cannot serve this model, whose head
has factors.
"""


class Progress(NamedTuple):
    """How far a run has come.

    Attributes:
      step: of the checkpoint.
      tokens: that it has seen by then; None if the checkpoint does not say.
      train_loss: newest loss of a step by then, in nats per token, or None.
      eval_step: step of the newest evaluation by then, or None.
      eval_loss: held-out loss of that evaluation, in nats per token, or None.
      bits_per_byte: of the same text, or None.
    """

    step: int
    tokens: int | None = None
    train_loss: float | None = None
    eval_step: int | None = None
    eval_loss: float | None = None
    bits_per_byte: float | None = None


def read_progress(
    folder: pathlib.Path, record: checkpoint.Record, *, seq_len: int
) -> Progress:
    """Returns how far the run in a folder had come at a checkpoint.

    Args:
      folder: of the run.
      record: of the checkpoint.
      seq_len: tokens per window of text.

    Raises:
      UserError: metrics.jsonl cannot be read.
    """
    step, windows = record["step"], record.get("data_position")
    progress = Progress(step, None if windows is None else windows * seq_len)
    for row in metrics.read_rows(folder / "metrics.jsonl"):
        if row.get("step", 0) > step:  # an interrupted run goes on from its checkpoint
            continue
        if "train/loss" in row:
            progress = progress._replace(train_loss=row["train/loss"])
        if "eval/loss" in row:
            progress = progress._replace(
                eval_step=row["step"],
                eval_loss=row["eval/loss"],
                bits_per_byte=row.get("eval/bits_per_byte"),
            )
    return progress


def write(
    run: workdir.LoadedRun, *, name: str, form: str, dtype: str, progress: Progress
) -> str:
    """Returns the text of the README.md of an export.

    Args:
      run: the model.
      name: of the model.
      form: from `exporting.FORMATS`.
      dtype: of the tensors.
      progress: from `read_progress`.
    """
    architecture = exporting.architecture(run.config.model, form)
    return _PAGE.format(
        name=name,
        version=importlib.metadata.version("sct_jax"),
        architecture=architecture,
        dtype=dtype,
        facts=_table(_facts(run, progress)),
        trust=", trust_remote_code=True" * (form == "factors"),
        mark=run.tokenizer.backend.id_to_token(run.tokenizer.document_mark),
        about=_about(run, form).format(architecture=architecture),
    )


def _about(run: workdir.LoadedRun, form: str) -> str:
    ranks = exporting.ranks(run)
    if form == "merged":
        return _MERGED if ranks else _DENSE
    head = "embed_tokens" if run.config.model.tie_embeddings else "lm_head"
    in_blocks = bool(exporting.blocks(run))
    return _FACTORS + _OWN_HEAD * (head in ranks) + _BLOCKS * in_blocks


def _facts(run: workdir.LoadedRun, progress: Progress) -> list[tuple[str, str]]:
    config = run.config.model
    dense = accounting.parameters(accounting.dense_config(config))
    facts = [
        ("parameters, as trained", f"{accounting.count(run.params):,}"),
        ("parameters of the same shape, dense", f"{dense:,}"),
        ("ranks", _ranks(run)),
        ("layers, width, heads, kv heads", _shape(config)),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("context in training", f"{run.config.data.seq_len:,} tokens"),
        ("training text", f"`{run.config.data.source}`"),
        ("steps", f"{progress.step:,}"),
    ]
    if progress.tokens is not None:
        facts.append(("tokens seen", f"{progress.tokens:,}"))
    if progress.train_loss is not None:
        facts.append(("training loss", f"{progress.train_loss:.4f} nats per token"))
    if progress.eval_loss is not None:
        at = f"{progress.eval_loss:.4f} nats per token, at step {progress.eval_step:,}"
        facts.append(("held-out loss", at))
    if progress.bits_per_byte is not None:
        facts.append(("held-out bits per byte", f"{progress.bits_per_byte:.4f}"))
    return facts


def _ranks(run: workdir.LoadedRun) -> str:
    ranks = exporting.ranks(run)
    kind = run.config.model.factors.replace("_", "-")
    blocks = exporting.blocks(run)
    each = ", ".join(
        f"{name} {_rank(rank)}"
        + (f" in {blocks[name]} blocks" if name in blocks else "")
        for name, rank in ranks.items()
    )
    return f"{each} ({kind})" if ranks else "none, all matrices are dense"


def _rank(rank: int | Sequence[int]) -> str:
    if isinstance(rank, int):
        return str(rank)
    return f"{min(rank)} to {max(rank)} by layer"


def _shape(config: model.ModelConfig) -> str:
    sizes = (config.num_layers, config.d_model, config.num_heads, config.num_kv_heads)
    return ", ".join(map(str, sizes))


def _table(facts: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in facts)])
