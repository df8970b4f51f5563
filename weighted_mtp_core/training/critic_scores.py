"""Computes a critic's scores in the precision of the policy, and names the plugin of a critic that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import torch
from torch import Tensor

from weighted_mtp_core.api import Batch, Critic, Scores
from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.messages import reason
from weighted_mtp_core.runtime.device import Autocast


@contextmanager
def critic_errors(label: str) -> Iterator[None]:
    """Add the critic's address, plugin, distribution and version (`label`) to every error of the block.

    Raises:
        RunFailedError: The block failed.
    """
    try:
        yield
    except WmtpError as error:
        raise RunFailedError(f"{label} failed: {error}", hint=error.hint) from error
    except Exception as error:  # a plugin can raise any exception
        raise RunFailedError(f"{label} failed: {reason(error)}") from error


def critic_scores(
    critic: Critic, batch: Batch, hidden_BTH: Tensor | None, *, autocast: Autocast, label: str
) -> Scores:
    """Return a critic's scores of a batch.

    Args:
        critic: The critic.
        batch: The batch.
        hidden_BTH: The policy's trunk states; None for a critic that does not read them.
        autocast: Returns a context manager that sets the precision of a forward pass.
        label: The critic's address, plugin, distribution and version, for messages.

    Raises:
        RunFailedError: The critic failed, or returned a tensor that is not float32.
    """
    with critic_errors(label), autocast():
        return checked(critic.score(batch, None if hidden_BTH is None else hidden_BTH.detach().float()))


def checked(scores: Scores) -> Scores:
    """Return the scores unchanged if there are any and all their tensors are float32.

    Raises:
        RunFailedError: All fields of the scores are None, or a tensor of the scores is not float32.
    """
    given = {name: each for name, each in attrs.asdict(scores, recurse=False).items() if each is not None}
    if not given:
        raise RunFailedError(
            "`score` returned no scores: all fields are None", hint="return what the critic `provides`"
        )
    for name, value in given.items():
        if value.dtype != torch.float32:
            raise RunFailedError(
                f"`score` returned `{name}` as {value.dtype}, expected torch.float32",
                hint="autocast makes matrix products bfloat16: compute the end of a score on `.float()`",
            )
    return scores
