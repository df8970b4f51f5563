"""The core framework for weighted multi-token prediction; plugins supply the algorithms."""

from weighted_mtp_core.runtime.environment import prepare_environment_for_torch

# Every process imports this package before torch, so the environment variables are set in time.
prepare_environment_for_torch()

__version__ = "0.1.0"
