"""What an exception that ends a run means."""

import errno

import jax

from sct_jax import errors
from sct_jax.training import checkpoint, exit_codes

# Of a disk or file system, not of a program.
_STORAGE = (
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ENOSPC,
    errno.EROFS,
    errno.ESTALE,
)


def code_of(error: BaseException) -> exit_codes.ExitCode:
    """Returns the exit code of a process that an exception ends."""
    if isinstance(error, errors.UserError):
        return exit_codes.ExitCode.BAD_INPUT
    if isinstance(error, KeyboardInterrupt):
        return exit_codes.ExitCode.INTERRUPTED
    if isinstance(error, checkpoint.SaveError) or _is(error, *_STORAGE):
        return exit_codes.ExitCode.SAVE_FAILED
    if (
        isinstance(error, MemoryError)
        or _is(error, errno.ENOMEM)
        or (is_of_runtime(error) and "RESOURCE_EXHAUSTED" in str(error))
    ):
        return exit_codes.ExitCode.OUT_OF_MEMORY
    return exit_codes.ExitCode.INTERNAL_ERROR


def is_of_runtime(error: BaseException) -> bool:
    """Returns whether the runtime of JAX raised it."""
    return isinstance(error, jax.errors.JaxRuntimeError)


def _is(error: BaseException, *numbers: int) -> bool:
    return isinstance(error, OSError) and error.errno in numbers
