"""Weighted multi-token prediction: a core that knows no algorithm, and plugins that are one each."""

__version__ = "0.1.0"
