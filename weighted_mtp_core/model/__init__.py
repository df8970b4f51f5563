"""The policy: trunk, heads, shared unembedding, and its weighted loss."""
