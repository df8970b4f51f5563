"""A trunk that a component trains as its own: a copy of the policy's, or the body of another model.

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

    It has no dropout, whatever its config says: a text always gets the same score.

    Args:
        body: A transformers model without its unembedding; used, not copied.
    """

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body.eval().requires_grad_(requires_grad=True)
        self.hidden_size = int(body.config.hidden_size)

    def forward(self, batch: Batch) -> Tensor:
        """Return the states of a batch; documents that share a row do not attend to each other."""
        states: Tensor = self.body(
            input_ids=batch.ids_BT, position_ids=batch.position_BT, use_cache=False
        ).last_hidden_state
        return states.float()


def trainable_trunk(policy: Policy, base: str | None, *, storage: Path, tokenizer: Any) -> Trunk:
    """Return a trunk that shares nothing with the policy.

    Args:
        policy: Its present trunk is copied, unless `base` names another model.
        base: A model, named as in `model.base`; all of its layers and its final norm are used.
        storage: The storage root, where models are looked up.
        tokenizer: The policy's.

    Raises:
        WmtpError: There is no such model, or its tokenizer differs from the policy's.
    """
    if base is None:
        return Trunk(copy.deepcopy(policy.trunk))
    device: torch.device = policy.unembedding.weight.device
    return Trunk(_load_body(base, storage=storage, tokenizer=tokenizer).to(device))


def _load_body(base: str, *, storage: Path, tokenizer: Any) -> Any:
    from transformers import AutoModel, AutoTokenizer

    folder = find_base(base, storage=storage)
    try:
        own_tokenizer = AutoTokenizer.from_pretrained(folder)
        body = AutoModel.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise WmtpError(
            f"`{folder}` cannot be loaded as a transformer: {str(error).splitlines()[0]}",
            hint="name a transformers directory, a `.gguf` file or a reachable hub id",
        ) from error
    if own_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise WmtpError(
            f"the tokenizer of `{folder}` is not the policy's, so it reads other tokens",
            hint="take a model of the policy's family",
        )
    return body
