"""Define the four hooks: functions without arguments that a plugin implements to declare its components.

Core calls the hooks of a plugin right after it has loaded the plugin, which may happen several times in a
process. Core loads the plugins that a recipe or a command names; `doctor`, `recipe new --list`, and
`plugins check` without names load all installed plugins. If an address is wrong, core may also load all
installed plugins to suggest a component. A hook only declares components; core then calls `Component.build`
of the components that the recipe selects. The training loop never calls a hook. Importing a plugin must be
quick, so import torch inside the build function.

The example of each hook is a complete plugin module, which a test runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pluggy

from weighted_mtp_core.api import Component, Critic, DataSource, Tracker, WeightingStrategy

hookspec = pluggy.HookspecMarker("weighted_mtp_core")


@hookspec
def wmtp_weighting_strategies() -> Iterable[Component[Any, WeightingStrategy]]:
    """Declare weightings, which compute the weights of a batch's target tokens from the batch's signals.

    Called once each time core loads the plugin. The weighting that `[weighting] use` selects is built after
    the policy. In stage 2, the training of the policy, core calls the weighting's method `weigh` once per
    step, without gradients and with the signals that the component `needs`.

    Example:
        from attrs import field, frozen
        from attrs import validators as v
        from weighted_mtp_core.api import Component, Signal, StepView, WeightingStrategy, Weights, hookimpl

        @frozen(kw_only=True)
        class RewardOptions:
            floor: float = field(default=0.1, validator=[v.ge(0), v.le(1)])

        class Reward(WeightingStrategy):
            def __init__(self, options: RewardOptions) -> None:
                self._floor = options.floor

            def weigh(self, view: StepView) -> Weights:
                weight_BT = view.reward_BT.clamp(min=self._floor) * view.response_BT
                return Weights(weight=weight_BT, metrics={"mean_reward": view.reward_BT.mean()})

        @hookimpl
        def wmtp_weighting_strategies():
            yield Component(
                name="reward", summary="The reward of the response, but not less than a floor.",
                options=RewardOptions, build=lambda options, context: Reward(options),
                needs=frozenset({Signal.REWARD}),
            )
    """
    return ()


@hookspec
def wmtp_critics() -> Iterable[Component[Any, Critic]]:
    """Declare critics, such as value heads and reference models, which score every token of a batch.

    Called once each time core loads the plugin. The critic that `[critic] use` selects is built after the
    policy. If the critic is `trainable` and the recipe names no trained critic in `[critic] checkpoint`, the
    critic is trained before the policy. While the policy is trained, core calls the critic's method `score`
    if the weighting needs a critic's signal.

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
                name="length", summary="A value that falls with the length.", options=LengthOptions,
                build=lambda options, context: Length(options), provides=frozenset({Signal.VALUE}),
            )
    """
    return ()


@hookspec
def wmtp_data_sources() -> Iterable[Component[Any, DataSource]]:
    """Declare data sources, which supply labelled responses for training and problems for evaluation.

    Called once each time core loads the plugin. The data source that `[data] use` selects is built before the
    model. Core may read the examples of a split several times, and records the version of the data with the
    run.

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
    """Declare trackers, which send the metrics, tags and files of a run to other systems.

    Called once each time core loads the plugin. Each tracker that a recipe selects in `[[tracker]]` is built
    before training. Core calls `start` before training. A background thread calls all other methods that send
    data, and calls `start` again if the run must be opened again. If a method raises an exception, core sends
    the same data again later, possibly together with newer data, unless the exception is a `WmtpError`.

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

            def finish(self, outcome, *, time_ms=None):
                self._write("finish", outcome.value)

        @hookimpl
        def wmtp_trackers():
            yield Component(
                name="lines", summary="Writes one line of JSON per event.", options=LinesOptions,
                build=lambda options, context: Lines(options),
            )
    """
    return ()
