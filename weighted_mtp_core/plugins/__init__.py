"""Find installed plugins, load those that a recipe names, and select their components."""
