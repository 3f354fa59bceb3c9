"""Every file in configs/, with each of its variants."""

import dataclasses
import importlib
import inspect
import pathlib

import jax
import pytest

from configs.studies import compare_methods
from experiments.studies import grid
from sct_jax import model, sharding
from sct_jax.training import accounting, config
from sct_jax.training import state as state_lib

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
FILES = sorted(path for path in FOLDER.glob("*.py") if path.stem != "__init__")


def variants(path):
    module = importlib.import_module(f"configs.{path.stem}")
    return getattr(module, "VARIANTS", ())


def kind(path):
    """What `get_config` says that it returns."""
    module = importlib.import_module(f"configs.{path.stem}")
    return inspect.signature(module.get_config).return_annotation


def specs(paths):
    return [
        spec
        for path in paths
        for spec in [str(path), *(f"{path}:{name}" for name in variants(path))]
    ]


SPECS = specs(path for path in FILES if kind(path) is config.ExperimentConfig)
STUDIES = specs(path for path in FILES if kind(path) is not config.ExperimentConfig)
each_spec = pytest.mark.parametrize(
    "spec", SPECS, ids=[pathlib.Path(spec).name for spec in SPECS]
)


def test_there_are_configs():
    assert f"{FOLDER / 'smollm_r128.py'}:tiny" in SPECS
    assert f"{FOLDER / 'compare_methods.py'}:small" in STUDIES


@each_spec
def test_a_config_loads_and_its_state_has_a_place(spec):
    experiment = config.load(spec)  # validates
    tx = experiment.optimizer.build(experiment.num_steps, decay_mask=model.decay_mask)
    state = state_lib.abstract(experiment.model, tx)
    # Shapes alone: the largest of these has billions of bytes.
    leaves = jax.tree.leaves(state)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    for sizes in ({}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = sharding.MeshConfig(**sizes).build()
        assert len(jax.tree.leaves(sharding.shardings(state, mesh))) == len(leaves)
    assert config.from_dict(config.to_dict(experiment)) == experiment


@each_spec
def test_a_config_trains_for_as_long_as_its_schedule(spec):
    experiment = config.load(spec)
    rate = experiment.optimizer.learning_rate(experiment.num_steps)
    peak = experiment.optimizer.peak_learning_rate
    steps = range(0, experiment.num_steps, max(experiment.num_steps // 200, 1))
    rates = [float(rate(step)) for step in steps]
    assert 0 < rates[0] <= max(rates) <= peak * (1 + 1e-6)
    assert max(rates) == pytest.approx(peak)
    assert experiment.optimizer.warmup_steps < experiment.num_steps


@pytest.mark.parametrize("spec", STUDIES, ids=lambda spec: pathlib.Path(spec).name)
def test_a_study_loads_with_trials_of_its_own(spec):
    study = config.load_as(kind(pathlib.Path(spec.partition(":")[0])), spec)
    trials = (
        grid.missing(study, {}, seconds={a.name: (1.0, 1.0) for a in study.arms})
        if isinstance(study, grid.Comparison)
        else study.trials()
    )
    assert len({trial.key for trial in trials}) == len(trials) > 0
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
def test_the_narrow_arm_has_the_flops_of_the_low_rank_ones(variant, field, value):
    study = compare_methods.get_config(variant)
    base = config.override(study.base, field, value)
    study = dataclasses.replace(study, base=base)
    (muon, narrow, ours) = (
        study.trial(arm, arm.rates[0], 0)
        for name in ("dense Muon", "dense Muon (narrow)", "Stiefel Muon")
        for arm in study.arms
        if arm.name == name
    )
    assert narrow.flops(1) == pytest.approx(ours.flops(1), rel=0.01)
    assert narrow.flops(1) < muon.flops(1)
    shape = narrow.experiment.model
    assert shape.spectral == () and shape.head_dim % 2 == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_config_file_says_what_it_is(path):
    module = importlib.import_module(f"configs.{path.stem}")
    text = inspect.getdoc(module) or ""
    # A study with a program of its own is that program's default.
    named = f"--config=configs/{path.name}", f"python -m experiments.{path.stem}"
    assert any(command in text for command in named)
    assert all(name in text for name in variants(path))


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [("1.7b", 597_797_888), ("", 597_797_888)],
)
def test_smollm_r128_has_the_parameters_of_the_paper(variant, parameters):
    spec = str(FOLDER / "smollm_r128.py") + (f":{variant}" if variant else "")
    shape = config.load(spec).model
    assert accounting.parameters(shape) == parameters
    assert accounting.parameters(accounting.dense_config(shape)) == 1_711_376_384


@pytest.mark.parametrize(
    ("variant", "dense"), [("135m", 134_515_008), ("360m", 361_821_120)]
)
def test_smaller_smollms_have_the_shapes_of_the_published_ones(variant, dense):
    # Parameters of HuggingFaceTB/SmolLM2-135M and -360M.
    shape = config.load(f"{FOLDER / 'smollm_r128.py'}:{variant}").model
    assert accounting.parameters(accounting.dense_config(shape)) == dense
