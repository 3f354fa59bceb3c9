"""Command lines: flags, overrides of fields, and what --help says of them."""

import argparse
import dataclasses
import inspect
import pathlib
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from sct_jax import errors
from sct_jax.training import config

_WIDTH = 88
# Of a docstring an indented "name: text", with its further lines indented more.
_ENTRY = re.compile(r"^( +)(\w+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


class FlagParser(argparse.ArgumentParser):
    """Command-line flags: - and _ alike, no abbreviations, typos answered, exit 2."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse(
        self, argv: Sequence[str]
    ) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
        """Returns the flags, and the --config.field=value overrides in order."""
        plain: list[str] = []
        overrides: list[tuple[str, str]] = []
        words = iter(argv)
        for word in words:
            name, equals, value = word.partition("=")
            if not name.startswith("--"):
                plain.append(word)
                continue
            name = "--" + name[2:].replace("-", "_")
            if name.startswith("--config."):
                if not equals:
                    value = next(words, None)
                    if value is None:
                        self.error(f"{name} needs a value")
                overrides.append((name.removeprefix("--config."), value))
            else:
                plain.append(name + equals + value)
        namespace, unknown = self.parse_known_args(plain)
        if unknown:
            known = [option for a in self._actions for option in a.option_strings]
            flag = unknown[0].partition("=")[0]
            self.error(f"unknown argument {flag!r}{errors.nearest(flag, known)}")
        return namespace, overrides

    def parse_flags(self, argv: Sequence[str]) -> argparse.Namespace:
        """Returns the flags of a command that has no configuration to override."""
        flags, overrides = self.parse(argv)
        if overrides:
            self.error("--config: there is nothing to configure here")
        return flags

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with code 2."""
        self.exit(2, f"error: {message}\n(--help lists the flags)\n")


def parse_experiment(
    argv: Sequence[str], description: str
) -> tuple[config.ExperimentConfig, pathlib.Path, argparse.Namespace]:
    """Returns configuration, workdir and flags of a training command.

    Exits with code 2 and one message for anything that is not right.
    """
    parser = FlagParser(description + "\n\n" + field_help())
    parser.add_argument(
        "--config", required=True, help="config file, with :variant if it has several"
    )
    parser.add_argument(
        "--workdir", help="folder of the run (default: runs/<file>-<variant>)"
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print the start table, write summary.json, and stop",
    )
    flags, overrides = parser.parse(argv)
    try:
        experiment = config.load(flags.config, overrides)
    except errors.UserError as error:
        parser.error(str(error))
    workdir = flags.workdir or config.default_workdir(flags.config)
    return experiment, pathlib.Path(workdir), flags


def field_help() -> str:
    """Returns every field of an experiment with its default and its meaning."""
    lines = ["Fields, with the defaults that a config file starts from:"]
    indent = " " * 6
    said = ""
    for name, value, meaning in fields_of(config.ExperimentConfig()):
        text = ",".join(value) if isinstance(value, tuple) else value
        lines.append(f"  --config.{name}={text}")
        if meaning != said:
            lines += textwrap.wrap(
                meaning, _WIDTH, initial_indent=indent, subsequent_indent=indent
            )
        said = meaning
    return "\n".join(lines)


def fields_of(
    settings: Any, prefix: str = "", meaning: str = ""
) -> Iterator[tuple[str, Any, str]]:
    """Yields dotted name, value and meaning of every field, those within too.

    The meaning is what the docstring of its dataclass says of it; if that has no
    attributes at all, that of the group which the field is in.
    """
    text = inspect.getdoc(type(settings)) or ""
    entries = {name: " ".join(said.split()) for _, name, said in _ENTRY.findall(text)}
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), prefix + field.name
        own = entries.get(field.name, "") if entries else meaning
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{name}.", own)
        else:
            yield name, value, own


def fail(message: str) -> NoReturn:
    """Prints one line to standard error and exits with code 2, for bad input."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
