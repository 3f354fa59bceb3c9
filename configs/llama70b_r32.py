"""Llama-3-70B's shape with every matrix at rank 32, in 8 GB of memory.

Paper: Kohlberger et al., Spectral Compact Training, 2026, arXiv 2604.00733.

  python -m experiments.step70b                                  # five measured steps
  python -m experiments.pretrain --config=configs/llama70b_r32.py

Variants:
  70b  the default.

All seven matrices of a layer, the embedding and the head are factors: 424,257,088
parameters replace 70,553,706,496. The paper's demonstration has 452 million parameters,
attention without a softmax, and neither embedding nor head.

Hardware, time and loss: 2 CPU cores and 8 GB for `step70b`, at 1.33 seconds per step of
8 tokens. The loss falls from 11.72 to 8.91 nats per token in five steps on one batch.
`pretrain` holds the state twice while it starts and saves. This configuration measures
the cost of a step; it is not a recipe for training such a model.
"""

from sct_jax import data, model
from sct_jax.training import config, optimizer_config

VARIANTS = ("70b",)


def get_config(variant: str = "70b") -> config.ExperimentConfig:
    del variant  # there is only one
    return config.ExperimentConfig(
        num_steps=5,
        step="layerwise",
        log_every=1,
        model=model.ModelConfig(
            d_model=8192,
            d_ff=28672,
            num_layers=80,
            num_heads=64,
            num_kv_heads=8,
            vocab_size=128256,
            rank=32,
            spectral=model.MATRICES,
            tie_embeddings=False,
            rope_theta=500_000.0,
            scan_layers=False,
        ),
        data=data.DataConfig(batch_size=1, seq_len=8),
        optimizer=optimizer_config.Sct(peak_learning_rate=3e-4, schedule="constant"),
        checkpoint=config.CheckpointConfig(every=1000, keep=1),
        eval=config.EvalConfig(every=1000, num_batches=1),
    )
