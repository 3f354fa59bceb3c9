"""The program `python -m sct_jax.training`, installed as `sct-train`."""

from typing import NoReturn

from sct_jax.training import process


def main() -> NoReturn:
    """Ends the process with the code of `cli.main`."""
    process.start("sct_jax.training.cli")


if __name__ == "__main__":
    main()
