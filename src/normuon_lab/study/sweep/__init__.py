"""`normuon sweep`: several hyperparameters of each arm, tuned with the same number of trials."""
