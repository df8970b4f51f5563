"""Checkpoints of a training: written, read, resumed."""
