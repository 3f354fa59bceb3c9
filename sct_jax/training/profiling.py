"""A profiler trace of some steps of a run."""

import contextlib
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

from sct_jax import errors

_RANGE = re.compile(r"([0-9]{1,10}):([0-9]{1,10})")


def parse_range(text: str) -> tuple[int, int]:
    """Returns first and last step of "START:STOP".

    Raises:
      UserError: naming --profile, where the text is no range.
    """
    found = _RANGE.fullmatch(text)
    if found is None:
        raise errors.UserError(
            f"--profile: {text!r} is not START:STOP; give the first and the last step "
            "to trace, such as 10:12"
        )
    return int(found[1]), int(found[2])


def check_range(steps: tuple[int, int], *, num_steps: int) -> None:
    """Raises UserError, naming --profile, unless a run takes the first of the steps.

    Args:
      steps: first and last step to trace.
      num_steps: of the run.
    """
    first, last = steps
    text = f"{first}:{last}"
    errors.check(
        "--profile",
        first >= 1,
        f"{text} starts at step {first}, but steps count from 1; give START >= 1",
    )
    errors.check(
        "--profile",
        first <= last,
        f"{text} ends before it starts; give START <= STOP, such as "
        f"{min(steps)}:{max(steps)}",
    )
    errors.check(
        "--profile",
        first <= num_steps,
        f"{text} starts after the last step; give START <= num_steps = {num_steps}",
    )


class Profile:
    """Traces the steps of a range; a context manager around all steps of a run.

    Waits for the devices before the first and after the last step of the range, so that
    the trace holds all of these steps and no part of another. What happens between
    them, such as a save, is in the trace too. Leaving the block ends a trace early.

    A trace that cannot be taken or written costs a warning, not the run.
    """

    def __init__(
        self,
        steps: tuple[int, int] | None,
        folder: pathlib.Path,
        *,
        say: Callable[[str], None],
    ):
        """Traces nothing yet.

        Args:
          steps: first and last step to trace, counted from 1; None traces nothing.
          folder: receives the trace, as TensorBoard and XProf read it.
          say: receives a line that says where the trace is, or what became of it.
        """
        self._steps = steps
        self._folder = folder
        self._say = say
        self._began: int | None = None  # first step of a trace in progress
        self._done: tuple[int, Any] = (0, None)  # last step and its metrics

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        if self._began is not None:
            try:
                if kind is None:  # else the values may be what failed
                    jax.block_until_ready(self._done[1])
            finally:
                self._stop()

    def resume(self, start_step: int) -> None:
        """Says what part of the range is past after `start_step` steps."""
        if self._steps is None:
            return
        first, last = self._steps
        if last <= start_step:
            self._say(
                f"note: --profile={first}:{last} traces nothing: step {start_step} is "
                "done already"
            )
        elif first <= start_step:
            self._say(
                f"note: --profile={first}:{last} traces steps {start_step + 1} to "
                f"{last}: step {start_step} is done already"
            )

    @contextlib.contextmanager
    def step(self, step: int, state: Any) -> Iterator[None]:
        """Marks the block as a step in the trace, which it starts when due.

        Args:
          step: the step, counted from 1.
          state: before the step.
        """
        if self._steps and self._steps[0] <= step <= self._steps[1]:
            if self._began is None:
                jax.block_until_ready(state)
                self._start(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                yield
        else:
            yield

    def after(self, step: int, state: Any, values: Any) -> None:
        """Ends the trace after the last step of the range.

        Args:
          step: the step that was dispatched.
          state: after it; not kept.
          values: metrics of the step.
        """
        if self._began is None or self._steps is None:
            return
        self._done = (step, values)
        if step == self._steps[1]:
            jax.block_until_ready((state, values))
            self._stop()

    def _start(self, step: int) -> None:
        try:
            jax.profiler.start_trace(self._folder)
        except Exception as error:  # of any type: another trace, a driver
            self._steps = None
            self._say(f"warning: --profile: cannot start a trace: {error}")
        else:
            self._began = step

    def _stop(self) -> None:
        began, self._began, self._steps = self._began, None, None
        last = self._done[0]
        try:
            jax.profiler.stop_trace()
        except Exception as error:  # of any type: a full disk
            self._say(f"warning: --profile: the trace could not be written: {error}")
        else:
            self._say(
                f"profile: steps {began} to {last} are in {self._folder}; open it with "
                "TensorBoard or xprof --logdir"
            )
