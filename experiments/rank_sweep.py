"""Sweeps the rank of the MLP matrices, as in the table of the SCT paper, beside dense.

python -m experiments.rank_sweep
python -m experiments.report experiments/results/rank_sweep

A comparison whose arms are ranks, with one learning rate for all parameters and with
one for each component, see configs/rank_sweep.py. Flags are those of
`experiments.compare`.
"""

import sys
from collections.abc import Sequence

from experiments import huge_pages

if __name__ == "__main__":
    huge_pages.restart_with_huge_pages()

from experiments import compare


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code, see `compare.main`."""
    return compare.command(argv, __doc__ or "", default="configs/rank_sweep.py")


if __name__ == "__main__":
    sys.exit(main())
