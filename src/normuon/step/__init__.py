"""One step of the optimizer: its order, its mathematics, and its exchanges between ranks."""
