"""`normuon tune`: the learning rate of each arm, on a grid whose best point is interior."""
