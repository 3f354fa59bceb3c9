"""The training framework: configuration, trainer, loop, checkpoints and metrics."""
