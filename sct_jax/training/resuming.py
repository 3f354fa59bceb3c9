"""What a run changes when it resumes: whether it may, and what follows."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sct_jax import errors, sharding
from sct_jax.training import config as config_lib
from sct_jax.training import state as state_lib


def check_same_run(
    old: config_lib.ExperimentConfig,
    new: config_lib.ExperimentConfig,
    where: str,
    *,
    allowed: Collection[str] = (),
) -> None:
    """Raises UserError, listing the fields, where `new` cannot continue `old`.

    Args:
      old: the run so far.
      new: the run that would continue it.
      where: what belongs to `old`, for the message.
      allowed: fields that may differ on request, as far as they fit the saved arrays.
    """
    found = config_lib.differences(old, new, allowed=allowed)
    errors.check(
        "workdir",
        not found,
        f"{where} belongs to a run with another configuration; choose another "
        "--workdir, allow a change with --allow-change=FIELD, or undo:\n  "
        + "\n  ".join(found),
    )
    changed = [d.field for d in config_lib.changes(old, new)]
    shaping = [
        name for name in changed if name.startswith(("model.", "optimizer.", "phases."))
    ]
    before, after = (config_lib.phases_of(config) for config in (old, new))
    ends = [[phase.last for phase in phases[:-1]] for phases in (before, after)]
    errors.check(
        ", ".join(changed) or "num_steps",
        ends[0] == ends[1],
        f"the phases of the run would end after {ends[1]} steps, and not after "
        f"{ends[0]}; undo it, or keep them with phases.switch_at = {tuple(ends[0])} "
        "and --allow-change=phases.switch_at",
    )
    fits = not shaping or all(
        _shapes(then.config, like=then.config) == _shapes(now.config, like=then.config)
        for then, now in zip(before, after, strict=True)
    )
    errors.check(
        "--allow-change",
        fits,
        f"{', '.join(shaping)} cannot change: the arrays of a phase would have other "
        "names or shapes; undo it, or choose another --workdir",
    )


def windows_before(
    record: Mapping[str, Any] | None, new: config_lib.ExperimentConfig
) -> int:
    """Returns by how much `_position` is beyond that of a run with one batch size.

    Args:
      record: of the checkpoint, see `workdir.record`; None for a new run.
      new: the run that continues it.
    """
    if record is None:
        return 0
    old = config_lib.from_dict(record["config"])
    return _position(record, old, new) - record["step"] * new.data.batch_size


def _position(
    record: Mapping[str, Any],
    old: config_lib.ExperimentConfig,
    new: config_lib.ExperimentConfig,
) -> int:
    """The number of windows of `new` that the text so far amounts to."""
    taken = record.get("data_position", record["step"] * old.data.batch_size)
    if old.data.seq_len == new.data.seq_len:
        return taken
    return taken * old.data.seq_len // new.data.seq_len


def describe(
    record: Mapping[str, Any],
    old: config_lib.ExperimentConfig,
    new: config_lib.ExperimentConfig,
    *,
    skipped: int = 0,
) -> list[str]:
    """Returns a line for every change that affects results, and for what follows.

    Args:
      record: of the checkpoint.
      old: configuration of the checkpoint.
      new: the run that continues it.
      skipped: steps so far that were not applied, which schedules do not count.
    """
    changes = config_lib.changes(old, new)
    changed = {change.field for change in changes}
    lines = [
        f"changed on request: {c.field}: {c.before!r} before, {c.after!r} now"
        for c in changes
    ]
    if old.num_steps < new.num_steps:
        lines.append(f"num_steps changed from {old.num_steps} to {new.num_steps}")
    taken = _position(record, old, new)
    if "data.batch_size" in changed:
        lines.append(
            f"data: continues at sequence {taken:,}; a step now has "
            f"{new.data.tokens_per_step:,} tokens, not {old.data.tokens_per_step:,}"
        )
    if changed & {"data.seq_len", "seed"}:
        lines.append(
            f"data: another order from here on, after as many tokens as before: "
            f"sequence {taken:,} of {new.data.seq_len:,} tokens each"
        )
    was, now = (
        _learning_rate(config, record["step"], skipped) for config in (old, new)
    )
    if was != now:
        lines.append(
            f"the learning rate at this step changes from {was:.2e} to {now:.2e}"
        )
    return lines


def _learning_rate(
    config: config_lib.ExperimentConfig, step: int, skipped: int
) -> float:
    # A schedule covers a whole phase, so a longer run has another learning rate.
    phase = config_lib.phase_at(config, step)
    schedule = phase.config.optimizer.learning_rate(phase.config.num_steps)
    return float(jnp.asarray(schedule(step - phase.first - skipped)))


def _shapes(
    config: config_lib.ExperimentConfig, *, like: config_lib.ExperimentConfig
) -> dict[str, Any]:
    """Shape and dtype of every array of the state, with layers as in `like`."""
    shape = dataclasses.replace(config.model, scan_layers=like.model.scan_layers)
    state = state_lib.abstract(shape, config.build_optimizer())
    return {
        sharding.path_name(path): (leaf.shape, leaf.dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
