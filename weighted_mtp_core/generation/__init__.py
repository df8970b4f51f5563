"""Generates text with a policy, by plain or self-speculative decoding, or with a server."""
