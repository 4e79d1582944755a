"""What runs say in numbers: means over seeds, steps saved, intervals and paired tests."""
