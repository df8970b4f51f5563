"""Conformance of every wrapper to core, whatever it wraps."""

import pytest
from weighted_mtp_core.testing import WeightingStrategySuite

WRAPPED = [
    {"use": "leaves.by_value"},
    {"use": "leaves.by_loss", "options": {"scale": 2.0}},
    {"use": "controls.clip", "options": {"high": 2.0, "of": {"use": "leaves.by_value"}}},
]


class WrapperSuite(WeightingStrategySuite):
    own_options = {}  # noqa: RUF012 - a table of a recipe

    @pytest.fixture(params=WRAPPED, ids=lambda wrapped: wrapped["use"])
    def options(self, request):
        return {"of": request.param, **self.own_options}


class TestShuffled(WrapperSuite):
    address = "controls.shuffled"


class TestRandomMatched(WrapperSuite):
    address = "controls.random_matched"


class TestClip(WrapperSuite):
    address = "controls.clip"
    own_options = {"low": 0.2, "high": 1.5}  # noqa: RUF012


class TestAnneal(WrapperSuite):
    address = "controls.anneal"
    own_options = {"end": 3}  # noqa: RUF012


class TestRecord(WrapperSuite):
    address = "controls.record"
    own_options = {"name": "kept"}  # noqa: RUF012


class TestProduct(WeightingStrategySuite):
    address = "controls.product"

    @pytest.fixture(params=[WRAPPED[:1], WRAPPED[:2], WRAPPED], ids=["one", "two", "three"])
    def options(self, request):
        return {"of": request.param}
