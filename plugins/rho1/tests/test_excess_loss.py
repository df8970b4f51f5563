"""`rho1.excess_loss`: conformance to core, and selections worked out by hand."""

import math

import pytest
import torch
from weighted_mtp_core.api import StepView
from weighted_mtp_core.testing import WeightingStrategySuite

from weighted_mtp_rho1 import ExcessLossOptions, build_excess_loss


class TestExcessLoss(WeightingStrategySuite):
    address = "rho1.excess_loss"

    @pytest.fixture(
        params=[{}, {"per": "target"}, {"selection": "soft"}, {"per": "target", "selection": "soft"}],
        ids=["head-top", "target-top", "head-soft", "target-soft"],
    )
    def options(self, request):
        return request.param


def weigh(view, **options):
    return build_excess_loss(ExcessLossOptions(**options), None).weigh(view)


def one_response(loss, reference):
    """Return a view of a prompt token and a response; `loss[k - 1]` holds head k's losses by target token."""
    length, heads = len(reference) + 1, len(loss)
    loss_BTK = torch.zeros(1, length, heads)
    target_BTK = torch.zeros(1, length, heads, dtype=torch.bool)
    for k in range(1, heads + 1):
        for target in range(1, length):
            if target >= k:
                loss_BTK[0, target - k, k - 1] = loss[k - 1][target - 1]
                target_BTK[0, target - k, k - 1] = True
    return StepView(
        ids_BT=torch.zeros(1, length, dtype=torch.long),
        document_BT=torch.zeros(1, length, dtype=torch.long),
        response_BT=torch.arange(length)[None] > 0,
        target_BTK=target_BTK,
        n_future=heads,
        step=0,
        training=True,
        token_loss_BTK=loss_BTK,
        reference_loss_BT=torch.tensor([[0.0, *reference]]),
    )


# Excess losses: 1.5, -.2, .4, .1, -.1, 1.3, .1, 1.2, -.5, -.2. Tokens 0, 2, 3, 5, 6, 7 have the six largest.
POLICY = [2.0, 1.0, 0.5, 3.0, 0.2, 1.5, 0.9, 2.2, 0.1, 1.1]
REFERENCE = [0.5, 1.2, 0.1, 2.9, 0.3, 0.2, 0.8, 1.0, 0.6, 1.3]
SELECTED = {0, 2, 3, 5, 6, 7}


def test_the_papers_selection_by_hand():
    weights = weigh(one_response([POLICY], REFERENCE), keep=0.6)

    # Head 1 predicts response token i from position i, because one prompt token precedes it.
    assert {int(t) for t in weights.weight[0, :, 0].nonzero()} == SELECTED
    assert set(weights.weight.unique().tolist()) == {0.0, 1.0}
    assert float(weights.metrics["selected_fraction"]) == pytest.approx(0.6)
    assert float(weights.metrics["excess_loss_mean"]) == pytest.approx(0.36)


def test_selection_per_target_is_head_ones_for_all_heads():
    view = one_response([POLICY, POLICY[::-1]], REFERENCE)

    weight_BT = weigh(view, keep=0.6, per="target").weight

    assert {int(t) - 1 for t in weight_BT[0].nonzero()} == SELECTED


def test_each_head_selects_its_own_share():
    reversed_heads = one_response([POLICY, POLICY[::-1]], REFERENCE)

    weight_BTK = weigh(reversed_heads, keep=0.6).weight

    # Head 2 predicts nine of the ten targets and selects five (5.4 rounded), by its own excess losses.
    excess = [own - other for own, other in zip(POLICY[::-1], REFERENCE, strict=True)]
    best = sorted(range(1, 10), key=lambda target: -excess[target])[:5]
    assert {int(t) for t in weight_BTK[0, :, 0].nonzero()} == SELECTED
    assert {int(t) + 1 for t in weight_BTK[0, :, 1].nonzero()} == set(best)


def test_soft_selection_by_hand():
    weight_BTK = weigh(one_response([POLICY], REFERENCE), keep=0.6, selection="soft", temperature=0.5).weight

    # The sixth largest excess, .1, is the threshold; token 0 lies 1.4 above it, token 8 lies .6 below.
    assert float(weight_BTK[0, 3, 0]) == pytest.approx(0.5, abs=1e-5)
    assert float(weight_BTK[0, 0, 0]) == pytest.approx(1 / (1 + math.exp(-1.4 / 0.5)), abs=1e-5)
    assert float(weight_BTK[0, 8, 0]) == pytest.approx(1 / (1 + math.exp(0.6 / 0.5)), abs=1e-5)


def test_a_soft_selection_hardens_as_the_temperature_falls():
    # No two excess losses are equal here, so only the target at the threshold gets 0.5.
    policy = [2.0, 1.0, 0.5, 3.0, 0.2]
    view = one_response([policy], [0.0] * 5)

    soft_BTK = weigh(view, keep=0.6, selection="soft", temperature=1e-4).weight

    torch.testing.assert_close(soft_BTK[0, :5, 0], torch.tensor([1.0, 0.5, 0.0, 1.0, 0.0]))


def test_keeping_everything_is_unweighted_training():
    view = one_response([POLICY, POLICY], REFERENCE)

    assert torch.equal(weigh(view, keep=1.0).weight, view.target_BTK.float())


@pytest.mark.parametrize("per", ["head", "target"])
@pytest.mark.parametrize("selection", ["top", "soft"])
def test_a_reference_loss_that_is_nan_is_no_reason_to_select_a_target(per, selection):
    """Core refuses weights that are NaN."""
    reference = [*REFERENCE[:4], math.nan, *REFERENCE[5:]]

    weight = weigh(one_response([POLICY], reference), per=per, selection=selection).weight

    assert weight.isnan().any()


def test_at_least_one_target_is_kept():
    view = one_response([POLICY[:2]], REFERENCE[:2])

    assert float(weigh(view, keep=0.01).weight.sum()) == 1.0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keep": 0.0}, "must be > 0: 0.0"),
        ({"keep": 1.5}, "must be <= 1"),
        ({"selection": "soft", "temperature": 0.0}, "must be > 0"),
        ({"temperature": 0.1}, 'has no effect with `selection = "top"`; leave it out: 0.1'),
    ],
)
def test_options_that_make_no_sense_are_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        ExcessLossOptions(**options)
