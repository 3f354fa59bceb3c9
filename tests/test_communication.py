"""The communication of a training step, on tiny models and eight CPU devices."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import pytest
import samples

from experiments import communication, step_figures
from sct_jax import data, sharding
from sct_jax.training import accounting, collectives, config, optimizer_config

CONFIG = "configs/smollm_r128.py:135m"
# No retraction and no clip: they take longest to compile.
FIELDS = {
    "model.d_model": 32,
    "model.d_ff": 64,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 4,
    "model.vocab_size": 64,
    "model.rank": 4,
    "model.remat": "dots",
    "optimizer.retraction": "none",
    "optimizer.max_update_norm": "none",
    "data.batch_size": 8,
    "data.seq_len": 16,
}
TINY = [f"--config.{name}={value}" for name, value in FIELDS.items()]
RATES = step_figures.Rates(
    flops=1e12, node_size=4, node_bandwidth=8e9, network_bandwidth=1e9
)


@pytest.fixture(autouse=True, scope="module")
def eight_devices():
    """The program does not choose the devices of a process in which JAX runs."""
    assert jax.device_count() == 8


def experiment(**changes):
    run = config.ExperimentConfig(
        model=dataclasses.replace(samples.SMALL, remat="dots"),
        data=data.DataConfig(batch_size=8, seq_len=16),
        optimizer=optimizer_config.Sct(peak_learning_rate=1e-3, retraction="none"),
    )
    return dataclasses.replace(run, **changes)


def compiled(run, **sizes):
    run, _ = communication.for_compilation(run, dict.fromkeys(sharding.AXES, 1) | sizes)
    return communication.compile_step(run, run.mesh.build(8))


@pytest.fixture(scope="module", params=step_figures.MODELS)
def replicated(request):
    """A step on eight replicas."""
    run = experiment()
    if request.param == "dense":
        run = experiment(model=accounting.dense_config(run.model))
    return compiled(run, data=8)


def test_replicas_exchange_one_gradient(replicated):
    gradients = 4 * accounting.parameters(replicated.experiment.model)
    assert {(c.kind, c.axes) for c in replicated.found} == {("all-reduce", ("data",))}
    total = collectives.total(replicated.most)
    # The loss is a few numbers more.
    assert gradients < total.payload_bytes <= gradients + 64
    assert total.wire_bytes == 2 * 7 / 8 * total.payload_bytes
    assert collectives.total(collectives.least(replicated.found)) == total


def test_memory_is_that_of_the_compiler(replicated):
    # Parameters and two moments, beside counters; and three rows of 16 tokens.
    state = 3 * 4 * accounting.parameters(replicated.experiment.model)
    batch = 3 * 4 * 16
    assert state + batch < replicated.memory["argument_bytes"] < state + batch + 256


def test_the_step_is_fused_scanned_and_always_applied():
    layerwise = experiment(
        step="layerwise",
        model=dataclasses.replace(samples.SMALL, scan_layers=False),
    )
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    run, notes = communication.for_compilation(layerwise, sizes)
    assert (run.step, run.model.scan_layers) == ("fused", True)
    assert not run.optimizer.guard.rejects
    assert run.mesh == sharding.MeshConfig(**sizes)
    assert notes == [
        'step="fused" here, not "layerwise"',
        "model.scan_layers=true here, not false",
        "optimizer.skip_nonfinite=null here, not 10",
    ]
    again, notes = communication.for_compilation(run, sizes)
    assert (again, notes) == (run, [])


@pytest.mark.parametrize(("available", "remat"), [(10**12, "none"), (1000, "full")])
def test_remat_is_what_fits_into_the_memory_given(available, remat):
    run = experiment(model=dataclasses.replace(samples.SMALL, remat="auto"))
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    run, _ = communication.for_compilation(run, sizes)
    by_model, notes = communication.runs(
        run, step_figures.MODELS, run.mesh.build(8), available=available
    )
    assert [run.model.remat for run in by_model.values()] == [remat, remat]
    assert by_model["dense"].model == dataclasses.replace(
        accounting.dense_config(run.model), remat=remat
    )
    assert [note.partition(" here")[0] for note in notes] == [
        f'{name}: model.remat="{remat}"' for name in step_figures.MODELS
    ]


# --- The model of seconds.


def test_seconds_are_bytes_over_the_slowest_link(replicated):
    sent = collectives.total(replicated.most).wire_bytes
    plan = step_figures.plan(replicated, RATES)
    assert (plan["node"], plan["network"]) == (0, sent / 1e9)
    flops = 8 * 16 * accounting.flops_per_token(replicated.experiment.model, seq_len=16)
    assert plan["compute"] == flops / 8 / 1e12
    assert plan["without_overlap"] == plan["compute"] + plan["network"]
    assert plan["with_full_overlap"] == max(plan["compute"], plan["network"])


@pytest.mark.parametrize(
    ("node_size", "axes", "in_node"),
    [
        (8, ("data",), True),
        (4, ("data",), False),
        (4, ("fsdp", "tensor"), True),
        (4, ("fsdp",), True),
        (4, ("data", "tensor"), False),
        (2, ("fsdp",), False),
        (2, ("tensor",), True),
        (3, ("tensor",), False),  # a ring of two would cross a border
    ],
)
def test_rings_within_a_node_are_fast(node_size, axes, in_node):
    mesh = sharding.MeshConfig(data=2, fsdp=2, tensor=2).build(8)
    rates = dataclasses.replace(RATES, node_size=node_size)
    assert rates.bandwidth(axes, mesh) == (8e9 if in_node else 1e9)


def test_bytes_are_divided_into_those_per_token_and_the_rest():
    mesh = sharding.MeshConfig(data=8, fsdp=1, tensor=1).build(8)

    def step(batch_size):
        moved = lambda name, size: collectives.Collective(
            name=name,
            kind="all-reduce",
            element_type="f32",
            operand_bytes=size,
            compiled_bytes=size,
            axes=("data",),
            group_size=8,
        )
        run = experiment(data=data.DataConfig(batch_size=batch_size, seq_len=16))
        return step_figures.Step(
            experiment=run,
            mesh=mesh,
            seconds=0.0,
            memory={},
            found=[moved("gradient", 800), moved("stream", 80 * batch_size)],
        )

    figures = step_figures.as_figures(step(8), step(16), RATES)
    assert figures["fixed_bytes"] == pytest.approx(1.75 * 800)
    # Each of the 8 devices sends 1.75 x 80 bytes per row of 16 tokens.
    assert figures["bytes_per_token"] == pytest.approx(8 * 1.75 * 80 / 16)


# --- The program.


def test_both_models_are_printed_and_written(tmp_path, capsys):
    path = tmp_path / "figures.json"
    flags = [
        f"--config={CONFIG}",
        *TINY,
        "--mesh=data:2,fsdp:2,tensor:2",
        f"--json={path}",
    ]
    assert communication.main(flags) == 0
    printed = capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    spectral, dense = (written["models"][name] for name in step_figures.MODELS)
    for model_figures in (spectral, dense):
        parts = model_figures["collectives"]
        total = model_figures["total"]
        for key in ("count", "payload_bytes", "wire_bytes"):
            assert total[key] == pytest.approx(sum(part[key] for part in parts))
        assert {axis for part in parts for axis in part["axes"]} == set(sharding.AXES)
        assert model_figures["bytes_per_token"] > 0
        assert f"{model_figures['parameters']:,}" in printed
    assert dense["parameters"] > spectral["parameters"]
    assert dense["memory"]["argument_bytes"] > spectral["memory"]["argument_bytes"]
    assert "spectral: compiled for 8 devices" in printed
    assert "all-reduce, fsdp" in printed
    assert "not measured" in printed


def test_a_mesh_of_one_device_moves_nothing(tmp_path):
    path = tmp_path / "figures.json"
    flags = [
        f"--config={CONFIG}",
        *TINY,
        "--mesh=data:1",
        "--models=spectral",
        "--once",
        f"--json={path}",
    ]
    assert communication.main(flags) == 0
    (figures,) = json.loads(path.read_text())["models"].values()
    assert figures["collectives"] == []
    assert "fixed_bytes" not in figures


REFUSED = {
    "unknown axis": (["--mesh=data:2,pipe:4"], "--mesh: unknown value 'pipe'"),
    "axis twice": (["--mesh=data:2,data:4"], "--mesh: axis 'data' is there twice"),
    "no size": (["--mesh=data"], "--mesh: 'data' is not an axis and its size"),
    "size 0": (["--mesh=data:0"], "--mesh: 'data:0' is not an axis and its size"),
    "product": (
        ["--mesh=data:2,fsdp:2", "--devices=8"],
        "--mesh: data 2 x fsdp 2 is 4 devices, but --devices is 8",
    ),
    "devices": (["--mesh=data:8", "--devices=0"], "--devices: 0 must be >= 1"),
    "too many": (["--mesh=data:8192"], "--mesh: 8192 devices are more than the 4096"),
    "weight": (
        ["--mesh=fsdp:3", "--config.data.batch_size=9"],
        "mesh.fsdp: axis 1 of params/embedding (64, 32) is not divisible by 3",
    ),
    "batch": (["--mesh=data:3"], "data.batch_size: 8 in 1 micro-batches"),
    "folder": (
        ["--mesh=data:2", "--json=missing/x.json"],
        "missing is not a folder",
    ),
    "a folder": (
        ["--mesh=data:2", "--json=."],
        "'.': it is not a regular file",
    ),
    "model": (["--mesh=data:2", "--models=sparse"], "--models: unknown value 'sparse'"),
    "rate": (["--mesh=data:2", "--flops=0"], "--flops: 0.0 must be above 0"),
    "not a number": (
        ["--mesh=data:2", "--node_bandwidth=nan"],
        "--node_bandwidth: nan",
    ),
    "node": (["--mesh=data:2", "--node_size=0"], "--node_size: 0 must be above 0"),
    "memory": (["--mesh=data:2", "--memory_gb=-1"], "--memory_gb: -1.0 must be above"),
    "mesh in the config": (
        ["--mesh=data:2", "--config.mesh.data=2"],
        "--config.mesh.data: the mesh is that of --mesh",
    ),
    "running": (["--mesh=data:16"], "--mesh: 16 devices, and JAX runs with 8"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_one_line_and_exit_code_2(case, capsys, monkeypatch, tmp_path):
    flags, message = case
    config_flag = f"--config={pathlib.Path(CONFIG).absolute()}"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        communication.main([config_flag, *TINY, *flags])
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_the_program_starts_as_many_devices_as_it_needs():
    """In a process of its own, whatever XLA_FLAGS asks for."""
    program = (
        "import jax; from experiments import communication; "
        "communication.start(12); print(jax.default_backend(), jax.device_count())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["cpu", "12"], done.stderr
