import dataclasses
import warnings

import pytest

from sct_jax import errors
from sct_jax.training import config as config_lib
from sct_jax.training import optimizer_config, overrides

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
    changed = overrides.override(BASE, field, text)
    assert get(changed, field) == value
    assert type(get(changed, field)) is type(value)
    # Nothing else changes, nor does the configuration that it started from.
    default = get(BASE, field)
    assert overrides.override(changed, field, text) == changed
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
        overrides.override(BASE, field, text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    "pairs",
    [
        [("optimizer.name", "stiefel_muon"), ("optimizer.momentum", "0.8")],
        [("optimizer.momentum", "0.8"), ("optimizer.name", "stiefel_muon")],
    ],
)
def test_a_chain_is_chosen_by_name_in_any_order(pairs):
    start = overrides.override(BASE, "optimizer.schedule", "wsd")
    assert overrides.apply(start, pairs).optimizer == optimizer_config.StiefelMuon(
        schedule="wsd", momentum=0.8
    )


def test_a_field_that_the_chain_lacks_is_refused_unless_reset():
    muon = overrides.override(BASE, "optimizer.name", "muon")
    with pytest.raises(errors.UserError, match=r"^optimizer\.retraction: 'qr' "):
        overrides.override(muon, "optimizer.retraction", "qr")
    clipped = overrides.override(BASE, "optimizer.max_update_norm", "0.5")
    to_muon = [("optimizer.name", "muon")]
    with pytest.raises(errors.UserError, match=r"^optimizer\.max_update_norm: 0\.5 "):
        overrides.apply(clipped, to_muon)
    reset = [*to_muon, ("optimizer.max_update_norm", "none")]
    assert overrides.apply(clipped, reset) == muon
    # The default of the chain, which differs among them.
    unset = overrides.apply(
        BASE, [("optimizer.b2", "0.9"), ("optimizer.b2", "none"), *to_muon]
    )
    assert unset.optimizer.b2 == optimizer_config.Muon().b2 == 0.95


