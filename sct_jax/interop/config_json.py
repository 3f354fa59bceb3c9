"""The config.json of Hugging Face's Llama family, and our `model.ModelConfig`.

Reading is strict: a key that is in no table here is refused, since it may change what
the model computes.
"""

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from sct_jax import errors, model

CONFIG = "config.json"
"""Name of the file."""


class _Family(NamedTuple):
    """What transformers takes for keys that a file leaves out."""

    qk_norm: bool = False
    head_dim: int | None = None
    rope_theta: float = 10_000.0
    tied: bool = False
    max_length: int = 2048
    no_rope_interval: int | None = None


FAMILIES = {
    "LlamaForCausalLM": _Family(),
    "Qwen3ForCausalLM": _Family(qk_norm=True, head_dim=128, max_length=32_768),
    "SmolLM3ForCausalLM": _Family(
        rope_theta=2_000_000.0, tied=True, max_length=32_768, no_rope_interval=4
    ),
}
"""Architectures that the model here computes."""

_SIZES = {
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "vocab_size": "vocab_size",
}

# Read by the functions below.
_READ = {
    *_SIZES,
    "architectures",
    "head_dim",
    "layer_types",
    "max_position_embeddings",
    "no_rope_layer_interval",
    "no_rope_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
}

# Features that the model here lacks, with the values that leave them out.
_ABSENT: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "auto_map": (None,),  # code of its own
    "hidden_act": ("silu", "swish"),  # two names of one function
    "is_decoder": (False, True),  # causal in both cases, as there is no encoder
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "partial_rotary_factor": (None, 1),
    "pretraining_tp": (None, 1),  # a product in parts rounds otherwise
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "rope_interleaved": (None, False),  # pairs (x_2i, x_2i+1)
}

# Keys that change no logit.
_HARMLESS = {
    # Where the file comes from, and who wrote it.
    "_name_or_path",
    "model_type",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    # Marks of converters: of a browser's weights, and of a Llama saved as another.
    "is_llama_config",
    "transformers.js_config",
    # The tensors say their own dtypes.
    "dtype",
    "torch_dtype",
    # Of generation and of batches: which ids end or pad a text, whether keys and values
    # are kept. Our document mark comes from tokenizer.json.
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    # Of training alone: how weights were drawn, and how attention was dropped.
    "attention_dropout",
    "initializer_range",
    # From which layer on a sliding window is in use; with one, the file is refused.
    "max_window_layers",
    # Which implementation computes the same attention.
    "_attn_implementation",
    "_attn_implementation_autoset",
    "attn_implementation",
}

# Keys of a rope type, beside those of its base and its name.
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


def from_config_json(values: Mapping[str, Any], where: str) -> model.ModelConfig:
    """Returns the dense model that a config.json describes.

    Args:
      values: content of the file.
      where: name of the file, for messages.

    Raises:
      UserError: naming the key and its value, for a model that is not computed here,
        for a key that is not known, and for a value that does not fit.
    """
    file = _File(values, where)
    family = _family(file)
    _check_keys(file)
    _check_layers(file, family)
    sizes: dict[str, Any] = {_SIZES[key]: file.count(key) for key in _SIZES}
    heads = sizes["num_heads"]
    config = model.ModelConfig(
        **sizes,
        num_kv_heads=file.count("num_key_value_heads", default=heads),
        head_dim=_head_dim(file, family),
        spectral=(),
        tie_embeddings=file.flag("tie_word_embeddings", default=family.tied),
        rope_theta=_rope_theta(file, family),
        rope_scaling=_rope_scaling(file, family),
        norm_eps=file.number("rms_norm_eps", default=1e-6),
        qk_norm=family.qk_norm,
    )
    try:
        config.validate()
    except errors.UserError as error:
        raise errors.UserError(f"{where}: {error}") from error
    return config


def max_length(values: Mapping[str, Any], where: str) -> int:
    """Returns the longest context, in tokens, that a config.json allows.

    Raises:
      UserError: see `from_config_json`.
    """
    file = _File(values, where)
    return _max_length(file, _family(file))


