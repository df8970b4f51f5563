"""Muon for the matrices of hidden layers: a momentum whose singular values are set to about 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weighted_mtp_core.training.one_by_one import OneByOne


class Muon(OneByOne):
    """torch's Muon (Jordan et al. 2024), with the update scaled as in Liu et al. 2025, eq. 4.

    With that scale, 0.2 sqrt(max(rows, columns)), an update has the size of an update of AdamW, so learning
    rate and weight decay mean the same for both. The momentum is 0.95 (Nesterov), and five Newton-Schulz
    iterations in bfloat16 replace the singular values.

    Args:
        groups: Groups of matrices, with `weight_decay`.
        lr: Learning rate.
    """

    needs_whole = True

    def __init__(self, groups: list[dict[str, object]], *, lr: float) -> None:
        super().__init__(groups, {"lr": lr})

    def update(
        self,
        parameter: nn.Parameter,
        state: Mapping[str, Tensor],
        group: Mapping[str, Any],
        *,
        original: nn.Parameter,  # noqa: ARG002
    ) -> Mapping[str, Tensor]:
        """Update a matrix by its gradient; the state is `momentum_buffer`, with the shape of the matrix."""
        muon = torch.optim.Muon(
            [parameter],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=0.95,
            nesterov=True,
            adjust_lr_fn="match_rms_adamw",
        )
        if state:
            muon.state[parameter] = dict(state)
        muon.step()  # type: ignore[no-untyped-call]
        found: Mapping[str, Tensor] = muon.state[parameter]
        return found
