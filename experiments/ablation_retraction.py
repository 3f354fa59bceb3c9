"""Asks whether the Stiefel constraint changes the loss that can be reached.

python -m experiments.ablation_retraction
python -m experiments.report experiments/results/ablation_retraction

A comparison of dense matrices with factors of full rank and of a quarter of it, with
the retraction and without, see configs/ablation_retraction.py. Flags are those of
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
    return compare.command(
        argv, __doc__ or "", default="configs/ablation_retraction.py"
    )


if __name__ == "__main__":
    sys.exit(main())
