"""Weighted multi-token prediction: a core that knows no algorithm, and plugins that are one each."""

from weighted_mtp_core.runtime.environment import prepare_environment_for_torch

# Every process imports this package before torch, so this is early enough.
prepare_environment_for_torch()

__version__ = "0.1.0"
