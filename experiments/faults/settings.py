"""Configurations that cannot be: typing errors, odd shapes, another run's workdir."""

import contextlib
import json
import math
import pathlib
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator

from experiments.faults import cases, runs, workspace
from sct_jax import data
from sct_jax.training import exit_codes

_WRONG = {
    "--config.model.d_modle=64": ("model.d_modle", "'model.d_model'"),
    "--config.num_step=64": ("num_step", "'num_steps'"),
    "--config.lr=.1": ("lr", "'optimizer.peak_learning_rate'"),
    "--config.num_steps=many": ("num_steps", "'many'"),
    "--config.num_steps=1.5": ("num_steps", "'1.5'"),
    "--config.num_steps=-5": ("num_steps", "-5"),
    "--config.num_steps=0": ("num_steps", "0"),
    "--config.model.scan_layers=perhaps": ("model.scan_layers", "perhaps"),
    "--config.model=3": ("model", "group"),
    "--config.optimizer.name=stc": ("optimizer.name", "'sct'"),
    "--workdr=x": ("--workdr", "'--workdir'"),
}


def _typing_errors(context: cases.Context) -> cases.Outcome:
    seen = cases.Seen()
    for flag, words in _WRONG.items():
        ended = runs.call(*context.space.flags(context.folder / "run"), flag)
        seen.refused(ended, *words)
        seen.that("compiled" not in ended.out, "before anything is compiled", flag)
    return seen.outcome(", ".join(_WRONG))


_IMPOSSIBLE = {
    "model.rank=0": ("model.rank", "0"),
    "model.rank=33": ("model.rank", "33", "'q'", "32"),
    "model.ranks.down=-1": ("model.ranks.down", "-1"),
    "model.ranks.up=40": ("model.ranks.up", "40", "32 x 48"),
    "model.num_heads=3": ("model.num_heads", "32"),
    "model.num_kv_heads=4": ("model.num_kv_heads", "num_heads"),
    "model.d_model=31": ("model.num_heads", "31"),
}


def _shapes(context: cases.Context) -> cases.Outcome:
    seen, space = cases.Seen(), context.space
    for change, words in _IMPOSSIBLE.items():
        ended = runs.call(*space.flags(context.folder / "run"), f"--config.{change}")
        seen.refused(ended, *words)
        seen.that("compiled" not in ended.out, "before anything is compiled", change)
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    meshes = (
        ({"mesh.data": 3}, ("mesh", "4 devices")),
        ({"mesh.data": 4, "data.batch_size": 6}, ("data.batch_size", "6")),
    )
    for changes, words in meshes:
        ended = space.train(context.folder / "mesh", changes, environment=devices)
        seen.refused(ended, *words)
        seen.that("compiled" not in ended.out, "before anything is compiled", changes)
    odd = {"model.d_ff": 45, "model.vocab_size": 301, "mesh.data": 2, "mesh.tensor": 2}
    ended = space.train(context.folder / "odd", odd, environment=devices)
    if ended.code == 0:  # what the mesh does not divide may be replicated
        seen.finished(ended)
    else:
        seen.refused(ended, "mesh")
    done = [*_IMPOSSIBLE, *(str(changes) for changes, _ in meshes), str(odd)]
    return seen.outcome("; ".join(done))


def _another_run(context: cases.Context) -> cases.Outcome:
    seen, space = cases.Seen(), context.space
    folder = space.interrupted(context.folder / "run")
    before = workspace.bytes_below(folder / "checkpoints")
    text = workspace.write_corpus(context.folder / "other", seed=-1)
    tokenizer = str(context.folder / "tokenizer.json")
    data.Tokenizer.train(["other words " * 99], vocab_size=300).save(tokenizer)
    changes: dict[str, tuple[workspace.Changes, tuple[str, ...]]] = {
        "rank": ({"model.rank": 3}, ("model.rank: 4", "3")),
        "width": ({"model.d_model": 16}, ("model.d_model: 32", "16")),
        "vocabulary": ({"model.vocab_size": 310}, ("model.vocab_size: 300", "310")),
        "tokenizer": ({"data.tokenizer": tokenizer}, ("hash", tokenizer)),
        "text": ({"data.source": text}, ("hash", text)),
        "dtype": ({"model.compute_dtype": "bfloat16"}, ("model.compute_dtype",)),
        "moments": (
            {"optimizer.moment_dtype": "bfloat16"},
            ("optimizer.moment_dtype",),
        ),
        "three at once": (
            {"model.rank": 2, "seed": 1, "model.d_ff": 64},
            ("model.rank: 4", "seed: 0", "model.d_ff: 48"),
        ),
    }
    for name, (changed, words) in changes.items():
        ended = runs.call(*space.flags(folder, changed))
        seen.refused(ended, *words)
        seen.that("compiled" not in ended.out, "before anything is compiled", name)
    after = workspace.bytes_below(folder / "checkpoints")
    seen.that(before == after, "the checkpoints stay as they are")
    seen.finished(runs.call(*space.flags(folder)))
    seen.same_end(folder, space.clean())
    return seen.outcome(f"resumed with another {', '.join(changes)}; then as it was")


# --- Devices and processes.

# Losses of a few nats, sums of a thousand terms in another order, forty steps.
TOLERANCE = 1e-3


