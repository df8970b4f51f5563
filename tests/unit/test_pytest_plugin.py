"""The fixtures that core gives to tests of plugins: an installed plugin, a tiny run, no plugins at all."""

import math
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from weighted_mtp_core.plugins.discovery import find
from weighted_mtp_core.plugins.loading import PluginRegistry

HALVES = """
    from attrs import frozen
    from weighted_mtp_core.api import Component, WeightingStrategy, Weights, hookimpl

    @frozen(kw_only=True)
    class HalvesOptions:
        weight: float = 0.5

    class Halves(WeightingStrategy):
        def __init__(self, options, context):
            self.weight = options.weight

        def weigh(self, view):
            weight_BT = self.weight * view.response_BT.float()
            return Weights(weight=weight_BT, metrics={"given_weight": self.weight})

    @hookimpl
    def wmtp_weighting_strategies():
        yield Component(name="halves", summary="Halves.", options=HalvesOptions, build=Halves)
"""


def test_a_plugin_is_installed_without_an_installer(wmtp_install_plugin):
    wmtp_install_plugin("halves", HALVES, version="1.2.3")

    assert PluginRegistry().load("halves").found.version == "1.2.3"


def test_it_is_gone_in_the_next_test():
    assert "halves" not in find()
    assert "wmtp_halves" not in sys.modules


def test_a_tiny_run_needs_nothing_but_a_weighting(wmtp_install_plugin, wmtp_tiny_run):
    wmtp_install_plugin("halves", HALVES)

    run = wmtp_tiny_run({"weighting": {"use": "halves"}})

    assert run.metrics["given_weight"] == 0.5
    assert math.isfinite(run.metrics["test_ce_head_1"])


def test_a_tiny_run_goes_through_every_stage(wmtp_install_plugin, wmtp_tiny_run, judged_plugin):
    wmtp_install_plugin("halves", HALVES)
    wmtp_install_plugin("sums", judged_plugin)

    run = wmtp_tiny_run(
        {"weighting": {"use": "halves", "options": {"weight": 0.25}}, "data": {"use": "sums"}}
    )

    assert run.metrics["given_weight"] == 0.25
    assert run.metrics["weight_mean"] == 0.25
    assert math.isfinite(run.metrics["train_loss"])
    assert run.metrics["tokens_per_forward"] >= 1
    assert (run.folder / "checkpoints" / "best_model.pt").exists()


def test_a_command_runs_in_this_process(wmtp_cli, capsys):
    assert wmtp_cli("plugins", "show", "core") == 0
    assert "core.jsonl" in capsys.readouterr().out


def test_looking_for_plugins_can_be_made_a_failure(wmtp_no_plugins):
    with pytest.raises(pytest.fail.Exception, match="must not look for installed plugins"):
        find()


def test_pytest_loads_the_fixtures_without_torch():
    (entry,) = entry_points(group="pytest11", name="weighted_mtp_core")
    code = f"import sys, {entry.value}; print('torch' in sys.modules, 'numpy' in sys.modules)"

    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert shown.stdout.split() == ["False", "False"]
