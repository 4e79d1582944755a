"""`normuon plan`: which rank orthogonalises what, and what is sent, before any training."""
