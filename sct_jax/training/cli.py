"""Pre-trains a language model.

python -m experiments.pretrain --config=configs/smollm_r128.py:tiny
sct-train --config=my_config.py --config.seed=1
"""

import functools
import os
import pathlib
import sys
from collections.abc import Sequence

# Silences JAX about absent accelerators, and TFDS about TensorFlow. JAX sets "1".
if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

from sct_jax import errors
from sct_jax.training import (
    checkpoint,
    compilation,
    exit_codes,
    failures,
    loop,
    origin,
    overrides,
    process,
    processes,
)
from sct_jax.training import workdir as workdir_lib

ExitCode = exit_codes.ExitCode


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of a run, see `exit_codes`. Exits for bad input.

    Args:
      argv: command line without the program; `sys.argv[1:]` if None.
    """
    arguments = sys.argv[1:] if argv is None else argv
    with overrides.notes_on_renames():
        flags, pairs = overrides.parse_command(
            arguments, f"{__doc__}\n{exit_codes.table()}\n"
        )
        try:
            if flags.address or flags.distributed:
                processes.start(
                    flags.address,
                    overrides.workdir_of(flags),
                    connect_timeout=flags.connect_timeout,
                    peer_timeout=flags.peer_timeout,
                )
            say = process.say if processes.is_first() else lambda line: None
            experiment, workdir = overrides.load_command(
                flags, pairs, inherit=functools.partial(origin.inherit, log=say)
            )
        except errors.UserError as error:
            processes.leave(ExitCode.BAD_INPUT, f"error: {error}")
            overrides.fail(str(error))
    if flags.stall_timeout is None and processes.count() > 1:
        flags.stall_timeout = processes.STALL_TIMEOUT  # who waits for whom is unknown
    try:
        with compilation.cached(process.say):
            result = loop.train(
                experiment,
                workdir,
                dry_run=flags.dry_run,
                compile_step=flags.compile,
                allow_change=flags.allow_change,
                stall_timeout=flags.stall_timeout,
                profile=flags.profile,
                init_from=flags.init_from,
            )
    except errors.UserError as error:
        overrides.fail(str(error))
    except Exception as error:
        return _failed(error, workdir)
    processes.close()
    if result.signal is not None:
        return exit_codes.of_signal(result.signal)
    return ExitCode.DIVERGED if result.status == "diverged" else ExitCode.FINISHED


def _failed(error: Exception, workdir: pathlib.Path) -> ExitCode:
    """Says what happened, what is kept and what to do; the exit code."""
    kept = _describe_kept(workdir)
    code = failures.code_of(error)
    if code == ExitCode.OUT_OF_MEMORY:
        first_line = str(error).strip().split("\n")[0] or type(error).__name__
        process.say(
            f"error: out of memory ({first_line}); lower data.batch_size, raise "
            f'data.num_microbatches, or set model.remat to "full"; {kept}'
        )
    elif isinstance(error, checkpoint.SaveError):
        process.say(f"error: {error}; {kept}")
    elif code == ExitCode.SAVE_FAILED:
        process.say(
            f"error: cannot write: {error}; free space or raise the limit; {kept}"
        )
    else:
        process.report_bug(error, kept)
    return code


def _describe_kept(workdir: pathlib.Path) -> str:
    try:
        step = workdir_lib.steps_done(workdir)
    except Exception:  # whatever is wrong there, it is not the error to report
        step = 0
    if not step:
        return f"nothing is saved in {workdir} yet"
    return (
        f"the checkpoint of step {step} in {workdir} is kept, and the same command "
        "resumes from it"
    )
