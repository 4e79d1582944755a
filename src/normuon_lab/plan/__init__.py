"""`normuon plan`: who orthogonalises what, and what travels, before any training."""
