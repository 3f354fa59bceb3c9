"""How Hugging Face's Llama family names the tensors of a model.

Their matrices are (fan_out, fan_in), the transposed of ours.
"""

from collections.abc import Iterator
from typing import NamedTuple

from sct_jax import model

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
"""Key of a block -> module of a layer of theirs."""


class Tensor(NamedTuple):
    """A tensor of a model.

    Attributes:
      layer: index of its block; None for the ends.
      key: of the block, or of the parameters.
      name: of theirs.
      shape: of theirs; a matrix is (fan_out, fan_in), and the embedding (V, D).
      is_matrix: whether it is a matrix, which may have factors here.
    """

    layer: int | None
    key: str
    name: str
    shape: tuple[int, ...]
    is_matrix: bool


def tensors(config: model.ModelConfig) -> Iterator[Tensor]:
    """Yields every tensor of a model, the embedding first and the head last."""
    shapes = config.matrix_shapes()
    yield Tensor(None, "embedding", EMBEDDING, shapes["embedding"], True)
    norms = {"attention_norm": config.d_model, "mlp_norm": config.d_model}
    if config.qk_norm:
        norms |= {"q_norm": config.head_size, "k_norm": config.head_size}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for key, module in MODULES.items():
            name = f"{prefix}{module}.weight"
            if key in shapes:
                yield Tensor(layer, key, name, shapes[key][::-1], True)
            elif key in norms:
                yield Tensor(layer, key, name, (norms[key],), False)
    yield Tensor(None, "final_norm", FINAL_NORM, (config.d_model,), False)
    if not config.tie_embeddings:
        yield Tensor(None, "head", HEAD, shapes["head"][::-1], True)
