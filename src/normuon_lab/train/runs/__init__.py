"""Trains small models side by side, for `normuon compare` and `normuon tune`."""
