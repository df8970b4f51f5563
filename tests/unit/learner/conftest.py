"""The tests of this folder share `small_policy.py` and a batch for its policies."""

import sys
from pathlib import Path

import pytest
import torch
from weighted_mtp_core.api import Batch

sys.path.insert(0, str(Path(__file__).parent))
from small_policy import B, T, V


@pytest.fixture
def batch():
    """Rows of uneven length: a prompt of two to five tokens, a response, padding."""
    generator = torch.Generator().manual_seed(0)
    place_T = torch.arange(T)
    length_B1, prompt_B1 = torch.tensor([[12], [7], [9], [6]]), torch.tensor([[2], [5], [3], [3]])
    inside_BT = place_T < length_B1
    response_BT = inside_BT & (place_T >= prompt_B1)
    return Batch(
        ids_BT=torch.randint(0, V, (B, T), generator=generator).where(inside_BT, 0),
        document_BT=torch.where(inside_BT, 0, -1),
        response_BT=response_BT,
        reward_BT=response_BT.float(),
        group_BT=torch.arange(B)[:, None].expand(B, T).where(inside_BT, -1),
    )
