r"""Imports a checkpoint of Hugging Face's Llama family as a run, dense or truncated.

python -m experiments.convert --from=HuggingFaceTB/SmolLM2-135M --workdir=runs/smollm2
python -m experiments.convert --from=HuggingFaceTB/SmolLM2-135M --workdir=runs/r144 \
  --rank-ratio=.25 --matrices=gate,up,down --matrix=down:energy=.95

--from is a folder, or a name on the Hugging Face hub. It holds config.json,
tokenizer.json and model.safetensors, whole or in parts.
Matrices that get a rank become factors u, s, v: the best approximation of that rank,
or with --text=SOURCE the one whose outputs on that text are best. --budget=.3 gives the
factors that part of the parameters, and each matrix the rank that keeps the most.
Others stay dense. experiments.generate reads the result, and experiments.pretrain
starts from it with --init-from. The exit code is 0, 2 for bad input, or 4 if the run
could not be written.
"""

from sct_jax.training import process

if __name__ == "__main__":
    process.start("experiments.convert")

import argparse
import dataclasses
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import rich.table

from sct_jax import compression, data, errors, model, paths
from sct_jax.interop import folders, importing
from sct_jax.interop import source as source_lib
from sct_jax.training import (
    accounting,
    checkpoint,
    console,
    exit_codes,
    overrides,
    workdir,
)

# Of the text: tokens in all and per window, and windows per pass.
_TEXT_TOKENS, _WINDOW, _ROWS = 65_536, 512, 8

