"""Continues text with a trained model.

python -m experiments.generate --workdir=runs/smollm_r128-tiny --prompt="def main("
python -m experiments.generate --hf=HuggingFaceTB/SmolLM2-135M --prompt="def main("
echo "import os" | python -m experiments.generate --workdir=runs/smollm_r128-tiny

One prompt is continued as it is written; several are continued together. The exit code
is 0, or 2 for bad input.
"""

from sct_jax.training import process

if __name__ == "__main__":
    process.start("experiments.generate")

import pathlib
import sys
import time
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple, TextIO

import jax

from experiments import json_file
from sct_jax import data, decode, errors, paths, sampling
from sct_jax.interop import folders
from sct_jax.training import overrides, workdir

DEFAULT_TOKENS = 128


class Continued(NamedTuple):
    """What was generated.

    Attributes:
      ids: new tokens of each prompt.
      texts: their text.
      first_seconds: until the first token, compilation included.
      tokens_per_second: of all prompts together, after the first two tokens; None for
        fewer.
      cache_bytes_per_token: of one prompt.
    """

    ids: list[list[int]]
    texts: list[str]
    first_seconds: float
    tokens_per_second: float | None
    cache_bytes_per_token: int


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    parser = overrides.FlagParser(__doc__ or "")
    parser.add_argument("--workdir", help="a run, with a checkpoint")
    parser.add_argument(
        "--hf",
        help="or a Hugging Face checkpoint of the Llama family: folder, or name on "
        "the hub",
    )
    parser.add_argument(
        "--tokenizer", help="with --hf: use this tokenizer.json, not the folder's"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="text to continue; repeatable"
    )
    parser.add_argument("--prompt_file", help="file with one prompt")
    parser.add_argument(
        "--num_tokens",
        type=int,
        help=f"most tokens per prompt (default: {DEFAULT_TOKENS}, or what the context "
        "has room for)",
    )
    defaults = sampling.SamplingConfig()
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token"
    )
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens")
    for name in ("top_p", "min_p", "repetition_penalty"):
        parser.add_argument(f"--{name}", type=float, default=getattr(defaults, name))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--latent_cache",
        action="store_true",
        help="keep R numbers per token and factorised k or v, not keys and values",
    )
    json_file.add_flag(parser, "also write texts, ids and figures to this file")
    flags = parser.parse_flags(sys.argv[1:] if argv is None else argv)
    try:
        sampler = sampling.SamplingConfig(
            **{name: getattr(flags, name) for name in vars(defaults)}
        )
        sampler.validate("--")
        errors.check_bounds("--", flags, "seed", least=0, below=2**32)
        prompts = read_prompts(flags.prompt, flags.prompt_file, sys.stdin)
        run = load(flags.workdir, flags.hf, flags.tokenizer)
        done = continue_prompts(
            run,
            prompts,
            num_tokens=flags.num_tokens,
            sampler=sampler,
            seed=flags.seed,
            latent=flags.latent_cache,
            output=sys.stdout,
        )
        process.say(describe(done))
        if flags.json is not None:
            json_file.write(flags.json, {"prompts": prompts, **done._asdict()})
    except errors.UserError as error:
        overrides.fail(str(error))
    return 0


def load(
    path: str | None, checkpoint: str | None, tokenizer: str | None = None
) -> workdir.LoadedRun:
    """Returns the model of a run, or of a Hugging Face checkpoint.

    Args:
      path: workdir of the run.
      checkpoint: folder, or name on the hub.
      tokenizer: of the checkpoint; None for its own.

    Raises:
      UserError: both models are given or neither, or one cannot be read.
    """
    errors.check(
        "--workdir",
        (path is None) != (checkpoint is None),
        "give a run, or a Hugging Face checkpoint with --hf, and not both",
    )
    errors.check(
        "--tokenizer",
        tokenizer is None or checkpoint is not None,
        "belongs to --hf, as a run has its own; leave it out",
    )
    if checkpoint is not None:
        return folders.load(checkpoint, tokenizer)
    return workdir.load_run(path or "")


def read_prompts(
    given: Sequence[str], file: str | None, standard_input: TextIO | None
) -> list[str]:
    """Returns the prompts of the command line, else that of a file, else of a pipe.

    Raises:
      UserError: there is none, or one is empty or not UTF-8.
    """
    errors.check(
        "--prompt_file",
        not (given and file),
        "excludes --prompt: give only one of them",
    )
    prompts = list(given)
    if file is not None:
        path = pathlib.Path(paths.expand("--prompt_file", file))
        try:
            prompts = [path.read_bytes().decode()]
        except (OSError, UnicodeError) as error:
            raise errors.UserError(f"--prompt_file: cannot read {path}: {error}") from (
                error
            )
    elif not prompts:
        errors.check(
            "--prompt",
            standard_input is not None and not standard_input.isatty(),
            "give a prompt, a --prompt_file, or text on standard input",
        )
        try:
            prompts = [typing.cast(TextIO, standard_input).read()]
        except UnicodeError as error:
            raise errors.UserError(f"--prompt: is not UTF-8: {error}") from error
    for prompt in prompts:
        errors.check("--prompt", prompt != "", "is empty; give some text to continue")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise errors.UserError(f"--prompt: is not UTF-8: {error}") from error
    return prompts


