"""Prints the first token ids of the embedded corpus as a JSON list.

python -m experiments.first_tokens --count=9

The tokenizer has 4,096 entries. `read_first_tokens` runs this as a child process: a
process that measures its own memory then gets real tokens without loading the data
libraries.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence

from sct_jax import data, errors
from sct_jax.training import overrides

VOCAB_SIZE = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    parser = overrides.FlagParser(__doc__ or "")
    parser.add_argument("--count", type=int, default=9, help="number of ids")
    flags = parser.parse_flags(sys.argv[1:] if argv is None else argv)
    # The split behind the 70B losses in experiments/README.md.
    config = data.DataConfig(split="files")
    with contextlib.redirect_stdout(sys.stderr):
        corpus = data.prepare(config, vocab_size=VOCAB_SIZE)
    available = len(corpus.train)
    if not 0 < flags.count <= available:
        overrides.fail(f"--count: {flags.count} is not in 1..{available}")
    print(json.dumps(corpus.train[: flags.count].tolist()))
    return 0


def read_first_tokens(count: int) -> list[int]:
    """Returns the first `count` ids, computed in a child process.

    Raises:
      UserError: if the child fails. It has printed the reason to standard error.
    """
    command = [sys.executable, "-m", "experiments.first_tokens", f"--count={count}"]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    errors.check(
        "--tokens", child.returncode == 0, f"cannot read {count} tokens; see above"
    )
    return json.loads(child.stdout)


if __name__ == "__main__":
    sys.exit(main())
