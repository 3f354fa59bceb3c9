"""Kernels of accelerators: interpreted on CPU, lowered for devices not at hand."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_attention
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from samples import SHAPE

from sct_jax import attention, attention_kernels, data, errors, model, sharding
from sct_jax.training import config as config_lib
from sct_jax.training import optimizer_config, trainer
from sct_jax.training import state as state_lib
from sct_jax.training import step as step_lib

# JAX 0.12 says that its Triton backend will go.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend")

PALLAS = ("triton", "splash")
CALLS = {
    "cudnn": ("cuda", r"__cudnn\$fmha\w+", 2),
    "triton": ("cuda", r"__gpu\$xla\.gpu\.triton", 3),
    "splash": ("tpu", r"tpu_custom_call", 3),
}


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(attention_kernels, "_INTERPRET", True)


@pytest.fixture
def cudnn_found(monkeypatch):
    """JAX asks the installed plugin for the version of cuDNN, and there is none."""
    from jax._src.cudnn import fused_attention_stablehlo

    class Versions:
        cudnn_get_version = staticmethod(lambda: 91000)

    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", Versions)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("implementation", PALLAS)
@pytest.mark.parametrize("documents", test_attention.DOCUMENTS)
@pytest.mark.parametrize(("length", "heads"), [(128, (4, 2)), (384, (2, 2))])
def test_matches_float64_forward_and_backward(length, heads, documents, implementation):
    operands = test_attention.example(length, heads=heads, size=16)
    ids = test_attention.segments(length, documents)
    wanted, pull_back = test_attention.exact(*operands, ids)
    attend = functools.partial(
        attention.attend, segment_ids=ids, implementation=implementation
    )
    found, vjp = jax.vjp(jax.jit(attend), *operands)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    d_out = jnp.asarray(np.random.default_rng(1).normal(size=found.shape), jnp.float32)
    for got, expected in zip(vjp(d_out), pull_back(d_out), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("implementation", PALLAS)
def test_bfloat16_stays_bfloat16(implementation):
    operands = test_attention.example(128, size=32, dtype=jnp.bfloat16)
    attend = functools.partial(attention.attend, implementation=implementation)
    found, vjp = jax.vjp(attend, *operands)
    wanted, pull_back = test_attention.exact(*operands, None)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=0.03)
    d_out = jnp.ones(found.shape, jnp.bfloat16)
    for got, expected in zip(vjp(d_out), pull_back(np.ones(found.shape)), strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=0.1)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("mode", ["auto", "explicit"])
@pytest.mark.parametrize("implementation", PALLAS)
def test_eight_devices_compute_their_own_rows_and_heads(implementation, mode):
    operands = test_attention.example(128, heads=(4, 2), size=16, batch=4)
    ids = test_attention.segments(128, "some", batch=4)
    wanted, pull_back = test_attention.exact(*operands, ids)
    kind = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[mode]
    mesh = jax.make_mesh((2, 2, 2), sharding.AXES, axis_types=(kind,) * 3)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    # Explicit axes: not how the kernel divides them, to see that it asks for that.
    operands = [place(x, ("data", "fsdp")) for x in operands]
    ids = place(ids, "data")

    def loss(q, k, v):
        out = attention.attend(q, k, v, segment_ids=ids, implementation=implementation)
        return jnp.sum(out), out

    gradient = attention_kernels.on_mesh(
        jax.grad(loss, argnums=(0, 1, 2), has_aux=True), mesh
    )
    compiled = jax.jit(gradient).lower(*operands).compile()
    found, out = compiled(*operands)
    assert out.sharding.shard_shape(out.shape) == (1, 128, 2, 16)
    np.testing.assert_allclose(out, wanted, atol=2e-6)
    for got, expected in zip(found, pull_back(np.ones(out.shape)), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


# --- Lowered without a device.

LENGTH = 1024
MODEL = model.ModelConfig(
    d_model=256,
    d_ff=160,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=20_011,
    rank=8,
    compute_dtype="bfloat16",
)


def on_a_gpu(platform):
    """JAX 0.12 lowers Triton for a named GPU; earlier versions need no name."""
    if platform != "cuda":
        return lambda function: function
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"
    )
    mesh = jax.sharding.AbstractMesh(
        (1,), ("data",), (AxisType.Auto,), abstract_device=device
    )
    return functools.partial(attention_kernels.on_mesh, mesh=mesh)


def lowered(implementation):
    """The text of a whole training step."""
    platform = CALLS[implementation][0]
    config = dataclasses.replace(MODEL, attention=implementation)
    tx = optimizer_config.Sct(grad_clip=1.0).build(10)
    step = step_lib.make_train_step(config, tx)
    ids = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
    batch = {"inputs": ids, "targets": ids, "segment_ids": ids}
    if implementation == "cudnn":
        del batch["segment_ids"]
    state = state_lib.abstract(config, tx)
    wanted = jax.ShapeDtypeStruct((), jnp.bool_)
    place = on_a_gpu(platform)
    trace = lambda: jax.jit(step).trace(state, batch, wanted)
    return place(lambda: trace().lower(lowering_platforms=(platform,)).as_text())()


def shapes(text):
    """The shapes of all arrays of a lowered module."""
    found = re.findall(r"tensor<((?:\d+x)+)[a-z]", text)
    return {tuple(map(int, shape.rstrip("x").split("x"))) for shape in found}


@pytest.mark.usefixtures("cudnn_found")
@pytest.mark.parametrize("implementation", CALLS)
def test_a_step_is_lowered_to_the_kernel_and_no_array_has_two_lengths(implementation):
    text = lowered(implementation)
    _, call, count = CALLS[implementation]
    assert len(re.findall(rf"custom_call @{call}", text)) == count
    found = shapes(text)
    assert (2, LENGTH, 4, 64) in found
    assert not {shape for shape in found if shape.count(LENGTH) > 1}
    logits = 2 * LENGTH * MODEL.vocab_size
    assert max(math.prod(shape) for shape in found) < logits


def test_the_search_for_shapes_finds_scores():
    ids = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
    config = dataclasses.replace(MODEL, attention="xla")
    params = jax.eval_shape(lambda key: model.init(key, config), jax.random.key(0))
    forward = jax.jit(lambda params, ids: model.forward(params, ids, config))
    text = forward.trace(params, ids).lower(lowering_platforms=("tpu",)).as_text()
    found = shapes(text)
    assert {shape for shape in found if shape.count(LENGTH) > 1}
    assert (2, LENGTH, MODEL.vocab_size) in found


# --- Which one serves.

WORK = attention_kernels.Workload(
    platform="cpu",
    head_dim=64,
    num_heads=32,
    num_kv_heads=8,
    seq_len=2048,
    dtype="bfloat16",
)
work_of = functools.partial(dataclasses.replace, WORK)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("chunked", "auto: CPU")),
        ({"seq_len": 64}, ("chunked", "auto: CPU")),
        (
            {"platform": "tpu", "seq_len": 256},
            ("xla", "auto: one block of 256 tokens"),
        ),
        ({"platform": "tpu"}, ("splash", "auto: TPU, bfloat16, documents")),
        (
            {"platform": "cuda"},
            (
                "chunked",
                "auto: NVIDIA GPU, cudnn does not keep documents apart "
                "(data.cross_document_attention = false) without an L x L mask",
            ),
        ),
        (
            {"platform": "cuda", "documents": False},
            ("cudnn", "auto: NVIDIA GPU, bfloat16"),
        ),
        (
            {"platform": "cuda", "documents": False, "dtype": "float32"},
            (
                "chunked",
                "auto: NVIDIA GPU, cudnn needs model.compute_dtype = 'bfloat16', not "
                "'float32'",
            ),
        ),
        (
            {"platform": "cuda", "documents": False, "compute_capability": "7.5"},
            (
                "chunked",
                "auto: NVIDIA GPU, cudnn needs compute capability 8.0, not 7.5",
            ),
        ),
        ({"platform": "rocm"}, ("chunked", "auto: AMD GPU, 2,048 > 256 tokens")),
        (
            {"platform": "tpu", "seq_len": 2000},
            (
                "chunked",
                "auto: TPU, splash needs data.seq_len to be a multiple of 128, not "
                "2000",
            ),
        ),
        (
            {"platform": "tpu", "tensor": 16},
            (
                "chunked",
                "auto: TPU, splash needs heads that mesh.tensor = 16 divides, not 32 "
                "and 8",
            ),
        ),
    ],
)
def test_auto_takes_what_serves_and_says_why(changes, expected):
    assert attention.select("auto", work_of(**changes)) == expected


@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
def test_what_serves_everywhere_is_taken_as_configured(implementation):
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        found = attention.select(implementation, work_of(platform=platform))
        assert found == (implementation, "as configured")


@pytest.mark.parametrize(
    ("implementation", "changes", "message"),
    [
        ("splash", {}, "'splash' needs a TPU, not 'cpu'; set it to 'auto', which "),
        ("triton", {"platform": "tpu"}, "needs an NVIDIA GPU, not 'tpu'.*'splash'"),
        ("cudnn", {"platform": "cuda"}, "cross_document_attention = false.*'chunked'"),
        (
            "cudnn",
            {"platform": "cuda", "documents": False, "dtype": "float32"},
            "model.compute_dtype = 'bfloat16', not 'float32'",
        ),
        (
            "cudnn",
            {
                "platform": "cuda",
                "documents": False,
                "head_dim": 192,
                "compute_capability": "8.0",
            },
            "head_dim of at most 128 that 8 divides, not 192",
        ),
        ("triton", {"platform": "cuda", "head_dim": 512}, "head_dim of 16 to 256"),
        ("triton", {"platform": "cuda", "seq_len": 1000}, "multiple of 128, not 1000"),
        ("splash", {"platform": "tpu", "head_dim": 20}, "head_dim that 8 divides"),
        ("splsh", {"platform": "tpu"}, "did you mean 'splash'"),
    ],
)
def test_what_cannot_serve_is_refused(implementation, changes, message):
    with pytest.raises(errors.UserError, match=rf"model\.attention: .*{message}"):
        attention.select(implementation, work_of(**changes))


@pytest.mark.parametrize(("name", "platform"), [("triton", "cuda"), ("splash", "tpu")])
def test_a_jax_without_a_kernel_is_named(monkeypatch, name, platform):
    monkeypatch.setattr(attention_kernels, "_module", lambda _: None)
    work = work_of(platform=platform)
    with pytest.raises(errors.UserError, match=r"which JAX .* does not have"):
        attention.select(name, work)
    assert attention.select("auto", work)[0] == "chunked"


def test_cudnn_never_sees_documents():
    operands = test_attention.example(8)
    with pytest.raises(ValueError, match="does not take segment_ids"):
        attention.attend(
            *operands,
            segment_ids=test_attention.segments(8, "some"),
            implementation="cudnn",
        )


# --- In a trainer.

RUN = config_lib.ExperimentConfig(
    model=dataclasses.replace(SHAPE, attention="splash"),
    data=data.DataConfig(batch_size=4, seq_len=128),
    optimizer=optimizer_config.Sct(peak_learning_rate=0.01),
)


def batch(config):
    rng = np.random.default_rng(0)
    shape = (config.data.batch_size, config.data.seq_len)
    ids = rng.integers(config.model.vocab_size, size=(2, *shape), dtype=np.int32)
    documents = np.sort(rng.integers(4, size=shape, dtype=np.int32), axis=1)
    return {"inputs": ids[0], "targets": ids[1], "segment_ids": documents}


def one_step(config, mesh):
    run = trainer.Trainer(config, mesh)
    state = run.init(jax.random.key(0))
    held_out = run._eval_step(state.params, run.place(batch(config)))
    _, metrics = run.step(state, batch(config), diagnose=False)
    return run, float(held_out), float(metrics["loss"]), float(metrics["grad_norm"])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("step", "axes", "micro_batches"),
    [
        ("fused", {"fsdp": 2}, 1),
        ("layerwise", {"fsdp": 2}, 1),
        ("fused", {"data": 2}, 2),
    ],
)
def test_a_sharded_trainer_uses_the_kernel_in_steps_and_evaluation(
    step, axes, micro_batches
):
    config = dataclasses.replace(
        RUN,
        step=step,
        model=dataclasses.replace(RUN.model, scan_layers=step == "fused"),
        data=dataclasses.replace(RUN.data, num_microbatches=micro_batches),
        mesh=sharding.MeshConfig(**axes, tensor=2),
    )
    plain = dataclasses.replace(
        config, model=dataclasses.replace(config.model, attention="xla")
    )
    run, *found = one_step(config, config.mesh.build(4))
    assert run.choices == {"attention": "splash (as configured)"}
    assert (run.model.attention, run.config) == ("splash", config)
    _, *expected = one_step(plain, sharding.MeshConfig().build(1))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_trainer_refuses_what_its_devices_cannot_run():
    with pytest.raises(errors.UserError, match=r"model\.attention: 'splash' needs a"):
        trainer.Trainer(RUN, sharding.MeshConfig().build(1))


def test_a_trainer_says_what_stands_for_auto():
    config = dataclasses.replace(
        RUN, model=dataclasses.replace(SHAPE, attention="auto")
    )
    run = trainer.Trainer(config, sharding.MeshConfig().build(1))
    assert run.choices == {"attention": "chunked (auto: CPU)"}
    assert run.config.model.attention == "auto"


def test_batches_for_cudnn_have_no_documents(monkeypatch):
    monkeypatch.setattr(attention_kernels, "obstacle", lambda *_: None)
    config = dataclasses.replace(
        RUN, model=dataclasses.replace(SHAPE, attention="cudnn", remat="dots")
    )
    run = trainer.Trainer(config, sharding.MeshConfig().build(1))
    assert set(run.abstract_batch()) == {"inputs", "targets"}
    assert set(run.place(batch(config))) == {"inputs", "targets"}
