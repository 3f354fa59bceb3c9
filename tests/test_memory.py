import dataclasses

import jax
import pytest
import samples

from sct_jax import data, errors, model, sharding
from sct_jax.training import config as config_lib
from sct_jax.training import hardware, memory, optimizer_config, trainer

BASE = config_lib.ExperimentConfig(
    num_steps=10,
    model=dataclasses.replace(samples.SMALL, num_layers=8, attention="chunked"),
    data=data.DataConfig(batch_size=16, seq_len=128),
)


def vary(config=BASE, *, rows=None, **fields):
    shape = dataclasses.replace(config.model, **fields)
    config = dataclasses.replace(config, model=shape)
    if rows:
        batch = dataclasses.replace(config.data, batch_size=rows)
        config = dataclasses.replace(config, data=batch)
    return config


def needed(config):
    config = vary(config, remat="none") if config.model.remat == "auto" else config
    run = trainer.Trainer(config, config.mesh.build(1))
    return sum(run.plan().needed.values())


def plan_with(monkeypatch, config, available):
    monkeypatch.setattr(hardware, "memory_bytes", lambda devices: available)
    run = trainer.Trainer(config, config.mesh.build(1))
    return run, run.plan()


NEEDS = {
    remat: needed(vary(remat=remat, num_layers=8)) for remat in ("none", "dots", "full")
}


def test_recomputation_needs_less():
    assert NEEDS["full"] < NEEDS["dots"] < NEEDS["none"]


@pytest.mark.parametrize(
    ("available", "remat"),
    [
        (1.2 * NEEDS["none"], "dots"),
        (1.2 * NEEDS["dots"], "dots"),
        (1.2 * NEEDS["full"], "full"),
        (1.0, "full"),
        (None, "dots"),
    ],
)
def test_auto_recomputes_as_little_as_fits(monkeypatch, available, remat):
    assert BASE.model.remat == "auto"
    run, plan = plan_with(monkeypatch, BASE, available and int(available))
    assert plan.config.model.remat == remat
    assert run.config == BASE  # which config.json receives
    text = plan.choices["rematerialisation"]
    assert text.startswith(f"{remat} (auto: ")
    assert (memory.human(NEEDS[remat]) in text) == (available is not None)
    assert ("unknown" in text) == (available is None)
    assert sum(plan.needed.values()) == NEEDS[remat]


def test_only_a_cpu_recomputes_for_speed():
    assert memory._policies("cpu") == ("dots", "full")
    assert memory._policies("gpu") == memory._policies("tpu") == model.REMAT


def test_an_explicit_choice_is_kept(monkeypatch):
    _, plan = plan_with(monkeypatch, vary(remat="dots"), 1 << 50)
    assert plan.choices["rematerialisation"] == "dots"


def test_separate_layers_on_cpu_gain_nothing_from_recomputation(monkeypatch):
    _, plan = plan_with(monkeypatch, vary(scan_layers=False), 1)
    assert plan.config.model.remat == "none"
    assert "separate" in plan.choices["rematerialisation"]


def test_the_choice_reaches_the_compiled_step(monkeypatch):
    def traced(available):
        run, _ = plan_with(monkeypatch, BASE, available)
        shape = (BASE.data.batch_size, BASE.data.seq_len)
        batch = dict.fromkeys(
            ("inputs", "targets", "segment_ids"),
            jax.ShapeDtypeStruct(shape, "int32"),
        )
        step = run._jitted_step
        return str(step.trace(run.abstract_state, batch, True).jaxpr)

    # "dots" is a policy of `jax.checkpoint`; "full" is a loop of its own.
    assert "prevent_cse" in traced(1 << 50)
    assert "prevent_cse" not in traced(1)


def test_bytes_have_a_total_and_each_kind_once(monkeypatch):
    _, plan = plan_with(monkeypatch, BASE, 1 << 50)
    kinds = dict(plan.sizes)
    assert kinds.pop("total") == sum(kinds.values()) == sum(plan.needed.values())
    assert set(kinds) == {"parameters", "gradients", "optimizer", "activations"}


def test_rows_on_several_devices_add_up(monkeypatch):
    monkeypatch.setattr(hardware, "memory_bytes", lambda devices: None)
    config = vary(remat="none")
    one = trainer.Trainer(config, config.mesh.build(1)).plan()
    mesh = dataclasses.replace(config.mesh, data=4).build(4)
    four = trainer.Trainer(config, mesh).plan()
    quarter = trainer.Trainer(vary(config, rows=4), config.mesh.build(1)).plan()
    assert four.needed == quarter.needed
    assert four.sizes["activations"] == 4 * four.needed["activations"]
    assert four.sizes["parameters"] == one.sizes["parameters"]


