"""Recipes: TOML files that are merged from layers and converted strictly to attrs classes."""
