"""The four stages of a run, and the one training loop that two of them share."""
