"""`dft.entropy`: conformance to core, and selections worked out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weighted_mtp_core.api import StepView
from weighted_mtp_core.testing import WeightingStrategySuite

from weighted_mtp_dft import EntropyOptions, build_entropy


class TestEntropy(WeightingStrategySuite):
    address = "dft.entropy"

    @pytest.fixture(params=[0.2, 0.5, 1.0])
    def options(self, request):
        return {"keep": request.param}


def view(entropy, target):
    """Return a view of one row, with entropies and targets by source position and head."""
    entropy_BTK, target_BTK = torch.tensor([entropy]), torch.tensor([target])
    length = entropy_BTK.shape[1]
    return StepView(
        ids_BT=torch.arange(length)[None],
        document_BT=torch.zeros(1, length, dtype=torch.long),
        response_BT=torch.ones(1, length, dtype=torch.bool),
        target_BTK=target_BTK,
        n_future=entropy_BTK.shape[2],
        step=0,
        training=True,
        token_entropy_BTK=entropy_BTK * target_BTK,
    )


def weigh(keep, seen):
    return build_entropy(EntropyOptions(keep=keep), None).weigh(seen)


# Head 1 has four targets, head 2 two; a source without targets has a large entropy that does not count.
ENTROPY = [[1.0, 0.3], [2.0, 0.4], [0.5, 0.0], [1.5, 0.0], [9.0, 9.0]]
TARGET = [[True, True], [True, True], [True, False], [True, False], [False, False]]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (0.5, [[0, 0], [1, 1], [0, 0], [1, 0], [0, 0]]),  # two of four: 2.0 and 1.5; one of two: 0.4
        (0.01, [[0, 0], [1, 1], [0, 0], [0, 0], [0, 0]]),  # at least one for each head
        (1.0, [[1, 1], [1, 1], [1, 0], [1, 0], [0, 0]]),  # unweighted training
    ],
)
def test_each_head_keeps_its_targets_with_the_largest_entropy(keep, expected):
    assert weigh(keep, view(ENTROPY, TARGET)).weight.tolist() == [expected]


def test_metrics_by_hand():
    metrics = weigh(0.5, view(ENTROPY, TARGET)).metrics

    assert float(metrics["entropy_mean"]) == pytest.approx((1.0 + 0.3 + 2.0 + 0.4 + 0.5 + 1.5) / 6)
    assert float(metrics["entropy_kept_mean"]) == pytest.approx((2.0 + 1.5 + 0.4) / 3)


def test_ties_with_the_threshold_are_kept():
    seen = view([[1.0], [1.0], [1.0], [0.5]], [[True]] * 4)

    assert weigh(0.25, seen).weight.flatten().tolist() == [1.0, 1.0, 1.0, 0.0]


@given(
    st.lists(st.floats(0, 4, width=32), min_size=1, max_size=12, unique=True),
    st.floats(0.01, 1.0),
)
def test_kept_targets_have_more_entropy_than_dropped_ones(entropies, keep):
    weights = weigh(keep, view([[each] for each in entropies], [[True]] * len(entropies))).weight.flatten()
    kept = [entropy for entropy, weight in zip(entropies, weights, strict=True) if weight]
    left = [entropy for entropy, weight in zip(entropies, weights, strict=True) if not weight]

    assert len(kept) == pytest.approx(max(keep * len(entropies), 1), abs=0.501)  # rounded
    assert not left or min(kept) > max(left)


@pytest.mark.parametrize(("keep", "expected"), [(0.0, "must be > 0"), (1.5, "must be <= 1")])
def test_options_that_make_no_sense_are_refused(keep, expected):
    with pytest.raises(ValueError, match=expected):
        EntropyOptions(keep=keep)
