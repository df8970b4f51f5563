"""Trains the critic (stage 1) and the policy (stage 2), with one training loop for both."""
