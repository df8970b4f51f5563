"""Computes the scores of a critic in the precision of the policy, and checks their dtype."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from weighted_mtp_core.api import Batch, Critic, Scores
from weighted_mtp_core.errors import RunFailedError
from weighted_mtp_core.runtime.device import Autocast


def critic_scores(critic: Critic, batch: Batch, hidden_BTH: Tensor | None, *, autocast: Autocast) -> Scores:
    """Return a critic's scores of a batch.

    Args:
        critic: The critic.
        batch: The batch.
        hidden_BTH: The policy's trunk states, for a critic that reads them.
        autocast: Returns a context manager that sets the precision of a forward pass.

    Raises:
        RunFailedError: The critic returns a tensor that is not float32.
    """
    with autocast():
        scores = critic.score(batch, None if hidden_BTH is None else hidden_BTH.detach().float())
    for name, value in attrs.asdict(scores, recurse=False).items():
        if value is not None and value.dtype != torch.float32:
            raise RunFailedError(
                f"critic `{type(critic).__name__}` returned `{name}` as {value.dtype}, expected "
                "torch.float32",
                hint="autocast makes matrix products bfloat16: compute the end of a score on `.float()`",
            )
    return scores
