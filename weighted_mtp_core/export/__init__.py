"""A trained policy as a model that other tools load."""
