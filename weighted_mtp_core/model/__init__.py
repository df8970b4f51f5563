"""The policy model, the base model it is made from, and its loss."""
