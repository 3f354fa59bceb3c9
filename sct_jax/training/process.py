"""How a program starts and ends: signals, output, exit code."""

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from sct_jax.training import exit_codes, huge_pages, signals, streams


def start(module: str) -> NoReturn:
    """Runs `main` of a module as `run` does, in huge pages where they help.

    Call it before any slow import, which a restart for huge pages would repeat:

        from sct_jax.training import process

        if __name__ == "__main__":
            process.start("experiments.generate")

        import jax

    Args:
      module: its full name. It is imported anew, once signals are answered.
    """
    huge_pages.restart_with_huge_pages()
    run(lambda: importlib.import_module(module).main())


def run(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and ends the process with the exit code that it returns.

    Answers signals from the start, so `main` should do slow imports. After anything
    but an ordinary end, the threads of libraries cannot keep the process alive.
    """
    streams.forgive_all()
    warnings.showwarning = _show_warning
    with signals.Program():
        code = _exit_code(main)
        if code:
            streams.flush()
            os._exit(code)
    sys.exit(0)


def _exit_code(main: Callable[[], int]) -> int:
    try:
        return main()
    except SystemExit as end:
        if isinstance(end.code, str):
            say(end.code)
            return exit_codes.ExitCode.INTERNAL_ERROR
        return end.code or 0
    except signals.Interrupted as interrupt:
        return exit_codes.of_signal(interrupt.number)
    except BaseException as error:
        report_bug(error, "nothing was trained")
        return exit_codes.ExitCode.INTERNAL_ERROR


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """A line without the place in the code, for warnings that are meant for users."""
    if issubclass(category, UserWarning):
        say(f"warning: {message}")
    else:
        _show_other_warning(message, category, filename, lineno, file, line)


_show_other_warning = warnings.showwarning


def report_bug(error: BaseException, kept: str) -> None:
    """Prints the traceback of an unexpected error, what it is, and what is kept."""
    traceback.print_exception(error)
    last = traceback.format_exception_only(error)[-1].strip().splitlines()
    say(
        f"error: {last[0] if last else type(error).__name__}. This is a bug in sct_jax "
        f"or in its environment: please report the lines above; {kept}"
    )


def say(text: str) -> None:
    """Prints a line to standard error."""
    print(text, file=sys.stderr)
