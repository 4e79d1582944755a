"""The pretraining lab: what trains and compares optimizers."""
