import json

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
    ],
)
def test_validate_names_the_field(field, text):
    with pytest.raises(errors.UserError, match=f"^{field}: "):
        overrides.override(BASE, field, text).validate()


def test_the_defaults_are_valid():
    BASE.validate()


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
        ("eval.every", "3"),
        ("eval.num_batches", "3"),
        ("num_steps", "2000"),
        ("mesh.fsdp", "4"),
        ("data.num_microbatches", "2"),
        ("model.remat", "dots"),
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
        ("data.source", "other"),
        ("data.batch_size", "64"),
        ("data.tokenizer", "t.json"),
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
