"""All cases of the fault suite, and how they are run."""

import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

from experiments.faults import (
    bad_steps,
    cases,
    damage,
    disks,
    fuzzing,
    killing,
    numerics,
    outputs,
    runs,
    settings,
    text,
    workspace,
)

_MODULES = (
    bad_steps,
    damage,
    disks,
    fuzzing,
    killing,
    numerics,
    outputs,
    settings,
    text,
)

CASES: tuple[cases.Case, ...] = tuple(
    sorted(
        (case for module in _MODULES for case in module.CASES),
        key=lambda case: case.number,
    )
)


def run(
    chosen: Sequence[cases.Case], space: workspace.Workspace
) -> Iterator[cases.Row]:
    """Yields a line per case as it ends; those of one group share a process."""
    groups = dict.fromkeys(case.group for case in chosen)
    for group in groups:
        members = [case for case in chosen if case.group == group]
        if group:
            yield from _run_group(members, space)
        else:
            for case in members:
                yield cases.attempt(case, space)


def _run_group(
    members: Sequence[cases.Case], space: workspace.Workspace
) -> Iterator[cases.Row]:
    """Runs cases in one process; a new one for the rest where it dies."""
    left = list(members)
    while left:
        path = space.root / f"rows-{left[0].number}.jsonl"
        numbers = ",".join(str(case.number) for case in left)
        flags = (f"--root={space.root}", f"--seed={space.seed}", f"--rows={path}")
        with runs.Process(
            [sys.executable, "-m", "experiments.faults.group", *flags, numbers],
            folder=space.root,
            environment=space.environment(),
        ) as process:
            while left:
                case, read = left[0], len(_rows(path))
                # Twice the limit: the process itself ends a case before.
                process.until(
                    lambda path=path, read=read: len(_rows(path)) > read,
                    limit=2 * case.limit + 60,
                )
                found = _rows(path)[read:]
                if not found:
                    break
                for row in found:
                    left = [case for case in left if case.number != row.number]
                    yield row
            if not left:
                return
            ended = process.wait(limit=0)
        last = ended.err.strip().splitlines()[-1:]
        said = f"its process ended with code {ended.code}: {' '.join(last)[:300]}"
        yield cases.row(left.pop(0), cases.Outcome("see the error", said, False), 0)


def _rows(path: pathlib.Path) -> list[cases.Row]:
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]  # the last may be incomplete
    return [cases.Row(**json.loads(line)) for line in lines]
