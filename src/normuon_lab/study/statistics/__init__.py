"""Statistics of runs: means over seeds, steps saved, intervals and paired tests."""
