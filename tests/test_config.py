import dataclasses
import json

import pytest

from sct_jax import data, errors, model, optimizers
from sct_jax.training import command_line
from sct_jax.training import config as config_lib

BASE = config_lib.ExperimentConfig()

CONFIG_FILE = """
from sct_jax.training import config

VARIANTS = ("small", "large")

def get_config(variant="small"):
    return config.ExperimentConfig(num_steps={"small": 7, "large": 70}[variant])
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CONFIG_FILE)
    return path


def get(config, field):
    for name in field.split("."):
        config = getattr(config, name)
    return config


# --- Overrides.


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("num_steps", "12", 12),
        ("num_steps", "1e3", 1000),
        ("num_steps", "2.5e3", 2500),
        ("num_steps", "1_000", 1000),
        ("seed", "0", 0),
        ("optimizer.peak_learning_rate", "3e-3", 3e-3),
        ("optimizer.peak_learning_rate", "1", 1.0),
        ("model.tie_embeddings", "false", False),
        ("model.tie_embeddings", "True", True),
        ("model.scan_layers", "0", False),
        ("model.scan_layers", "1", True),
        ("optimizer.schedule", "wsd", "wsd"),
        ("data.source", "a=b,c/*.txt", "a=b,c/*.txt"),
        ("model.spectral", "q,k", ("q", "k")),
        ("model.spectral", "q, k ,", ("q", "k")),
        ("model.spectral", "q", ("q",)),
        ("model.spectral", "", ()),
        ("model.spectral", "('q', 'k')", ("q", "k")),
        ("model.spectral", '["q","k"]', ("q", "k")),
        ("optimizer.max_update_norm", "none", None),
        ("optimizer.max_update_norm", "None", None),
        ("optimizer.max_update_norm", "0.5", 0.5),
        ("optimizer.base_width", "256", 256),
        ("data.tokenizer", "null", None),
        ("data.tokenizer", "a/tokenizer.json", "a/tokenizer.json"),
        ("data.cache_dir", "/tmp/x", "/tmp/x"),
        ("model.ranks.q", "8", 8),
        ("model.ranks.q", "none", None),
        ("model.rank_ratios.down", "0.25", 0.25),
        ("mesh.data", "-1", -1),
    ],
)
def test_an_override_has_the_type_of_its_field(field, text, value):
    changed = config_lib.override(BASE, field, text)
    assert get(changed, field) == value
    assert type(get(changed, field)) is type(value)
    # Nothing else changes, nor does the configuration that it started from.
    default = get(BASE, field)
    assert config_lib.override(changed, field, text) == changed
    assert (changed == BASE) == (default == value)
    assert config_lib.ExperimentConfig() == BASE


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("num_steps", "many"),
        ("num_steps", "1.5"),
        ("num_steps", "1.5e0"),
        ("num_steps", "1e999"),
        ("num_steps", ""),
        ("num_steps", "none"),
        ("num_steps", "True"),
        ("optimizer.peak_learning_rate", "fast"),
        ("optimizer.peak_learning_rate", "none"),
        ("model.tie_embeddings", "maybe"),
        ("model.tie_embeddings", "2"),
        ("optimizer.max_update_norm", "small"),
        ("model.ranks.q", "0.5"),
        ("model.rank_ratios.q", "half"),
        ("model.spectral", "('q',"),
        ("model.spectral", "[1"),
    ],
)
def test_a_value_of_another_type_names_the_field(field, text):
    with pytest.raises(errors.UserError, match=f"^{field}: ") as caught:
        config_lib.override(BASE, field, text)
    assert repr(text) in str(caught.value)


def test_a_tuple_that_is_none_is_refused():
    # "(5)" is the integer 5 to Python; a tuple of characters would be worse.
    with pytest.raises(errors.UserError, match=r"^model\.spectral: "):
        config_lib.override(BASE, "model.spectral", "(5)")


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "field",
    [
        "optimizer.peak_learning_rate",
        "optimizer.weight_decay",
        "model.rank_ratios.gate",
        "model.rope_theta",
    ],
)
def test_a_float_that_is_no_number_is_refused(field, text):
    with pytest.raises(errors.UserError, match=f"{field}"):
        config_lib.override(BASE, field, text).validate()


def test_aliases_are_of_fields():
    assert set(config_lib._ALIASES.values()) <= set(
        config_lib.flatten(config_lib.to_dict(BASE))
    )


@pytest.mark.parametrize(
    ("field", "nearest"),
    [
        ("num_step", "num_steps"),
        ("nmu_steps", "num_steps"),
        ("optimiser.peak_learning_rate", "optimizer"),
        ("optimizer.peak_learning_rte", "peak_learning_rate"),
        ("model.d_modle", "d_model"),
        ("model.ranks.gat", "gate"),
        ("batch_size", "data.batch_size"),
        ("peak_learning_rate", "optimizer.peak_learning_rate"),
        ("vocab_size", "model.vocab_size"),
        ("optimizer.vocab_sise", "model.vocab_size"),
        ("steps", "num_steps"),
        ("optimizer.lr", "optimizer.peak_learning_rate"),
        ("model.hidden_size", "model.d_model"),
    ],
)
def test_an_unknown_field_suggests_the_nearest(field, nearest):
    with pytest.raises(errors.UserError, match="unknown config field") as caught:
        config_lib.override(BASE, field, "1")
    assert f"did you mean {nearest!r}" in str(caught.value)


@pytest.mark.parametrize("field", ["xyzzy", "num_steps.x", "model.", ".model", ""])
def test_an_unknown_field_is_named(field):
    with pytest.raises(errors.UserError, match="unknown config field"):
        config_lib.override(BASE, field, "1")


@pytest.mark.parametrize("field", ["model", "optimizer", "model.ranks"])
def test_a_group_lists_its_fields(field):
    with pytest.raises(errors.UserError, match=f"^{field}: a group") as caught:
        config_lib.override(BASE, field, "1")
    assert all(
        f.name in str(caught.value) for f in dataclasses.fields(get(BASE, field))
    )


# --- Files.


def test_an_error_in_a_file_is_told_with_its_line(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def get_config():\n    return STEPS\n")
    with pytest.raises(errors.UserError, match=r"bad\.py:2: NameError: .*'STEPS'"):
        config_lib.load(str(path))


def test_load_takes_the_variant_and_the_overrides(config_file):
    assert config_lib.load(str(config_file)).num_steps == 7
    loaded = config_lib.load(f"{config_file}:large", [("seed", "3"), ("seed", "4")])
    assert (loaded.num_steps, loaded.seed) == (70, 4)


def test_load_validates_after_all_overrides(config_file):
    # rank 100 fits once d_model does, whatever comes first.
    overrides = [("model.rank", "1000"), ("model.d_model", "1152")]
    assert config_lib.load(str(config_file), overrides).model.rank == 1000
    with pytest.raises(errors.UserError, match=r"^model\.rank: "):
        config_lib.load(str(config_file), overrides[:1])


def test_an_unknown_variant_suggests_the_nearest(config_file):
    with pytest.raises(errors.UserError, match=r"variant.*'lrge'.*'large'"):
        config_lib.load(f"{config_file}:lrge")


def test_an_unknown_file_suggests_the_nearest(config_file):
    wrong = config_file.with_name("mien.py")
    with pytest.raises(errors.UserError, match=r"--config: no file.*mine\.py"):
        config_lib.load(str(wrong))


@pytest.mark.parametrize(
    "text",
    [
        "def get_config(:",
        "x = 1",
        "import no_such_module_of_anybody",
        "STEPS = STEP",
        "def get_config(): return {}['steps']",
        "def get_config(variant=''): return {'num_steps': 1}",
        "from sct_jax import config\n"
        "def get_config(): return config.ExperimentConfig(num_step=1)",
    ],
)
def test_a_file_that_gives_no_configuration_is_refused(tmp_path, text):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(errors.UserError, match=r"bad\.py"):
        config_lib.load(str(path))


@pytest.mark.parametrize("name", ["folder", "notes.txt"])
def test_what_is_no_python_file_is_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(errors.UserError, match="--config"):
        config_lib.load(str(tmp_path / name))


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
        ("optimizer.retraction", "svd"),
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
    config = config_lib.override(BASE, field, text)
    with pytest.raises(errors.UserError, match=f"^{field}: "):
        config.validate()


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
        optimizer=optimizers.OptimizerConfig(max_update_norm=0.1),
        checkpoint=config_lib.CheckpointConfig(every=3),
    )
    text = json.dumps(config_lib.to_dict(config))
    assert config_lib.from_dict(json.loads(text)) == config
    assert hash(config_lib.from_dict(json.loads(text)).model) == hash(config.model)


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
    changed = config_lib.override(BASE, field, text)
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
    changed = config_lib.override(BASE, field, text)
    (found,) = config_lib.differences(BASE, changed)
    assert found.startswith(f"{field}: ")
    assert repr(get(BASE, field)).strip("()") in found.replace('"', "'") or (
        field == "model.spectral"
    )


def test_layers_stay_as_they_lie_where_ranks_change():
    old = config_lib.override(BASE, "rank.energy", "0.9")
    new = config_lib.override(old, "model.scan_layers", "false")
    (found,) = config_lib.differences(old, new)
    assert found.startswith("model.scan_layers: ")


def test_each_difference_is_listed():
    changed = BASE
    for field, text in (("seed", "5"), ("model.rank", "3"), ("log_every", "4")):
        changed = config_lib.override(changed, field, text)
    found = config_lib.differences(BASE, changed)
    assert [line.partition(":")[0] for line in found] == ["model.rank", "seed"]
    assert "128" in found[0] and "3" in found[0]


# --- Flags.


def parse(*argv):
    return command_line.parse_experiment(list(argv), "Trains.")


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--config.optimizer.peak_learning_rate=3e-3", "--dry_run"],
        ["--config.optimizer.peak-learning-rate=3e-3", "--dry-run"],
        ["--config.optimizer.peak-learning_rate", "3e-3", "--dry-run"],
    ],
)
def test_dashes_and_underscores_are_alike_in_flags(config_file, words):
    config, workdir, flags = parse(f"--config={config_file}", "--workdir=a-b_c", *words)
    assert config.optimizer.peak_learning_rate == 3e-3
    assert flags.dry_run is True
    assert str(workdir) == "a-b_c"


def test_values_keep_their_dashes(config_file):
    config, _, _ = parse(
        "--config", str(config_file), "--config.data.source=my-text/*.txt"
    )
    assert config.data.source == "my-text/*.txt"


def test_the_default_workdir_names_file_and_variant(config_file, tmp_path):
    assert parse(f"--config={config_file}")[1].as_posix() == "runs/mine-small"
    assert parse(f"--config={config_file}:large")[1].as_posix() == "runs/mine-large"
    plain = tmp_path / "plain.py"
    plain.write_text(
        "from sct_jax import config\ndef get_config(): return config.ExperimentConfig()"
    )
    assert parse(f"--config={plain}")[1].as_posix() == "runs/plain"


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--confg=x", "--config"),
        ("--work-dir=x", "--workdir"),
        ("--dryrun", "--dry_run"),
        ("--dry_runs", "--dry_run"),
        ("--work=x", "--workdir"),
    ],
)
def test_an_unknown_flag_suggests_the_nearest(capsys, config_file, flag, nearest):
    message = refused(capsys, f"--config={config_file}", flag)
    assert f"did you mean {nearest!r}" in message


def test_words_without_a_flag_are_refused(capsys, config_file):
    assert "'tiny'" in refused(capsys, f"--config={config_file}", "tiny")


def test_flags_without_a_value_are_refused(capsys, config_file):
    assert "--config" in refused(capsys)
    assert "--config.seed" in refused(
        capsys, f"--config={config_file}", "--config.seed"
    )
    assert "dry_run" in refused(capsys, f"--config={config_file}", "--dry_run=yes")


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in ("num_steps", "model.ranks.q", "data.cache_dir", "mesh.tensor"):
        assert f"--config.{field}=" in text
    assert "--config.seed=0\n      of the parameters and of the data order.\n" in text
    fields = command_line.fields_of(config_lib.ExperimentConfig())
    assert not [name for name, _, meaning in fields if not meaning]


def test_a_failure_prints_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        command_line.fail("data.source: no text")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: data.source: no text\n"


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--config.rank.energy=0.9"], "rank.energy"),
        (["--config.optimizer.name=spectron"], "model.factors"),
        (["--config.model.factors=low_rank"], "model.factors"),
        (["--config.model.factors=lowrank"], "model.factors"),
        (["--config.optimizer.name=adamw"], "model.factors"),
    ],
    ids=str,
)
def test_rules_that_do_not_fit_the_factors_are_refused(
    capsys, config_file, flags, field
):
    assert field in refused(capsys, f"--config={config_file}", *flags)


def test_dense_matrices_go_with_every_rule():
    for name in ("sct", "adamw", "muon", "spectron"):
        config_lib.ExperimentConfig(
            model=model.ModelConfig(spectral=()),
            optimizer=optimizers.OptimizerConfig(name=name),
        ).validate()
