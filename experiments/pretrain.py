"""Pre-trains a language model.

python -m experiments.pretrain --config=configs/smollm_r128.py:tiny
python -m experiments.pretrain --config=configs/smollm_r128.py --config.seed=1
"""

import os
import sys
from collections.abc import Sequence

# Neither does anything here but print: JAX about absent accelerators, TFDS about TF.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from experiments import huge_pages

if __name__ == "__main__":
    huge_pages.restart_with_huge_pages()

from sct_jax import errors
from sct_jax.training import command_line, loop


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 finished, 1 diverged, 2 bad input, 130 or 143."""
    argv = sys.argv[1:] if argv is None else argv
    experiment, workdir, flags = command_line.parse_experiment(argv, __doc__ or "")
    try:
        return loop.train(experiment, workdir, dry_run=flags.dry_run)
    except errors.UserError as error:
        command_line.fail(str(error))


if __name__ == "__main__":
    sys.exit(main())
