"""Weighted multi-token prediction: the core framework; plugins supply the algorithms."""

from weighted_mtp_core.runtime.environment import prepare_environment_for_torch

# Every process imports this package before torch, so the variables are set in time.
prepare_environment_for_torch()

__version__ = "0.1.0"
