"""All cases of the fault suite, and how they are run."""

import json
import os
import pathlib
import queue
import sys
import threading
from collections.abc import Iterator, Sequence

from experiments.faults import (
    bad_steps,
    cases,
    damage,
    disks,
    fuzzing,
    interfaces,
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
    interfaces,
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


_WORKERS = min(2, os.cpu_count() or 1)


def run(
    chosen: Sequence[cases.Case], space: workspace.Workspace
) -> Iterator[cases.Row]:
    """Yields a line per case as it ends; those of one group share a process.

    Two processes run at a time, where there are two cores.
    """
    # Numerics need no run of the tiny model, which another group trains meanwhile. What
    # takes long comes first, so that all end at about the same time.
    groups = sorted(
        {case.group for case in chosen if case.group},
        key=lambda group: (group != "numerics", group),
    )
    jobs: list[Iterator[cases.Row]] = [
        _run_group([case for case in chosen if case.group == group], space)
        for group in groups
    ]
    alone = [case for case in chosen if not case.group]
    jobs += [_run_alone(case, space) for case in reversed(alone)]
    waiting = iter(jobs)
    found: queue.Queue[cases.Row | BaseException | None] = queue.Queue()
    lock, stopped = threading.Lock(), threading.Event()

    def work() -> None:
        try:
            while not stopped.is_set():
                with lock:
                    job = next(waiting, None)
                if job is None:
                    break
                for row in job:
                    found.put(row)
        except BaseException as error:
            found.put(error)
        found.put(None)

    workers = [threading.Thread(target=work) for _ in range(_WORKERS)]
    for worker in workers:
        worker.start()
    try:
        running = len(workers)
        while running:
            row = found.get()
            if isinstance(row, BaseException):
                raise row
            if row is None:
                running -= 1
            else:
                yield row
    finally:
        stopped.set()
        runs.end_all()
        for worker in workers:
            worker.join()


def _run_alone(case: cases.Case, space: workspace.Workspace) -> Iterator[cases.Row]:
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
