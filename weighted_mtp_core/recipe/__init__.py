"""Recipes: TOML files, layered and structured strictly into attrs classes."""
