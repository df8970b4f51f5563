"""Each hook's docstring contains a whole plugin module; these tests run the module."""

import inspect
import types
import typing
from collections.abc import Iterable
from textwrap import dedent
from typing import Any

import pytest
import torch
from weighted_mtp_core import hookspecs
from weighted_mtp_core.api import (
    BuildContext,
    Component,
    MetricPoint,
    RunInfo,
    RunOutcome,
    StepView,
)
from weighted_mtp_core.plugins.loading import Kind, PluginRegistry


def example(kind):
    return dedent(inspect.getdoc(getattr(hookspecs, kind.hook)).split("Example:\n")[1])


@pytest.fixture
def build(install_plugin, tmp_path):
    """Install the example of a kind as a plugin, load it, build its component."""

    def build(kind, **options):
        install_plugin("shown", example(kind))
        (component,) = PluginRegistry().load("shown").components[kind].values()
        assert isinstance(component, Component)
        return component.build(component.options(**options), BuildContext(seed=0, storage=tmp_path))

    return build


def test_there_is_one_hook_a_kind():
    hooks = {name for name, each in vars(hookspecs).items() if isinstance(each, types.FunctionType)}

    assert hooks == {kind.hook for kind in Kind}


@pytest.mark.parametrize("kind", Kind)
def test_a_kinds_row_is_what_its_hook_declares(kind):
    declares = typing.get_type_hints(getattr(hookspecs, kind.hook))["return"]

    assert declares == Iterable[Component[Any, kind.interface]]
    assert f"[{kind.value}]" in getattr(hookspecs, kind.hook).__doc__


@pytest.mark.parametrize("kind", Kind)
def test_a_hook_has_no_arguments_and_says_when_it_is_called(kind):
    hook = getattr(hookspecs, kind.hook)

    assert not inspect.signature(hook).parameters
    assert "Called once" in hook.__doc__
    assert hook() == ()


@pytest.mark.parametrize("kind", Kind)
def test_the_example_builds_a_component_of_its_kind(build, kind):
    assert isinstance(build(kind), kind.interface)


def test_the_example_weighting_weighs(build):
    response_BT = torch.tensor([[False, True, True]])
    view = StepView(
        ids_BT=torch.zeros(1, 3, dtype=torch.int64),
        document_BT=torch.zeros(1, 3, dtype=torch.int64),
        response_BT=response_BT,
        target_BTK=response_BT[:, :, None],
        n_future=1,
        step=0,
        training=True,
        reward_BT=torch.tensor([[0.0, 1.0, 0.0]]),
    )

    weights = build(Kind.WEIGHTING, floor=0.25).weigh(view)

    assert weights.weight.tolist() == [[0.0, 1.0, 0.25]]


def test_the_example_critic_scores(build):
    batch = types.SimpleNamespace(response_BT=torch.tensor([[False, True, True]]))

    scores = build(Kind.CRITIC, slope=0.5).score(batch, None)

    assert scores.value_BT.tolist() == [[1.0, 0.5, 0.0]]


def test_the_example_source_has_disjoint_splits_and_a_version(build):
    source = build(Kind.DATA)
    splits = [
        {each.example_id for each in source.examples(split)} for split in ("train", "validation", "test")
    ]

    assert len(set.union(*splits)) == sum(map(len, splits)) == 100
    assert len(source.version().sha256) == 64


def test_the_example_tracker_writes_lines(build, tmp_path):
    tracker = build(Kind.TRACKER, file=str(tmp_path / "lines.txt"))
    run = RunInfo(run_id="1", name="r", experiment="e", params={}, tags={}, datasets=(), folder=tmp_path)

    tracker.start(run)
    tracker.log_metrics([MetricPoint(name="loss", value=0.5, step=1, time_ms=0)])
    tracker.log_artifact(tmp_path / "a.txt", "logs")
    tracker.set_tags({"a": "b"})
    tracker.finish(RunOutcome.FINISHED)

    assert (tmp_path / "lines.txt").read_text().splitlines() == [
        '["start", "1"]',
        '["loss", 1, 0.5]',
        '["artifact", "logs", "a.txt"]',
        '["tags", {"a": "b"}]',
        '["finish", "FINISHED"]',
    ]
