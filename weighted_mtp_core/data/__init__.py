"""From text to batches: tokenised examples, their order, and rows of tensors."""
