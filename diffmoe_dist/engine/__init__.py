"""Training runs: trainer, checkpoints, weight average, logs."""
