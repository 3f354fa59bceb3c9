"""Runs some cases of the suite in this process; `suite` starts it."""

import argparse
import dataclasses
import faulthandler
import json
import pathlib
import sys
from collections.abc import Sequence

from experiments.faults import cases, runs, suite, workspace


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 once the outcome of every case is written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=pathlib.Path, help="folder of the suite")
    parser.add_argument("--seed", type=int, help="of the suite")
    parser.add_argument("--rows", type=pathlib.Path, help="receives a line per case")
    parser.add_argument("numbers", help="of the cases")
    flags = parser.parse_args(argv)
    space = workspace.Workspace(flags.root, flags.seed)
    numbers = [int(number) for number in flags.numbers.split(",")]
    for case in (case for case in suite.CASES if case.number in numbers):
        # For code that holds the interpreter's lock, which no alarm reaches.
        faulthandler.dump_traceback_later(case.limit + 30, exit=True)
        row = _within_limit(case, space)
        faulthandler.cancel_dump_traceback_later()
        with open(flags.rows, "a") as file:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")
    return 0


def _within_limit(case: cases.Case, space: workspace.Workspace) -> cases.Row:
    try:
        with runs.Deadline(case.limit):
            return cases.attempt(case, space)
    except runs.TooLate as error:
        outcome = cases.Outcome("see the error", str(error), False)
        return cases.row(case, outcome, case.limit)


if __name__ == "__main__":
    sys.exit(main())
