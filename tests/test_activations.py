"""Counted activations against what the compiler allots.

Compared are the temporaries of the compiled step, whose state is donated, with one
gradient per parameter and `accounting.activation_bytes`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from sct_jax import data, model
from sct_jax.training import accounting, trainer
from sct_jax.training import config as config_lib

# Of SmolLM2-135M, with fewer layers.
SHAPE = model.ModelConfig(num_layers=6, rope_theta=100_000.0, remat="none")
LAYERS = {"dense": (), "mlp": model.MLP, "all": model.MATRICES[:-1]}


def relative_error(*, rows, seq_len, num_microbatches=1, spectral="mlp", **fields):
    experiment = config_lib.ExperimentConfig(
        num_steps=10,
        model=dataclasses.replace(SHAPE, spectral=LAYERS[spectral], **fields),
        data=data.DataConfig(
            batch_size=rows, seq_len=seq_len, num_microbatches=num_microbatches
        ),
    )
    run = trainer.Trainer(experiment, experiment.mesh.build(1))
    tokens = jax.ShapeDtypeStruct((rows, seq_len), jnp.int32)
    batch = dict.fromkeys(("inputs", "targets", "segment_ids"), tokens)
    lowered = run._jitted_step.lower(run.abstract_state, batch, jnp.array(True))
    allotted = lowered.compile().memory_analysis()
    activations = accounting.activation_bytes(
        experiment.model,
        run.tx,
        rows=rows,
        seq_len=seq_len,
        num_microbatches=num_microbatches,
    )
    gradients = accounting.num_bytes(run.abstract_state.params)
    own = allotted.output_size_in_bytes - allotted.alias_size_in_bytes
    return (activations + gradients) / (allotted.temp_size_in_bytes + own) - 1


QUICK = [
    {"rows": 4, "seq_len": 512, "num_layers": 3, "attention": "xla"},
    {"rows": 4, "seq_len": 512, "attention": "chunked", "remat": "full"},
    {"rows": 8, "seq_len": 512, "num_microbatches": 2, "remat": "dots"},
    {"rows": 4, "seq_len": 512, "compute_dtype": "bfloat16", "spectral": "dense"},
]
ALL = [
    {
        "rows": rows,
        "seq_len": seq_len,
        "remat": remat,
        "attention": attention,
        "spectral": spectral,
        "compute_dtype": dtype,
    }
    for rows, seq_len, spectral, dtype in (
        (4, 512, "mlp", "float32"),
        (4, 512, "mlp", "bfloat16"),
        (4, 512, "dense", "float32"),
        (4, 512, "all", "float32"),
        (8, 1024, "mlp", "float32"),
    )
    for remat in model.REMAT
    for attention in ("xla", "chunked")
]
APART = [
    {"rows": 4, "seq_len": 512, "scan_layers": False, "attention": attention} | more
    for attention in ("xla", "chunked")
    for more in ({}, {"remat": "full"}, {"spectral": "dense"})
] + [{"rows": 4, "seq_len": 512, "scan_layers": False, "compute_dtype": "bfloat16"}]


@pytest.mark.parametrize("variant", QUICK, ids=str)
def test_the_compiler_allots_what_is_counted(variant):
    assert abs(relative_error(**variant)) <= 0.15


def more_than_counted(variant):
    """Whether XLA on CPU allots 16 to 26 % more than is counted.

    It copies scores of 8 x 1,024 tokens to other layouts, and keeps what separate
    layers could compute again.
    """
    if not variant.get("scan_layers", True):
        return variant.get("attention") == "chunked"
    large = variant["seq_len"] == 1024
    return large and variant["attention"] == "xla" and variant["remat"] != "none"


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*ALL, *APART], ids=str)
def test_the_compiler_allots_what_is_counted_everywhere(variant):
    error = relative_error(**variant)
    if more_than_counted(variant):
        assert -0.27 <= error <= -0.15
    else:
        assert abs(error) <= 0.15


def test_separate_layers_cost_the_same_each():
    def counted(num_layers):
        config = dataclasses.replace(
            SHAPE, num_layers=num_layers, scan_layers=False, vocab_size=1000
        )
        tx = config_lib.ExperimentConfig().build_optimizer()
        return accounting.activation_bytes(config, tx, rows=4, seq_len=256)

    two, three, four = map(counted, (2, 3, 4))
    assert four - two == pytest.approx(2 * (four - three), rel=0.1)
