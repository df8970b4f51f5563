"""Test before training whether a model keeps the documents of a packed row separate.

Shape letters: B rows, T positions, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import reason
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.runtime.device import evaluation_mode, full_precision

_TOLERANCE = 1e-4  # relative difference between a document's fp32 states in a shared row and in its own row
_LENGTH = 8
_MEND = 'set `data.packing = "none"`: documents are then grouped by length'


@torch.no_grad()
def check_packing(policy: Policy) -> None:
    """Compare a document's states in a row of its own with its states in a row after another document.

    Raises:
        WmtpError: The model cannot be run on packed rows, or the states of a document depend on the document
            before it.
    """
    device = policy.unembedding.weight.device
    ids_BT = torch.arange(2, 2 + 2 * _LENGTH, device=device).remainder(policy.vocab_size)[None]
    position_BT = torch.arange(_LENGTH, device=device).repeat(2)[None]
    try:
        with evaluation_mode(policy), full_precision(device):
            packed = _states(policy, ids_BT, position_BT=position_BT)[:, _LENGTH:]
            alone = _states(policy, ids_BT[:, _LENGTH:], position_BT=None)
    except Exception as error:  # an unknown model can raise any exception
        raise WmtpError(
            f"a `{policy.config.model_type}` model cannot be run on packed rows ({reason(error)})", hint=_MEND
        ) from error
    gap = float((packed - alone).abs().max() / alone.abs().max().clamp(min=1e-6))
    if not gap <= _TOLERANCE:  # also True for NaN
        raise WmtpError(
            f"a `{policy.config.model_type}` model mixes documents that share a row "
            f"(states differ by {gap:.2g})",
            hint=_MEND,
        )


def _states(policy: Policy, ids_BT: Tensor, *, position_BT: Tensor | None) -> Tensor:
    """Return the states of all heads, concatenated along H."""
    hidden_BTH = policy.trunk_states(ids_BT, position_BT=position_BT)
    heads = policy.each_head_states(hidden_BTH, ids_BT=ids_BT, position_BT=position_BT)
    return torch.cat(list(heads), dim=-1)
