"""The pretraining lab: trains models and compares optimizers."""
