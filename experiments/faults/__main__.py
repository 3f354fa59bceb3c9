"""Injects faults into a tiny model's training, and says what becomes of each.

python -m experiments.faults
python -m experiments.faults --quick
python -m experiments.faults --only=4,41 --json=faults.json

Kills, signals, full disks, damaged files, bad text, bad numbers, bad flags: each fault
is real, and is judged by what must follow. All is written to a temporary folder.
"""

import dataclasses
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence

import rich.box
import rich.console
import rich.markup
import rich.table

from experiments import json_file
from experiments.faults import cases, suite, workspace
from sct_jax import errors
from sct_jax.training import exit_codes, overrides

_WIDTH = 2000  # of a table in a file: no cell is wrapped


def main(
    argv: Sequence[str] | None = None,
    *,
    known: Sequence[cases.Case] = suite.CASES,
) -> int:
    """Returns 0 if all faults that could be injected pass, 1 otherwise.

    Exits with code 2 for bad input.

    Args:
      argv: command line without the program; `sys.argv[1:]` if None.
      known: the cases to choose from.
    """
    parser = overrides.FlagParser(__doc__ or "")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="run only the quick faults (under a minute)",
    )
    parser.add_argument("--only", metavar="N[,M...]", help="run only these faults")
    json_file.add_flag(parser, "also write the rows to this file")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    flags = parser.parse_flags(sys.argv[1:] if argv is None else argv)
    try:
        chosen = _choose(known, flags.only, quick=flags.quick)
    except errors.UserError as error:
        overrides.fail(str(error))
    console = rich.console.Console(width=None if sys.stdout.isatty() else _WIDTH)
    numbers = ", ".join(str(case.number) for case in chosen)
    _say(console, f"seed {flags.seed}; faults {numbers} of {len(known)}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        space = workspace.Workspace(pathlib.Path(name), flags.seed, quick=flags.quick)
        rows = []
        for row in suite.run(chosen, space):
            rows.append(row)
            _say(
                console,
                f"{row.number:3} {row.result:7} {row.seconds:6.1f} s  {row.fault}",
            )
    rows.sort(key=lambda row: row.number)
    with console.capture() as printed:
        console.print(_table(rows))
    lines = [line for line in printed.get().splitlines() if line.strip()]
    console.file.write("\n".join(["", *lines, "", ""]))
    if flags.json is not None:
        values = [dataclasses.asdict(row) | {"seed": flags.seed} for row in rows]
        try:
            json_file.write(flags.json, values)
        except errors.UserError as error:
            overrides.fail(str(error))
    counts = {
        result: sum(row.result == result for row in rows)
        for result in (cases.PASS, cases.FAIL, cases.SKIPPED)
    }
    _say(
        console,
        f"{counts[cases.PASS]} pass, {counts[cases.FAIL]} fail, "
        f"{counts[cases.SKIPPED]} skipped; seed {flags.seed}, "
        f"{time.monotonic() - began:.0f} s",
    )
    code = exit_codes.ExitCode
    return code.INTERNAL_ERROR if counts[cases.FAIL] else code.FINISHED


def _choose(
    known: Sequence[cases.Case], only: str | None, *, quick: bool
) -> list[cases.Case]:
    """The cases to run, in order.

    Raises:
      UserError: `only` names none, or one that is not known.
    """
    if only is None:
        return [case for case in known if case.quick or not quick]
    numbers = {case.number: case for case in known}
    wanted = []
    for word in only.split(","):
        errors.check(
            "--only",
            word.strip().isdecimal() and int(word) in numbers,
            f"there is no fault {word.strip()!r}; use numbers from {min(numbers)} to "
            f"{max(numbers)}",
        )
        wanted.append(int(word))
    return [case for case in known if case.number in wanted]


def _table(rows: Sequence[cases.Row]) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.MARKDOWN)
    for name in ("number", "fault", "done", "required", "seen", "result"):
        table.add_column("#" if name == "number" else name, overflow="fold")
    for row in rows:
        cells = (row.number, row.fault, row.done, row.required, row.seen, row.result)
        # A bar would end a cell, and rich reads brackets as markup.
        table.add_row(*(_escape(str(cell)) for cell in cells))
    return table


def _escape(text: str) -> str:
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return rich.markup.escape(text.replace("|", "\\|"))


def _say(console: rich.console.Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
