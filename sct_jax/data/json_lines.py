"""Text in JSON lines: one object per line, with the text under a field."""

import codecs
import functools
import io
import json
from collections.abc import Iterator
from typing import NamedTuple

from sct_jax import errors
from sct_jax.data import patterns

# Python limits the digits of an integer, JSON does not.
_DECODER = json.JSONDecoder(parse_int=float)
_PAIRS_DECODER = json.JSONDecoder(parse_int=float, object_pairs_hook=list)

_KINDS = {
    type(None): "null",
    bool: "true or false",
    float: "a number",
    list: "an array",
    dict: "an object",
}


class Line(NamedTuple):
    """A line of a file: its number, from 1, its offset, and its bytes."""

    path: str
    number: int
    offset: int
    raw: bytes

    def __str__(self) -> str:
        path = patterns.shown(self.path)
        return f"{path} line {self.number} (byte {self.offset})"


def lines(file: io.BufferedReader, *, path: str) -> Iterator[Line]:
    """Yields every line of the file at `path` that is not blank.

    Raises:
      UserError: the file is in UTF-16 or UTF-32.
    """
    offset = 0
    for number, line in enumerate(file, start=1):
        start, offset = offset, offset + len(line)
        if number == 1:
            encoding = json.detect_encoding(line)
            if not encoding.startswith("utf-8"):
                encoding = encoding.removesuffix("-le").removesuffix("-be").upper()
                raise errors.UserError(
                    f"data.source: {patterns.shown(path)} seems to be in {encoding}, "
                    f"not UTF-8; convert it: iconv -f {encoding} -t UTF-8"
                )
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield Line(path, number, start, line)


def text_of(line: Line, field: str, *, repeats: bool) -> bytes:
    """Returns the text of a JSON line; invalid UTF-8 if the line or text is invalid.

    Args:
      line: the line.
      field: key of the text.
      repeats: whether the last of several values of the field counts.

    Raises:
      UserError: the line is no JSON object with a text in the field.
    """
    try:
        text = line.raw.decode()
    except UnicodeDecodeError:
        return line.raw
    try:
        entry = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        reason, advice = _explain(text, error)
        raise errors.UserError(
            f"data.source: {line} is not valid JSON ({reason}); {advice}"
        ) from error
    if isinstance(entry, list):
        raise errors.UserError(
            f"data.text_field: {line} is an array, not an object with {field!r}; write "
            "one object per line: jq -c '.[]'"
        )
    if not isinstance(entry, dict) or field not in entry:
        has = ", ".join(map(repr, entry)) if isinstance(entry, dict) else "none"
        raise errors.UserError(
            f"data.text_field: {line} has no text under {field!r} (fields: {has})"
        )
    value = entry[field]
    if not isinstance(value, str):
        raise errors.UserError(
            f"data.text_field: {field!r} is {_KINDS[type(value)]}, not text, at "
            f"{line}; remove the line, or name another field"
        )
    # A key may be written with escapes.
    written = text.count(_written(field))
    if not repeats and (written != 1 or "\\u" in text):
        names = [name for name, _ in _PAIRS_DECODER.decode(text)]
        errors.check(
            "data.text_field",
            names.count(field) == 1,
            f"{line} has {names.count(field)} values of {field!r}; keep one",
        )
    # JSON can escape half of a surrogate pair, which UTF-8 cannot represent.
    return value.encode("utf-8", "surrogatepass")


@functools.cache
def _written(field: str) -> str:
    return json.dumps(field, ensure_ascii=False)


def _explain(text: str, error: Exception) -> tuple[str, str]:
    """Returns why a line cannot be parsed, and what to do."""
    otherwise = "fix or remove the line"
    if not isinstance(error, json.JSONDecodeError):
        return str(error), otherwise
    # Its own message would name line 1, which is the only one that it was given.
    reason = f"{error.msg} at character {error.pos + 1}"
    before, after = text[: error.pos].rstrip(), text[error.pos :].strip()
    if after == ",":
        return reason, "remove the comma after the object"
    if before.endswith(",") and after.startswith(("]", "}")):
        return reason, "remove the trailing comma"
    if not after:
        kind = {"[": "array", "{": "object"}.get(before[:1], "value")
        every = "'.[]'" if kind == "array" else "."
        return (
            f"the {kind} does not end in its line",
            f"write one object per line: jq -c {every}",
        )
    return reason, otherwise
