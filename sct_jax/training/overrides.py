"""Configuration files, and the flags that override their fields.

A configuration file is a Python module with `get_config(variant=...)`. It returns a
typed configuration that states only what differs from the defaults.
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import textwrap
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

from sct_jax import errors, paths
from sct_jax.training import config as config_lib
from sct_jax.training import hardware, optimizer_config, processes, profiling

T = TypeVar("T")

Pairs = Iterable[tuple[str, str]]  # dotted fields and their values as text


@typing.runtime_checkable
class Validated(Protocol):
    """A configuration that checks itself."""

    def validate(self) -> None:
        """Raises UserError, naming the field."""


V = TypeVar("V", bound=Validated)


# --- Files.


def load(
    spec: str, pairs: Pairs = (), *, adapt: Callable[[Any], Any] = lambda config: config
) -> config_lib.ExperimentConfig:
    """Returns the validated configuration of "path.py" or "path.py:variant".

    Args:
      spec: configuration file, with the variant after a colon.
      pairs: overrides, see `apply`.
      adapt: changes what the file says, before the overrides.

    Raises:
      UserError: for an unknown file, variant or field, and for a value that does not
        fit.
    """

    def checked(config: config_lib.ExperimentConfig) -> config_lib.ExperimentConfig:
        config_lib.check_types(config)  # before anything reads a group
        return adapt(config)

    return load_as(config_lib.ExperimentConfig, spec, pairs, adapt=checked)


def load_as(
    kind: type[V],
    spec: str,
    pairs: Pairs = (),
    *,
    adapt: Callable[[V], V] = lambda config: config,
) -> V:
    """Returns what `load` does, for a file whose `get_config` returns a `kind`."""
    path, variant = split_spec(spec)
    config = _call_get_config(pathlib.Path(path), variant)
    errors.check(
        "--config",
        isinstance(config, kind),
        f"get_config of {path} returned {type(config).__name__}, not {kind.__name__}",
    )
    config = apply(adapt(config), pairs)
    config.validate()
    return config


def split_spec(spec: str) -> tuple[str, str]:
    """Returns path and variant of "path.py:variant"; a path may hold colons itself.

    The variant follows the last colon, if what is before it is a file.
    """
    spec = paths.expand("--config", spec)
    path, _, variant = spec.rpartition(":")
    if os.path.isfile(path) or (path.endswith(".py") and not os.path.isfile(spec)):
        return path, variant
    return spec, ""


def default_workdir(spec: str) -> str:
    """Returns runs/<file stem>-<variant>, with the file's default variant."""
    path, variant = split_spec(spec)
    if not variant:
        get_config = _load_module(pathlib.Path(path)).get_config
        parameter = inspect.signature(get_config).parameters.get("variant")
        variant = parameter.default if parameter else ""
    stem = pathlib.Path(path).stem
    return os.path.join("runs", f"{stem}-{variant}" if variant else stem)


def _call_get_config(path: pathlib.Path, variant: str) -> Any:
    module = _load_module(path)
    if variant:
        variants = tuple(getattr(module, "VARIANTS", ()))
        errors.check_choice("--config variant", variant, variants)
    with _errors_with_line(path):
        return module.get_config(variant=variant) if variant else module.get_config()