@pytest.mark.parametrize(
    ("field", "text", "now", "value"),
    [
        ("rank.energy", "0.9", "adaptive_rank.energy", 0.9),
        ("optimizer.dense_rate", "2", "optimizer.dense_lr_multiplier", 2.0),
        ("step", "whole", "step", "fused"),
        ("optimizer.retraction", "lossless", "optimizer.retraction", "svd"),
    ],
)
def test_an_earlier_name_works_with_a_note(field, text, now, value):
    with pytest.warns(FutureWarning, match=now):
        changed = overrides.override(BASE, field, text)
    assert get(changed, now) == value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A configuration that holds an experiment, like a comparison."""

    seeds: tuple[int, ...] = (0,)
    base: config_lib.ExperimentConfig = BASE


@pytest.mark.parametrize(
    ("field", "text", "now", "value"),
    [
        ("seeds", "1,2", "seeds", (1, 2)),
        ("base.model.rank", "8", "base.model.rank", 8),
        ("base.rank.energy", "0.9", "base.adaptive_rank.energy", 0.9),
        ("base.step", "whole", "base.step", "fused"),
        ("base.optimizer.retraction", "lossless", "base.optimizer.retraction", "svd"),
        ("base.optimizer.b2", "none", "base.optimizer.b2", 0.999),
    ],
)
def test_an_experiment_within_a_study_takes_the_same_overrides(field, text, now, value):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assert get(overrides.override(Study(), field, text), now) == value
    with pytest.raises(errors.UserError, match=r"^base\.num_steps: 'many'"):
        overrides.override(Study(), "base.num_steps", "many")


@pytest.mark.parametrize(
    ("field", "near"),
    [
        ("momentum", "optimizer.momentum"),
        ("gauge", "optimizer.coordinates"),
        ("energy", "adaptive_rank.energy"),
    ],
)
def test_suggestions_cover_every_chain_and_earlier_names(field, near):
    with pytest.raises(errors.UserError, match=f"did you mean '{near}'"):
        overrides.override(BASE, field, "1")


def test_a_tuple_that_is_none_is_refused():
    # "(5)" is the integer 5 to Python; a tuple of characters would be worse.
    with pytest.raises(errors.UserError, match=r"^model\.spectral: "):
        overrides.override(BASE, "model.spectral", "(5)")


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
        overrides.override(BASE, field, text).validate()


def test_aliases_are_of_fields():
    assert set(overrides.ALIASES.values()) <= set(
        config_lib.flatten(config_lib.to_dict(BASE))
    )


@pytest.mark.parametrize(
    ("field", "nearest"),
    [
        ("num_step", "num_steps"),
        ("nmu_steps", "num_steps"),
        ("optimiser.peak_learning_rate", "optimizer"),
        ("optimizer.peak_learning_rte", "optimizer.peak_learning_rate"),
        ("model.d_modle", "model.d_model"),
        ("model.ranks.gat", "model.ranks.gate"),
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
        overrides.override(BASE, field, "1")
    assert f"did you mean {nearest!r}" in str(caught.value)


@pytest.mark.parametrize("field", ["xyzzy", "num_steps.x", "model.", ".model", ""])
def test_an_unknown_field_is_named(field):
    with pytest.raises(errors.UserError, match="unknown config field"):
        overrides.override(BASE, field, "1")


@pytest.mark.parametrize("field", ["model", "optimizer", "model.ranks"])
def test_a_group_lists_its_fields(field):
    with pytest.raises(errors.UserError, match=f"^{field}: .* a group") as caught:
        overrides.override(BASE, field, "1")
    assert all(
        f.name in str(caught.value) for f in dataclasses.fields(get(BASE, field))
    )


# --- Files.


def test_an_error_in_a_file_is_told_with_its_line(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def get_config():\n    return STEPS\n")
    with pytest.raises(errors.UserError, match=r"bad\.py:2: NameError: .*'STEPS'"):
        overrides.load(str(path))


def test_load_takes_the_variant_and_the_overrides(config_file):
    assert overrides.load(str(config_file)).num_steps == 7
    loaded = overrides.load(f"{config_file}:large", [("seed", "3"), ("seed", "4")])
    assert (loaded.num_steps, loaded.seed) == (70, 4)


def test_load_validates_after_all_overrides(config_file):
    # rank 100 fits once d_model does, whatever comes first.
    pairs = [("model.rank", "1000"), ("model.d_model", "1152")]
    assert overrides.load(str(config_file), pairs).model.rank == 1000
    with pytest.raises(errors.UserError, match=r"^model\.rank: "):
        overrides.load(str(config_file), pairs[:1])


def test_an_unknown_variant_suggests_the_nearest(config_file):
    with pytest.raises(errors.UserError, match=r"variant.*'lrge'.*'large'"):
        overrides.load(f"{config_file}:lrge")


def test_an_unknown_file_suggests_the_nearest(config_file):
    wrong = config_file.with_name("mien.py")
    with pytest.raises(errors.UserError, match=r"--config: no file.*mine\.py"):
        overrides.load(str(wrong))


@pytest.mark.parametrize(
    "text",
    [
        "def get_config(:",
        "x = 1",
        "import no_such_module_of_anybody",
        "STEPS = STEP",
        "def get_config(): return {}['steps']",
        "def get_config(variant=''): return {'num_steps': 1}",
        "from sct_jax.training import config\n"
        "def get_config(): return config.ExperimentConfig(num_step=1)",
    ],
)
def test_a_file_that_gives_no_configuration_is_refused(tmp_path, text):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(errors.UserError, match=r"bad\.py"):
        overrides.load(str(path))


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [("data", {"seq_len": 4}, "seq_len"), ("optimizer", "sct", "b1")],
)
def test_a_group_of_another_type_is_refused_before_its_fields(
    tmp_path, name, value, field
):
    path = tmp_path / "mine.py"
    path.write_text(
        "from sct_jax.training import config\n"
        "def get_config():\n"
        "    made = config.ExperimentConfig()\n"
        # The classes of tests check types themselves.
        f"    object.__setattr__(made, {name!r}, {value!r})\n"
        "    return made\n"
    )
    for pairs in ([], [(f"{name}.{field}", "0")]):
        with pytest.raises(errors.UserError, match=rf"^{name}: .* is not a .*Config"):
            overrides.load(str(path), pairs)


@pytest.mark.parametrize(
    "name", ["a:b.py", "C:\\mine.py", "a:b/mine.py", ":.py", "x.py:y.py"]
)
def test_a_path_may_hold_colons(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(CONFIG_FILE)
    assert overrides.split_spec(str(path)) == (str(path), "")
    assert overrides.load(str(path)).num_steps == 7
    assert overrides.load(f"{path}:").num_steps == 7
    assert overrides.load(f"{path}:large").num_steps == 70
    assert overrides.default_workdir(f"{path}:large").endswith("-large")


def test_a_variant_of_a_file_that_is_not_there_is_no_part_of_its_name(tmp_path):
    with pytest.raises(errors.UserError, match=r"no file '[^']*mine\.py'"):
        overrides.load(f"{tmp_path}/mine.py:large")
    with pytest.raises(errors.UserError, match=r"no file '[^']*a:b'"):
        overrides.load(f"{tmp_path}/a:b")


def test_a_file_below_home_is_found(config_file, monkeypatch):
    monkeypatch.setenv("HOME", str(config_file.parent))
    assert overrides.load("~/mine.py:large").num_steps == 70
    with pytest.raises(errors.UserError, match="home"):
        overrides.load("~nobody-of-this-name/mine.py")


@pytest.mark.parametrize("name", ["x" * 5000, "nul\0.py", "\udcff.py", "/nowhere.py"])
def test_a_name_that_no_file_has_is_refused(name):
    with pytest.raises(errors.UserError, match=r"^--config: no file "):
        overrides.load(name)


@pytest.mark.parametrize("name", ["folder", "notes.txt"])
def test_what_is_no_python_file_is_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(errors.UserError, match="--config"):
        overrides.load(str(tmp_path / name))


# --- Flags.


def parse(*argv):
    flags, pairs = overrides.parse_command(list(argv), "Trains.")
    try:
        return *overrides.load_command(flags, pairs), flags
    except errors.UserError as error:
        overrides.fail(str(error))


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
        "from sct_jax.training import config\n"
        "def get_config(): return config.ExperimentConfig()"
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
    seed = (
        "--config.seed=0\n      random seed of the parameters and of the data order.\n"
    )
    assert seed in text
    fields = overrides.fields_of(config_lib.ExperimentConfig())
    assert not [name for name, _, meaning in fields if not meaning]


def test_a_failure_prints_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        overrides.fail("data.source: no text")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: data.source: no text\n"
