"""Random nasty flags: a dry run accepts them and builds, or refuses them in one line.

    python -m experiments.faults.fuzz_configs --seed=0 --count=1000

Ends with an error at the first command that exits with anything but 0 or 2, shows a
traceback, takes longer than a minute, or needs a gigabyte more than the ones before.
"""

import collections
import contextlib
import faulthandler
import io
import json
import pathlib
import random
import re
import resource
import sys
import tempfile
import warnings
from collections.abc import Sequence

from sct_jax import model
from sct_jax.training import cli, optimizer_config, overrides
from sct_jax.training import config as config_lib

SECONDS = 60
MEGABYTES = 1000  # that one command may add to the process
CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "smollm_r128.py"

_LIKELY = {
    "bool": ("true", "false", "0", "1"),
    "int": ("1", "2", "4", "16", "64", "128", "256", "1e3"),
    "float": ("0", "0.1", "0.5", "0.9", "1", "2", "1e-3", "1e-8", "1e4"),
    "NoneType": ("none", "1", "8", "0.5", "64"),
    "tuple": ("", "q", "gate,up,down", "q,k,v,o", "embedding"),
    "str": ("cosine", "svd", "qr", "none", "float32", "bfloat16", "text", "x.txt"),
}
_INTEGERS = (
    *("0", "-1", "1", "2", "3", "7", "16", "64", "96", "4096", "1_000", "+5", " 4 "),
    *("1e3", "1e18", "-1e18", "1e400", "2147483647", "2147483648", "4294967296"),
    *("9" * 20, "9" * 5000, "0x10", "1.5", "1e-3", "٣", "--1"),
)
_FLOATS = (
    *("0", "0.0", "-0.0", "1", "0.5", "0.999", "0.99999999999", "1e-3", "-1e-3", "2"),
    *("nan", "-nan", "inf", "-inf", "1e300", "1e-300", "1e-320", "3.5e38", "1e-45"),
    *("1e38", "1_0.5", "1,5", "0x1p3", "½"),
)
_WORDS = (
    *("", " ", "none", "None", "null", "true", "False", "0", "1", "yes", "q", "gate"),
    *("q,k", "q,q", "q,,k", "(5)", "('q',", "['q', 'k']", "[[1]]", "head", "é", "漢字"),
    *("\0", "\udcff", "a" * 5000, "../..", "~no-such-user/x", "*", "[", "{}", "%s"),
    *("__import__('os')", "low_rank", "spectral", "float16", "bfloat16", "layerwise"),
)
_FLAGS = (
    *("--config.", "--config.=1", "--config.model=1", "--config.model.=1", "--confg=x"),
    *("--dry-run=1", "--workdir=", "--workdir=\0", "--workdir=\udcff", "extra", "-x"),
    *("--allow-change=", "--allow-change=seed", "--allow-change=sed", "--", "--seed=1"),
    *("--stall-timeout=-1", "--stall-timeout=1e9", "--stall-timeout=é", "--config="),
    *("--workdir=~no-such-user/x", "--workdir=/dev/null", "--workdir=/dev/null/x"),
)
_CHOICES = {
    "optimizer.name": tuple(optimizer_config.CHAINS),
    "optimizer.schedule": optimizer_config.SCHEDULES,
    "model.factors": model.FACTORS,
    "model.remat": model.REMAT,
    "step": config_lib.STEPS,
}


def random_flags(rng: random.Random) -> list[str]:
    """Returns some flags of a training command: sound, extreme, wrong or contrary."""
    fields = list(_fields())
    flags = []
    for _ in range(rng.choice((1, 1, 2, 2, 3, 5, 8))):
        name = rng.choice(fields)
        if rng.random() < 0.05:
            flags.append(rng.choice(_FLAGS))
            continue
        text = _value(rng, name)
        if rng.random() < 0.05:
            name = _misspelt(rng, name)
        flags += [f"--config.{name}={text}"] * rng.choice((1,) * 9 + (2,))
    return flags


def _fields() -> dict[str, str]:
    """Every field of an experiment, with the name of its type."""
    found = {}
    for kind in optimizer_config.CHAINS.values():
        config = config_lib.ExperimentConfig(optimizer=kind())
        for name, value, _ in overrides.fields_of(config):
            if value is not None or name not in found:
                found[name] = type(value).__name__
    return found


def _value(rng: random.Random, name: str) -> str:
    if name in _CHOICES and rng.random() < 0.8:
        return rng.choice(_CHOICES[name])
    kinds = {"int": _INTEGERS, "float": _FLOATS, "NoneType": _INTEGERS + _FLOATS}
    kind = _fields()[name]
    usual = _LIKELY[kind] if rng.random() < 0.6 else kinds.get(kind, _WORDS)
    if rng.random() < 0.1:
        usual = rng.choice((_INTEGERS, _FLOATS, _WORDS))
    return rng.choice(usual)


def _misspelt(rng: random.Random, name: str) -> str:
    at = rng.randrange(len(name))
    return name[:at] + rng.choice(("", "x", "_", ".", "é", "-", " ")) + name[at + 1 :]


def dry_run(flags: Sequence[str], workdir: str) -> tuple[int, str]:
    """Returns exit code and error output of a dry run with the flags.

    Raises:
      AssertionError: the outcome is neither a run that builds nor a refusal.
    """
    given = [f"--config={CONFIG}:tiny", f"--workdir={workdir}", "--dry-run", *flags]
    out, err = io.StringIO(), io.StringIO()
    before = _megabytes()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")
        try:
            code = int(cli.main(given))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    text = err.getvalue()
    assert code in (0, 2), f"code {code}:\n{text}"
    assert "Traceback" not in text, text
    assert _megabytes() - before < MEGABYTES, f"{_megabytes() - before} MB more"
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == (code == 2), text
    if code == 0 and not any(flag.startswith("--workdir") for flag in flags):
        summary = json.loads((pathlib.Path(workdir) / "summary.json").read_text())
        assert summary["bytes"]["total"] > 0
    return code, text


def _megabytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 once all commands behave; prints how many were refused, and why."""
    parser = overrides.FlagParser(__doc__ or "")
    parser.add_argument("--seed", type=int, default=0, help="of the first command")
    parser.add_argument("--count", type=int, default=1000, help="number of commands")
    flags = parser.parse_flags(sys.argv[1:] if argv is None else argv)
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for seed in range(flags.seed, flags.seed + flags.count):
            given = random_flags(random.Random(seed))
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            try:
                code, text = dry_run(given, f"{folder}/{seed}")
            except BaseException:
                print(f"seed {seed}: {[flag[:200] for flag in given]!r}")
                raise
            faulthandler.cancel_dump_traceback_later()
            reason = re.split(r"[:']", text.removeprefix("error: "))[0]
            counts[f"refused: {reason}" if code else "accepted"] += 1
    for outcome, count in counts.most_common():
        print(f"{count:6} {outcome!a}")
    print(f"{flags.count} commands, {_megabytes()} MB at most")
    return 0


if __name__ == "__main__":
    sys.exit(main())
