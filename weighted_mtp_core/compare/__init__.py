"""Arms side by side: the same data, seeds and budget, paired differences, intervals, curves."""
