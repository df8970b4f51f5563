"""Exports a trained policy as a model that other tools can load."""
