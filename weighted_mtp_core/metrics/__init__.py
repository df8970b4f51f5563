"""Formulas of the metrics."""
