"""The policy, its base model and its loss."""
