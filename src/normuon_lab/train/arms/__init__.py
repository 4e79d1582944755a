"""Optimizers that NorMuon is compared with and that no library ships: ablations, Dion, RMNP."""
