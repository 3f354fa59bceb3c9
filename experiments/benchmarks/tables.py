"""Figures with targets, as tables and as JSON."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import rich.table


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
