"""`given.weights`: conformance to core, and the unchanged weights of the data."""

import json

import pytest
import torch
from weighted_mtp_core.api import StepView
from weighted_mtp_core.testing import WeightingStrategySuite

from weighted_mtp_given import WeightsOptions, build_weights


class TestWeights(WeightingStrategySuite):
    address = "given.weights"


def test_the_weights_of_the_data_are_returned_as_they_are():
    given_BT = torch.tensor([[0.0, 0.5, 0.1, 2.0]])
    view = StepView(
        ids_BT=torch.arange(4)[None],
        document_BT=torch.zeros(1, 4, dtype=torch.long),
        response_BT=torch.tensor([[False, True, True, True]]),
        target_BTK=torch.zeros(1, 4, 2, dtype=torch.bool),
        n_future=2,
        step=0,
        training=True,
        given_BT=given_BT,
    )

    weights = build_weights(WeightsOptions(), None).weigh(view)

    assert torch.equal(weights.weight, given_BT)


def test_a_run_with_rows_without_weights_stops_before_training(wmtp_tiny_run, capsys):
    with pytest.raises(AssertionError, match="the run failed"):
        wmtp_tiny_run({"weighting": {"use": "given.weights"}})

    assert (
        "weighting `given.weights` needs weights that come with the data, but no training example"
        in capsys.readouterr().err
    )


@pytest.fixture
def signed(tmp_path):
    """Return a recipe whose data have a negative weight in every second row."""
    path = tmp_path / "signed.jsonl"
    rows = [{"prompt": f"{i}: ", "response": "yes", "weight": (-1) ** i / 2} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "data": {"use": "core.jsonl", "options": {"path": str(path)}},
        "weighting": {"use": "given.weights"},
    }


def test_negative_weights_without_permission_are_refused_with_row_and_file(wmtp_tiny_run, capsys, signed):
    with pytest.raises(AssertionError, match="the run failed"):
        wmtp_tiny_run(signed)

    error = capsys.readouterr().err
    assert "signed.jsonl: 20 bad lines\n" in error
    assert "  line 2: `weight` -0.5 is negative: `loss.negative_weights = true` allows it\n" in error


def test_negative_weights_with_permission_are_trained_on(wmtp_tiny_run, signed):
    metrics = wmtp_tiny_run({**signed, "loss": {"negative_weights": True}}).metrics

    assert (metrics["weight_p05"], metrics["weight_p95"]) == (-0.5, 0.5)
    assert metrics["effective_sample_share"] == 1.0  # all weights have the same absolute value
