"""Trunks for components: a frozen or trainable copy of the policy's trunk, or the body of another model.

Shape letters: B rows, T positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weighted_mtp_core.api import Batch
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.model.adapters import merged_copy
from weighted_mtp_core.model.load import find_base
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.pretrained import load_pretrained
from weighted_mtp_core.runtime.fsdp import callable_, copy_of
from weighted_mtp_core.runtime.sharding import mesh_of_parameters


class Trunk(nn.Module):
    """Maps a batch to float32 states `[B, T, H]`.

    Dropout is disabled even if the model's config enables it, so that a text always gets the same states.

    Args:
        body: A transformers model without its unembedding, sharded or not; it is not copied.
    """

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = callable_(body.eval())
        self.hidden_size = int(body.config.hidden_size)

    def forward(self, batch: Batch) -> Tensor:
        """Return the states of a batch; documents that share a row do not attend to each other."""
        states: Tensor = self.body(
            input_ids=batch.ids_BT, position_ids=batch.position_BT, use_cache=False
        ).last_hidden_state
        return states.float()


def frozen_trunk(policy: Policy) -> Callable[[Batch], Tensor]:
    """Copy the trunk; return a function that maps a batch to float32 states `[B, T, H]` without gradient."""
    trunk = Trunk(copy_of(policy.trunk)).requires_grad_(requires_grad=False)
    return torch.no_grad()(trunk.forward)


def trainable_trunk(policy: Policy, base: str | None, *, storage: Path, tokenizer: Any) -> Trunk:
    """Return a trainable trunk that shares no parameters with the policy.

    Args:
        policy: The policy, whose current trunk is copied unless `base` names another model. Adapters in the
            trunk are merged in the copy.
        base: Name of a model as in `model.base`; its whole body, with all layers and the final norm, becomes
            the trunk. None copies the policy's trunk.
        storage: The storage root, where models are looked up.
        tokenizer: The policy's tokenizer.

    Raises:
        WmtpError: `base` does not name a model, the model cannot be loaded, or its tokenizer differs from the
            policy's tokenizer; or `base` is None, and the policy is sharded and has adapters.
    """
    if base is None:
        return Trunk(merged_copy(policy.trunk)).requires_grad_(requires_grad=True)
    from transformers import AutoModel

    folder = find_base(base, storage=storage)
    mesh = mesh_of_parameters(policy)
    own_tokenizer, body = load_pretrained(folder, AutoModel, kind="transformer", mesh=mesh)
    if own_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise WmtpError(
            f"the tokenizer of `{folder}` differs from the policy's",
            hint="use a model of the policy's family",
        )
    return Trunk(body.to(policy.unembedding.weight.device)).requires_grad_(requires_grad=True)
