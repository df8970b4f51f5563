"""Compare algorithms with the same data, seeds and budget by paired differences, intervals and curves."""
