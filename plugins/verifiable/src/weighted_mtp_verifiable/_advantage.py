"""TD errors and generalised advantage estimation, for whole batches at once.

A response is an episode. The state before token t is the prefix that ends at token t - 1, and the action is
token t. The only reward R comes with the last response token; the value after this token is 0.

Shape letters: B batch rows, T positions.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from weighted_mtp_verifiable._reductions import discounted_sums, remaining_response_tokens, same_as_previous


def td_errors(
    value_BT: Tensor, reward_BT: Tensor, *, document_BT: Tensor, response_BT: Tensor, gamma: float
) -> Tensor:
    """Return the TD error `delta_t = r_t + gamma * V_t - V_{t-1}` of each token (Sutton 1988).

    The reward r_t of token t is R at the last response token and 0 elsewhere; gamma is the discount.

    Args:
        value_BT: V_t, the value of the prefix that ends at token t; finite.
        reward_BT: The reward R of the response, on each of its tokens.
        document_BT: Number of the document within the row; -1 on padding.
        response_BT: True on response tokens.
        gamma: Discount per token.

    Returns:
        TD errors `[B, T]`; 0 if neither the token nor a later token of its document is a response token, for
        example on padding. Prompt tokens, and tokens between two stretches of a response, have TD errors too,
        so that intermediate values cancel in a sum over a document. For the first token of a document, the
        previous value V_{t-1} is taken as 0.
    """
    remaining_BT = remaining_response_tokens(response_BT, document_BT)
    last_BT = response_BT & (remaining_BT == 1)
    before_BT = F.pad(value_BT[:, :-1], (1, 0)).where(same_as_previous(document_BT), 0.0)
    after_BT = reward_BT.where(last_BT, gamma * value_BT)
    return (after_BT - before_BT).where(remaining_BT >= 1, 0.0)


def advantages(delta_BT: Tensor, *, document_BT: Tensor, gamma: float, lam: float) -> Tensor:
    """Return the advantage `A_t = sum_l (gamma * lam)^l * delta_{t+l}` of each token t in its document.

    Here delta_t is the TD error of token t. The formula is generalised advantage estimation (Schulman et al.
    2016, https://arxiv.org/abs/1506.02438, eq. 16). With `gamma = lam = 1`, the advantage is `R - V_{t-1}`,
    the reward R of the response minus the value V_{t-1} before token t.
    """
    return discounted_sums(delta_BT, document_BT=document_BT, discount=gamma * lam)
