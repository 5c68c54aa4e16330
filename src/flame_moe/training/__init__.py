"""The training loop, metrics, checkpoints and seeding; knows nothing of continual methods."""
