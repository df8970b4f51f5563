"""Muon for the matrices of hidden layers: an update is the momentum with singular values set to about 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weighted_mtp_core.training.one_by_one import OneByOne


class Muon(OneByOne):
    """torch's Muon (Jordan et al. 2024), with the update scaled as in Liu et al. 2025, eq. 4.

    With the scale 0.2 sqrt(max(rows, columns)), updates of Muon are about as large as updates of AdamW, so
    the same learning rate and weight decay suit both optimisers. The momentum is 0.95 (Nesterov). Five
    Newton-Schulz iterations in bfloat16 set the singular values to about 1.

    Args:
        groups: Groups of matrices; each group is a dict with `params` and `weight_decay`.
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
        """Update a matrix with its gradient; the state is `momentum_buffer`, with the shape of the matrix."""
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
