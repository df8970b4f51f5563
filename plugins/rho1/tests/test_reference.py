"""`rho1.reference`: conformance to core, and the losses of the frozen model."""

from pathlib import Path

import attrs
import pytest
import torch
from weighted_mtp_core.api import BuildContext
from weighted_mtp_core.testing import CriticSuite, documents

from weighted_mtp_rho1 import ReferenceOptions, build_reference


class TestReference(CriticSuite):
    address = "rho1.reference"


@pytest.mark.parametrize("checkpoint", [None, "runs/first/checkpoints/best_model.pt"])
def test_its_losses_are_those_of_the_frozen_model(checkpoint):
    requested = []

    def frozen_losses(path):
        requested.append(path)
        return lambda batch: 0.5 * batch.response_BT

    model = attrs.evolve(documents.model_context(), frozen_losses=frozen_losses)
    context = BuildContext(seed=0, storage=Path("storage"), model=model)
    batch = documents.PACKED.batch()

    scores = build_reference(ReferenceOptions(checkpoint=checkpoint), context).score(batch, None)

    assert requested == [checkpoint and Path(checkpoint)]
    assert torch.equal(scores.reference_loss_BT, 0.5 * batch.response_BT)
    assert scores.value_BT is None
