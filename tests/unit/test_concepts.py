"""docs/concepts.md is correct: its code runs, and its figure shows the pairs and weights of core."""

import re
from xml.etree import ElementTree as ET

import torch
from weighted_mtp_core.api.tensors import align_weights
from weighted_mtp_core.model.loss import normalisers
from weighted_mtp_core.model.targets import align_labels, target_mask

WEIGHT_BT = torch.tensor([[0.0, 0.0, 0.0, 0.5, 2.0, 1.0, 0.0]])
TARGET_BTK = target_mask(
    align_labels(
        torch.arange(7)[None],
        document_BT=torch.tensor([[0, 0, 0, 0, 0, 0, -1]]),
        response_BT=torch.tensor([[False, False, False, True, True, True, False]]),
        n_future=3,
    )
)


def code(repository):
    (block,) = re.findall(
        r"```python\n(.*?)```", (repository / "docs" / "concepts.md").read_text(), re.DOTALL
    )
    names = {}
    exec(block, names)
    return names


def test_its_code_runs_and_its_pairs_are_the_counted_ones(repository):
    assert torch.equal(code(repository)["view"].target_BTK, TARGET_BTK)


def test_its_figure_shows_the_weights_of_the_pairs(repository):
    texts = ET.parse(repository / "docs" / "figures" / "pairs.svg").iter("{http://www.w3.org/2000/svg}text")
    shown = {text.get("id"): float(text.text) for text in texts if text.get("id")}
    weight_BTK = align_weights(WEIGHT_BT, TARGET_BTK)

    assert shown == {f"t{t}k{k}": float(weight_BTK[0, t, k - 1]) for t in range(7) for k in range(1, 4)}


def test_its_normaliser_is_that_of_the_figure():
    weight_BTK = align_weights(WEIGHT_BT, TARGET_BTK)

    assert normalisers(weight_BTK, TARGET_BTK, normalise="weights").tolist() == [3.5, 3.5, 3.5]
    assert normalisers(weight_BTK, TARGET_BTK, normalise="tokens").tolist() == [3.0, 3.0, 3.0]
