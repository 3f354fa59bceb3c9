"""Prints the first token ids of the embedded text as a JSON list.

python -m experiments.first_tokens --count=9

A program of its own, so that a process whose memory is measured can have real tokens
without the libraries that make them. The tokenizer has 4,096 entries.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence

from sct_jax import data, errors
from sct_jax.training import command_line

VOCAB_SIZE = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    parser = command_line.FlagParser(__doc__ or "")
    parser.add_argument("--count", type=int, default=9, help="how many")
    flags = parser.parse_flags(sys.argv[1:] if argv is None else argv)
    with contextlib.redirect_stdout(sys.stderr):
        corpus = data.prepare(data.DataConfig(), vocab_size=VOCAB_SIZE)
    available = len(corpus.train)
    if not 0 < flags.count <= available:
        command_line.fail(f"--count: {flags.count} is not in 1..{available}")
    print(json.dumps(corpus.train[: flags.count].tolist()))
    return 0


def read_first_tokens(count: int) -> list[int]:
    """Returns the ids, from a child process.

    Raises:
      UserError: where the child has none; its messages went to standard error.
    """
    command = [sys.executable, "-m", "experiments.first_tokens", f"--count={count}"]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    errors.check(
        "--tokens", child.returncode == 0, f"cannot read {count} tokens, see above"
    )
    return json.loads(child.stdout)


if __name__ == "__main__":
    sys.exit(main())
