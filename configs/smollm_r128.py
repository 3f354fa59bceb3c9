"""SmolLM2 with spectral MLP matrices.

Paper: Kohlberger et al., Spectral Compact Training, 2026, arXiv 2604.00733.

  python -m experiments.pretrain --config=configs/smollm_r128.py         # 1.7b
  python -m experiments.pretrain --config=configs/smollm_r128.py:tiny

Variants:
  1.7b    d 2048, 24 layers, MLP at rank 128. 597,797,888 parameters replace
          1,711,376,384.
  360m    d 960, 32 layers, MLP at rank 128.
  135m    d 576, 30 layers, MLP at rank 128.
  recipe  shape of 135m, all seven matrices in 4 blocks of R = d/4, Stiefel Muon without
          a retraction: the least loss of factors at equal FLOPs in
          configs/studies/start.py, where a narrow dense model is lower. With
          --config.model.num_blocks=1 --config.optimizer.retraction=cholesky_qr, the
          best settings for orthonormal factors.
  tiny    d 256, 3 layers, all seven matrices at rank 64, on the source text of the
          Python standard library.

Hardware, time and loss: tiny takes 2 to 5 minutes on 2 CPU cores, and ends at a
held-out loss of 3.35 nats per token. The others are starting points for one
accelerator, and have not been trained.
"""

import dataclasses

from sct_jax import data, model
from sct_jax.training import config, optimizer_config


def get_config(variant: str = "1.7b") -> config.ExperimentConfig:
    return VARIANTS[variant]()


def _smollm(
    *,
    d_model: int,
    d_ff: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    rope_theta: float,
) -> config.ExperimentConfig:
    return config.ExperimentConfig(
        num_steps=20_000,
        model=model.ModelConfig(
            d_model=d_model,
            d_ff=d_ff,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            vocab_size=49152,
            rank=128,
            spectral=model.MLP,
            rope_theta=rope_theta,
            compute_dtype="bfloat16",
        ),
        data=data.DataConfig(batch_size=16, seq_len=2048),
        optimizer=optimizer_config.Sct(
            # For u and v with fan `base_width`; see studies/compare_methods.py:width.
            peak_learning_rate=3e-3,
            base_width=128,
            dense_lr_multiplier=1 / 3,
            schedule="wsd",
            warmup_steps=500,
            max_update_norm=0.5,
            grad_clip=1.0,
            weight_decay=0.01,
            b2=0.95,
        ),
    )


def _135m() -> config.ExperimentConfig:
    return _smollm(
        d_model=576,
        d_ff=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        rope_theta=100_000.0,
    )


def _recipe() -> config.ExperimentConfig:
    plain = _135m()
    return dataclasses.replace(
        plain,
        model=dataclasses.replace(
            plain.model,
            rank=plain.model.d_model // 4,
            ranks=model.MatrixRanks(k=48, v=48),  # full: their outputs are few
            num_blocks=4,
            spectral=model.BLOCK_MATRICES,
            qk_norm=True,
        ),
        optimizer=plain.optimizer.to(
            optimizer_config.StiefelMuon,
            peak_learning_rate=0.01,
            decay_ratio=0.9,
            final_rate_ratio=0.0,
            retraction="none",
            max_update_norm=None,
            weight_decay=0.0,
            singular_value_lr_multiplier=0.2,
            dense_lr_multiplier=2.7,
        ),
    )


def _tiny() -> config.ExperimentConfig:
    return config.ExperimentConfig(
        num_steps=650,
        model=model.ModelConfig(
            d_model=256,
            d_ff=704,
            num_layers=3,
            num_heads=2,
            num_kv_heads=2,
            vocab_size=4096,
            rank=64,
            spectral=model.BLOCK_MATRICES,
            qk_norm=True,
            remat="dots",  # on CPU, memory traffic costs more than matrix products
        ),
        data=data.DataConfig(batch_size=16, seq_len=128),
        optimizer=optimizer_config.StiefelMuon(
            peak_learning_rate=0.02,
            schedule="wsd",
            warmup_steps=40,
            decay_ratio=0.8,
            final_rate_ratio=0.02,
            grad_clip=1.0,
            momentum=0.9,  # short runs; see studies/compare_methods.py:recipe
            singular_value_lr_multiplier=0.2,
            dense_lr_multiplier=1.35,
        ),
        checkpoint=config.CheckpointConfig(every=100),
        eval=config.EvalConfig(every=200, num_batches=32),
    )


VARIANTS = {
    "1.7b": lambda: _smollm(
        d_model=2048,
        d_ff=8192,
        num_layers=24,
        num_heads=32,
        num_kv_heads=32,
        rope_theta=130_000.0,
    ),
    "360m": lambda: _smollm(
        d_model=960,
        d_ff=2560,
        num_layers=32,
        num_heads=15,
        num_kv_heads=5,
        rope_theta=100_000.0,
    ),
    "135m": _135m,
    "recipe": _recipe,
    "tiny": _tiny,
}
