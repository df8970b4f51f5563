"""Judging what a policy writes: generation, the sandbox, pass@k."""
