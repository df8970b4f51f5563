"""The formulas of all metrics."""
