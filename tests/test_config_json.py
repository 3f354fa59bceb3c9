"""config.json of Hugging Face: what it becomes, what transformers makes of ours."""

import dataclasses
import json

import pytest

from sct_jax import errors, model
from sct_jax.interop import config_json

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "rms_norm_eps": 1e-5,
}
SHAPE = model.ModelConfig(
    d_model=32,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    vocab_size=64,
    spectral=(),
    tie_embeddings=False,
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def read(**changes):
    values = {k: v for k, v in {**LLAMA, **changes}.items() if v != "absent"}
    return config_json.from_config_json(values, "dir/config.json")


def refusal(**changes) -> str:
    with pytest.raises(errors.UserError) as caught:
        read(**changes)
    message = str(caught.value)
    assert message.startswith("dir/config.json: ")
    return message.removeprefix("dir/config.json: ")


def test_a_llama():
    assert read() == SHAPE


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_key_value_heads": 2}, {"num_kv_heads": 2}),
        ({"head_dim": 8}, {}),
        ({"head_dim": None}, {}),
        ({"head_dim": 16}, {"head_dim": 16}),
        ({"tie_word_embeddings": True}, {"tie_embeddings": True}),
        ({"rope_theta": 500000}, {"rope_theta": 500_000.0}),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_theta": 5e5},
        ),
        ({"rope_scaling": None, "rope_theta": 5e5}, {"rope_theta": 5e5}),
        (
            {"rope_scaling": {"type": "linear", "factor": 4}},
            {"rope_scaling": model.RopeScaling(kind="linear", factor=4.0)},
        ),
        (
            {"rope_scaling": LLAMA3, "max_position_embeddings": 128},
            {
                "rope_scaling": model.RopeScaling(
                    kind="llama3", factor=8.0, original_length=16
                )
            },
        ),
    ],
)
def test_a_key(changes, expected):
    assert read(**changes) == dataclasses.replace(SHAPE, **expected)


def test_the_original_length_is_the_longest_if_absent():
    """As in transformers, for which a key outside of the group comes first."""
    scaling = {k: v for k, v in LLAMA3.items() if not k.startswith("original")}
    length = lambda **more: read(rope_scaling=scaling, **more).rope_scaling
    assert length(max_position_embeddings=99).original_length == 99
    assert length(original_max_position_embeddings=7).original_length == 7
    assert length().original_length == 2048


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "architectures: ['MistralFor"),
        ({"architectures": "absent"}, "architectures: None"),
        ({"architectures": [3]}, "architectures: [3]"),
        ({"attention_bias": True}, "attention_bias: True"),
        ({"mlp_bias": True}, "mlp_bias: True"),
        ({"mlp_bias": 0}, "mlp_bias: 0"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"pretraining_tp": 2}, "pretraining_tp: 2"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: {'bits': 4}"),
        ({"num_local_experts": 8}, "num_local_experts: 8"),
        ({"auto_map": {"a": "b"}}, "auto_map: {'a': 'b'}"),
        ({"sliding_window": 4096}, "sliding_window: 4096"),
        ({"use_sliding_window": True}, "use_sliding_window: True"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types: ['sliding"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers: [1, 0]"),
        ({"rope_interleaved": True}, "rope_interleaved: True"),
        ({"logit_scale": 1.0}, "logit_scale: 1.0 is a key that is not known"),
        ({"hidden_size": "absent"}, "hidden_size: is missing"),
        ({"hidden_size": 32.0}, "hidden_size: 32.0"),
        ({"hidden_size": True}, "hidden_size: True"),
        ({"num_attention_heads": 5}, "model.num_heads: 5 must divide"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: 1"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps: 'x'"),
        ({"rope_theta": 0.5}, "model.rope_theta: 0.5"),
        *(
            (
                {"rope_scaling": {"rope_type": kind, "factor": 2.0}},
                f"rope_scaling: rope_type: {kind!r} is not computed",
            )
            for kind in ("yarn", "dynamic", "longrope")
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_parameters: partial_rotary_factor: 0.5",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope_parameters: full_attention",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e5}, "rope_theta": 1e4},
            "rope_theta: 10000.0 contradicts",
        ),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 1e5}},
            "rope_scaling: {",
        ),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}},
            "rope_scaling: rope_type: 'llama3' contradicts",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor: is missing"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_scaling: rope_type: ["),
        ({"rope_scaling": "linear"}, "rope_scaling: 'linear'"),
    ],
)
def test_what_is_refused(changes, said):
    assert refusal(**changes).startswith(said)


def test_layers_of_smollm3_without_rope_are_refused():
    smollm3 = {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}
    assert read(**smollm3).tie_embeddings
    assert read(**smollm3).rope_theta == 2e6
    said = refusal(**smollm3, num_hidden_layers=4)
    assert said.startswith("no_rope_layer_interval: 4")
    every = read(**smollm3, num_hidden_layers=4, no_rope_layers=[1] * 4)
    assert every.num_layers == 4


CONFIGS = {
    "plain": SHAPE,
    "tied": dataclasses.replace(SHAPE, tie_embeddings=True, num_kv_heads=2),
    "head_dim": dataclasses.replace(SHAPE, head_dim=12),
    "qwen3": dataclasses.replace(SHAPE, qk_norm=True, head_dim=16, norm_eps=1e-6),
    "linear": dataclasses.replace(
        SHAPE, rope_scaling=model.RopeScaling(kind="linear", factor=2.0)
    ),
    "llama3": dataclasses.replace(
        SHAPE,
        rope_theta=5e5,
        rope_scaling=model.RopeScaling(kind="llama3", factor=4.0, original_length=16),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_and_writes_ours(name, tmp_path):
    """Ours has the old spelling of rope, and theirs the new one."""
    transformers = pytest.importorskip("transformers")
    values = config_json.to_config_json(
        CONFIGS[name],
        max_length=128,
        dtype="bfloat16",
        bos_token_id=1,
        eos_token_id=2,
    )
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert [type(theirs).__name__] == [
        x.replace("ForCausalLM", "Config") for x in values["architectures"]
    ]
    assert str(theirs.dtype) == "torch.bfloat16"
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    theirs.save_pretrained(tmp_path)
    again = json.loads(file.read_text())
    assert "rope_theta" not in again and "rope_parameters" in again
    for written in (values, again):
        assert config_json.from_config_json(written, "x") == CONFIGS[name]
        assert config_json.max_length(written, "x") == 128


@pytest.mark.parametrize("family", config_json.FAMILIES)
def test_absent_keys_mean_what_transformers_takes_them_for(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, family.replace("ForCausalLM", "Config"))
    few = {k: v for k, v in LLAMA.items() if k not in ("model_type", "rms_norm_eps")}
    values = few | {"architectures": [family], "num_key_value_heads": 2}
    kind(**values).save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    found = config_json.from_config_json(values, "x")
    assert found == config_json.from_config_json(whole, "x")
    length = config_json.max_length(values, "x")
    assert length == config_json.max_length(whole, "x")


def test_a_shape_that_transformers_refuses_is_not_written():
    config = dataclasses.replace(SHAPE, d_model=30, head_dim=8)
    with pytest.raises(errors.UserError, match=r"^model.num_heads: 4 does not divide"):
        config_json.to_config_json(
            config, max_length=8, dtype="float32", bos_token_id=None, eos_token_id=None
        )
