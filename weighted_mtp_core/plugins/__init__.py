"""Find, load and select plugins."""
