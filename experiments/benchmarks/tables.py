"""Figures with targets, as tables and as JSON, and the command that prints them."""

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import rich.console
import rich.table

from experiments import json_file
from experiments.benchmarks import machine
from sct_jax import errors
from sct_jax.training import overrides

NO_TORCH = "needs torch and transformers: install the dev extra"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One row: a measured value, and its lower or upper target.

    Attributes:
      name: what was measured.
      value: the measurement; None if there is none.
      at_least: lower target.
      at_most: upper target.
      note: why there is no value.
    """

    name: str
    value: float | None
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @property
    def text(self) -> str:
        """The value with three digits, or the note in its place."""
        if self.value is None:
            return self.note
        return f"{self.value:,.0f}" if self.value >= 1000 else f"{self.value:.3g}"

    @property
    def target(self) -> str:
        """The target as text."""
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"

    @property
    def verdict(self) -> str:
        """Returns "pass", "short", or "-" without a value or a target."""
        if self.value is None:
            return "-"
        if self.at_least is not None:
            return "pass" if self.value >= self.at_least else "short"
        if self.at_most is not None:
            return "pass" if self.value <= self.at_most else "short"
        return "-"


Figures = list[Figure]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A table of a benchmark.

    Attributes:
      title: title of the table.
      measure: from the number of timed runs to its figures.
    """

    title: str
    measure: Callable[[int], Figures]


def main(doc: str, rows: Mapping[str, Row], argv: Sequence[str]) -> int:
    """Prints the rows that the command line selects; returns the exit code 0.

    Exits with 2 for bad input.

    Args:
      doc: shown by --help.
      rows: name -> row.
      argv: command line without the program.
    """
    parser = parser_of(doc, rows, rounds=7)
    flags = parser.parse_flags(argv)
    try:
        measure(selected(flags, rows), rows, flags)
    except errors.UserError as error:
        overrides.fail(str(error))
    return 0


def parser_of(doc: str, rows: Mapping[str, Any], *, rounds: int) -> Any:
    """Returns a parser with --rows, --rounds and --json."""
    parser = overrides.FlagParser(doc)
    parser.add_argument("--rows", default=",".join(rows), help="rows, comma-separated")
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="timed runs of each function"
    )
    json_file.add_flag(parser)
    return parser


def selected(flags: argparse.Namespace, rows: Mapping[str, Any]) -> list[str]:
    """Returns the names of the rows to measure.

    Raises:
      UserError: for an unknown row, or rounds below 1.
    """
    errors.check("--rounds", flags.rounds >= 1, f"{flags.rounds} must be >= 1")
    names = list(dict.fromkeys(flags.rows.split(",")))
    for name in names:
        errors.check_choice("--rows", name, tuple(rows))
    return names


def measure(
    names: Sequence[str], rows: Mapping[str, Row], flags: argparse.Namespace
) -> None:
    """Measures rows and prints each as it ends; writes JSON after each too.

    Raises:
      UserError: the file can no longer be written.
    """
    console = rich.console.Console()
    titles = {name: rows[name].title for name in names}
    results: dict[str, Figures] = {}
    for name in names:
        results[name] = rows[name].measure(flags.rounds)
        console.print(table(titles[name], results[name], column="value"))
        if flags.json is not None:
            json_file.write(flags.json, as_json(titles, results))
        machine.release_memory()


def has_torch() -> bool:
    """Returns whether PyTorch and transformers are installed."""
    return all(map(importlib.util.find_spec, ("torch", "transformers")))


def table(
    title: str, figures: Sequence[Figure], *, column: str = "ratio"
) -> rich.table.Table:
    """Returns figures as a table.

    Args:
      title: shown above the table.
      figures: its rows.
      column: header of the values.
    """
    result = rich.table.Table(title=title, title_justify="left")
    result.add_column("figure")
    for header in (column, "target", ""):
        result.add_column(header, justify="right")
    for figure in figures:
        result.add_row(figure.name, figure.text, figure.target, figure.verdict)
    return result


def as_json(
    titles: Mapping[str, str], results: Mapping[str, Sequence[Figure]]
) -> dict[str, Any]:
    """Returns the figures of every table, ready for JSON.

    Args:
      titles: name -> title of a table.
      results: name -> its figures.
    """
    return {
        name: {
            "title": titles[name],
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "figures": [_as_dict(figure) for figure in figures],
        }
        for name, figures in results.items()
    }


def _as_dict(figure: Figure) -> dict[str, Any]:
    result: dict[str, Any] = {
        "name": figure.name,
        "value": figure.value,
        "target": figure.target,
        "verdict": figure.verdict,
    }
    return result | {"note": figure.note} if figure.note else result
