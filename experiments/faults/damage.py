"""Checkpoints that are damaged, edited, copied, or beside junk."""

import json
import pathlib
import random
import shutil
import warnings
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.faults import cases, fuzz_checkpoints, runs, workspace
from sct_jax import data, errors, sharding
from sct_jax.training import overrides, trainer
from sct_jax.training import workdir as workdir_lib

_AT, _BEFORE = workspace.STANDS_AT, workspace.STANDS_AT - 10


class _Restored(NamedTuple):
    """What a run would resume from: its step, CRC-32 of its arrays, warnings."""

    step: int
    sums: dict[str, int]
    record: dict[str, Any]
    warned: list[str]


class _Reader:
    """Restores checkpoints as a run does, without changing the folder."""

    def __init__(self, space: workspace.Workspace):
        pairs = [("data.source", space.source)]
        config = overrides.load(str(workspace.CONFIG), pairs)
        self._run = trainer.Trainer(config, config.mesh.build())

    def restore(self, folder: pathlib.Path) -> _Restored:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with workdir_lib.reading(folder) as checkpoints:
                found = checkpoints.restore(
                    self._run.abstract_at,
                    self._run.mesh,
                    layout=self._run.config.mesh.tensor_layout,
                )
        assert found is not None
        state, record = found
        sums = {
            sharding.path_name(path): zlib.crc32(np.asarray(leaf).tobytes())
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        }
        return _Restored(
            record["step"], sums, record, [str(warning.message) for warning in caught]
        )


def _checkpoint(folder: pathlib.Path, step: int = _AT) -> pathlib.Path:
    return folder / "checkpoints" / str(step)


def _whole_states(reader: _Reader, folder: pathlib.Path) -> tuple[_Restored, _Restored]:
    """The newest checkpoint of an interrupted run, and the one before."""
    newest = reader.restore(folder)
    cases.injected(newest.step == _AT and not newest.warned, f"it is at {newest.step}")
    shutil.move(_checkpoint(folder), folder / "away")
    earlier = reader.restore(folder)
    shutil.move(folder / "away", _checkpoint(folder))
    cases.injected(earlier.step == _BEFORE and not earlier.warned, "none before")
    cases.injected(newest.sums != earlier.sums, "two checkpoints are equal")
    return newest, earlier


def _flipped_bit(context: cases.Context) -> cases.Outcome:
    seen = cases.Seen()
    folder = context.space.interrupted(context.folder / "run")
    before = workspace.bytes_below(_checkpoint(folder))
    done = fuzz_checkpoints.flip_bit(context.rng, _checkpoint(folder) / "state")
    cases.injected(before != workspace.bytes_below(_checkpoint(folder)), "no change")
    ended = context.space.train(folder)
    seen.finished(ended)
    _warned_once(seen, ended.text, done.rpartition(" ")[2])
    seen.that(f"resumed at step {_BEFORE}" in ended.out, "the one before is used")
    seen.same_end(folder, context.space.clean())
    return seen.outcome(f"{done} of the newest checkpoint flipped")


def _warned_once(seen: cases.Seen, text: str, *words: str) -> None:
    lines = [line for line in text.splitlines() if "warning" in line.lower()]
    seen.that(len(lines) == 1, "one warning", f"{len(lines)}: {lines[:3]}")
    for word in words:
        seen.that(any(word in line for line in lines), f"it names {word}", lines)


