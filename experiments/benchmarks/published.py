"""The SCT authors' method in PyTorch, for comparisons on one machine.

python -m experiments.benchmarks.published --steps=3

trains their 70B-class demonstration and prints seconds per step and peak memory as
JSON: seven spectral matrices per layer, attention that is a sum, no embedding and no
head. `experiments.step70b --reference_attention` is the same in `sct_jax`.

This module needs PyTorch, and `llama` needs transformers too. It does not load JAX,
whose memory would count.

References:
  Kohlberger et al., Spectral Compact Training, arXiv 2604.00733, 2026
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from experiments.benchmarks import machine

PROJECTIONS = {
    "q": ("self_attn", "q_proj"),
    "k": ("self_attn", "k_proj"),
    "v": ("self_attn", "v_proj"),
    "o": ("self_attn", "o_proj"),
    "gate": ("mlp", "gate_proj"),
    "up": ("mlp", "up_proj"),
    "down": ("mlp", "down_proj"),
}
"""Maps our names of a layer's matrices to the names in transformers."""


class SpectralLinear(nn.Module):
    """Multiplies by U diag(s) V.T, without building the product."""

    def __init__(self, fan_in: int, fan_out: int, rank: int):
        """Draws orthonormal U (I, R) and V (O, R); s (R,) keeps the usual scale."""
        super().__init__()
        self.U = nn.Parameter(_orthonormal(fan_in, rank))
        scale = math.sqrt(2 * fan_out / (fan_in * rank))
        self.s = nn.Parameter(torch.full((rank,), scale))
        self.V = nn.Parameter(_orthonormal(fan_out, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x @ W."""
        return ((x @ self.U) * self.s) @ self.V.T


class RMSNorm(nn.Module):
    """Divides by the root mean square, and scales."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the normalised x."""
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * scale * self.weight


class Block(nn.Module):
    """A layer of the demonstration: a sum for attention, then SwiGLU."""

    def __init__(self, d_model: int, d_ff: int, rank: int):
        super().__init__()
        self.attention_norm, self.mlp_norm = RMSNorm(d_model), RMSNorm(d_model)
        self.q = SpectralLinear(d_model, d_model, rank)
        self.k = SpectralLinear(d_model, d_model, rank)
        self.v = SpectralLinear(d_model, d_model, rank)
        self.o = SpectralLinear(d_model, d_model, rank)
        self.gate = SpectralLinear(d_model, d_ff, rank)
        self.up = SpectralLinear(d_model, d_ff, rank)
        self.down = SpectralLinear(d_ff, d_model, rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the residual stream after the layer."""
        h = self.attention_norm(x)
        x = x + self.o(self.q(h) + self.k(h) + self.v(h))
        h = self.mlp_norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def stack(num_layers: int, d_model: int, d_ff: int, rank: int) -> nn.Sequential:
    """Returns the layers of the demonstration."""
    return nn.Sequential(*(Block(d_model, d_ff, rank) for _ in range(num_layers)))


def llama(shape: Any) -> Any:
    """Returns transformers' Llama with the authors' layer for its spectral matrices.

    Args:
      shape: a `model.ModelConfig` of one rank, with tied embeddings.
    """
    import transformers

    fields: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.d_ff,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": True,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    result = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    for layer in result.model.layers:
        for name in shape.spectral:
            part, projection = PROJECTIONS[name]
            owner = getattr(layer, part)
            dense = getattr(owner, projection)
            factors = SpectralLinear(dense.in_features, dense.out_features, shape.rank)
            setattr(owner, projection, factors)
    return result.train()


def make_step(
    model: nn.Module, loss_fn: Callable[[], torch.Tensor], *, learning_rate: float
) -> Callable[[], float]:
    """Returns a training step: AdamW on all parameters, then QR of every factor.

    AdamW is PyTorch's default implementation for the device. Each QR is followed by
    the signs of R's diagonal.

    Args:
      model: updated in place.
      loss_fn: computes the loss of the batch with `model`.
      learning_rate: of all parameters.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        optimizer.step()
        retract(model)
        return loss.item()

    return step


@torch.no_grad()
def retract(model: nn.Module) -> None:
    """Makes U and V of every spectral matrix orthonormal."""
    for module in model.modules():
        if isinstance(module, SpectralLinear):
            for factor in (module.U, module.V):
                q, r = torch.linalg.qr(factor)
                factor.copy_(q * torch.sign(torch.diagonal(r)))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the figures of the demonstration as JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("num_layers", 80),
        ("d_model", 8192),
        ("d_ff", 28672),
        ("rank", 32),
        ("tokens", 8),
        ("steps", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args(argv)
    torch.set_num_threads(machine.num_cores())
    torch.manual_seed(0)
    model = stack(flags.num_layers, flags.d_model, flags.d_ff, flags.rank)
    x = torch.randn(1, flags.tokens, flags.d_model)
    loss_fn = lambda: model(x).square().mean()
    step = make_step(model, loss_fn, learning_rate=3e-4)
    losses, seconds = [], []
    for _ in range(flags.steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds_per_step": statistics.median(seconds[1:] or seconds),
        "peak_rss_bytes": machine.peak_rss_bytes(),
        "losses": losses,
    }
    print(json.dumps(figures))
    return 0


def _orthonormal(rows: int, columns: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns))[0]


if __name__ == "__main__":
    sys.exit(main())
