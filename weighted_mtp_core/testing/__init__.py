"""Conformance suites: what core promises of each kind of component, as tests that a plugin subclasses.

    from weighted_mtp_core.testing import WeightingStrategySuite

    class TestMyWeighting(WeightingStrategySuite):
        address = "my_plugin.my_weighting"

Components with required options override the fixture `options`, a recipe's `[<kind>.options]` table.
Needs the extra `testing` (`pip install weighted-mtp-core[testing]`).
"""

from __future__ import annotations

import pytest

for _module in ("component", "critic", "data_source", "tracker", "weighting"):
    pytest.register_assert_rewrite(f"{__name__}.{_module}")

from weighted_mtp_core.testing.component import ComponentSuite  # noqa: E402 - rewritten first
from weighted_mtp_core.testing.critic import CriticSuite  # noqa: E402
from weighted_mtp_core.testing.data_source import DataSourceSuite  # noqa: E402
from weighted_mtp_core.testing.tracker import TrackerSuite  # noqa: E402
from weighted_mtp_core.testing.weighting import WeightingStrategySuite  # noqa: E402

__all__ = [
    "ComponentSuite",
    "CriticSuite",
    "DataSourceSuite",
    "TrackerSuite",
    "WeightingStrategySuite",
]
