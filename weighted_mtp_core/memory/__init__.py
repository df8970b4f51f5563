"""How much memory a run will take, found by running its code on tensors without values."""