def _truncated(path: pathlib.Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _truncated_or_deleted(context: cases.Context) -> cases.Outcome:
    seen, reader = cases.Seen(), _Reader(context.space)
    folder = context.space.interrupted(context.folder / "run")
    _, earlier = _whole_states(reader, folder)
    whole = context.folder / "whole"
    shutil.copytree(_checkpoint(folder), whole)
    chunks = sorted((whole / "state").glob("**/d/*"))
    cases.injected(chunks, "no file of arrays is known")
    parts = {
        "manifest": pathlib.Path("state/manifest.ocdbt"),
        "arrays": chunks[0].relative_to(whole),
        "metadata": pathlib.Path("state/_METADATA"),
        "record": pathlib.Path("record.json"),
    }
    damages: dict[str, Callable[[pathlib.Path], None]] = {
        "truncated": _truncated,
        "deleted": pathlib.Path.unlink,
    }
    for part, path in parts.items():
        for name, damage in damages.items():
            damage(_checkpoint(folder) / path)
            found = reader.restore(folder)
            what = f"{part} {name}"
            seen.that(
                found.sums == earlier.sums,
                "the one before is used",
                f"{what}: {found.step}",
            )
            seen.that(
                len(found.warned) == 1, "one warning each", f"{what}: {found.warned}"
            )
            seen.that(
                found.warned and path.name in found.warned[0],
                "it names the file",
                f"{what}: {found.warned}",
            )
            shutil.rmtree(_checkpoint(folder))
            shutil.copytree(whole, _checkpoint(folder))
    return seen.outcome(f"{', '.join(parts)}: each truncated, and deleted")


def _junk(context: cases.Context) -> cases.Outcome:
    seen = cases.Seen()
    folder = context.space.interrupted(context.folder / "run")
    base = folder / "checkpoints"
    (base / "40").mkdir()  # where the last step will go
    (base / "35").mkdir()
    (base / "35" / "state").write_bytes(context.rng.randbytes(100))
    (base / "33").write_text("no folder")
    (base / "0031").mkdir()
    (base / "34").symlink_to("nowhere")
    (base / "notes").mkdir()
    ended = runs.call(*context.space.flags(folder))
    seen.finished(ended)
    seen.that(
        f"resumed at step {_AT}" in ended.out, f"resumed at step {_AT}", ended.out
    )
    lines = [line for line in ended.out.splitlines() if "warning" in line]
    for name in ("40", "35", "33", "0031", "34"):
        seen.that(
            any(f"checkpoint {name} " in x or f"/{name} " in x for x in lines),
            "a warning for each",
            f"none for {name}",
        )
    seen.that((base / "notes").is_dir(), "other folders are left alone")
    seen.same_end(folder, context.space.clean())
    return seen.outcome(
        "beside checkpoint 30: empty folder 40, junk in 35, file 33, folder 0031, "
        "dangling link 34"
    )


def _moved_steps(context: cases.Context) -> cases.Outcome:
    seen, space = cases.Seen(), context.space
    edited = space.interrupted(context.folder / "edited")
    path = _checkpoint(edited) / "record.json"
    record = json.loads(path.read_text())
    cases.injected(record["step"] == _AT, f"the record is of step {record['step']}")
    path.write_text(json.dumps(record | {"step": 10}))
    copied = space.interrupted(context.folder / "copied")
    shutil.copytree(_checkpoint(copied), _checkpoint(copied, 38))
    for folder, step in ((edited, _BEFORE), (copied, _AT)):
        ended = runs.call(*space.flags(folder))
        seen.finished(ended)
        _warned_once(seen, ended.text)
        seen.that(
            f"resumed at step {step}" in ended.out, f"resumed at {step}", ended.out
        )
        seen.same_end(folder, space.clean())
    return seen.outcome(
        "the step in a record edited from 30 to 10; checkpoint 30 copied to 38"
    )


def _other_tokenizer(context: cases.Context) -> cases.Outcome:
    seen = cases.Seen()
    folder = context.space.interrupted(context.folder / "run")
    path = folder / "tokenizer.json"
    own = workdir_lib.load_run(folder).tokenizer.hash
    data.Tokenizer.train(["other words " * 50], vocab_size=300).save(str(path))
    other = data.Tokenizer.load(str(path)).hash
    cases.injected(own != other, "the tokenizers are the same")
    try:
        workdir_lib.load_run(folder)
    except errors.UserError as error:
        message = str(error)
    else:
        message = "accepted"
    for word in (str(path), own[:16], other[:16]):
        seen.that(word in message, "refused by its hash", message)
    return seen.outcome("tokenizer.json of another run; `load_run`")


def _manifest(context: cases.Context) -> cases.Outcome:
    """In a process of its own, as complaints come when the interpreter ends."""
    seen = cases.Seen()
    folder = context.space.interrupted(context.folder / "run")
    path = _checkpoint(folder) / "state" / "manifest.ocdbt"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(
        byte ^ 255 for byte in content[middle : middle + 8]
    )
    path.write_bytes(content)
    ended = context.space.train(folder)
    seen.finished(ended)
    seen.that(not ended.err, "nothing on standard error", ended.err[:300])
    _warned_once(seen, ended.text, "manifest.ocdbt")
    seen.that(f"resumed at step {_BEFORE}" in ended.out, "the one before is used")
    seen.same_end(folder, context.space.clean())
    return seen.outcome("eight bytes of manifest.ocdbt inverted")


# --- Many random ones.

FLIPS, RECORDS = 40, 100


def _flipped_bits(context: cases.Context) -> cases.Outcome:
    def flip(rng: random.Random, folder: pathlib.Path) -> str:
        return fuzz_checkpoints.flip_bit(rng, folder)

    return _many(context, FLIPS, flip, "bits flipped, of any file, one at a time")


def _changed_records(context: cases.Context) -> cases.Outcome:
    def change(rng: random.Random, folder: pathlib.Path) -> str:
        path = folder / "record.json"
        text = fuzz_checkpoints.mutate_record(rng, path.read_text())
        path.write_text(text, errors="surrogatepass")
        return "record.json"

    return _many(context, RECORDS, change, "random changes of record.json")


def _many(
    context: cases.Context,
    count: int,
    damage: Callable[[random.Random, pathlib.Path], str],
    what: str,
) -> cases.Outcome:
    """Damages the newest checkpoint again and again, from new."""
    seen, reader = cases.Seen(), _Reader(context.space)
    folder = context.space.interrupted(context.folder / "run")
    newest, earlier = _whole_states(reader, folder)
    whole = context.folder / "whole"
    shutil.copytree(_checkpoint(folder), whole)
    before = workspace.bytes_below(whole)
    detected = 0
    for _ in range(count):
        done = ""
        while workspace.bytes_below(_checkpoint(folder)) == before:
            done = damage(context.rng, _checkpoint(folder))
        found = reader.restore(folder)
        if found.step == _AT:
            same = found.sums == newest.sums and found.record == newest.record
            seen.that(same and not found.warned, "else without effect", done)
        else:
            detected += 1
            seen.that(found.sums == earlier.sums, "the one before is used", done)
            seen.that(
                len(found.warned) == 1, "one warning each", f"{done}: {found.warned}"
            )
        shutil.rmtree(_checkpoint(folder))
        shutil.copytree(whole, _checkpoint(folder))
    seen.that(detected, f"{detected} of {count} detected")
    return seen.outcome(f"{count} {what}")


CASES = (
    cases.Case(
        4,
        "one flipped bit in the newest checkpoint",
        "detected, the file named, the previous one used, the same end",
        _flipped_bit,
    ),
    cases.Case(
        5,
        "manifest, arrays, metadata or record truncated or deleted",
        "detected, the file named, the previous checkpoint used",
        _truncated_or_deleted,
        group="checkpoints",
        quick=True,
    ),
    cases.Case(
        6,
        "an empty folder and junk beside the checkpoints",
        "ignored with a warning, the same end",
        _junk,
        group="checkpoints",
    ),
    cases.Case(
        29,
        "a checkpoint with the step of another one",
        "detected; the right one is resumed, the same end",
        _moved_steps,
        group="checkpoints",
    ),
    cases.Case(
        34,
        "a workdir with the tokenizer of another run",
        "refused by its hash",
        _other_tokenizer,
        group="checkpoints",
        quick=True,
    ),
    cases.Case(
        51,
        "a damaged OCDBT manifest",
        "one warning, nothing on standard error, the same end",
        _manifest,
    ),
    cases.Case(
        56,
        f"{RECORDS} random changes of a checkpoint's record",
        "detected or without effect; no traceback, no silent acceptance",
        _changed_records,
        group="checkpoints",
    ),
    cases.Case(
        59,
        f"{FLIPS} flipped bits anywhere in a checkpoint",
        "detected with one warning, or without effect; the right state",
        _flipped_bits,
        group="checkpoints",
    ),
)
