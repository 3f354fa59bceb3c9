"""What the exit code of the training program says."""

import enum
import signal


class ExitCode(enum.IntEnum):
    """How the program ended. `meaning` is its line in `--help`."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> "ExitCode":
        """Returns a member that carries its meaning."""
        code = int.__new__(cls, value)
        code._value_ = value
        code.meaning = meaning
        return code

    FINISHED = 0, "finished, now or earlier"
    INTERNAL_ERROR = 1, "an unexpected error, with a traceback: please report it"
    BAD_INPUT = 2, "a flag, a field or a file must change; one line names it"
    DIVERGED = 3, "the loss diverged; the last finite checkpoint is kept"
    SAVE_FAILED = 4, "a file of the run could not be written; older ones are kept"
    STALLED = 5, "nothing happened for --stall-timeout; stacks-*.txt says where"
    OUT_OF_MEMORY = 6, "memory ran out; one line names what to lower"
    PEER_LOST = 7, "another process of the run was lost; the same commands resume"
    ABORTED = (
        128 + signal.SIGABRT,
        "process 0 was lost, and JAX ended the others; the same commands resume",
    )
    HANGUP = 128 + signal.SIGHUP, "SIGHUP: saved, where there was a state to save"
    INTERRUPTED = 128 + signal.SIGINT, "SIGINT: likewise"
    TERMINATED = 128 + signal.SIGTERM, "SIGTERM: likewise"


def of_signal(number: int) -> int:
    """Returns the exit code of a process that a signal ended: 130 for SIGINT."""
    return 128 + number


def table() -> str:
    """Returns a line per exit code, for `--help`."""
    lines = [f"  {code.value:3}  {code.meaning}" for code in ExitCode]
    return "\n".join(["Exit codes:", *lines])
