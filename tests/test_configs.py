"""Every file in configs/, with each of its variants."""

import dataclasses
import importlib
import inspect
import pathlib

import jax
import pytest

from configs.studies import compare_methods
from experiments.studies import grid, search
from sct_jax import sharding
from sct_jax.training import accounting, config, overrides
from sct_jax.training import state as state_lib

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "configs"
FILES = sorted(path for path in FOLDER.rglob("*.py") if path.stem != "__init__")
SMOLLM = FOLDER / "smollm_r128.py"


def module_of(path):
    return importlib.import_module(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
    )


def variants(path):
    return getattr(module_of(path), "VARIANTS", ())


def kind(path):
    """Returns the return annotation of `get_config`."""
    return inspect.signature(module_of(path).get_config).return_annotation


def specs(paths):
    return [
        spec
        for path in paths
        for spec in ([f"{path}:{name}" for name in variants(path)] or [str(path)])
    ]


SPECS = specs(path for path in FILES if kind(path) is config.ExperimentConfig)
STUDIES = specs(path for path in FILES if kind(path) is not config.ExperimentConfig)
each_spec = pytest.mark.parametrize(
    "spec", SPECS, ids=[pathlib.Path(spec).name for spec in SPECS]
)


def test_there_are_configs():
    assert f"{SMOLLM}:tiny" in SPECS
    assert f"{FOLDER / 'studies' / 'compare_methods.py'}:small" in STUDIES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_default_is_one_of_the_variants(path):
    module = module_of(path)
    if variants(path):
        defaults = inspect.signature(module.get_config).parameters["variant"].default
        assert defaults in variants(path)
        if kind(path) is config.ExperimentConfig:
            assert module.get_config() == module.get_config(variant=defaults)


@each_spec
def test_a_config_loads_and_its_state_can_be_sharded(spec):
    experiment = overrides.load(spec)  # validates
    assert experiment.unused_fields() == []
    # Layers are alike, and the shapes of two take less time to trace.
    shape = dataclasses.replace(experiment.model, num_layers=2)
    state = state_lib.abstract(shape, experiment.build_optimizer())
    leaves = jax.tree.leaves(state)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    for sizes in ({}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = sharding.MeshConfig(**sizes).build()
        assert len(jax.tree.leaves(sharding.shardings(state, mesh))) == len(leaves)
    assert config.from_dict(config.to_dict(experiment)) == experiment


@each_spec
def test_the_schedule_of_a_config_covers_the_run(spec):
    experiment = overrides.load(spec)
    rate = experiment.optimizer.learning_rate(experiment.num_steps)
    peak = experiment.optimizer.peak_learning_rate
    warmup = experiment.optimizer.warmup_steps
    assert warmup < experiment.num_steps
    steps = (0, warmup // 2, warmup, experiment.num_steps - 1)
    rates = [float(rate(step)) for step in steps]
    assert 0 < min(rates) <= max(rates) <= peak * (1 + 1e-6)
    assert rates[2] == pytest.approx(peak)


@pytest.mark.parametrize("spec", STUDIES, ids=lambda spec: pathlib.Path(spec).name)
def test_a_study_loads_and_has_distinct_trials(spec):
    study = overrides.load_as(kind(pathlib.Path(spec.partition(":")[0])), spec)
    if isinstance(study, grid.Comparison):
        seconds = {method.name: (1.0, 1.0) for method in study.methods}
        trials = search.missing(study, {}, seconds=seconds)
    else:
        trials = study.trials({})
    assert len({trial.identity for trial in trials}) == len(trials) > 0
    for trial in trials:
        trial.validate()


@pytest.mark.parametrize(
    ("variant", "field", "value"),
    [
        ("small", "model.rank", "32"),
        ("short", "model.rank", "64"),
        ("long", "model.rank", "16"),
        ("large", "model.rank", "96"),
        ("small", "model.rank", "64"),
        ("small", "data.seq_len", "512"),
    ],
)
def test_the_narrow_method_has_the_flops_of_the_low_rank_ones(variant, field, value):
    study = compare_methods.get_config(variant)
    base = overrides.override(study.base, field, value)
    study = dataclasses.replace(study, base=base)
    methods = {method.name: method for method in study.methods}
    (muon, narrow, ours) = (
        study.trial(methods[name], methods[name].learning_rates[0], 0)
        for name in ("dense Muon", "dense Muon (narrow)", "Stiefel Muon")
    )
    assert narrow.flops(1) == pytest.approx(ours.flops(1), rel=0.01)
    assert narrow.flops(1) < muon.flops(1)
    shape = narrow.experiment.model
    assert shape.spectral == () and shape.head_size % 2 == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_config_file_has_a_command_and_describes_its_variants(path):
    text = inspect.getdoc(module_of(path)) or ""
    # A study with its own program is the default of that program.
    file = path.relative_to(ROOT)
    commands = f"--config={file}", f"python -m experiments.studies.{path.stem}"
    assert any(command in text for command in commands)
    assert all(name in text for name in variants(path))


def test_smollm_r128_has_the_parameters_of_the_paper():
    shape = overrides.load(f"{SMOLLM}").model
    assert accounting.parameters(shape) == 597_797_888
    assert accounting.parameters(accounting.dense_config(shape)) == 1_711_376_384


# Parameters of HuggingFaceTB/SmolLM2-135M and -360M.
@pytest.mark.parametrize(
    ("variant", "dense"), [("135m", 134_515_008), ("360m", 361_821_120)]
)
def test_smaller_smollms_have_the_shapes_of_the_published_ones(variant, dense):
    shape = overrides.load(f"{SMOLLM}:{variant}").model
    assert accounting.parameters(accounting.dense_config(shape)) == dense