def _other_devices(context: cases.Context) -> cases.Outcome:
    seen, space = cases.Seen(), context.space
    folder = context.folder / "run"
    space.interrupted(folder, step=10)
    meshes = (
        (2, {"mesh.data": 2}, 20),
        (4, {"mesh.data": 1, "mesh.fsdp": 4}, 30),
        (4, {"mesh.data": 2, "mesh.tensor": 2}, 30),
    )
    clean = {row["step"]: row for row in workspace.rows(space.clean())}
    apart, done = 0.0, []
    for devices, mesh, keep in meshes:
        flags = f"--xla_force_host_platform_device_count={devices}"
        start = workspace.saved_steps(folder)[-1]
        ended = space.train(folder, mesh, environment={"XLA_FLAGS": flags})
        seen.finished(ended)
        seen.that(f"resumed at step {start}" in ended.out, "it resumes", ended.text)
        cases.injected(f"{devices} x " in ended.out, "the devices are others")
        found = {row["step"]: row for row in workspace.rows(folder)}
        seen.that(found.keys() == clean.keys(), "each step once", mesh)
        for step in found.keys() & clean.keys():
            for name in ("train/loss", "eval/loss"):
                if name in clean[step]:
                    apart = max(apart, abs(found[step][name] - clean[step][name]))
        for saved in workspace.saved_steps(folder):
            record = folder / "checkpoints" / str(saved) / "record.json"
            at = json.loads(record.read_text())["data_position"]
            seen.that(at == 4 * saved, "the same data order", f"{at} at step {saved}")
        done.append(f"{devices} devices ({mesh})")
        for saved in workspace.saved_steps(folder):
            if saved > keep:
                shutil.rmtree(folder / "checkpoints" / str(saved))
    seen.that(
        apart <= TOLERANCE,
        f"losses within {TOLERANCE:g} nats of one device ({apart:.1e})",
        f"{apart:.1e}",
    )
    return seen.outcome("a run on 1 device resumed on " + ", then ".join(done))


PEER_TIMEOUT = 5  # seconds

# By JAX itself, where process 0 is killed.
_LOST = (exit_codes.ExitCode.PEER_LOST, -signal.SIGABRT)


def _lost_processes(context: cases.Context) -> cases.Outcome:
    seen, space = cases.Seen(), context.space
    folder, done = context.folder / "run", []
    for lost, number in ((1, signal.SIGKILL), (0, signal.SIGKILL), (0, signal.SIGSTOP)):
        with _two_processes(space, folder) as pair:
            trains = lambda pair=pair: "\nstep " in pair[0].out
            cases.injected(pair[0].until(trains), "both train")
            pair[lost].signal(number)
            began = time.monotonic()
            ended = pair[1 - lost].wait(limit=100)
            seconds = time.monotonic() - began
        name = f"{signal.Signals(number).name} to process {lost}"
        seen.that(ended.code in _LOST, "exit code 7 or 134 of the other", ended.text)
        limit = PEER_TIMEOUT + 20
        seen.that(seconds < limit, f"over within {limit} s", f"{name}: {seconds:.0f}")
        done.append(name)
    with _two_processes(space, folder) as pair:
        ends = [process.wait() for process in pair]
    for ended in ends:
        seen.finished(ended)
    clean = {row["step"]: row for row in workspace.rows(space.clean())}
    found = {row["step"]: row for row in workspace.rows(folder)}
    seen.that(found.keys() == clean.keys(), "each step once")
    apart = [
        abs(found[step]["train/loss"] - row["train/loss"])
        for step, row in clean.items()
        if step in found and "train/loss" in row
    ]
    worst = max(apart, default=math.inf)
    seen.that(
        worst <= TOLERANCE,
        f"losses within {TOLERANCE:g} nats of one process ({worst:.1e})",
        f"{worst:.1e}",
    )
    return seen.outcome(f"{', '.join(done)} of two; each time the same commands again")


@contextlib.contextmanager
def _two_processes(
    space: workspace.Workspace, folder: pathlib.Path
) -> Iterator[list[runs.Process]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [
        *(sys.executable, "-m", "sct_jax.training", *space.flags(folder)),
        *(f"--coordinator={address}", "--num-processes=2"),
        f"--peer-timeout={PEER_TIMEOUT}",
    ]
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                runs.Process(
                    [*command, f"--process-id={index}"],
                    folder=space.root,
                    environment=space.environment(),
                )
            )
            for index in range(2)
        ]


CASES = (
    cases.Case(
        8,
        "a run resumed with another rank, width, vocabulary, tokenizer, text or dtype",
        "refused before it compiles, each difference listed",
        _another_run,
        group="input",
        quick=True,
    ),
    cases.Case(
        9,
        "a run resumed on 2 and 4 devices, data-, fsdp- and tensor-parallel",
        f"the same data order, losses within {TOLERANCE:g} nats",
        _other_devices,
    ),
    cases.Case(
        14,
        "ranks of 0 or too large, odd shapes, meshes that do not divide",
        "an error naming the weight or the field, before it compiles",
        _shapes,
        group="input",
    ),
    cases.Case(
        18,
        "one of two processes killed, or stopped",
        "the other ends with a code of its own; the same commands resume both",
        _lost_processes,
    ),
    cases.Case(
        20,
        "typing errors, wrong types, unknown keys, negative steps",
        "exit code 2, the nearest name suggested, no traceback",
        _typing_errors,
        group="input",
        quick=True,
    ),
)
