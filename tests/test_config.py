import json
import typing

import pytest

from sct_jax import data, errors, model, rank
from sct_jax.training import config as config_lib
from sct_jax.training import optimizer_config, overrides

BASE = config_lib.ExperimentConfig()


def get(config, field):
    for name in field.split("."):
        config = getattr(config, name)
    return config


# --- Checks.


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("num_steps", "0"),
        ("num_steps", "-3"),
        ("seed", "-1"),
        ("seed", str(2**32)),  # the shuffle's limit
        ("log_every", "0"),
        ("step", "half"),
        ("data.batch_size", "0"),
        ("data.seq_len", "0"),
        ("data.num_microbatches", "5"),
        ("data.batch_size", "1e9"),  # tokens per step beyond int32
        ("data.source", ""),
        ("optimizer.name", "adam"),
        ("optimizer.schedule", "linear"),
        ("optimizer.retraction", "givens"),
        ("optimizer.moment_dtype", "float16"),
        ("optimizer.peak_learning_rate", "0"),
        ("optimizer.max_update_norm", "0"),
        ("optimizer.grad_clip", "-1"),
        ("optimizer.weight_decay", "-0.1"),
        ("optimizer.b1", "1"),
        ("optimizer.b2", "-0.1"),
        ("optimizer.decay_ratio", "1.5"),
        ("optimizer.warmup_steps", "-1"),
        ("optimizer.base_width", "0"),
        ("mesh.data", "0"),
        ("checkpoint.every", "0"),
        ("checkpoint.keep", "0"),
        ("eval.every", "0"),
        ("eval.num_batches", "0"),
        ("model.rank", "0"),
        # Beyond what arrays can count or hold, or a machine describe.
        ("num_steps", "1e18"),
        ("optimizer.warmup_steps", "1e18"),
        ("optimizer.base_width", "1e18"),
        ("adaptive_rank.multiple", "1e18"),
        ("adaptive_rank.max_rank", "1e18"),
        ("model.d_model", "1e9"),
        ("model.d_ff", "1e9"),
        ("model.num_layers", "1e18"),
        ("model.num_heads", "1e9"),
        ("model.num_kv_heads", "1e9"),
        ("model.vocab_size", "1e18"),
        # Zero, infinite or one in float32.
        ("optimizer.peak_learning_rate", "1e300"),
        ("optimizer.peak_learning_rate", "1e-300"),
        ("optimizer.eps", "1e-40"),
        ("optimizer.b1", "0.99999999999"),
        ("optimizer.weight_decay", "1e-60"),
        ("optimizer.max_update_norm", "nan"),
        ("optimizer.grad_clip", "inf"),
        ("model.rope_theta", "1e-320"),
        ("model.rope_theta", "0.5"),
        ("model.norm_eps", "1e39"),
    ],
)
def test_validate_names_the_field(field, text):
    with pytest.raises(errors.UserError, match=f"^{field}: "):
        overrides.override(BASE, field, text).validate()


def test_the_defaults_are_valid():
    BASE.validate()


def test_the_largest_values_are_valid():
    overrides.override(BASE, "num_steps", str(2**31 - 1)).validate()
    sizes = model.MAX_SIZES | {"num_heads": 1024, "num_kv_heads": 1024}
    model.ModelConfig(**sizes, rank=2**20).validate()
    for field, most in model.MAX_SIZES.items():
        with pytest.raises(errors.UserError, match=f"model.{field}: .* <= {most}"):
            model.ModelConfig(**{**sizes, field: most + 1}).validate()


def every_float():
    for name in config_lib.flatten(config_lib.to_dict(BASE)):
        group, _, field = name.rpartition(".")
        kind = type(get(BASE, group)) if group else type(BASE)
        hint = config_lib.field_types(kind)[field]
        if float in (hint, *typing.get_args(hint)):
            yield name


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e300", "-1e300"])
def test_no_float_is_beyond_float32(text):
    for field in every_float():
        config = overrides.override(BASE, field, text)
        if field.startswith("model.rank_ratios."):
            name = field.rpartition(".")[2]
            config = overrides.override(config, "model.spectral", name)
        with pytest.raises(errors.UserError) as caught:
            config.validate()
        assert str(caught.value).startswith(f"{field}: ")


class Numbers(typing.NamedTuple):
    x: float | None


@pytest.mark.parametrize(
    ("value", "bounds", "passes"),
    [
        (0.5, {"above": 0, "below": 1}, True),
        (None, {"above": 0}, True),
        (1e-46, {"above": 0}, False),
        (1 - 1e-9, {"below": 1}, False),
        (1 - 1e-9, {"most": 1}, True),
        (float("nan"), {"least": 0}, False),
    ],
)
def test_bounds_hold_in_float32(value, bounds, passes):
    if passes:
        errors.check_bounds("p.", Numbers(value), "x", **bounds)
        return
    with pytest.raises(errors.UserError, match=r"^p\.x: "):
        errors.check_bounds("p.", Numbers(value), "x", **bounds)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, 3, 2.0**-126, -(2.0**-126), 3.4e38])
