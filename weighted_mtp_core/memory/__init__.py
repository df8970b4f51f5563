"""Forecasts how much memory a run takes, by running its code on tensors without values."""
