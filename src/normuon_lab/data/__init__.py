"""From text to tokens, and from tokens to the batches of a pretraining run."""
