"""Text from a policy: plain and self-speculative decoding."""