def test_float32_holds_what_it_holds(value):
    assert errors.to_float32(value) == pytest.approx(value, rel=2**-24)
    errors.check_float32("x", value)


@pytest.mark.parametrize("value", [2.0**-127, 1e-45, -1e-45])
def test_float32_flushes_the_smallest(value):
    assert errors.to_float32(value) == 0


# --- JSON.


def test_from_dict_undoes_to_dict():
    config = config_lib.ExperimentConfig(
        num_steps=3,
        model=model.ModelConfig(
            spectral=("q", "down"),
            ranks=model.MatrixRanks(q=3),
            rank_ratios=model.MatrixRankRatios(down=0.5),
        ),
        data=data.DataConfig(source="x", tokenizer="t.json"),
        optimizer=optimizer_config.StiefelMuon(max_update_norm=0.1),
        checkpoint=config_lib.CheckpointConfig(every=3),
    )
    text = json.dumps(config_lib.to_dict(config))
    assert config_lib.from_dict(json.loads(text)) == config
    assert hash(config_lib.from_dict(json.loads(text)).model) == hash(config.model)


@pytest.mark.parametrize("group", ["data", "optimizer", "model"])
def test_from_dict_refuses_a_value_in_the_place_of_a_group(group):
    with pytest.raises(errors.UserError, match=f"{group}: not a group"):
        config_lib.from_dict({group: 3})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_steps", "abc"),
        ("num_steps", 1e3),
        ("num_steps", True),
        ("num_steps", None),
        ("num_steps", [5]),
        ("step", 5),
        ("model.d_model", 2.5),
        ("model.tie_embeddings", 1),
        ("model.tie_embeddings", "true"),
        ("model.spectral", "q"),
        ("model.spectral", ["q", 5]),
        ("model.spectral", [["q"]]),
        ("model.ranks.q", 2.0),
        ("model.ranks.q", {}),
        ("model.norm_eps", "small"),
        ("model.norm_eps", True),
        ("model.norm_eps", 10**400),
        ("optimizer.b1", "0.9"),
        ("optimizer.b1", [0.9]),
        ("optimizer.schedule", 3),
        ("optimizer.schedule", ["cosine"]),
        ("data.tokenizer", 5),
        ("mesh.data", None),
        ("adaptive_rank.energy", "0.9"),
    ],
    ids=str,
)
def test_from_dict_refuses_another_type(field, value):
    values = config_lib.to_dict(BASE)
    *groups, name = field.split(".")
    group = values
    for key in groups:
        group = group[key]
    group[name] = value
    with pytest.raises(errors.UserError, match=rf"^config\.json {field}: "):
        config_lib.from_dict(values)


@pytest.mark.parametrize("values", [[], "x", 3, None])
def test_from_dict_refuses_what_is_no_configuration(values):
    with pytest.raises(errors.UserError, match=r"^config\.json"):
        config_lib.from_dict(values)


def test_an_integer_may_stand_for_a_float():
    values = {"optimizer": {"peak_learning_rate": 1, "grad_clip": 2}}
    config = config_lib.from_dict(values)
    assert isinstance(config.optimizer.peak_learning_rate, float)
    assert isinstance(config.optimizer.grad_clip, float)
    assert config.optimizer.peak_learning_rate == 1
    # As Python files may write it.
    config_lib.check_types(optimizer_config.Sct(peak_learning_rate=1e-3))


def test_from_dict_refuses_a_field_of_another_version():
    values = config_lib.to_dict(BASE)
    values["model"]["num_expert"] = 8
    with pytest.raises(errors.UserError, match=r"config\.json.*num_expert"):
        config_lib.from_dict(values)


# --- What a resumed run may change.


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("log_every", "3"),
        ("checkpoint.every", "3"),
        ("checkpoint.keep", "7"),
        ("data.cache_dir", "elsewhere"),
        # Hashes tell whether text and tokenizer are the same.
        ("data.source", "other"),
        ("data.tokenizer", "t.json"),
        ("data.text_field", "content"),
        ("data.split", "files"),
        ("eval.every", "3"),
        ("eval.num_batches", "3"),
        ("log.sinks", "jsonl,wandb"),
        ("log.project", "other"),
        ("log.name", "other"),
        ("num_steps", "2000"),
        ("mesh.fsdp", "4"),
        ("data.num_microbatches", "2"),
        ("model.remat", "dots"),
        ("model.remat", "none"),
        ("model.scan_layers", "false"),
        ("step", "layerwise"),
    ],
)
def test_cadences_more_steps_and_another_layout_are_no_difference(field, text):
    changed = overrides.override(BASE, field, text)
    assert changed != BASE
    assert config_lib.differences(BASE, changed) == []


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("num_steps", "999"),
        ("seed", "1"),
        ("model.rank", "64"),
        ("model.ranks.gate", "64"),
        ("model.spectral", "gate"),
        ("model.compute_dtype", "bfloat16"),
        ("data.batch_size", "64"),
        ("optimizer.peak_learning_rate", "1"),
        ("optimizer.max_update_norm", "1"),
    ],
)
def test_anything_else_is_a_difference(field, text):
    changed = overrides.override(BASE, field, text)
    (found,) = config_lib.differences(BASE, changed)
    assert found.startswith(f"{field}: ")
    assert repr(get(BASE, field)).strip("()") in found.replace('"', "'") or (
        field == "model.spectral"
    )


