"""Output that nobody reads, encodings, exit codes, and logs that are not logs."""

import fcntl
import os
import pathlib
import pty
import select
import shlex
import subprocess
import sys
import termios
import threading

from experiments.faults import cases, runs, workspace
from sct_jax.training import exit_codes

_ExitCode = exit_codes.ExitCode
_LONG, _ENDLESS = workspace.LONG, workspace.ENDLESS
_LINES = 5


def _not_read(context: cases.Context) -> cases.Outcome:
    seen, space, clean = cases.Seen(), context.space, context.space.clean()
    printed = len((clean / "stdout").read_text().splitlines())
    cases.injected(printed > _LINES + 5, f"only {printed} lines are printed")

    folder = context.folder / "piped"
    command = shlex.join(space.command(folder))
    command = f"{command} | head -{_LINES}; exit ${{PIPESTATUS[0]}}"
    with runs.Process(
        ["bash", "-c", command], folder=space.root, environment=space.environment()
    ) as process:
        ended = process.wait()
    cases.injected(len(ended.out.splitlines()) == _LINES, "the pipe stayed open")
    seen.finished(ended)
    seen.that(not ended.err, "nothing on standard error", ended.err[-300:])
    seen.same_end(folder, clean)

    folder = context.folder / "full"
    with open("/dev/full", "wb") as full:
        ended = space.train(folder, stdout=full)
    seen.finished(ended)
    seen.that(not ended.err, "nothing on standard error", ended.err[-300:])
    seen.same_end(folder, clean)

    folder = context.folder / "terminal"
    ended, shown = _close_terminal(context, folder)
    cases.injected(b"compiled in" in shown, "the terminal showed no run")
    seen.equal("exit code on a hangup", ended.code, _ExitCode.HANGUP)
    logged, saved = workspace.last_step(folder), workspace.saved_steps(folder)
    cases.injected(logged < 400, "the run was over")
    seen.that(saved and saved[-1] == logged, "the last step is saved", saved[-1:])
    ended = space.train(folder, _LONG)
    seen.finished(ended)
    seen.resumed(ended, saved)
    seen.same_end(folder, space.clean(_LONG))
    return seen.outcome(
        f"`| head -{_LINES}`; standard output on /dev/full; a terminal closed at step "
        f"{logged} of 400, then the same command"
    )


