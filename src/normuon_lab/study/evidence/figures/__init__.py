"""The figures of the results page, from what `collected.py` reads; drawn by matplotlib."""
