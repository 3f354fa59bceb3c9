"""The program `python -m sct_jax.training`, installed as `sct-train`."""

import sys

from sct_jax.training import huge_pages


def main() -> int:
    """Returns the exit code of `cli.main`, run in huge memory pages where they help."""
    huge_pages.restart_with_huge_pages()
    # Only now, as a restart repeats every import.
    from sct_jax.training import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
