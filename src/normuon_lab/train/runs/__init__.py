"""Training small models, many side by side: what `normuon compare` and `normuon tune` run."""
