"""Properties of configurations: JSON, command lines and checks lose nothing."""

import dataclasses
import json
import math
import random
import typing

import hypothesis
import pytest
from hypothesis import strategies as st

from experiments.faults import fuzz_configs
from sct_jax import errors
from sct_jax.training import config as config_lib
from sct_jax.training import optimizer_config, overrides

settings = hypothesis.settings(derandomize=True, deadline=None, max_examples=50)

# "none" is no text on a command line, where a field may be None.
WORDS = st.text(st.characters(exclude_categories=["Cs"])).filter(
    lambda text: text.lower() not in ("none", "null")
)
NAMES = st.text("abcdefg_", min_size=1)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


def values_of(hint):
    """Values of the type of a field, sound or not."""
    found = []
    for option in typing.get_args(hint) or (hint,):
        if option is type(None):
            found.append(st.none())
        elif option is bool:
            found.append(st.booleans())
        elif option is int:
            found.append(st.integers())
        elif option is float:
            found.append(FLOATS)
        elif option is str and typing.get_origin(hint) is not tuple:
            found.append(WORDS)
    if typing.get_origin(hint) is tuple:
        numbers = float in typing.get_args(hint)
        return st.lists(FLOATS if numbers else NAMES).map(tuple)
    return st.one_of(found)


def fields_of(kind, prefix=""):
    """Every field of a configuration with its type."""
    for name, hint in config_lib.field_types(kind).items():
        if dataclasses.is_dataclass(hint):
            if hint is not optimizer_config.OptimizerConfig:
                yield from fields_of(hint, f"{prefix}{name}.")
        elif name != "name":
            yield prefix + name, hint


def changes(kind, prefix=""):
    """Some fields of a class with values."""
    options = [
        st.tuples(st.just(name), values_of(hint))
        for name, hint in fields_of(kind, prefix)
    ]
    return st.lists(st.one_of(options), max_size=8).map(dict)


# A chain, changes of its fields, and changes of all other fields.
CHANGES = st.sampled_from(sorted(optimizer_config.CHAINS)).flatmap(
    lambda chain: st.tuples(
        st.just(chain),
        changes(optimizer_config.CHAINS[chain], "optimizer."),
        changes(config_lib.ExperimentConfig),
    )
)


def configuration(changed):
    """The configuration with some fields changed."""
    chain, *groups = changed
    config = config_lib.ExperimentConfig(optimizer=optimizer_config.CHAINS[chain]())
    for name, value in (groups[0] | groups[1]).items():
        config = with_field(config, name.split("."), value)
    return config


def with_field(config, keys, value):
    if len(keys) > 1:
        value = with_field(getattr(config, keys[0]), keys[1:], value)
    return dataclasses.replace(config, **{keys[0]: value})


@settings
@hypothesis.given(CHANGES)
def test_json_loses_nothing(changed):
    config = configuration(changed)
    if config.data.source == "stdlib" and config.data.split is None:
        # An earlier version had but one way to divide that corpus.
        config = with_field(config, ["data", "split"], "files")
    text = json.dumps(config_lib.to_dict(config))
    again = config_lib.from_dict(json.loads(text))
    assert again == config
    assert config_lib.to_dict(again) == config_lib.to_dict(config)
    assert config_lib.differences(config, again) == []
    config_lib.check_types(again)


@settings
@hypothesis.given(CHANGES, st.randoms())
def test_a_command_line_loses_nothing(changed, rng):
    """Every field, written as the flags of a command, comes back as it was."""
    config = configuration(changed)
    pairs = []
    for name, value, _ in overrides.fields_of(config):
        if isinstance(value, tuple):
            value = ",".join(map(str, value))
        pairs.append((name, repr(value) if isinstance(value, float) else str(value)))
    rng.shuffle(pairs)
    assert overrides.apply(config_lib.ExperimentConfig(), pairs) == config


@settings
@hypothesis.given(CHANGES)
def test_a_configuration_is_valid_or_refused_by_name(changed):
    config = configuration(changed)
    names = config_lib.flatten(config_lib.to_dict(config))
    try:
        config.validate()
    except errors.UserError as error:
        field = str(error).partition(":")[0]
        assert field in names or any(name.startswith(f"{field}.") for name in names)
    else:
        floats = [x for x in names.values() if isinstance(x, float)]
        assert all(math.isfinite(errors.to_float32(x)) for x in floats)


GROUPS = [field.name for field in dataclasses.fields(config_lib.ExperimentConfig)]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["model", "data", "num_steps", "spectral", "ranks", "q", "x"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings
@hypothesis.given(st.dictionaries(st.sampled_from(GROUPS), VALUES))
def test_json_of_any_kind_is_read_or_refused(values):
    try:
        config = config_lib.from_dict(values)
    except errors.UserError as error:
        assert "config.json" in str(error) or str(error).startswith("optimizer")
    else:
        config_lib.check_types(config)


@settings
@hypothesis.given(
    st.dictionaries(
        st.sampled_from(sorted(optimizer_config.field_kinds())), VALUES, max_size=3
    )
)
def test_an_optimizer_of_any_kind_is_read_or_refused(values):
    try:
        config = config_lib.from_dict({"optimizer": values})
    except errors.UserError:
        return
    config_lib.check_types(config)


@pytest.mark.parametrize("start", [0, 25])
def test_random_flags_build_or_are_refused_in_one_line(tmp_path, monkeypatch, start):
    monkeypatch.chdir(tmp_path)
    codes = set()
    for seed in range(start, start + 25):
        flags = fuzz_configs.random_flags(random.Random(seed))
        codes.add(fuzz_configs.dry_run(flags, str(tmp_path / str(seed)))[0])
    assert codes == {0, 2}
