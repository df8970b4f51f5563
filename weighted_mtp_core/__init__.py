"""Weighted multi-token prediction: a core without any algorithm, and plugins that supply them."""

from weighted_mtp_core.runtime.environment import prepare_environment_for_torch

# Every process imports this package before torch, so this is early enough.
prepare_environment_for_torch()

__version__ = "0.1.0"