def test_all_rows_count_where_tensor_divides_activations(monkeypatch):
    monkeypatch.setattr(hardware, "memory_bytes", lambda devices: None)
    one = trainer.Trainer(BASE, BASE.mesh.build(1)).plan()
    mesh = dataclasses.replace(BASE.mesh, data=1, tensor=2).build(2)
    two = trainer.Trainer(BASE, mesh).plan()
    assert two.sizes["activations"] == pytest.approx(one.sizes["activations"], rel=1e-3)


@pytest.mark.parametrize("spectral", [(), model.BLOCK_MATRICES], ids=["dense", "all"])
def test_the_need_of_a_mesh_that_divides_parameters_is_the_compilers(
    monkeypatch, spectral
):
    """To 15 %: what is gathered on each device counts too."""
    monkeypatch.setattr(hardware, "memory_bytes", lambda devices: None)
    config = config_lib.ExperimentConfig(
        num_steps=10,
        model=model.ModelConfig(
            d_model=128,
            d_ff=352,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            vocab_size=4096,
            rank=32,
            spectral=spectral,
            remat="full",
        ),
        data=data.DataConfig(batch_size=8, seq_len=32),
        optimizer=(
            optimizer_config.Sct(retraction="none")
            if spectral
            else optimizer_config.AdamW()
        ),
    )
    mesh = sharding.MeshConfig(data=1, fsdp=8).build(8)
    run = trainer.Trainer(config, mesh)
    run.compile(run.abstract_state)
    compiled = run.compiled_memory(run.abstract_state)
    needed = sum(run.plan().needed.values())
    assert needed == pytest.approx(compiled["total_bytes"], rel=0.15)


def check(monkeypatch, config, available):
    run, plan = plan_with(monkeypatch, config, int(available))
    return memory.check(plan, run.mesh, run.abstract_state)


def test_a_run_that_fits_passes_in_silence(monkeypatch):
    config = vary(remat="none")
    assert check(monkeypatch, config, 1.16 * NEEDS["none"]) is None


@pytest.mark.parametrize("factor", [1.14, 1.0, 0.88])
def test_a_run_that_may_not_fit_gets_a_note(monkeypatch, factor):
    note = check(monkeypatch, vary(remat="none"), factor * NEEDS["none"])
    assert note and memory.human(NEEDS["none"]) in note


@pytest.mark.parametrize(
    ("fields", "named", "not_named"),
    [
        ({"remat": "none"}, ["model.remat=dots", "model.remat=full"], ["attention"]),
        ({"remat": "full"}, ["data.num_microbatches=2"], ["model.remat"]),
        ({"remat": "full", "rows": 1}, ["seq_len"], ["microbatches", "batch_size"]),
        ({"remat": "none", "scan_layers": False}, ["batch_size=8"], ["model.remat"]),
    ],
    ids=str,
)
def test_a_run_that_cannot_fit_is_refused(monkeypatch, fields, named, not_named):
    config = vary(**fields)
    need = needed(config)
    with pytest.raises(errors.UserError, match=r"^model: ") as caught:
        check(monkeypatch, config, 0.86 * need)
    text = str(caught.value)
    assert memory.human(need) in text and memory.human(int(0.86 * need)) in text
    assert all(field in text for field in named)
    assert not any(field in text for field in not_named)


def test_a_state_larger_than_the_memory_is_refused_whatever_the_tolerance(monkeypatch):
    config = vary(remat="full", rows=1)
    run, plan = plan_with(monkeypatch, config, 1 << 50)
    state = plan.needed["parameters"] + plan.needed["optimizer"]
    plan = plan._replace(needed=plan.needed | {"gradients": 0, "activations": 0})
    checked = lambda available: memory.check(
        plan._replace(available=available), run.mesh, run.abstract_state
    )
    assert "may run out" in (checked(state) or "")
    with pytest.raises(errors.UserError, match=r"^model: "):
        checked(state - 1)


def test_chunked_attention_is_named_where_it_helps(monkeypatch):
    config = vary(attention="xla", remat="none")
    long = dataclasses.replace(config.data, seq_len=1024, batch_size=1)
    config = dataclasses.replace(config, data=long)
    with pytest.raises(errors.UserError, match=r"model\.attention=chunked"):
        check(monkeypatch, config, 0.5 * needed(config))


def test_the_layerwise_step_has_its_own_figures(monkeypatch):
    config = dataclasses.replace(vary(scan_layers=False), step="layerwise")
    _, plan = plan_with(monkeypatch, config, 1 << 50)
    assert plan.config.model.remat == "none"
    assert plan.sizes["streams"] > 0
    kinds = dict(plan.sizes)
    assert kinds.pop("total") == sum(kinds.values()) == sum(plan.needed.values())
    assert plan.sizes["gradients"] < plan.sizes["parameters"]


def test_model_functions_take_auto_for_none():
    assert model.ModelConfig().remat == "auto"
    model.ModelConfig().validate()
