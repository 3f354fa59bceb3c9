"""A Llama or Qwen3 decoder whose matrices may be products of two thin ones.

A matrix W (fan_in, fan_out) of rank R is two linear layers without bias, `a` from
fan_in to R and `b` from R to fan_out. W itself is never built. In a matrix of B
blocks, both layers are grouped, and the B R numbers between them are shuffled.

This file is part of an exported model, and needs torch and transformers alone. Layers
are made here, and their forward passes are those of Qwen3 in transformers: attention by
`config._attn_implementation`, keyword arguments handed down to it, any `Cache`. That is
what vLLM's Transformers backend asks of a model.
"""

import typing

import torch
from torch import nn
from transformers.models.qwen3 import configuration_qwen3 as qwen3_config
from transformers.models.qwen3 import modeling_qwen3 as qwen3

_COLWISE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_COLWISE += ("mlp.gate_proj", "mlp.up_proj")
_ROWWISE = ("self_attn.o_proj", "mlp.down_proj")


class SpectralConfig(qwen3_config.Qwen3Config):
    """Qwen3's configuration with the rank of each matrix.

    Attributes:
      ranks: name of a matrix, such as "q_proj", to its rank, or to one rank per layer.
        A matrix that is not there is dense. "embed_tokens" and "lm_head" are matrices
        too; where embeddings are tied, the head has the rank of the embedding.
      blocks: name of a matrix of the layers to its number of blocks. One that is not
        there has none.
      qk_norm: whether queries and keys are normalised, as in Qwen3.
    """

    model_type = "spectral"
    ranks = None
    blocks = None
    qk_norm = False
    base_model_pp_plan: typing.ClassVar = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    def rank_of(self, name: str, layer: int = 0) -> int | None:
        """Returns the rank of a matrix; None if it is dense."""
        rank = (self.ranks or {}).get(name)
        return rank[layer] if isinstance(rank, list | tuple) else rank

    def blocks_of(self, name: str) -> int:
        """Returns the number of blocks of a matrix, 1 if it has none."""
        return (self.blocks or {}).get(name, 1)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Returns how layers are divided over devices.

        The wide side of each matrix is. R numbers per token are the same everywhere.
        Matrices in blocks are not divided.
        """
        plan = {}
        for names, style, part in (
            (_COLWISE, "colwise", ".b"),
            (_ROWWISE, "rowwise", ".a"),
        ):
            for name in names:
                if self.blocks_of(name.split(".")[1]) > 1:
                    continue
                factorised = self.rank_of(name.split(".")[1]) is not None
                plan[f"layers.*.{name}{part if factorised else ''}"] = style
        return plan

    @property
    def embedding_size(self) -> int:
        """Returns the width of the table that `get_input_embeddings` gives."""
        return self.rank_of("embed_tokens") or self.hidden_size


class Factors(nn.Module):
    """A linear layer of rank R: b(a(x)), at 2 R (fan_in + fan_out) FLOPs per token."""

    def __init__(self, fan_in: int, rank: int, fan_out: int):
        super().__init__()
        self.a = nn.Linear(fan_in, rank, bias=False)
        self.b = nn.Linear(rank, fan_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (..., fan_out) from (..., fan_in)."""
        return self.b(self.a(x))


