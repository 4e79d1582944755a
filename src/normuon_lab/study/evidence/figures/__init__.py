"""The figures of the results page, from what the results have; drawn by matplotlib."""