def continue_prompts(
    run: workdir.LoadedRun,
    prompts: Sequence[str],
    *,
    num_tokens: int | None,
    sampler: sampling.SamplingConfig,
    seed: int,
    latent: bool = False,
    output: TextIO,
) -> Continued:
    """Writes each prompt and what follows it, up to the end of the document.

    Args:
      run: the model.
      prompts: texts, none of them empty.
      num_tokens: most tokens per prompt; None for a default.
      sampler: how tokens are drawn.
      seed: of the draws.
      latent: as in `decode.init_cache`.
      output: where the text goes.

    Raises:
      UserError: the context is too short.
    """
    mark = run.tokenizer.document_mark
    ids = [[mark, *run.tokenizer.encode(prompt)] for prompt in prompts]
    num_tokens = fit_tokens(
        num_tokens, longest=max(map(len, ids)), context=run.config.data.seq_len
    )
    params = decode.prepare(run.params, run.config.model)
    began = time.monotonic()
    times: list[float] = []
    new: list[list[int]] = [[] for _ in prompts]
    writers = [_Writer(run.tokenizer, prompt, output) for prompt in prompts]
    single = len(prompts) == 1
    for tokens in decode.stream(
        params,
        run.config.model,
        ids,
        num_tokens=num_tokens,
        key=jax.random.key(seed),
        sampler=sampler,
        stop=run.tokenizer.stops,
        latent=latent,
    ):
        times.append(time.monotonic())
        for row, token in zip(new, tokens, strict=True):
            if token is not None:
                row.append(token)
        if single:
            writers[0].write(new[0])
    for row, writer in zip(new, writers, strict=True):
        writer.write(row, last=True)
    return Continued(
        ids=new,
        texts=[run.tokenizer.decode(row) for row in new],
        first_seconds=times[0] - began if times else time.monotonic() - began,
        tokens_per_second=_rate(times, rows=new),
        cache_bytes_per_token=decode.bytes_per_token(
            params, run.config.model, latent=latent
        ),
    )


def fit_tokens(num_tokens: int | None, *, longest: int, context: int) -> int:
    """Returns how many tokens to generate after prompts of up to `longest` tokens.

    Raises:
      UserError: the prompt, or what was asked for, does not fit into the context.
    """
    errors.check(
        "--prompt",
        longest < context,
        f"{longest} tokens do not fit into the context of {context} that the model "
        "was trained with; shorten the prompt",
    )
    room = context - longest
    if num_tokens is None:
        return min(DEFAULT_TOKENS, room)
    errors.check(
        "--num_tokens",
        1 <= num_tokens <= room,
        f"{num_tokens} must be in 1..{room}: the context has {context} tokens, and "
        f"the prompt {longest}",
    )
    return num_tokens


def describe(done: Continued) -> str:
    """Returns a line about the speed and the memory."""
    count = sum(map(len, done.ids))
    rate = done.tokens_per_second
    speed = f", then {rate:.1f} tokens per second" if rate else ""
    return (
        f"{count} tokens; the first after {done.first_seconds:.1f} s{speed}; the cache "
        f"takes {done.cache_bytes_per_token:,} bytes per token"
    )


def _rate(times: Sequence[float], *, rows: Sequence[Sequence[int]]) -> float | None:
    """Tokens per second once everything is compiled: after the second step."""
    if len(times) < 3:
        return None
    count = sum(max(len(row) - 2, 0) for row in rows)
    return count / (times[-1] - times[1])


class _Writer:
    """Writes a prompt and its tokens, as far as they make whole characters."""

    def __init__(self, tokenizer: data.Tokenizer, prompt: str, output: TextIO):
        self._tokenizer = tokenizer
        self._output = output
        self._written = 0
        self._prompt: Any = prompt

    def write(self, ids: Sequence[int], *, last: bool = False) -> None:
        if self._prompt is not None:
            self._output.write(self._prompt)
            self._prompt = None
        text = self._tokenizer.decode(ids)
        whole = text if last else text.rstrip("\ufffd")
        self._output.write(whole[self._written :] + "\n" * last)
        self._output.flush()
        self._written = max(self._written, len(whole))