RULES = {"rank": int, "rank_ratio": float, "energy": float}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code, see above."""
    flags = _parse(sys.argv[1:] if argv is None else argv)
    try:
        rules = parse_rules(flags)
        errors.check("--workdir", flags.workdir != "", "must not be empty")
        path = pathlib.Path(paths.expand("--workdir", flags.workdir))
        workdir.check_new(path)
        source = source_lib.open_folder(flags.source)
        tokenizer = folders.load_tokenizer(source, flags.tokenizer)
        text = None
        errors.check(
            "--text-tokens",
            flags.text is not None or flags.text_tokens is None,
            "has no effect without --text",
        )
        if flags.text is not None:
            errors.check(
                "--text",
                bool(rules),
                "has no effect without a rank; add --rank, --rank-ratio, --energy, "
                "--budget or --matrix",
            )
            text = calibration_text(flags, source, tokenizer)
        imported = importing.load(
            source,
            rules,
            scan_layers=flags.scan_layers,
            text=text,
            budget=flags.budget,
            log=process.say,
        )
        config = folders.run_config(
            imported.config, source.max_length, path / "tokenizer.json"
        )
        workdir.create(path, config, imported.params, tokenizer)
    except errors.UserError as error:
        overrides.fail(str(error))
    except (checkpoint.SaveError, OSError) as error:
        process.say(f"error: {error}; nothing is left of {flags.workdir}")
        return exit_codes.ExitCode.SAVE_FAILED
    output = console.standard_output()
    if imported.truncations:
        of = "outputs on the text" if text else "matrices"
        output.print(truncation_table(imported.truncations, of=of))
    for note in imported.notes:
        console.say(output, f"note: {note}")
    console.say(output, f"wrote {path}: {describe(imported.config, source.config)}")
    return exit_codes.ExitCode.FINISHED


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = overrides.FlagParser(__doc__ or "")
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        help="folder of the checkpoint, or its name on the hub",
    )
    parser.add_argument("--workdir", required=True, help="folder of the run, a new one")
    parser.add_argument("--rank", type=int, help="of every matrix in --matrices")
    parser.add_argument("--rank_ratio", type=float, help="rank as a part of fan_in")
    parser.add_argument(
        "--energy",
        type=float,
        help="the rank that keeps this part of the sum of squared singular values, in "
        "every layer",
    )
    parser.add_argument(
        "--matrices",
        help="what gets factors, a list of "
        f"{', '.join(model.MATRICES)} (default: the first seven)",
    )
    parser.add_argument(
        "--matrix",
        action="append",
        default=[],
        metavar="NAME:SETTING=VALUE",
        help="one matrix with its own rank, rank_ratio or energy; repeatable",
    )
    parser.add_argument(
        "--budget",
        type=float,
        help="fraction of the dense parameters that the factors may use; ranks go "
        "where they keep the most energy",
    )
    parser.add_argument(
        "--text",
        help="approximate the outputs on this text, and not the matrices alone; a path "
        "or glob, as data.source",
    )
    parser.add_argument(
        "--text_tokens",
        type=int,
        help=f"how much of that text, at most (default: {_TEXT_TOKENS:,} tokens)",
    )
    parser.add_argument(
        "--tokenizer", help="a tokenizer.json, if not that of the folder"
    )
    parser.add_argument(
        "--scan_layers",
        action="store_true",
        help="open the run with stacked layers, which compile faster",
    )
    return parser.parse_flags(argv)


def parse_rules(flags: argparse.Namespace) -> dict[str, importing.Rule]:
    """Returns how the rank of each matrix is found that gets factors.

    Raises:
      UserError: naming the flag.
    """
    common = {name: getattr(flags, name) for name in RULES}
    given = {f"--{n.replace('_', '-')}" for n, x in common.items() if x is not None}
    rules: dict[str, importing.Rule] = {}
    if flags.budget is not None:
        errors.check_bounds("--", flags, "budget", above=0, most=1)
        errors.check(
            "--budget",
            not given and not flags.matrix,
            "chooses the ranks itself; leave out --rank, --rank-ratio, --energy and "
            "--matrix",
        )
        return dict.fromkeys(_matrices(flags.matrices), importing.Rule())
    if given:
        rule = importing.Rule(**common)
        rule.validate("--")
        rules = dict.fromkeys(_matrices(flags.matrices), rule)
    errors.check(
        "--matrices",
        bool(given) or flags.matrices is None,
        "has no effect alone; add --rank, --rank-ratio, --energy or --budget",
    )
    for text in flags.matrix:
        name, rule = _matrix(text)
        rules[name] = rule
    return rules


def calibration_text(
    flags: argparse.Namespace, source: source_lib.Source, tokenizer: data.Tokenizer
) -> compression.Text:
    """Returns windows from all over the training text, as many as there are.

    Raises:
      UserError: for text that cannot be read, or has no window.
    """
    errors.check_bounds("--", flags, "text_tokens", least=1)
    tokens = flags.text_tokens or _TEXT_TOKENS
    length = min(source.max_length, _WINDOW, tokens)
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "tokenizer.json")
        tokenizer.save(file)
        settings = data.DataConfig(
            source=flags.text,
            tokenizer=file,
            seq_len=length,
            batch_size=1,
        )
        try:
            corpus = data.prepare(
                settings, vocab_size=source.config.vocab_size, log=process.say
            )
            least = min(tokens, len(corpus.train) - 1)  # the last is a target
            if least < 1:
                raise errors.UserError("it has no token to read; name more text")
            length = min(length, least)
            settings = dataclasses.replace(
                settings, seq_len=length, batch_size=least // length
            )
            batch = next(data.train_batches(corpus, settings, seed=0))
        except errors.UserError as error:
            raise errors.UserError(f"--text: {error}") from error
    rows = range(0, len(batch["inputs"]), _ROWS)
    return compression.Text(
        tokens=[jnp.asarray(batch["inputs"][i : i + _ROWS]) for i in rows],
        segment_ids=[jnp.asarray(batch["segment_ids"][i : i + _ROWS]) for i in rows],
    )


def _matrices(text: str | None) -> tuple[str, ...]:
    if text is None:
        return model.BLOCK_MATRICES
    listed = tuple(word.strip() for word in text.split(",") if word.strip())
    errors.check("--matrices", bool(listed), "must not be empty")
    for name in listed:
        errors.check_choice("--matrices", name, model.MATRICES)
    return listed


def _matrix(text: str) -> tuple[str, importing.Rule]:
    """Matrix and rule of "down:rank=96"."""
    where = f"--matrix={text}"
    name, _, setting = text.partition(":")
    field, _, value = setting.partition("=")
    field = field.replace("-", "_")
    errors.check_choice(where, name, model.MATRICES)
    errors.check_choice(where, field, tuple(RULES))
    kind: Callable[[str], Any] = RULES[field]
    try:
        rule = importing.Rule(**{field: kind(value)})
    except ValueError as error:
        raise errors.UserError(
            f"{where}: {value!r} is not a value of type {RULES[field].__name__}"
        ) from error
    rule.validate(f"{where}: ")
    return name, rule


def truncation_table(
    truncations: Sequence[importing.Truncation], *, of: str = "matrices"
) -> rich.table.Table:
    """Returns a table of the ranks, and of what they keep.

    Args:
      truncations: of each matrix.
      of: what has the energies and errors.
    """
    table = rich.table.Table(
        title=f"truncated: energy and error of {of}, over layers", title_justify="left"
    )
    for column in (
        "matrix",
        "fan_in x fan_out",
        "rank",
        "least energy",
        "mean energy",
        "largest error",
        "mean error",
    ):
        table.add_column(column)
    for found in truncations:
        energies, residuals = found.energies, found.errors
        table.add_row(
            found.name,
            f"{found.shape[0]} x {found.shape[1]}",
            str(found.rank),
            f"{min(energies):.4f}",
            f"{sum(energies) / len(energies):.4f}",
            f"{max(residuals):.2e}",
            f"{sum(residuals) / len(residuals):.2e}",
        )
    return table


def describe(config: model.ModelConfig, dense: model.ModelConfig) -> str:
    """Returns a sentence about the parameters."""
    count, before = map(accounting.parameters, (config, dense))
    if count == before:
        return f"{count:,} parameters, all dense"
    return f"{count:,} parameters, of {before:,}"
