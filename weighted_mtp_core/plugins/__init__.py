"""Find installed plugins, load the plugins that a recipe names, and select their components."""