def architecture(config: model.ModelConfig) -> str:
    """Returns the class of transformers that computes the dense model."""
    return "Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"


def to_config_json(
    config: model.ModelConfig,
    *,
    max_length: int,
    dtype: str,
    bos_token_id: int | None,
    eos_token_id: int | None,
) -> dict[str, Any]:
    """Returns the config.json of the dense model with the shapes of `config`.

    Ranks are left out: the file describes dense matrices. Rope has the spelling that
    old and new versions of transformers read.

    Args:
      config: a valid configuration.
      max_length: longest context, in tokens.
      dtype: of the tensors, for example "bfloat16".
      bos_token_id: id of the token that begins a text.
      eos_token_id: id of the token that ends it.

    Raises:
      UserError: transformers refuses a model of this shape.
    """
    errors.check(
        "model.num_heads",
        config.qk_norm or config.d_model % config.num_heads == 0,
        f"{config.num_heads} does not divide model.d_model = {config.d_model}, and "
        "LlamaForCausalLM of transformers refuses that; only a model with "
        "model.qk_norm can be written so",
    )
    family = architecture(config)
    values = {
        "architectures": [family],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": max_length,
        "model_type": family.removesuffix("ForCausalLM").lower(),
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": _to_rope_scaling(config.rope_scaling),
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if not config.qk_norm:
        values |= {"mlp_bias": False, "pretraining_tp": 1}
    values |= {theirs: getattr(config, ours) for theirs, ours in _SIZES.items()}
    return dict(sorted(values.items()))


def _to_rope_scaling(scaling: model.RopeScaling) -> dict[str, Any] | None:
    if scaling.kind == "none":
        return None
    values = dataclasses.asdict(scaling)
    values["original_max_position_embeddings"] = values["original_length"]
    keys = _ROPE_KEYS[scaling.kind]
    return {"rope_type": scaling.kind} | {key: values[key] for key in keys}


class _File(NamedTuple):
    """The content of a config.json, or of a group in it; reads values of one type."""

    values: Mapping[str, Any]
    where: str

    def check(self, key: str, holds: bool, message: str) -> None:
        """Raises UserError naming file, key and value, unless `holds`."""
        shown = reprlib.repr(self.values.get(key))
        errors.check(f"{self.where}: {key}", holds, f"{shown} {message}")

    def count(self, key: str, *, default: int | None = None) -> int:
        """Returns an integer of at least 1; null is the same as no key."""
        value = self._get(key, default)
        self.check(key, type(value) is int and value >= 1, "is not a positive integer")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        """Returns a number as a float."""
        value = self._get(key, default)
        self.check(key, type(value) in (int, float), "is not a number")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        """Returns true or false."""
        value = self._get(key, default)
        self.check(key, isinstance(value, bool), "is not true or false")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        errors.check(
            f"{self.where}: {key}",
            value is not None,
            "is missing; the file does not describe a model without it",
        )
        return value


def _family(file: _File) -> _Family:
    names = file.values.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    known = isinstance(name, str) and name in FAMILIES
    message = f"is not computed here; only one of {', '.join(FAMILIES)} is"
    file.check("architectures", known, message)
    return FAMILIES[str(name)]


def _check_keys(file: _File) -> None:
    """Raises UserError for a feature that the model here lacks, or an unknown key."""
    for key, value in file.values.items():
        if key in _ABSENT:
            file.check(
                key,
                any(_same(value, allowed) for allowed in _ABSENT[key]),
                "is a feature that the model here lacks, so the checkpoint cannot be "
                "computed",
            )
        else:
            file.check(
                key,
                key in _READ or key in _HARMLESS,
                "is a key that is not known here, and may change what the model "
                "computes; if it does not, remove it from the file",
            )


def _same(a: Any, b: Any) -> bool:
    """Equality, but True is not 1."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _check_layers(file: _File, family: _Family) -> None:
    """Raises UserError where layers differ: by a sliding window, or without rope."""
    sliding = file.flag("use_sliding_window", default=False)
    file.check("use_sliding_window", not sliding, "is a feature that is not here")
    file.check(
        "sliding_window",
        file.values.get("sliding_window") is None
        or file.values.get("use_sliding_window") is False,
        "is a feature that is not here; attention reaches the whole context",
    )
    kinds = file.values.get("layer_types")
    file.check(
        "layer_types",
        kinds is None
        or (isinstance(kinds, list) and set(map(str, kinds)) <= {"full_attention"}),
        "names layers that are not here; only 'full_attention' is",
    )
    count = file.count("num_hidden_layers")
    rope = file.values.get("no_rope_layers")
    if rope is not None:
        file.check(
            "no_rope_layers",
            isinstance(rope, list) and len(rope) >= count and all(rope[:count]),
            "leaves layers without rotary embedding (each 0), and here all have it",
        )
    elif family.no_rope_interval is not None:
        interval = file.count("no_rope_layer_interval", default=family.no_rope_interval)
        errors.check(
            f"{file.where}: no_rope_layer_interval",
            count < interval,
            f"{interval} leaves every layer of that number without rotary embedding, "
            f"and here all {count} have it",
        )


def _head_dim(file: _File, family: _Family) -> int | None:
    """K, or None where it is d_model / num_heads."""
    if file.values.get("head_dim") is None and family.head_dim is None:
        return None
    size = file.count("head_dim", default=family.head_dim)
    implied = size * file.count("num_attention_heads") == file.count("hidden_size")
    return None if implied else size


def _max_length(file: _File, family: _Family) -> int:
    return file.count("max_position_embeddings", default=family.max_length)


def _rope(file: _File) -> _File:
    """The group of the rotary embedding, in its old or its new spelling."""
    groups = [
        key
        for key in ("rope_parameters", "rope_scaling")
        if file.values.get(key) not in (None, {})
    ]
    for key in groups:
        file.check(key, isinstance(file.values[key], Mapping), "is not a JSON object")
    if not groups:
        return _File({}, f"{file.where}: rope_scaling")
    file.check(
        groups[-1],
        len(groups) < 2 or file.values[groups[0]] == file.values[groups[1]],
        f"contradicts {groups[0]}; remove one of them",
    )
    return _File(file.values[groups[0]], f"{file.where}: {groups[0]}")


def _rope_theta(file: _File, family: _Family) -> float:
    inner = _rope(file)
    given = [f for f in (inner, file) if f.values.get("rope_theta") is not None]
    found = [f.number("rope_theta") for f in given] or [family.rope_theta]
    file.check(
        "rope_theta", len(set(found)) == 1, f"contradicts {inner.where} ({found[0]})"
    )
    return found[0]


def _rope_scaling(file: _File, family: _Family) -> model.RopeScaling:
    group = _rope(file)
    names = [
        group.values[key] for key in ("rope_type", "type") if group.values.get(key)
    ]
    kind = names[0] if names else "default"
    group.check(
        "rope_type",
        all(name == kind for name in names),
        "contradicts `type`; remove one of them",
    )
    errors.check(
        f"{group.where}: rope_type",
        isinstance(kind, str) and kind in _ROPE_KEYS,
        f"{kind!r} is not computed here; only {', '.join(_ROPE_KEYS)} are",
    )
    known = (*_ROPE_KEYS[kind], "rope_type", "type", "rope_theta")
    for key, value in group.values.items():
        neutral = key == "partial_rotary_factor" and _same(value, 1)
        group.check(key, key in known or neutral, f"does not belong to {kind!r}")
    if kind == "default":
        return model.RopeScaling()
    factor = group.number("factor")
    if kind == "linear":
        return model.RopeScaling(kind=kind, factor=factor)
    return model.RopeScaling(
        kind=kind,
        factor=factor,
        low_freq_factor=group.number("low_freq_factor"),
        high_freq_factor=group.number("high_freq_factor"),
        original_length=_original_length(file, group, family),
    )


def _original_length(file: _File, group: _File, family: _Family) -> int:
    """As transformers does, a key outside of the group comes first."""
    key = "original_max_position_embeddings"
    inner = group.count(key, default=_max_length(file, family))
    return file.count(key, default=inner)
