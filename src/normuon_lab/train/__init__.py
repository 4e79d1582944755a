"""Training: the compared optimizers, small runs in one process, and pretraining."""
