"""`normuon bench`: what an optimizer step costs on this machine, beside installed peers."""
