"""The program `python -m sct_jax.training`, installed as `sct-train`."""

from typing import NoReturn

from sct_jax.training import huge_pages, process


def main() -> NoReturn:
    """Ends the process with the code of `cli.main`, in huge pages where they help."""
    huge_pages.restart_with_huge_pages()
    process.run(_main)


def _main() -> int:
    # Only now, as a restart repeats every import.
    from sct_jax.training import cli

    return cli.main()


if __name__ == "__main__":
    main()
