"""Training: the optimizers that are compared, small runs in one process, and pretraining."""
