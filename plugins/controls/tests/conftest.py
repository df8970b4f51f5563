"""The plugin `leaves` with weightings to wrap, which is installed for these tests only."""

import sys
from textwrap import dedent

import pytest

LEAVES = """
    from attrs import frozen
    from weighted_mtp_core.api import Component, Signal, WeightingStrategy, Weights, WmtpError, hookimpl

    @frozen(kw_only=True)
    class LeafOptions:
        scale: float = 1.0

    class ByValue(WeightingStrategy):
        '''Weighs tokens by value, and a little more with each training batch.'''

        def __init__(self, options, context):
            self.scale = options.scale
            self.seen = 0

        def weigh(self, view):
            self.seen += view.training
            weight_BT = (self.scale * (4 * view.value_BT).clamp(0.5, 3.0) + self.seen) * view.response_BT
            return Weights(weight=weight_BT, metrics={"seen": float(self.seen)})

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state):
            if set(state) != {"seen"}:
                raise WmtpError(f"unknown state: {sorted(state)}")
            self.seen = state["seen"]

    class ByLoss(WeightingStrategy):
        '''Weighs pairs by the policy's own loss.'''

        def __init__(self, options, context):
            self.scale = options.scale

        def weigh(self, view):
            return Weights(weight=self.scale * (-view.token_loss_BTK).exp() * view.target_BTK)

    @hookimpl
    def wmtp_weighting_strategies():
        yield Component(
            name="by_value", summary="Tokens.", options=LeafOptions, build=ByValue,
            needs=frozenset({Signal.VALUE}),
        )
        yield Component(
            name="by_loss", summary="Pairs.", options=LeafOptions, build=ByLoss,
            needs=frozenset({Signal.TOKEN_LOSS}),
        )
"""


@pytest.fixture(scope="session", autouse=True)
def leaves(tmp_path_factory):
    """Install the plugin: a module and a `dist-info` folder on `sys.path`."""
    site = tmp_path_factory.mktemp("site-packages")
    (site / "wmtp_leaves.py").write_text(dedent(LEAVES))
    metadata = site / "wmtp_leaves-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: wmtp-leaves\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[weighted_mtp_core]\nleaves = wmtp_leaves\n")
    sys.path.insert(0, str(site))
    yield
    sys.path.remove(str(site))
