"""A trunk that a component may train as its own: a copy of the policy's, or another model's body.

Shape letters: B rows, T positions, H hidden.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weighted_mtp_core.api import Batch
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.model.load import find_base
from weighted_mtp_core.model.policy import Policy


class Trunk(nn.Module):
    """From a batch to float32 states `[B, T, H]`, with gradients.

    It has no dropout, whatever its configuration says: what scores a text twice gives it one score.

    Args:
        body: A transformers model without its unembedding; it is the trunk's from now on.
    """

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body.eval().requires_grad_(requires_grad=True)
        self.hidden_size = int(body.config.hidden_size)

    def forward(self, batch: Batch) -> Tensor:
        """Return the states of a batch; documents that share a row do not see each other."""
        states: Tensor = self.body(
            input_ids=batch.ids_BT, position_ids=batch.position_BT, use_cache=False
        ).last_hidden_state
        return states.float()


def trainable_trunk(policy: Policy, base: str | None, *, storage: Path, tokenizer: Any) -> Trunk:
    """Return a trunk that shares nothing with the policy.

    Args:
        policy: Its trunk as it is now is copied, unless `base` names another model.
        base: Named as `model.base` is; all of its layers, its final norm included.
        storage: The storage root, where models are looked for.
        tokenizer: The policy's, whose ids the trunk will read.

    Raises:
        WmtpError: There is no such model, or it reads other tokens.
    """
    if base is None:
        return Trunk(copy.deepcopy(policy.trunk))
    return Trunk(_load_body(base, storage=storage, tokenizer=tokenizer).to(_device_of(policy)))


def _device_of(policy: Policy) -> torch.device:
    return next(policy.parameters()).device


def _load_body(base: str, *, storage: Path, tokenizer: Any) -> Any:
    from transformers import AutoModel, AutoTokenizer

    folder = find_base(base, storage=storage)
    try:
        theirs = AutoTokenizer.from_pretrained(folder)
        body = AutoModel.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise WmtpError(
            f"`{folder}` cannot be loaded as a transformer: {str(error).splitlines()[0]}",
            hint="name a transformers directory, a `.gguf` file or a reachable hub id",
        ) from error
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise WmtpError(
            f"the tokenizer of `{folder}` is not the policy's, so it reads other tokens",
            hint="take a model of the policy's family",
        )
    return body
