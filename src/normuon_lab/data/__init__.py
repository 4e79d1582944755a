"""Text becomes tokens, and tokens the batches of a pretraining run."""
