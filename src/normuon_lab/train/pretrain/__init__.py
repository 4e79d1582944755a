"""`normuon train`: language models trained on one process or many, from checkpoints that last."""
