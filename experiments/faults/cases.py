"""What a case of the fault suite is, and how its outcome is judged."""

import dataclasses
import pathlib
import random
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments.faults import runs, workspace

PASS, FAIL, SKIPPED = "pass", "FAIL", "skipped"


class Outcome(NamedTuple):
    """What became of a fault.

    Attributes:
      done: the fault that was injected.
      seen: what followed.
      passed: whether that is what is required; None if the fault could not be injected
        on this machine.
    """

    done: str
    seen: str
    passed: bool | None


@dataclasses.dataclass(frozen=True)
class Context:
    """What a case works with.

    Attributes:
      folder: an empty folder of its own.
      rng: draws from the seed of the suite and the number of the case.
      space: text, caches and uninterrupted runs, shared by all cases.
    """

    folder: pathlib.Path
    rng: random.Random
    space: workspace.Workspace


@dataclasses.dataclass(frozen=True)
class Case:
    """A fault, what must happen, and the function that finds out.

    Attributes:
      number: unique.
      fault: in a few words.
      required: outcome that passes, in words.
      check: injects the fault and judges the outcome.
      group: cases of one group run in one process; "" runs processes of its own.
      quick: whether `--quick` includes it.
      limit: seconds that a case of a group may take.
    """

    number: int
    fault: str
    required: str
    check: Callable[[Context], Outcome]
    group: str = ""
    quick: bool = False
    limit: float = 240.0


class NotInjectedError(Exception):
    """The fault did not take place, so nothing was tested."""


class Seen:
    """Collects what a case sees, and whether all of it is as required."""

    def __init__(self):
        self._facts: list[str] = []
        self._failures: list[str] = []

    def that(self, holds: Any, fact: str, otherwise: object = "") -> bool:
        """Notes a fact that has to hold; returns whether it does.

        Args:
          holds: whether it does.
          fact: in words, as it is required.
          otherwise: what is there instead.
        """
        if holds:
            if fact not in self._facts:
                self._facts.append(fact)
        else:
            detail = " ".join(str(otherwise).split())
            self._failures.append(f"not so: {fact}" + (f" ({detail})" * bool(detail)))
        return bool(holds)

    def equal(self, name: str, found: object, wanted: object) -> bool:
        """Notes a value that has to be another; returns whether it is."""
        return self.that(found == wanted, f"{name} {wanted}", f"it is {found}")

    def all_of(self, fact: str, *parts: tuple[Any, str, object]) -> bool:
        """Notes one fact if all of its parts hold, and else those that do not.

        Args:
          fact: in words.
          *parts: arguments of `that`.
        """
        failed = [part for part in parts if not part[0]]
        for part in failed:
            self.that(*part)
        return not failed and self.that(True, fact)

    def raises(self, word: str, refused: Callable[[], Any]) -> bool:
        """Notes whether a call raises a ValueError whose message has the word."""
        try:
            refused()
        except ValueError as error:
            return self.that(word in str(error), f"refused by {word}", error)
        return self.that(False, f"refused by {word}", "accepted")

    def refused(self, ended: runs.Ended, *words: str, code: int = 2) -> bool:
        """Notes whether a command ended in one line that has all the words.

        Args:
          ended: the command.
          *words: that its message has to have.
          code: exit code that is due.
        """
        said = ended.errors[0] if ended.errors else ended.text[-300:]
        known = ("error: ", "  ", "(--help", "note: ")
        loose = [
            line
            for line in ended.err.splitlines()
            if line.strip() and not line.startswith(known)
        ]
        return self.all_of(
            f"exit code {code}, one line that names the cause",
            (ended.code == code, f"exit code {code}", f"it is {ended.code}: {said}"),
            ("Traceback" not in ended.text, "no traceback", said),
            (len(ended.errors) == 1, "one error", ended.err[-300:]),
            (not loose, "nothing else on standard error", loose),
            *((word in ended.err, f"it names {word}", said) for word in words),
        )

    def finished(self, ended: runs.Ended) -> bool:
        """Notes whether a command came to its end without an error."""
        return self.that(
            ended.code == 0 and "Traceback" not in ended.text,
            "exit code 0",
            f"it is {ended.code}: {ended.err[-300:]}",
        )

    def resumed(self, ended: runs.Ended, saved: Sequence[int]) -> bool:
        """Notes whether a command went on from the newest of the saved steps."""
        if not saved:
            return True
        return self.that(
            f"resumed at step {saved[-1]}\n" in ended.out,
            "it resumes at the newest checkpoint",
            f"not at {saved[-1]}: {ended.out[-300:]}",
        )

    def same_end(self, folder: pathlib.Path, clean: pathlib.Path) -> bool:
        """Notes whether a run ended in the state of another, each step logged once."""
        try:
            found, wanted = workspace.final_state(folder), workspace.final_state(clean)
        except Exception as error:
            return self.that(False, "the last checkpoint is whole", error)
        differing = [
            name
            for name, leaf in wanted.leaves.items()
            if leaf != found.leaves.get(name)
        ]
        rows, wanted_rows = map(workspace.timeless_rows, (folder, clean))
        return self.all_of(
            "end bitwise equal to the uninterrupted run, each step logged once",
            (found.step == wanted.step, f"last step {wanted.step}", found.step),
            (
                found.leaves.keys() == wanted.leaves.keys() and not differing,
                "end bitwise equal to the uninterrupted run",
                f"{len(differing)} arrays differ, such as {differing[:1]}",
            ),
            (
                rows == wanted_rows,
                "each step logged once, with the same numbers",
                f"{len(rows)} rows for {len(wanted_rows)}",
            ),
        )

    def outcome(self, done: str) -> Outcome:
        """Returns the outcome of the fault described by `done`."""
        if not self._facts and not self._failures:
            raise NotInjectedError(f"{done}: nothing was checked")
        if self._failures:
            return Outcome(done, "; ".join(self._failures), False)
        return Outcome(done, "; ".join(self._facts), True)


def injected(holds: Any, what: str) -> None:
    """Raises NotInjectedError unless the fault took place."""
    if not holds:
        raise NotInjectedError(what)


def skip(needed: str) -> Outcome:
    """Returns the outcome of a fault that this machine does not allow."""
    return Outcome("nothing", f"not run: needs {needed}", None)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table."""

    number: int
    fault: str
    done: str
    required: str
    seen: str
    result: str
    seconds: float


def row(case: Case, outcome: Outcome, seconds: float) -> Row:
    """Returns the line of a case with its outcome."""
    result = SKIPPED if outcome.passed is None else PASS if outcome.passed else FAIL
    return Row(
        number=case.number,
        fault=case.fault,
        done=outcome.done,
        required=case.required,
        seen=outcome.seen,
        result=result,
        seconds=round(seconds, 1),
    )


def attempt(case: Case, space: workspace.Workspace) -> Row:
    """Runs a case and returns its line; an exception is a failure."""
    began = time.monotonic()
    context = Context(
        folder=space.new_folder(f"case-{case.number}"),
        rng=random.Random(f"{space.seed} {case.number}"),
        space=space,
    )
    try:
        outcome = case.check(context)
    except NotInjectedError as error:
        outcome = Outcome("the fault did not take place", str(error), False)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{pathlib.Path(last.filename).name}:{last.lineno}"
        words = " ".join(f"{type(error).__name__}: {error}".split())
        outcome = Outcome("see the error", f"{words[:600]} ({where})", False)
    finally:
        space.remove(context.folder)
    return row(case, outcome, time.monotonic() - began)
