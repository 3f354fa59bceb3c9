"""Random input by the thousand: configurations, corpora, tokenizers, caches."""

import collections
import random
import shutil
import sys
from collections.abc import Callable, Sequence

from experiments.faults import cases, fuzz_caches, fuzz_tokenizers, runs
from sct_jax import data

CONFIGS, CORPORA, TOKENIZERS, CACHES = 1000, 200, 100, 100
_SECONDS = 60  # for one tokenizer or cache


def _configs(context: cases.Context) -> cases.Outcome:
    ends = ("accepted", "refused")
    return _program(context, "fuzz_configs", CONFIGS, "configurations", ends)


def _corpora(context: cases.Context) -> cases.Outcome:
    ends = ("read", "refused")
    return _program(context, "fuzz_corpora", CORPORA, "corpora", ends)


def _program(
    context: cases.Context, name: str, count: int, what: str, wanted: Sequence[str]
) -> cases.Outcome:
    """Runs a program of this package, which ends at the first case that fails."""
    seen = cases.Seen()
    seed = context.rng.randrange(1 << 31)
    flags = (f"--seed={seed}", f"--count={count}")
    with runs.Process(
        [sys.executable, "-m", f"experiments.faults.{name}", *flags],
        folder=context.folder,
        environment=context.space.environment(),
    ) as process:
        ended = process.wait(limit=900)
    seen.finished(ended)
    ends = [" ".join(line.split()) for line in ended.out.splitlines()]
    for word in wanted:
        cases.injected(ended.code or word in ended.out, f"none was {word}")
    seen.that(ends, f"no traceback, no hang ({len(ends)} kinds of outcome)")
    return seen.outcome(f"{count:,} {what}, from seed {seed}")


def _tokenizers(context: cases.Context) -> cases.Outcome:
    seen, rng = cases.Seen(), context.rng
    corpus = _corpus(context)
    whole = corpus.tokenizer.backend.to_str()
    path = context.folder / "tokenizer.json"
    ends: collections.Counter[str] = collections.Counter()
    for _ in range(TOKENIZERS):
        seed = rng.randrange(1 << 31)
        mutated = fuzz_tokenizers.mutate_tokenizer(random.Random(seed), whole)
        path.write_text(mutated, encoding="utf-8", errors="surrogatepass")
        ends[
            _attempt(seen, seed, lambda: fuzz_tokenizers.try_tokenizer(str(path)))
        ] += 1
    cases.injected(ends["refused"] and ends["kept"], f"one-sided: {dict(ends)}")
    seen.that(True, ", ".join(f"{count} {end}" for end, count in ends.most_common()))
    return seen.outcome(f"{TOKENIZERS} mutated tokenizers")


def _caches(context: cases.Context) -> cases.Outcome:
    seen, rng = cases.Seen(), context.rng
    expected = fuzz_caches.corpus_bits(_corpus(context))
    cache = context.folder / "cache"
    ends: collections.Counter[str] = collections.Counter()
    for _ in range(CACHES):
        seed = rng.randrange(1 << 31)
        fuzz_caches.damage_cache(random.Random(seed), str(cache))
        end = _attempt(
            seen,
            seed,
            lambda: fuzz_caches.try_cache(
                lambda log: _corpus(context, log), expected
            ).split()[0],
        )
        ends[end] += 1
        if end not in ("repaired", "unharmed"):  # such as a lock: begin anew
            shutil.rmtree(cache)
            _corpus(context)
    cases.injected(ends["repaired"] > CACHES / 4, f"hardly any damage: {dict(ends)}")
    seen.that(True, ", ".join(f"{count} {end}" for end, count in ends.most_common()))
    return seen.outcome(f"{CACHES} damaged files of a cache")


def _attempt(seen: cases.Seen, seed: int, attempt: Callable[[], str]) -> str:
    """Returns how one case ended; notes anything but what it may do."""
    try:
        with runs.Deadline(_SECONDS):
            return attempt()
    except (Exception, runs.TooLate) as error:
        words = " ".join(str(error).split())[:200]
        seen.that(False, "no error", f"seed {seed}: {type(error).__name__}: {words}")
        return "failed"


def _corpus(
    context: cases.Context, log: Callable[[str], None] = lambda line: None
) -> data.Corpus:
    config = data.DataConfig(
        source=context.space.source, cache_dir=str(context.folder / "cache")
    )
    return data.prepare(config, vocab_size=300, log=log)


CASES = (
    cases.Case(
        53,
        f"{CONFIGS:,} random configurations, several flags at once",
        "it builds, or is refused in one line; no traceback, no hang",
        _configs,
    ),
    cases.Case(
        54,
        f"{CORPORA} random corpora",
        "read to the last byte of text, or refused; all counts add up",
        _corpora,
    ),
    cases.Case(
        55,
        f"{TOKENIZERS} mutated tokenizers",
        "text is kept, or the tokenizer is refused",
        _tokenizers,
        group="fuzzing",
        limit=600,
    ),
    cases.Case(
        57,
        f"{CACHES} damaged files of a cache",
        "repaired, without effect, or refused",
        _caches,
        group="fuzzing",
        limit=600,
    ),
)
