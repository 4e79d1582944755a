"""`normuon tune` and `normuon sweep`: each arm's hyperparameters, until its best are interior."""
