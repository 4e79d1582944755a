"""`normuon bench`: what an optimizer step costs on this machine, next to installed peers."""
