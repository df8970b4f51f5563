"""Compare algorithms with the same data, seeds and budget: paired differences, intervals, curves."""
