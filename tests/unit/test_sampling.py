"""Drawing and accepting tokens: the distribution of the result, worked out independently of the code."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weighted_mtp_core.generation.sampling import accept, accept_greedy, draw, probabilities

GRID = 1000  # uniform numbers, in the middle of equal steps


def distributions(size):
    """Distributions over `size` tokens, some of which may be impossible."""
    counts = st.lists(st.integers(0, 20), min_size=size, max_size=size).filter(any)
    return counts.map(lambda each: torch.tensor(each, dtype=torch.float32) / sum(each))


def grid():
    return (torch.arange(GRID) + 0.5) / GRID


@given(
    st.lists(st.integers(0, 1), min_size=3, max_size=3), st.lists(st.integers(0, 1), min_size=4, max_size=4)
)
def test_greedy_drafts_are_accepted_up_to_the_first_that_is_not_the_likeliest(draft, best):
    stays = 0
    while stays < 3 and draft[stays] == best[stays]:
        stays += 1

    count_R, token_R = accept_greedy(torch.tensor([draft]), torch.tensor([best]))

    assert (count_R.item(), token_R.item()) == (stays, best[stays])


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.floats(0.1, 3))
def test_temperature_divides_the_logits(logits, temperature):
    powers = np.exp((np.array(logits) - max(logits)) / temperature)

    actual = probabilities(torch.tensor(logits), temperature=temperature)

    np.testing.assert_allclose(actual, powers / powers.sum(), rtol=1e-4, atol=1e-6)


@given(distributions(5))
def test_draws_have_the_given_distribution(p_V):
    drawn = draw(p_V.expand(GRID, 5), grid())

    share_V = torch.bincount(drawn, minlength=5) / GRID
    torch.testing.assert_close(share_V, p_V, rtol=0, atol=1.5 / GRID)
    assert bool((p_V[drawn] > 0).all())


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
@given(p_V=distributions(6))
def test_the_ends_of_the_uniform_range_draw_possible_tokens(uniform, p_V):
    (token,) = draw(p_V[None], torch.tensor([uniform])).tolist()

    assert p_V[token] > 0


def resulting(q_V, p_V):
    """The first token's distribution when one draft from q is verified against p, in closed form.

    Uses the rule's own share of accepted drafts, over a grid of uniform numbers, and its distribution of the
    replacement: sum over drafts x of q(x) (accepted(x) [x] + (1 - accepted(x)) replacement).
    """
    result_V = torch.zeros_like(q_V)
    for token in q_V.nonzero()[:, 0].tolist():
        count_R, next_RV = accept(
            torch.full((GRID, 1), token),
            q_V.expand(GRID, 1, -1),
            p_V.expand(GRID, 2, -1),
            grid()[:, None],
        )
        result_V[token] += q_V[token] * count_R.float().mean()
        refused_RV = next_RV[count_R == 0]
        result_V += q_V[token] * (refused_RV / refused_RV.sum(dim=1, keepdim=True)).sum(dim=0) / GRID
    return result_V


@given(distributions(5), distributions(5))
def test_accepted_and_replaced_tokens_are_distributed_as_the_target(q_V, p_V):
    torch.testing.assert_close(resulting(q_V, p_V), p_V, rtol=0, atol=2 / GRID)


@given(distributions(4), distributions(4), st.integers(0, 2**32 - 1))
def test_if_all_drafts_are_accepted_the_next_token_is_drawn_from_the_target(p_V, after_V, seed):
    generator = torch.Generator().manual_seed(seed)
    draft_RD = draw(p_V.expand(6, 4), torch.rand(6, generator=generator)).reshape(3, 2)
    target_RDV = torch.stack([p_V, p_V, after_V]).expand(3, 3, 4)

    count_R, next_RV = accept(
        draft_RD, p_V.expand(3, 2, 4), target_RDV, torch.rand(3, 2, generator=generator)
    )

    assert count_R.tolist() == [2, 2, 2]
    torch.testing.assert_close(next_RV, after_V.expand(3, 4))


def test_no_draft_after_a_rejected_one_is_accepted():
    certain = torch.eye(3)
    draft_RD = torch.tensor([[0, 1, 2]])
    target_RDV = certain[[0, 2, 2, 1]][None]  # agrees with the first and the third

    count_R, next_RV = accept(draft_RD, certain[[0, 1, 2]][None], target_RDV, torch.zeros(1, 3))

    assert count_R.tolist() == [1]
    assert next_RV.tolist() == [[0, 0, 1]]


def test_a_draft_rejected_by_rounding_is_replaced_by_a_possible_token():
    p_V = torch.tensor([0.3, 0.7, 0.0])
    q_V = p_V * (1 + 2**-22)  # sums to a little more than 1, so that p - q is nowhere positive

    _, next_RV = accept(
        torch.tensor([[1]]), q_V[None, None], p_V.expand(1, 2, 3), torch.tensor([[1 - 2**-24]])
    )

    (token,) = draw(next_RV, torch.tensor([0.5])).tolist()
    assert p_V[token] > 0