def _load_module(path: pathlib.Path) -> types.ModuleType:
    if not os.path.isfile(path):  # False also for a name that no file can have
        siblings = _config_files(path.parent)
        raise errors.UserError(
            f"--config: no file {str(path)!r}{errors.nearest(str(path), siblings)}"
        )
    module_spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise errors.UserError(f"--config: {str(path)!r} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    with _errors_with_line(path):
        module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise errors.UserError(f"--config: {path} has no get_config(variant=...)")
    return module


def _config_files(folder: pathlib.Path) -> list[str]:
    """The Python files in a folder, and all below `configs`."""
    try:
        files = {*folder.glob("*.py"), *pathlib.Path("configs").rglob("*.py")}
    except (OSError, ValueError):
        return []
    return sorted(str(path) for path in files if path.name != "__init__.py")


@contextlib.contextmanager
def _errors_with_line(path: pathlib.Path) -> Iterator[None]:
    """Turns an error in a configuration file into a UserError that names its line."""
    try:
        yield
    except errors.UserError:
        raise
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        where = f"{path}:{line}" if line else str(path)
        raise errors.UserError(
            f"--config: {where}: {type(error).__name__}: {error}"
        ) from error


# --- Overrides.


def override(config: T, field: str, text: str) -> T:
    """Returns the configuration with one dotted field set, see `apply`."""
    return apply(config, [(field, text)])


def apply(config: T, pairs: Pairs) -> T:
    """Returns the configuration with dotted fields set to parsed text.

    Later pairs win. The order does not matter otherwise: `optimizer.name` may come
    before or after the fields of its chain.

    Raises:
      UserError: for an unknown field (names the nearest), or text that is not a value
        of the field's type.
    """
    changes: dict[str, Any] = {}
    for field, text in pairs:
        prefix, field = _split_prefix(type(config), field)
        field, text = _current_names(field, text)
        value = _parse_field(config, prefix, field, text)
        group, keys = changes, (prefix + field).split(".")
        for key in keys[:-1]:
            group = group.setdefault(key, {})
        group[keys[-1]] = value
    return _replace(config, changes)


def _replace(config: Any, changes: dict[str, Any]) -> Any:
    """The configuration with nested changes; a chain may change its class."""
    if isinstance(config, optimizer_config.OptimizerConfig):
        before = {"name": config.name} | config.set_fields()
        # None asks for the default of the chain.
        unset = {k for k, v in changes.items() if v is _CHAIN_DEFAULT}
        after = {k: v for k, v in (before | changes).items() if k not in unset}
        return optimizer_config.from_fields(after)
    values = {
        key: _replace(getattr(config, key), value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    return dataclasses.replace(config, **values)


def _current_names(field: str, text: str) -> tuple[str, str]:
    """Field and value under the names of this version; warns about earlier ones."""
    name = field
    for old, new in config_lib.RENAMED_FIELDS.items():
        if field == old or field.startswith(f"{old}."):
            name = new + field.removeprefix(old)
    value = config_lib.RENAMED_VALUES.get(name, {}).get(text, text)
    if (name, value) != (field, text):
        message = f"{field}={text} is now {name}={value}"
        if name != field:
            message = f"{field} is now {name}"
        warnings.warn(
            f"{message}; the next release drops the earlier name",
            FutureWarning,
            stacklevel=4,
        )
    return name, value


_CHAIN_DEFAULT = object()


def _split_prefix(kind: Any, field: str) -> tuple[str, str]:
    """The path to the experiment within a configuration, and the field in it."""
    keys = field.split(".")
    for depth, key in enumerate(keys):
        if kind is config_lib.ExperimentConfig:
            return "".join(f"{key}." for key in keys[:depth]), ".".join(keys[depth:])
        kind = typing.get_type_hints(kind).get(key)
        if not dataclasses.is_dataclass(kind):
            break
    return "", field


def _parse_field(config: Any, prefix: str, field: str, text: str) -> Any:
    """The value of `text` for a field, given the path to its experiment."""
    kind: Any = type(config)
    keys = (prefix + field).split(".")
    for depth, key in enumerate(keys):
        name = ".".join(keys[: depth + 1])
        hints = config_lib.field_types(kind)
        if key not in hints:
            near = _near(key, hints, prefix=name.removesuffix(key))
            raise errors.UserError(
                f"unknown config field {name!r}{errors.suggestion(near)}"
            )
        kind = hints[key]
        last = depth == len(keys) - 1
        if dataclasses.is_dataclass(kind) and last:
            fields = ", ".join(config_lib.field_types(kind))
            raise errors.UserError(
                f"{name}: this is a group; set one of {name}.[{fields}]"
            )
        if not dataclasses.is_dataclass(kind) and not last:
            raise errors.UserError(f"unknown config field {'.'.join(keys)!r}")
    if field in config_lib.CHAIN_DEFAULTS and text.lower() in ("none", "null"):
        return _CHAIN_DEFAULT
    return _parse(prefix + field, kind, text)


# What other projects call a field.
ALIASES = {
    "batch": "data.batch_size",
    "context_length": "data.seq_len",
    "hidden_size": "model.d_model",
    "intermediate_size": "model.d_ff",
    "learning_rate": "optimizer.peak_learning_rate",
    "lr": "optimizer.peak_learning_rate",
    "max_steps": "num_steps",
    "n_layers": "model.num_layers",
    "num_hidden_layers": "model.num_layers",
    "num_train_steps": "num_steps",
    "sequence_length": "data.seq_len",
    "steps": "num_steps",
    "warmup": "optimizer.warmup_steps",
    "wd": "optimizer.weight_decay",
}


def _near(key: str, hints: Iterable[str], *, prefix: str) -> str | None:
    """The field that a wrong key probably means, of this group or else of any."""
    names = {name.rpartition(".")[2]: name for name in reversed(_all_fields())}
    names |= {
        old.rpartition(".")[2]: new
        for old, new in config_lib.RENAMED_FIELDS.items()
        if "." in old
    }
    names |= ALIASES
    if key in names:
        return names[key]
    if near := errors.closest(key, tuple(hints)):
        return prefix + near
    leaf = errors.closest(key, tuple(names), cutoff=0.7)
    return names[leaf] if leaf else None


def _parse(name: str, kind: Any, text: str) -> Any:
    """The value of `text` for a field of type `kind`."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    for option in options:
        try:
            if option is bool:
                return {"true": True, "1": True, "false": False, "0": False}[
                    text.lower()
                ]
            if option is int:
                number = float(text) if "e" in text.lower() else int(text)
                if number == int(number):
                    return int(number)
            if option is float:
                return float(text)
            if option is str:
                return text
            if typing.get_origin(option) is tuple:
                item_kind = typing.get_args(option)[0]
                return tuple(_parse(name, item_kind, x) for x in _split_tuple(text))
        except (KeyError, ValueError, OverflowError):
            continue
    raise errors.UserError(
        f"{name}: {text!r} is not a value of type {config_lib.type_name(kind)}"
    )


def _split_tuple(text: str) -> tuple[str, ...]:
    if text.startswith(("(", "[")):
        try:
            return tuple(str(item) for item in ast.literal_eval(text))
        except (SyntaxError, TypeError) as error:
            raise ValueError(text) from error
    return tuple(item.strip() for item in text.split(",") if item.strip())


# --- Command lines.

_MAX_TIMEOUT = 10**6  # seconds, twelve days


class FlagParser(argparse.ArgumentParser):
    """Treats - and _ alike, rejects abbreviations, and suggests corrections."""

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
        pairs: list[tuple[str, str]] = []
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
                pairs.append((name.removeprefix("--config."), value))
            else:
                plain.append(name + equals + value)
        # Before argparse, which first misses a required flag that a typo hides.
        flags = [word.partition("=")[0] for word in plain if word.startswith("--")]
        self._refuse(
            [flag for flag in flags if flag not in self._option_string_actions]
        )
        namespace, unknown = self.parse_known_args(plain)
        self._refuse(unknown)
        return namespace, pairs

    def _refuse(self, unknown: Sequence[str]) -> None:
        if unknown:
            known = [option for a in self._actions for option in a.option_strings]
            near = errors.nearest(unknown[0].partition("=")[0], known)
            self.error(f"unknown argument {unknown[0]!r}{near}")

    def parse_flags(self, argv: Sequence[str]) -> argparse.Namespace:
        """Returns the flags of a command that has no configuration to override."""
        flags, pairs = self.parse(argv)
        if pairs:
            self.error("--config: this command has no configuration")
        return flags

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with code 2."""
        self.exit(2, f"error: {message}\n(--help lists the flags)\n")


def parse_command(
    argv: Sequence[str], description: str
) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Returns the flags of a training command, and its overrides.

    Prints help, or one message for bad input, and exits with code 2 for the latter.
    `address` of the flags is where processes meet; None unless it is given.
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
    parser.add_argument(
        "--compile",
        action="store_true",
        help="with --dry_run: compile the step too, for the devices at hand, and add "
        "the compiler's memory per device; needs no memory for the model",
    )
    parser.add_argument(
        "--allow_change",
        action="append",
        default=[],
        metavar="FIELD,...",
        help="fields, such as data.batch_size, that may differ from the run to resume",
    )
    parser.add_argument(
        "--init_from",
        metavar="RUN",
        help="start with the model, the parameters and the tokenizer of another run, "
        "trained or imported by experiments.convert",
    )
    parser.add_argument(
        "--stall_timeout",
        type=float,
        metavar="SECONDS",
        help="end the process if no step, evaluation or save ends for so long; more "
        "than a compilation takes (default with several processes: "
        f"{processes.STALL_TIMEOUT:g})",
    )
    parser.add_argument(
        "--profile",
        metavar="START:STOP",
        help="write a profiler trace of the steps START to STOP, both included and "
        "counted from 1, to the folder profile of the workdir",
    )
    _add_processes(parser)
    flags, pairs = parser.parse(argv)
    try:
        flags.allow_change = _fields(",".join(flags.allow_change))
        _check_flags(flags)
        flags.address = _address(flags)
    except errors.UserError as error:
        parser.error(str(error))
    return flags, pairs


Inherit = Callable[
    [config_lib.ExperimentConfig, pathlib.Path, str | None], config_lib.ExperimentConfig
]
"""From a configuration file, a workdir and --init-from to what flags then override."""


def load_command(
    flags: argparse.Namespace,
    pairs: Pairs,
    *,
    inherit: Inherit = lambda config, workdir, init_from: config,
) -> tuple[config_lib.ExperimentConfig, pathlib.Path]:
    """Returns the configuration and the workdir of a training command.

    Args:
      flags: from `parse_command`, like `pairs`.
      pairs: the overrides.
      inherit: see `origin.inherit`.

    Raises:
      UserError: for a value that makes no sense, and if JAX finds no devices.
    """
    hardware.check_backend()
    workdir = workdir_of(flags)
    adapt = lambda config: inherit(config, workdir, flags.init_from)
    try:
        experiment = load(flags.config, pairs, adapt=adapt)
    except errors.UserError as error:
        if flags.init_from and str(error).startswith("model."):
            raise errors.UserError(
                f"{error}; the model is that of --init-from={flags.init_from}"
            ) from error
        raise
    if flags.profile is not None:
        profiling.check_range(flags.profile, num_steps=experiment.num_steps)
    return experiment, workdir


def workdir_of(flags: argparse.Namespace) -> pathlib.Path:
    """Returns the folder of the run of a training command.

    Raises:
      UserError: for a path that makes no sense.
    """
    path = flags.workdir
    return pathlib.Path(
        paths.expand(
            "--workdir", default_workdir(flags.config) if path is None else path
        )
    )


def _add_processes(parser: FlagParser) -> None:
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="train in all processes that SLURM, Open MPI, GKE or a Cloud TPU started",
    )
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="train in several processes, which meet where process 0 listens",
    )
    parser.add_argument(
        "--num_processes", type=int, metavar="N", help="how many, with --coordinator"
    )
    parser.add_argument(
        "--process_id",
        type=int,
        metavar="I",
        help="which one this is, from 0, with --coordinator",
    )
    for name, default, meaning in (
        ("connect_timeout", processes.CONNECT_TIMEOUT, "wait for each other at first"),
        ("peer_timeout", processes.PEER_TIMEOUT, "do without a sign of another one"),
    ):
        parser.add_argument(
            f"--{name}",
            type=float,
            default=default,
            metavar="SECONDS",
            help=f"how long several processes {meaning} (default: %(default)g)",
        )


def _address(flags: argparse.Namespace) -> processes.Address | None:
    given = {
        "--coordinator": flags.coordinator,
        "--num-processes": flags.num_processes,
        "--process-id": flags.process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    errors.check(
        missing[0] if missing else "--coordinator",
        not missing,
        f"is missing: {', '.join(given)} belong together",
    )
    errors.check(
        "--distributed",
        not flags.distributed,
        "asks the environment for what --coordinator says; leave one of the two out",
    )
    return processes.Address(*given.values())


def _check_flags(flags: argparse.Namespace) -> None:
    errors.check("--workdir", flags.workdir != "", "must not be empty")
    errors.check("--init-from", flags.init_from != "", "must not be empty")
    for name in ("stall_timeout", "connect_timeout", "peer_timeout"):
        seconds = getattr(flags, name)
        errors.check(
            f"--{name}",
            seconds is None or 0 < seconds <= _MAX_TIMEOUT,
            f"{seconds} must be > 0 and <= {_MAX_TIMEOUT} seconds",
        )
    errors.check(
        "--compile",
        flags.dry_run or not flags.compile,
        "a run compiles in any case; add --dry_run to compile without training, or "
        "leave --compile out",
    )
    if flags.profile is not None:
        errors.check(
            "--profile",
            not flags.dry_run,
            "--dry_run takes no steps to trace; leave one of the two out",
        )
        flags.profile = profiling.parse_range(flags.profile)


def _fields(text: str) -> tuple[str, ...]:
    """The fields of an experiment in a list, under the names of this version."""
    known = _all_fields()
    found = []
    for name in (word.strip() for word in text.split(",")):
        field = config_lib.RENAMED_FIELDS.get(name, name)
        if field and field not in known:
            group, _, key = field.rpartition(".")
            siblings = [f for f in known if f.rpartition(".")[0] == group]
            near = _near(
                key,
                [f.rpartition(".")[2] for f in siblings],
                prefix=f"{group}." if group else "",
            )
            raise errors.UserError(
                f"--allow_change: unknown config field {name!r}"
                f"{errors.suggestion(near)}"
            )
        found += [field] if field else []
    return tuple(found)


@contextlib.contextmanager
def notes_on_renames() -> Iterator[None]:
    """Prints warnings about earlier names as notes on standard error."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FutureWarning)
            yield
    finally:
        notes = [str(w.message) for w in caught if w.category is FutureWarning]
        for note in dict.fromkeys(notes):
            print(f"note: {note}", file=sys.stderr)
    for warning in caught:
        if warning.category is not FutureWarning:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def fail(message: str) -> NoReturn:
    """Prints one line to standard error and exits with code 2, for bad input."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# --- Help.

_WIDTH = 88
# An entry of a docstring: an indented "name: text", continued on deeper lines.
_ENTRY = re.compile(r"^( +)(\w+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


def field_help() -> str:
    """Returns every field of an experiment with its default and its meaning."""
    lines = ["Fields, with the defaults of the library; a config file may change them:"]
    indent = " " * 6
    said = ""
    for name, (meaning, values) in _all_fields().items():
        lines.append(f"  --config.{name}={_defaults(values)}")
        if meaning != said:
            lines += textwrap.wrap(
                meaning, _WIDTH, initial_indent=indent, subsequent_indent=indent
            )
        said = meaning
    return "\n".join(lines)


@functools.cache
def _all_fields() -> dict[str, tuple[str, dict[str, Any]]]:
    """Meaning of every field, and its default by chain; fields of a group together."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for chain, kind in optimizer_config.CHAINS.items():
        experiment = config_lib.ExperimentConfig(optimizer=kind())
        for name, value, meaning in fields_of(experiment):
            found.setdefault(name, (meaning, {}))[1][chain] = value
    default = config_lib.ExperimentConfig().optimizer.name
    found["optimizer.name"] = (
        found["optimizer.name"][0],
        dict.fromkeys(optimizer_config.CHAINS, default),
    )
    groups = [field.name for field in dataclasses.fields(config_lib.ExperimentConfig)]
    order = lambda item: groups.index(item[0].partition(".")[0])
    return dict(sorted(found.items(), key=order))


def _defaults(values: dict[str, Any]) -> str:
    """The default of a field, with the chains where they differ or some lack it."""
    by_text: dict[str, list[str]] = {}
    for chain, value in values.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        by_text.setdefault(text, []).append(chain)
    if len(by_text) == 1 and values.keys() == optimizer_config.CHAINS.keys():
        return next(iter(by_text))
    return "; ".join(f"{text} ({', '.join(names)})" for text, names in by_text.items())


def fields_of(
    settings: Any, prefix: str = "", meaning: str = ""
) -> Iterator[tuple[str, Any, str]]:
    """Yields dotted name, value and meaning of every field, nested ones included.

    The meaning comes from the docstring of the dataclass or its bases. A dataclass
    without attributes in its docstring passes on the meaning of its group.
    """
    entries: dict[str, str] = {}
    for kind in reversed(type(settings).__mro__):
        text = inspect.cleandoc(kind.__doc__ or "")
        entries |= {
            name: " ".join(said.split()) for _, name, said in _ENTRY.findall(text)
        }
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), prefix + field.name
        own = entries.get(field.name, "") if entries else meaning
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{name}.", own)
        else:
            yield name, value, own