def _close_terminal(
    context: cases.Context, folder: pathlib.Path
) -> tuple[runs.Ended, bytes]:
    """Runs in a terminal that is closed; returns how it ended and what was shown."""
    terminal, inner = pty.openpty()
    shown: list[bytes] = []
    closing = threading.Event()

    def read() -> None:  # else the terminal fills up and stops the run
        while not closing.is_set():
            if select.select([terminal], [], [], 0.02)[0]:
                shown.append(os.read(terminal, 4096))

    step = context.rng.randrange(21, 200)
    with context.space.start(
        folder,
        _LONG,
        stdin=inner,
        stdout=inner,
        stderr=inner,
        before=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as process:
        os.close(inner)
        thread = threading.Thread(target=read)
        thread.start()
        try:
            process.until(lambda: workspace.last_step(folder) >= step)
            cases.injected(process.is_running(), "the run was over")
        finally:
            closing.set()
            thread.join()
            os.close(terminal)
        return process.wait(), b"".join(shown)


def _encodings(context: cases.Context) -> cases.Outcome:
    seen, space, clean = cases.Seen(), context.space, context.space.clean()
    base = os.fsencode(context.folder)
    names = {b"ascii": "ascii", b"caf\xe9 \xff": "ascii", b"\xff\xfe": "utf-8"}
    for name, encoding in names.items():
        folder = pathlib.Path(os.fsdecode(base + b"/" + name))
        ended = space.train(folder, environment={"PYTHONIOENCODING": encoding})
        seen.finished(ended)
        seen.that(
            f"finished: {workspace.NUM_STEPS} steps" in ended.out,
            "all lines are printed",
            ended.out[-300:],
        )
        if encoding == "ascii":
            seen.that(
                ended.out.isascii() and "\\" in ended.out,
                "what is not ASCII is escaped",
                ended.out[-300:],
            )
        seen.same_end(folder, clean)
    sample = (clean / "stdout").read_text()
    cases.injected(not sample.isascii(), "all that is printed is ASCII")
    return seen.outcome(
        "PYTHONIOENCODING=ascii, and workdirs called " + ", ".join(map(repr, names))
    )


_BUG = """
from sct_jax.training import cli, loop, process
def fail(*arguments, **options):
    return {}["a bug"]
loop.train = fail
process.run(cli.main)
"""


def _codes(context: cases.Context) -> cases.Outcome:
    seen, space = cases.Seen(), context.space
    with runs.Process(
        [sys.executable, "-c", _BUG, *space.flags(context.folder / "bug")],
        folder=context.folder,
        environment=space.environment(),
    ) as process:
        bug = process.wait()
    seen.equal("code of an unexpected error", bug.code, _ExitCode.INTERNAL_ERROR)
    seen.that(
        "Traceback" in bug.err and "KeyError" in bug.err, "its traceback is shown"
    )
    seen.that(bug.errors and "bug in sct_jax" in bug.errors[-1], "it is called a bug")
    folder = context.folder / "diverged"
    ended = space.train(folder, {"optimizer.peak_learning_rate": 1e30})
    seen.equal("code of a diverged loss", ended.code, _ExitCode.DIVERGED)
    seen.that("diverged: " in ended.out, "it says so", ended.text[-300:])
    seen.that("Traceback" not in ended.text, "no traceback there", ended.err[-300:])
    folder = context.folder / "unwritable"
    with space.start(folder, _ENDLESS) as process:
        process.until(lambda: workspace.saved_steps(folder))
        cases.injected(process.is_running(), "the run was over")
        folder.rename(context.folder / "elsewhere")
        ended = process.wait(limit=60)
    seen.equal("code of a failed save", ended.code, _ExitCode.SAVE_FAILED)
    names = _ExitCode.__members__  # two names of one value are one member
    seen.equal("different codes", len(set(names.values())), len(names))
    return seen.outcome(
        "a KeyError in the program; a learning rate of 1e30; no workdir"
    )


# --- Files of a run that are something else.


def _immutable(path: pathlib.Path, *, on: bool) -> bool:
    """Whether even root may not write the file from now on."""
    flag = "+i" if on else "-i"
    try:
        ended = subprocess.run(["chattr", flag, str(path)], capture_output=True)
    except OSError:
        return False
    return ended.returncode == 0


def _odd_files(context: cases.Context) -> cases.Outcome:
    seen, space = cases.Seen(), context.space
    done = ["metrics.jsonl that is not UTF-8, or has a row without object or step"]
    contents = (b"\xff\xfe\n", b"5\n", b"[]\n", b'{"loss": 1}\n', b'{"step": "3"}\n')
    for number, content in enumerate(contents):
        folder = space.interrupted(context.folder / f"row-{number}")
        path = folder / "metrics.jsonl"
        path.write_bytes(content + path.read_bytes())
        seen.refused(runs.call(*space.flags(folder)), "metrics.jsonl")
    folder = space.interrupted(context.folder / "unwritable")
    path = folder / "metrics.jsonl"
    path.chmod(0o400)
    folder.chmod(0o500)
    fixed = os.access(path, os.W_OK) and _immutable(path, on=True)
    if fixed or not os.access(path, os.W_OK):
        ended = runs.call(*space.flags(folder))
        if fixed:
            _immutable(path, on=False)
        seen.refused(ended, str(folder))
        done.append("one that cannot be written")
    folder.chmod(0o700)
    folder = space.interrupted(context.folder / "deep")
    (folder / "config.json").write_text("[" * 200_000)
    seen.refused(runs.call(*space.flags(folder)), "config.json")
    done.append("a config.json of 200,000 brackets")
    names = ("config.json", "metrics.jsonl", "summary.json", "tokenizer.json", ".lock")
    for name in names:
        folder = space.interrupted(context.folder / f"folder {name}")
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
        seen.refused(runs.call(*space.flags(folder)), name)
    folder = context.folder / "file checkpoints"
    folder.mkdir()
    (folder / "checkpoints").write_text("")
    seen.refused(runs.call(*space.flags(folder)), "checkpoints")
    done.append("a folder where a file is due, and the reverse (6 of 6)")
    for name in ("num_steps", "model.num_layers"):
        flags = space.flags(context.folder / "huge", {name: "1e18"})
        seen.refused(runs.call(*flags), name)
        done.append(f"{name}=1e18")
    return seen.outcome("; ".join(done))


CASES = (
    cases.Case(
        44,
        "`| head`, standard output on a full device, a closed terminal",
        "printing stops, training goes on; SIGHUP saves",
        _not_read,
    ),
    cases.Case(
        45,
        "an ASCII terminal, and names that are not UTF-8",
        "what cannot be printed is replaced; exit code 0",
        _encodings,
    ),
    cases.Case(
        46,
        "an unexpected error, a diverged loss, a failed save",
        "exit codes of their own: 1, 3, 4",
        _codes,
    ),
    cases.Case(
        48,
        "metrics.jsonl, config.json and other files that are something else",
        "exit code 2, naming the file or the field",
        _odd_files,
        group="input",
    ),
)
