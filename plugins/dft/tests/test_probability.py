"""`dft.probability`: conformance to core, and weights worked out by hand."""

import math

import pytest
import torch
from weighted_mtp_core.api import StepView
from weighted_mtp_core.testing import WeightingStrategySuite

from weighted_mtp_dft import ProbabilityOptions, build_probability


class TestProbability(WeightingStrategySuite):
    address = "dft.probability"

    @pytest.fixture(params=[0.0, 0.3])
    def options(self, request):
        return {"floor": request.param}


def view(probability):
    """Return a view of a prompt token and a response of three tokens.

    Head k at position t gives its target the probability `probability[t][k - 1]`.
    """
    probability_BTK = torch.tensor([probability])
    target_BTK = probability_BTK > 0
    return StepView(
        ids_BT=torch.arange(4)[None],
        document_BT=torch.zeros(1, 4, dtype=torch.long),
        response_BT=torch.tensor([[False, True, True, True]]),
        target_BTK=target_BTK,
        n_future=2,
        step=0,
        training=True,
        token_loss_BTK=(-probability_BTK.log()).where(target_BTK, 0.0),
    )


BY_HAND = [[0.5, 0.2], [0.9, 0.05], [0.01, 0.0], [0.0, 0.0]]


def test_the_weight_of_a_pair_is_the_probability_of_its_target():
    weights = build_probability(ProbabilityOptions(), None).weigh(view(BY_HAND))

    torch.testing.assert_close(weights.weight, torch.tensor([BY_HAND]))


def test_the_floor_is_the_smallest_weight():
    weights = build_probability(ProbabilityOptions(floor=0.1), None).weigh(view(BY_HAND))

    expected = [[0.5, 0.2], [0.9, 0.1], [0.1, 0.0], [0.0, 0.0]]
    torch.testing.assert_close(weights.weight, torch.tensor([expected]))
    assert float(weights.metrics["floored_fraction"]) == pytest.approx(2 / 5)
    assert float(weights.metrics["own_probability_mean"]) == pytest.approx(
        (0.5 + 0.2 + 0.9 + 0.05 + 0.01) / 5
    )


def test_a_floor_of_one_is_unweighted_training():
    weights = build_probability(ProbabilityOptions(floor=1.0), None).weigh(view(BY_HAND))

    assert torch.equal(weights.weight, view(BY_HAND).target_BTK.float())


def test_the_weighted_gradient_is_that_of_the_probability():
    # Wu et al. 2025: the sum of sg(p) * (-log p) has the gradient of the sum of -p; sg stops the gradient.
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(0), requires_grad=True)
    label = torch.arange(6)
    loss_N = torch.nn.functional.cross_entropy(logits, label, reduction="none")
    one_row = StepView(
        ids_BT=torch.zeros(1, 6, dtype=torch.long),
        document_BT=torch.zeros(1, 6, dtype=torch.long),
        response_BT=torch.ones(1, 6, dtype=torch.bool),
        target_BTK=torch.ones(1, 6, 1, dtype=torch.bool),
        n_future=1,
        step=0,
        training=True,
        token_loss_BTK=loss_N.detach()[None, :, None],
    )
    weight_N = build_probability(ProbabilityOptions(), None).weigh(one_row).weight.flatten()

    (weighted,) = torch.autograd.grad((weight_N * loss_N).sum(), logits, retain_graph=True)
    (of_probability,) = torch.autograd.grad(-torch.exp(-loss_N).sum(), logits)

    torch.testing.assert_close(weighted, of_probability)
    assert math.isfinite(float(weighted.sum()))
