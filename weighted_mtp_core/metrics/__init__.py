"""Formulas of what is measured."""
