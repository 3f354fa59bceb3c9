"""A report: text, tables and images, as Markdown and as one HTML page."""

import base64
import html
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from experiments.studies import rows as rows_lib


class Table(NamedTuple):
    """A table with its heading."""

    heading: str
    header: Sequence[str]
    body: Sequence[Sequence[str]]


class Image(NamedTuple):
    """A drawn figure; its file has this name with the suffix .png."""

    name: str
    caption: str
    png: bytes


class Page(NamedTuple):
    """The parts of a report, in their order."""

    title: str
    notes: Sequence[str]
    tables: Sequence[Table]
    images: Sequence[Image]

    def write(self, folder: pathlib.Path) -> pathlib.Path:
        """Writes report.md, report.html and figures/; returns the path of the first."""
        (folder / "figures").mkdir(exist_ok=True)
        for image in self.images:
            (folder / "figures" / f"{image.name}.png").write_bytes(image.png)
        (folder / "report.html").write_text(self.as_html())
        page = folder / "report.md"
        page.write_text(self.as_markdown())
        return page

    def as_markdown(self) -> str:
        """Returns the report as Markdown, with links to its images."""
        lines = [f"# {self.title}", ""]
        for note in self.notes:
            lines += [note, ""]
        for heading, header, body in self.tables:
            lines += [f"## {heading}", "", markdown_table(header, body), ""]
        for name, caption, _ in self.images:
            lines += [f"![{caption}](figures/{name}.png)", "", caption, ""]
        return "\n".join(lines)

    def as_html(self) -> str:
        """Returns the report as one page without other files."""
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
        for _, caption, png in self.images:
            source = base64.b64encode(png).decode()
            text = html.escape(caption, quote=True)
            parts.append(
                f'<figure><img alt="{text}" src="data:image/png;base64,{source}">'
                f"<figcaption>{text}</figcaption></figure>"
            )
        return "\n".join([*parts, "</body></html>"]) + "\n"


def provenance(rows: Sequence[rows_lib.Row]) -> Table:
    """Returns the table of environments, with their numbers of trials."""
    counts: dict[tuple[str, ...], int] = {}
    header = list(dict.fromkeys(name for row in rows for name in row.environment))
    for row in rows:
        values = tuple(str(row.environment.get(name, "")) for name in header)
        counts[values] = counts.get(values, 0) + 1
    body = [[str(count), *values] for values, count in counts.items()]
    return Table("What was run", ["trials", *header], body)


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    line = lambda cells: f"| {' | '.join(cells)} |"
    return "\n".join(map(line, (header, ["---"] * len(header), *body)))


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
