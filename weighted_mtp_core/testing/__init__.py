"""Provide conformance suites: test classes with the checks that every component must pass.

The tests of a plugin subclass the suite for the kind of its component:

    from weighted_mtp_core.testing import WeightingStrategySuite

    class TestMyWeighting(WeightingStrategySuite):
        address = "my_plugin.my_weighting"

If a component has required options, its test class overrides the fixture `options`, which returns the table
`[<kind>.options]` of a recipe. The suites need the extra `testing`, which
`pip install weighted-mtp-core[testing]` installs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weighted_mtp_core.testing.component import ComponentSuite
    from weighted_mtp_core.testing.critic import CriticSuite
    from weighted_mtp_core.testing.data_source import DataSourceSuite
    from weighted_mtp_core.testing.tracker import TrackerSuite
    from weighted_mtp_core.testing.weighting import WeightingStrategySuite

__all__ = [
    "ComponentSuite",
    "CriticSuite",
    "DataSourceSuite",
    "TrackerSuite",
    "WeightingStrategySuite",
]
_MODULES = dict(zip(__all__, ("component", "critic", "data_source", "tracker", "weighting"), strict=True))


def __getattr__(name: str) -> Any:
    """Import a suite on first use, because every pytest run imports this package to load `pytest_plugin`."""
    if name not in _MODULES:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