def test_an_allowed_change_is_no_difference():
    changed = BASE
    for field, text in (("seed", "5"), ("data.batch_size", "64")):
        changed = overrides.override(changed, field, text)
    (found,) = config_lib.differences(BASE, changed, allowed=("data.batch_size",))
    assert found.startswith("seed: ")


def test_text_that_moved_is_listed():
    changed = overrides.override(BASE, "data.source", "there/*.txt")
    (change,) = config_lib.text_changes(BASE, changed)
    assert change == ("data.source", "stdlib", "there/*.txt")
    assert config_lib.text_changes(BASE, BASE) == []


def test_layers_stay_as_they_lie_where_ranks_change():
    old = overrides.override(BASE, "adaptive_rank.energy", "0.9")
    new = overrides.override(old, "model.scan_layers", "false")
    (found,) = config_lib.differences(old, new)
    assert found.startswith("model.scan_layers: ")


def test_another_chain_is_one_difference():
    changed = overrides.override(BASE, "optimizer.name", "muon")
    found = config_lib.differences(BASE, changed)
    # And the fields of both that have another default.
    assert [line.partition(":")[0] for line in found] == [
        "optimizer.b2",
        "optimizer.name",
    ]


def test_each_difference_is_listed():
    changed = BASE
    for field, text in (("seed", "5"), ("model.rank", "3"), ("log_every", "4")):
        changed = overrides.override(changed, field, text)
    found = config_lib.differences(BASE, changed)
    assert [line.partition(":")[0] for line in found] == ["model.rank", "seed"]
    assert "128" in found[0] and "3" in found[0]


# --- Chains and factors.


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"adaptive_rank.energy": "0.9"}, "adaptive_rank.energy"),
        ({"optimizer.name": "spectron"}, "model.factors"),
        ({"model.factors": "low_rank"}, "model.factors"),
        ({"model.factors": "lowrank"}, "model.factors"),
        ({"optimizer.name": "adamw"}, "model.factors"),
        ({"step": "layerwise"}, "model.scan_layers"),
        (
            {
                "step": "layerwise",
                "model.scan_layers": "0",
                "optimizer.grad_clip": "1",
            },
            "optimizer.grad_clip",
        ),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_each_other_are_refused(changes, field):
    config = overrides.apply(BASE, changes.items())
    with pytest.raises(errors.UserError, match=f"^{field}: "):
        config.validate()


def test_dense_matrices_go_with_every_chain():
    for kind in optimizer_config.CHAINS.values():
        config_lib.ExperimentConfig(
            model=model.ModelConfig(spectral=()), optimizer=kind()
        ).validate()


# --- Configurations of earlier versions.

# The optimizer of `:tiny` before each chain had fields of its own.
EARLIER = {
    "num_steps": 60,
    "step": "whole",
    "data": {"source": "stdlib", "batch_size": 16},
    "rank": {"energy": None, "every": 50},
    "optimizer": {
        "name": "stiefel_muon",
        "peak_learning_rate": 0.02,
        "b2": None,
        "eps": None,
        "singular_value_rate": 0.2,
        "dense_rate": 1.35,
        "base_width": None,
        "retraction": "lossless",
        "moment_dtype": "float32",
        "tangent_projection": None,
        "transport_moments": False,
        "retraction_every": 1,
        "retraction_tolerance": None,
        "momentum": 0.9,
        "nesterov": None,
        "shape_factor": False,
        "gauge": "svd",
        "max_rotation": 0.1,
    },
}


def test_a_configuration_written_before_still_opens():
    assert config_lib.from_dict(EARLIER) == config_lib.ExperimentConfig(
        num_steps=60,
        step="fused",
        data=data.DataConfig(batch_size=16, split="files"),
        adaptive_rank=rank.AdaptiveRankConfig(every=50),
        optimizer=optimizer_config.StiefelMuon(
            peak_learning_rate=0.02,
            singular_value_lr_multiplier=0.2,
            dense_lr_multiplier=1.35,
            retraction="svd",
            momentum=0.9,
            coordinates="svd",
        ),
    )


def test_a_field_of_another_chain_must_be_at_its_default():
    values = EARLIER | {"optimizer": {"name": "adamw", "momentum": 0.9}}
    with pytest.raises(errors.UserError, match=r"^optimizer\.momentum: 0\.9 .*0\.95"):
        config_lib.from_dict(values)


def test_renamed_fields_exist():
    names = config_lib.flatten(config_lib.to_dict(BASE)) | {
        f"optimizer.{name}": None for name in optimizer_config.field_kinds()
    }
    for old, new in config_lib.RENAMED_FIELDS.items():
        assert old not in names
        assert any(name == new or name.startswith(f"{new}.") for name in names)
    assert set(config_lib.RENAMED_VALUES) <= names.keys()
    assert {*config_lib.WITHOUT_EFFECT, *config_lib.RESUMABLE} <= names.keys()
