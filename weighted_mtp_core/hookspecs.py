"""The four hooks. All alike: no arguments, and the result declares what a plugin offers.

A hook is called once, right after its plugin was loaded. Nothing is built there, and the training loop never
goes through a hook: what the recipe chose is built by `Component.build`, everything else is left alone. So a
plugin's module, and what it imports at its top, stays light; torch is imported inside the build function.

Each example below is a whole plugin module; a test runs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pluggy

from weighted_mtp_core.api import Component, Critic, DataSource, Tracker, WeightingStrategy

hookspec = pluggy.HookspecMarker("weighted_mtp_core")


@hookspec
def wmtp_weighting_strategies() -> Iterable[Component[Any, WeightingStrategy]]:
    """Offer weightings: what turns the signals of a batch into weights on its target tokens.

    Called once when a recipe names the plugin (or `plugins show` and `plugins check` do). The weighting that
    `[weighting] use` names is built after the policy; its `weigh` is called once a step, without gradients,
    with the signals that the component `needs` and no others.

    Example:
        from attrs import field, frozen
        from attrs import validators as v
        from weighted_mtp_core.api import (
            BuildContext, Component, Signal, StepView, WeightingStrategy, Weights, hookimpl
        )

        @frozen(kw_only=True)
        class RewardOptions:
            floor: float = field(default=0.1, validator=[v.ge(0), v.le(1)])

        class Reward(WeightingStrategy):
            def __init__(self, options: RewardOptions) -> None:
                self._floor = options.floor

            def weigh(self, view: StepView) -> Weights:
                weight_BT = view.reward_BT.clamp(min=self._floor) * view.response_BT
                return Weights(weight=weight_BT, metrics={"mean_reward": view.reward_BT.mean()})

        def build_reward(options: RewardOptions, context: BuildContext) -> Reward:
            return Reward(options)

        @hookimpl
        def wmtp_weighting_strategies():
            yield Component(
                name="reward", summary="Weighs a token by the reward of its response.",
                options=RewardOptions, build=build_reward, needs=frozenset({Signal.REWARD}),
            )
    """
    return ()


@hookspec
def wmtp_critics() -> Iterable[Component[Any, Critic]]:
    """Offer critics: what scores every position of a batch, such as a value head or a reference model.

    Called once when a recipe names the plugin. The critic that `[critic] use` names is built after the
    policy, trained in stage 1 if it says it is trainable, and asked for scores when the weighting needs a
    signal that the component `provides`.

    Example:
        from attrs import frozen
        from weighted_mtp_core.api import Component, Critic, Scores, Signal, hookimpl

        @frozen(kw_only=True)
        class LengthOptions:
            slope: float = 0.01

        class Length(Critic):
            reads_policy = False

            def __init__(self, options: LengthOptions) -> None:
                self._slope = options.slope

            def score(self, batch, hidden_BTH) -> Scores:
                length_BT = batch.response_BT.cumsum(dim=1)
                return Scores(value_BT=(1.0 - self._slope * length_BT).clamp(min=0.0))

        @hookimpl
        def wmtp_critics():
            yield Component(
                name="length", summary="Believes that long responses fail.", options=LengthOptions,
                build=lambda options, context: Length(options), provides=frozenset({Signal.VALUE}),
            )
    """
    return ()


@hookspec
def wmtp_data_sources() -> Iterable[Component[Any, DataSource]]:
    """Offer data sources: labelled responses to learn from and problems to be judged on.

    Called once when a recipe names the plugin. The source that `[data] use` names is built before the model,
    asked for the examples of each split once, and for its version, which every tracker records.

    Example:
        import hashlib
        from attrs import frozen
        from weighted_mtp_core.api import Component, DataSource, DatasetVersion, Example, hookimpl

        @frozen(kw_only=True)
        class SumsOptions:
            largest: int = 9

        class Sums(DataSource):
            def __init__(self, options: SumsOptions) -> None:
                numbers = range(options.largest + 1)
                self._examples = [
                    Example(
                        example_id=f"{a}+{b}", problem_id=f"{a}+{b}", prompt=f"{a} + {b} = ",
                        response=str(a + b), reward=1.0,
                    )
                    for a in numbers for b in numbers
                ]

            def examples(self, split):
                start = {"train": 0, "validation": 1, "test": 2}[split]
                return self._examples[start::3]

            def version(self) -> DatasetVersion:
                sha256 = hashlib.sha256(repr(self._examples).encode()).hexdigest()
                return DatasetVersion(name="sums", version="1", sha256=sha256)

        @hookimpl
        def wmtp_data_sources():
            yield Component(
                name="sums", summary="Sums of two small numbers.", options=SumsOptions,
                build=lambda options, context: Sums(options),
            )
    """
    return ()


@hookspec
def wmtp_trackers() -> Iterable[Component[Any, Tracker]]:
    """Offer trackers: where runs are sent.

    Called once when a recipe names the plugin. Each `[[tracker]]` of the recipe is built before anything is
    trained and then fed from one background thread, behind the core's journal: a method that raises is
    called again later with the same arguments.

    Example:
        import json
        from pathlib import Path
        from attrs import frozen
        from weighted_mtp_core.api import Component, Tracker, hookimpl

        @frozen(kw_only=True)
        class LinesOptions:
            file: str = "metrics.txt"

        class Lines(Tracker):
            def __init__(self, options: LinesOptions) -> None:
                self._path = Path(options.file)

            def _write(self, *fields: object) -> None:
                with self._path.open("a") as file:
                    print(json.dumps(fields), file=file)

            def start(self, run):
                self._write("start", run.run_id)

            def log_metrics(self, points):
                for point in points:
                    self._write(point.name, point.step, point.value)

            def log_artifact(self, path, subdir):
                self._write("artifact", subdir, path.name)

            def set_tags(self, tags):
                self._write("tags", dict(tags))

            def finish(self, outcome):
                self._write("finish", outcome.value)

        @hookimpl
        def wmtp_trackers():
            yield Component(
                name="lines", summary="One line of JSON an event.", options=LinesOptions,
                build=lambda options, context: Lines(options),
            )
    """
    return ()
