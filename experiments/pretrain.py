"""Pre-trains a language model.

python -m experiments.pretrain --config=configs/smollm_r128.py:tiny
python -m experiments.pretrain --config=configs/smollm_r128.py --config.seed=1
"""

from collections.abc import Sequence

from sct_jax.training import huge_pages, process


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code, see `sct_jax.training.cli.main`."""
    from sct_jax.training import cli

    return cli.main(argv)


if __name__ == "__main__":
    huge_pages.restart_with_huge_pages()
    process.run(main)
