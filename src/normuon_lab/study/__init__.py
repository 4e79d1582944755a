"""Studies over many runs: compare, tune, sweep, and the published evidence."""