class GroupedLinear(nn.Module):
    """A linear layer without bias for each of B groups of features.

    Attributes:
      weight: (B, features out, features in) of each group.
    """

    def __init__(self, blocks: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, out_features, in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (..., B, features out) from (..., B, features in)."""
        return torch.einsum("...bi,boi->...bo", x, self.weight)


class BlockFactors(nn.Module):
    """A linear layer of rank B R, at the 2 R (fan_in + fan_out) FLOPs of rank R.

    The results of `a`, (B, R) per token, are transposed, and read again as (B, R).
    """

    def __init__(self, fan_in: int, rank: int, fan_out: int, blocks: int):
        super().__init__()
        self.blocks = blocks
        self.a = GroupedLinear(blocks, fan_in // blocks, rank)
        self.b = GroupedLinear(blocks, rank, fan_out // blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (..., fan_out) from (..., fan_in)."""
        h = self.a(x.unflatten(-1, (self.blocks, -1)))
        h = h.transpose(-1, -2).flatten(-2).unflatten(-1, (self.blocks, -1))
        return self.b(h).flatten(-2)


class FactorsEmbedding(nn.Module):
    """A table of R numbers per token, and a linear layer to the residual stream."""

    def __init__(self, vocab_size: int, rank: int, hidden_size: int):
        super().__init__()
        self.a = nn.Embedding(vocab_size, rank)
        self.b = nn.Linear(rank, hidden_size, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns (..., hidden_size) from (...)."""
        return self.b(self.a(input_ids))


class TiedHead(nn.Module):
    """The transposed `FactorsEmbedding`, with its parameters and none of its own."""

    def __init__(self, embedding: FactorsEmbedding):
        super().__init__()
        self._shared = [embedding]  # in a list, so that it is registered once

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (..., vocab_size) from (..., hidden_size)."""
        (embedding,) = self._shared
        return nn.functional.linear(x @ embedding.b.weight, embedding.a.weight)


def _linear(fan_in: int, fan_out: int, rank: int | None, blocks: int = 1) -> nn.Module:
    if rank is None:
        return nn.Linear(fan_in, fan_out, bias=False)
    if blocks > 1:
        return BlockFactors(fan_in, rank, fan_out, blocks)
    return Factors(fan_in, rank, fan_out)


class SpectralAttention(qwen3.Qwen3Attention):
    """Grouped-query attention, causal, with or without normalised queries and keys."""

    def __init__(self, config: SpectralConfig, layer_idx: int):
        nn.Module.__init__(self)  # Qwen3's would build the dense matrices
        self.config = config
        self.layer_idx = layer_idx
        self.layer_type = "full_attention"
        self.head_dim = config.head_dim
        self.num_key_value_groups = (
            config.num_attention_heads // config.num_key_value_heads
        )
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.sliding_window = None
        width = config.hidden_size
        queries = config.num_attention_heads * self.head_dim
        keys = config.num_key_value_heads * self.head_dim
        form_of = lambda name: (config.rank_of(name, layer_idx), config.blocks_of(name))
        self.q_proj = _linear(width, queries, *form_of("q_proj"))
        self.k_proj = _linear(width, keys, *form_of("k_proj"))
        self.v_proj = _linear(width, keys, *form_of("v_proj"))
        self.o_proj = _linear(queries, width, *form_of("o_proj"))
        self.q_norm, self.k_norm = (
            qwen3.Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            if config.qk_norm
            else nn.Identity()
            for _ in range(2)
        )


class SpectralMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: SpectralConfig, layer_idx: int):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        form_of = lambda name: (config.rank_of(name, layer_idx), config.blocks_of(name))
        self.gate_proj = _linear(width, inner, *form_of("gate_proj"))
        self.up_proj = _linear(width, inner, *form_of("up_proj"))
        self.down_proj = _linear(inner, width, *form_of("down_proj"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (..., hidden_size) from (..., hidden_size)."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class SpectralDecoderLayer(qwen3.Qwen3DecoderLayer):
    """Attention, then SwiGLU, each of the normalised residual stream."""

    def __init__(self, config: SpectralConfig, layer_idx: int):
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        self.attention_type = "full_attention"
        self.self_attn = SpectralAttention(config, layer_idx)
        self.mlp = SpectralMLP(config, layer_idx)
        self.input_layernorm, self.post_attention_layernorm = (
            qwen3.Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            for _ in range(2)
        )


class SpectralPreTrainedModel(qwen3.Qwen3PreTrainedModel):
    """What the model has with and without its head."""

    config_class = SpectralConfig
    _no_split_modules: typing.ClassVar = ["SpectralDecoderLayer"]
    _supports_attention_backend = True
    _can_record_outputs: typing.ClassVar = {
        "hidden_states": SpectralDecoderLayer,
        "attentions": SpectralAttention,
    }


class SpectralModel(SpectralPreTrainedModel, qwen3.Qwen3Model):
    """The decoder without its head."""

    def __init__(self, config: SpectralConfig):
        qwen3.Qwen3PreTrainedModel.__init__(self, config)
        self.padding_idx = None
        self.vocab_size = config.vocab_size
        rank = config.rank_of("embed_tokens")
        self.embed_tokens = (
            nn.Embedding(config.vocab_size, config.hidden_size)
            if rank is None
            else FactorsEmbedding(config.vocab_size, rank, config.hidden_size)
        )
        self.layers = nn.ModuleList(
            SpectralDecoderLayer(config, index)
            for index in range(config.num_hidden_layers)
        )
        self.norm = qwen3.Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = qwen3.Qwen3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.has_sliding_layers = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Returns the table by token: R numbers each where the embedding has factors.

        `inputs_embeds` are results of `embed_tokens`, not of this table.
        """
        return getattr(self.embed_tokens, "a", self.embed_tokens)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the table by token."""
        owner, name = (
            (self.embed_tokens, "a")
            if hasattr(self.embed_tokens, "a")
            else (self, "embed_tokens")
        )
        setattr(owner, name, value)


class SpectralForCausalLM(SpectralPreTrainedModel, qwen3.Qwen3ForCausalLM):
    """The decoder with its head."""

    def __init__(self, config: SpectralConfig):
        qwen3.Qwen3PreTrainedModel.__init__(self, config)
        self.model = SpectralModel(config)
        self.vocab_size = config.vocab_size
        embedding, rank = self.model.embed_tokens, config.rank_of("lm_head")
        if config.tie_word_embeddings and isinstance(embedding, FactorsEmbedding):
            self.lm_head = TiedHead(embedding)
            self._tied_weights_keys = {}
        else:
            self.lm_head = _linear(config.hidden_size, config.vocab_size, rank)
        self.post_init()
        if not isinstance(self.lm_head, nn.Linear):  # the plan is that of a dense head
            plan = dict(self._tp_plan or {})
            style = plan.pop("lm_head", None)
            if style and isinstance(self.lm_head, Factors):
                plan["lm_head.b"] = style
            self._tp_plan = plan

    def get_input_embeddings(self) -> nn.Module:
        """Returns the table by token, see `SpectralModel`."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the table by token."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """Returns the linear layer with a row per token; None if the head has none."""
        if isinstance(self.lm_head, TiedHead):
            return None
        return getattr(self.lm_head, "b", self.lm_head)

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the linear layer with a row per token."""
        if isinstance(self.lm_head, Factors):
            self.lm_head.b = value
        else:
            self.lm_head = value
