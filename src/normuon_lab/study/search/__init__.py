"""`normuon tune` and `normuon sweep`: search each arm's hyperparameters until the best are
interior."""
