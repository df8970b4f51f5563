"""Conformance of the plugin's components to core, for each of their main options."""

import pytest
from weighted_mtp_core.testing import CriticSuite, WeightingStrategySuite


class TestTdError(WeightingStrategySuite):
    address = "verifiable.td_error"

    @pytest.fixture(
        params=[
            {"whiten": "batch"},
            {"whiten": "ema"},
            {"whiten": "none"},
            {"positives_only": True, "per_response": True},
            {"sign": "reward"},
        ],
        ids=["batch", "ema", "none", "positives_only", "sign"],
    )
    def options(self, request):
        return request.param


class TestSuccessRatio(WeightingStrategySuite):
    address = "verifiable.success_ratio"

    @pytest.fixture(
        params=[{}, {"where": "wrong", "cap": 1.0, "power": 2.0}, {"span": "line"}, {"heads": "path"}],
        ids=["all", "wrong", "line", "path"],
    )
    def options(self, request):
        return request.param


class TestGroupAdvantage(WeightingStrategySuite):
    address = "verifiable.group_advantage"

    @pytest.fixture(params=[{}, {"positives_only": True}], ids=["all", "positives_only"])
    def options(self, request):
        return request.param


class TestValueHead(CriticSuite):
    address = "verifiable.value_head"

    @pytest.fixture(
        params=[
            {},
            {"objective": "lambda_return"},
            {"objective": "bradley_terry"},
            {"body": "policy", "layers": 0, "lm_loss_weight": 0.0},
            {"body": "frozen", "layers": 1},
            {"body": "trunk", "layers": 0, "lm_loss_weight": 0.0},
            {"body": "trunk", "layers": 1, "lora_rank": 2},
        ],
        ids=["monte_carlo", "lambda_return", "bradley_terry", "policy", "frozen", "trunk", "lora"],
    )
    def options(self, request):
        return {"hidden_size": 16, "heads": 2, "layers": 2, **request.param}


class TestLanguageModels(CriticSuite):
    address = "verifiable.language_models"

    @pytest.fixture(
        params=[{}, {"folds": 2, "lora_rank": 2}, {"right_model": "one", "all_model": "another"}],
        ids=["trained", "folds", "finished"],
    )
    def options(self, request):
        return request.param
