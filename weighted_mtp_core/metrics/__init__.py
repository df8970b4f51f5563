"""Formulas of metrics: measures of critics and of token weights, pass@k, and statistics over seeds."""
