"""Turns examples into batches: tokenises texts, orders the documents and lays them out as tensors."""
