"""The model that the fault suite trains: 20,000 parameters, seconds on one core.

python -m experiments.pretrain --config=experiments/faults/tiny.py \
    --config.data.source='my_text/*.txt'
"""

from sct_jax import data, model
from sct_jax.training import config, optimizer_config


def get_config() -> config.ExperimentConfig:
    """Returns the configuration of the runs that faults are injected into."""
    return config.ExperimentConfig(
        num_steps=40,
        log_every=1,
        model=model.ModelConfig(
            d_model=32,
            d_ff=48,
            num_layers=2,
            num_heads=2,
            num_kv_heads=2,
            vocab_size=300,
            rank=4,
            spectral=("q", *model.MLP),
        ),
        data=data.DataConfig(source="corpus/*.txt", batch_size=4, seq_len=16),
        optimizer=optimizer_config.Sct(
            peak_learning_rate=3e-3, warmup_steps=4, max_update_norm=0.5
        ),
        checkpoint=config.CheckpointConfig(every=10, keep=1000),
        eval=config.EvalConfig(every=20, num_batches=2),
    )
