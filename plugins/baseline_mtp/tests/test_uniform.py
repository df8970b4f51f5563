"""`baseline_mtp.uniform`: conformance to core, and weights worked out by hand."""

import torch
from weighted_mtp_core.api import StepView
from weighted_mtp_core.testing import WeightingStrategySuite

from weighted_mtp_baseline_mtp import UniformOptions, build_uniform


class TestUniform(WeightingStrategySuite):
    address = "baseline_mtp.uniform"


def test_response_tokens_have_weight_one_and_all_others_zero():
    # Two documents in the first row (prompt, prompt, response | prompt, response), one in the second, padded.
    response_BT = torch.tensor(
        [[False, False, True, False, True], [False, True, True, False, False]],
    )
    view = StepView(
        ids_BT=torch.arange(10).view(2, 5),
        document_BT=torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, -1, -1]]),
        response_BT=response_BT,
        target_BTK=torch.zeros(2, 5, 4, dtype=torch.bool),
        n_future=4,
        step=0,
        training=True,
    )

    weights = build_uniform(UniformOptions(), None).weigh(view)

    assert weights.weight.tolist() == [[0.0, 0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0, 0.0]]
