"""One step of the optimizer: its order, its mathematics, and what carries it over ranks."""
