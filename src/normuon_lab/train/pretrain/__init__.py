"""`normuon train`: trains language models in one process or many, with checkpoints."""
