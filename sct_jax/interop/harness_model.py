"""A run as a model of lm-evaluation-harness (`pip install 'sct_jax[eval]'`)."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from lm_eval.api import model as harness  # pyright: ignore[reportMissingImports]
from lm_eval.models import utils as harness_utils  # pyright: ignore[reportMissingImports]

from sct_jax import decode, errors, sampling, scoring
from sct_jax.training import workdir as workdir_lib

_SAMPLER = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class HarnessModel(harness.TemplateLM):
    """Answers requests with the model of a workdir.

    Every text begins with the document mark, as in training. A request with more tokens
    than the context loses its first ones.

    Attributes:
      run: configuration, parameters and tokenizer.
      max_length: tokens that the model reads at once.
      batch_size: prompts that are continued together.
    """

    def __init__(
        self,
        workdir: str,
        *,
        max_length: int | None = None,
        stride: int | None = None,
        batch_size: int | str = "auto",
        seed: int = 0,
        **ignored: Any,
    ):
        """Loads the model.

        Args:
          workdir: a run, with a checkpoint.
          max_length: tokens that the model reads at once; None for those of training.
          stride: of the window over long documents, see `scoring.windows`. None is
            `max_length`, with which the harness scores other models.
          batch_size: prompts that are continued together; "auto" is 16.
          seed: of draws.
          **ignored: `device` and `max_batch_size`, which the harness always gives.

        Raises:
          UserError: the workdir holds no such run, or an argument has no such value.
        """
        super().__init__()
        unknown = ignored.keys() - {"device", "max_batch_size"}
        for name in sorted(unknown):
            errors.check_choice(
                "--model_args",
                name,
                ("workdir", "max_length", "stride", "batch_size", "seed"),
            )
        self.run = workdir_lib.load_run(str(workdir))
        context = self.run.config.data.seq_len
        self.max_length = context if max_length is None else max_length
        errors.check(
            "max_length",
            1 < self.max_length <= context,
            f"{max_length} must be in 2..{context}, the context of the run",
        )
        self._stride = self.max_length if stride is None else stride
        errors.check(
            "stride",
            1 <= self._stride <= self.max_length,
            f"{stride} must be in 1..{self.max_length}",
        )
        automatic = str(batch_size).startswith("auto")
        number = "16" if automatic else str(batch_size)
        errors.check(
            "batch_size",
            number.isdecimal() and int(number) > 0,
            f'{batch_size!r} must be "auto" or an integer > 0',
        )
        self.batch_size = int(number)
        errors.check("seed", 0 <= seed < 2**32, f"{seed} must be >= 0 and < 2^32")
        self._key = jax.random.key(seed)

    @property
    def eot_token_id(self) -> int:
        """The document mark."""
        return self.run.tokenizer.document_mark

    @property
    def tokenizer_name(self) -> str:
        """The hash of the tokenizer, for caches of requests."""
        return self.run.tokenizer.hash

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns the tokens of a text, after a document mark unless it is unwanted."""
        ids = self.run.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.eot_token_id, *ids]

    def _encode_pair(
        self, context: str, continuation: str
    ) -> tuple[list[int], list[int]]:
        """The tokens of both; those of the whole text unless one spans the border."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = (
                context[:-spaces],
                context[-spaces:] + continuation,
            )
        before = self.tok_encode(context)
        whole = self.tok_encode(context + continuation)
        if whole[: len(before)] == before:
            return before, whole[len(before) :]
        return before, self.tok_encode(continuation, add_special_tokens=False)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        found = []
        scores = self._score(
            _pair(before, after, self.max_length) for _, before, after in requests
        )
        for (strings, _, _), each in zip(requests, scores, strict=True):
            answer = _log_probability(each), bool(each.is_greedy.all())
            self.cache_hook.add_partial("loglikelihood", strings, answer)
            found.append(answer)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-probability of each text, by a window that slides over it."""
        found = []
        texts = [request.args for request in requests]
        scores = self._score(
            scoring.Request(self.tok_encode(text)) for (text,) in texts
        )
        for text, each in zip(texts, scores, strict=True):
            found.append(_log_probability(each))
            self.cache_hook.add_partial("loglikelihood_rolling", text, found[-1])
        return found

    def _score(self, requests: Iterable[scoring.Request]) -> Iterable[scoring.Scores]:
        return scoring.score(
            self.run.params,
            self.run.config.model,
            requests,
            seq_len=self.max_length,
            stride=self._stride,
        )

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Returns what follows each context, up to a stop sequence or its end.

        A context is cut from the left where it leaves less room than is asked for, but
        keeps half of what the model reads at once.
        """
        found: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1]), []).append(number)
        for options, numbers in groups.items():
            prompts = {n: self.tok_encode(requests[n].args[0]) for n in numbers}
            numbers = sorted(numbers, key=lambda n: len(prompts[n]))
            for at in range(0, len(numbers), self.batch_size):
                batch = numbers[at : at + self.batch_size]
                texts = self._continue(
                    [prompts[number] for number in batch], json.loads(options)
                )
                for number, text in zip(batch, texts, strict=True):
                    args = requests[number].args
                    self.cache_hook.add_partial("generate_until", args, text)
                    found[number] = text
        return [found[number] for number in range(len(requests))]

    def _continue(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        """What follows prompts, all with the same options of the harness."""
        wanted: dict[str, Any] = {**harness_utils.normalize_gen_kwargs(options)}
        until, most = wanted.pop("until"), wanted.pop("max_gen_toks")
        wanted.pop("do_sample", None)
        for name in wanted:
            errors.check_choice("generation_kwargs", name, _SAMPLER)
        given = {name: value for name, value in wanted.items() if value is not None}
        sampler = sampling.SamplingConfig(**{"temperature": 0.0, **given})
        # Of each prompt alone: what follows it does not depend on the others.
        half = self.max_length // 2
        rooms = [max(self.max_length - len(prompt), half) for prompt in prompts]
        limits = [max(1, min(most, room)) for room in rooms]
        kept = [
            prompt[-(self.max_length - limit) :]
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
        self._key, key = jax.random.split(self._key)
        rows: list[list[int]] = [[] for _ in prompts]
        ended = [False for _ in prompts]
        for tokens in decode.stream(
            self.run.params,
            self.run.config.model,
            kept,
            num_tokens=max(limits),
            key=key,
            sampler=sampler,
            stop=self.run.tokenizer.stops,
        ):
            for row, token in enumerate(tokens):
                if token is None:
                    ended[row] = True
                elif not ended[row]:
                    rows[row].append(token)
                    ended[row] = (
                        len(rows[row]) == limits[row] or self._text(rows[row], until)[1]
                    )
            if all(ended):
                break
        return [self._text(row, until)[0] for row in rows]

    def _text(self, tokens: list[int], until: Sequence[str]) -> tuple[str, bool]:
        """The text before the first stop sequence, and whether there is one."""
        text = self.run.tokenizer.decode(tokens)
        ends = [place for stop in until if stop and (place := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text, bool(ends)


def _log_probability(scores: scoring.Scores) -> float:
    return -float(scores.nats.sum(dtype="float64"))


def _pair(
    context: list[int], continuation: list[int], max_length: int
) -> scoring.Request:
    """The continuation, and as much context as fits into one window with it."""
    most = max(1, max_length + 1 - len(continuation))
    context = context[-most:]
    return scoring.Request([*context, *continuation], len(context))
