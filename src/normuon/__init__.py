"""NorMuon: orthogonalised momentum with one adaptive scale per neuron."""
