"""A report on results: text, tables and figures, as Markdown and as one HTML page."""

import base64
import html
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from experiments.studies import summary


class Table(NamedTuple):
    """A table and what stands above it."""

    heading: str
    header: Sequence[str]
    body: Sequence[Sequence[str]]


class Figure(NamedTuple):
    """A figure, and the name of its file without the ending."""

    name: str
    caption: str
    png: bytes


class Page(NamedTuple):
    """What a report says, in the order in which it says it."""

    title: str
    notes: Sequence[str]
    tables: Sequence[Table]
    figures: Sequence[Figure]

    def write(self, folder: pathlib.Path) -> pathlib.Path:
        """Returns the path of report.md, written beside report.html and figures/."""
        (folder / "figures").mkdir(exist_ok=True)
        for figure in self.figures:
            (folder / "figures" / f"{figure.name}.png").write_bytes(figure.png)
        (folder / "report.html").write_text(self.as_html())
        page = folder / "report.md"
        page.write_text(self.as_markdown())
        return page

    def as_markdown(self) -> str:
        """Returns the report as Markdown, with links to its figures."""
        lines = [f"# {self.title}", ""]
        for note in self.notes:
            lines += [note, ""]
        for heading, header, body in self.tables:
            lines += [f"## {heading}", ""]
            lines += [_row(header), _row(["---"] * len(header)), *map(_row, body), ""]
        for name, caption, _ in self.figures:
            lines += [f"![{caption}](figures/{name}.png)", "", caption, ""]
        return "\n".join(lines)

    def as_html(self) -> str:
        """Returns the report as one page that needs no other file."""
        parts = [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<link rel="icon" href="data:,">',
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head>",
            f"<body><h1>{html.escape(self.title)}</h1>",
            *(f"<p>{html.escape(note)}</p>" for note in self.notes),
        ]
        for heading, header, body in self.tables:
            cells = lambda tag, row: "".join(
                f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row
            )
            parts += [
                f"<h2>{html.escape(heading)}</h2><div class='wide'><table>",
                f"<tr>{cells('th', header)}</tr>",
                *(f"<tr>{cells('td', row)}</tr>" for row in body),
                "</table></div>",
            ]
        for _, caption, png in self.figures:
            source = base64.b64encode(png).decode()
            text = html.escape(caption, quote=True)
            parts.append(
                f'<figure><img alt="{text}" src="data:image/png;base64,{source}">'
                f"<figcaption>{text}</figcaption></figure>"
            )
        return "\n".join([*parts, "</body></html>"]) + "\n"


def provenance(rows: Sequence[summary.Row]) -> Table:
    """Returns the table of which trials were made with what."""
    counts: dict[tuple[str, ...], int] = {}
    header = list(dict.fromkeys(name for row in rows for name in row["environment"]))
    for row in rows:
        made_with = tuple(str(row["environment"].get(name, "")) for name in header)
        counts[made_with] = counts.get(made_with, 0) + 1
    body = [[str(count), *made_with] for made_with, count in counts.items()]
    return Table("What was run", ["trials", *header], body)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; color: #111; background: #fff; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ccc; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 2rem 0; } img { max-width: 100%; height: auto; }
figcaption { color: #444; }
"""
