"""The error that asks the user, not a developer, to change something."""

import difflib
import math
import operator
import struct
from collections.abc import Sequence
from typing import Any

_SMALLEST_FLOAT32 = 2.0**-126

MAX_INT32 = 2**31 - 1
"""Steps are counted in int32, on the devices."""


class UserError(ValueError):
    """The user must change something.

    For example a configuration, a flag, a damaged file or a missing package. The
    message names it and says what to do. Entry points print the message without a
    traceback and exit with code 2.
    """


def check(field: str, holds: bool, message: str) -> None:
    """Raises UserError "field: message" unless `holds`."""
    if not holds:
        raise UserError(f"{field}: {message}")


def check_choice(field: str, value: str | None, choices: Sequence[str | None]) -> None:
    """Raises UserError unless `value` is one of `choices`; suggests the closest one."""
    if value in choices:
        return
    names = [str(choice) for choice in choices]
    raise UserError(
        f"{field}: unknown value {value!r}{nearest(str(value), names)} "
        f"(choices: {', '.join(names) or 'none'})"
    )


def check_bounds(
    prefix: str,
    config: Any,
    *fields: str,
    least: int | None = None,
    above: int | None = None,
    most: int | None = None,
    below: int | None = None,
) -> None:
    """Raises UserError for a field of `config` that is out of bounds; None passes.

    A float has to meet the bounds once rounded to float32 too, as arrays hold it.

    Args:
      prefix: prepended to field names in messages, for example "optimizer.".
      config: object with the fields.
      *fields: names of numeric fields.
      least: inclusive lower bound.
      above: exclusive lower bound.
      most: inclusive upper bound.
      below: exclusive upper bound.
    """
    bounds = [
        (limit, sign, holds)
        for limit, sign, holds in (
            (least, ">=", operator.ge),
            (above, ">", operator.gt),
            (most, "<=", operator.le),
            (below, "<", operator.lt),
        )
        if limit is not None
    ]
    wanted = " and ".join(f"{sign} {limit}" for limit, sign, _ in bounds)
    for field in fields:
        value = getattr(config, field)
        if value is None:
            continue
        for x in (value, to_float32(value)):
            check(
                f"{prefix}{field}",
                all(holds(x, limit) for limit, _, holds in bounds),
                f"{value} must be {wanted}" + " in float32" * (x != value),
            )


def check_float32(field: str, value: int | float) -> None:
    """Raises UserError for what float32 rounds to zero or infinity, and for NaN."""
    check(field, math.isfinite(value), f"{value} is not finite")
    rounded = to_float32(value)
    check(
        field,
        math.isfinite(rounded) and (rounded != 0 or value == 0),
        f"{value} is beyond float32, which holds it as {rounded}",
    )


def to_float32(value: int | float) -> int | float:
    """Returns a float as arrays on a device hold it; an integer as it is.

    Devices flush subnormal numbers to zero.
    """
    if not isinstance(value, float):
        return value
    try:
        (rounded,) = struct.unpack("f", struct.pack("f", value))
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded if abs(rounded) >= _SMALLEST_FLOAT32 else 0.0


def nearest(name: str, choices: Sequence[str]) -> str:
    """Returns '; did you mean X?' for the closest choice, or an empty string."""
    return suggestion(closest(name, choices))


def closest(name: str, choices: Sequence[str], *, cutoff: float = 0.5) -> str | None:
    """Returns the choice most similar to `name`, or None if none is similar."""
    close = difflib.get_close_matches(name, choices, n=1, cutoff=cutoff)
    return close[0] if close else None


def suggestion(name: str | None) -> str:
    """Returns '; did you mean X?', or an empty string for None."""
    return f"; did you mean {name!r}?" if name else ""
