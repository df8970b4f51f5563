"""Plugins to test with: a module and a `dist-info` folder on `sys.path`, as an installer would leave them."""

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

EXAMPLE_PLUGIN = """
    from attrs import field, frozen
    from attrs import validators as v
    from weighted_mtp_core.api import SAME_RESULT, Component, Signal, hookimpl

    @frozen(kw_only=True)
    class WeightOptions:
        beta: float = field(default=0.9, validator=v.gt(0))
        clip: tuple[float, float] = (0.1, 3.0)
        mode: str | None = None

    @frozen(kw_only=True)
    class DataOptions:
        folder: str
        count: int = 3
        workers: int = field(default=0, metadata=SAME_RESULT)

    @frozen(kw_only=True)
    class TrackerOptions:
        experiment_prefix: str = "weighted_mtp"
        tracking_uri: str | None = None

    @frozen(kw_only=True)
    class NoOptions:
        pass

    def build(options, context):
        return options

    @hookimpl
    def wmtp_weighting_strategies():
        yield Component(name="flat", summary="Flat weights.", options=WeightOptions, build=build)
        yield Component(
            name="valued", summary="Weights from values.", options=WeightOptions, build=build,
            needs=frozenset({Signal.VALUE, Signal.REWARD}),
        )

    @hookimpl
    def wmtp_critics():
        yield Component(
            name="judge", summary="Values.", options=NoOptions, build=build,
            provides=frozenset({Signal.VALUE}),
        )
        yield Component(
            name="reference", summary="Losses of a reference model.", options=NoOptions, build=build,
            provides=frozenset({Signal.REFERENCE_LOSS}),
        )

    @hookimpl
    def wmtp_data_sources():
        yield Component(name="lines", summary="Lines of a file.", options=DataOptions, build=build)

    @hookimpl
    def wmtp_trackers():
        yield Component(name="paper", summary="Writes runs down.", options=TrackerOptions, build=build)
"""

JUDGED_PLUGIN = """
    from attrs import frozen
    from weighted_mtp_core.api import (
        Component, DatasetVersion, DataSource, Example, Problem, Verdict, VerdictKind, hookimpl
    )

    NUMBERS = {"train": range(16), "validation": range(16, 18), "test": range(18, 20)}

    @frozen(kw_only=True)
    class SumsOptions:
        pass

    class Sums(DataSource):
        # A completion passes if it is the sum.

        def examples(self, split):
            return [
                Example(
                    example_id=f"{problem.problem_id}/{more}",
                    problem_id=problem.problem_id,
                    prompt=problem.prompt,
                    response=str(int(problem.tests) + more),
                    reward=1.0 - more,
                )
                for problem in self.problems(split)
                for more in (0, 1)
            ]

        def version(self):
            return DatasetVersion(name="sums", version="1", sha256="5" * 64)

        def problems(self, split):
            return [
                Problem(
                    problem_id=f"sums/{n}", prompt=f"What is {n} and {n}?", entry_point="", tests=str(2 * n),
                    solution=str(2 * n),
                )
                for n in NUMBERS[split]
            ]

        def verify(self, attempts):
            return [self.judge(problem, text) for problem, text in attempts]

        def judge(self, problem, text):
            if text == problem.tests:
                return Verdict(kind=VerdictKind.PASSED)
            return Verdict(kind=VerdictKind.WRONG, detail=f"expected {problem.tests}")

    @hookimpl
    def wmtp_data_sources():
        yield Component(
            name="sums", summary="Sums.", options=SumsOptions, build=lambda options, context: Sums()
        )
"""

FLAT_PLUGIN = """
    from attrs import frozen
    from weighted_mtp_core.api import Component, WeightingStrategy, Weights, hookimpl

    @frozen(kw_only=True)
    class NoOptions:
        pass

    class Flat(WeightingStrategy):
        def weigh(self, view):
            return Weights(weight=view.response_BT.float())

    @hookimpl
    def wmtp_weighting_strategies():
        yield Component(
            name="flat", summary="Flat weights.", options=NoOptions, build=lambda options, context: Flat()
        )
"""

HUMANEVAL_CHARACTERS = """
    600 925 355 579 531 479 772 380 512 525 795 410 531 267 314 271 298 638 457 690 1026 485 322 156 249
    684 390 208 241 368 265 438 1073 483 181 263 432 550 610 633 687 663 244 608 398 161 676 309 363 302
    415 466 301 132 461 229 535 335 372 522 263 535 337 580 573 422 453 889 1328 672 551 605 894 599 796
    670 559 421 1087 602 565 1899 469 220 528 240 612 935 671 614 432 491 568 619 946 1359 643 383 356
    1014 514 626 434 586 511 1187 656 1053 635 1557 891 768 681 805 476 1113 530 985 863 998 695 339 446
    1123 1342 681 854 1337 538 1993 919 468 948 571 637 468 648 715 295 464 908 1156 859 946 781 617 655
    732 1254 918 390 513 843 1490 623 415 714 451 528 1115 961 637 325 414
"""


@pytest.fixture(scope="session")
def judged_plugin() -> str:
    """The source of a plugin whose one data source, 20 sums, judges completions by itself."""
    return dedent(JUDGED_PLUGIN)


@pytest.fixture(scope="session")
def flat_plugin() -> str:
    """The source of a plugin whose one weighting, without options, weighs every target by 1."""
    return dedent(FLAT_PLUGIN)


@pytest.fixture(scope="session")
def humaneval_characters() -> list[int]:
    """For each problem of HumanEval, the length of prompt and solution together, in characters."""
    return [int(length) for length in HUMANEVAL_CHARACTERS.split()]


@pytest.fixture
def site(wmtp_site: Path) -> Path:
    """A folder of installed packages, on `sys.path` for this test only."""
    return wmtp_site


@pytest.fixture
def install_plugin(wmtp_install_plugin: Callable[..., Path]) -> Callable[..., Path]:
    """Install a plugin `name`, by default `EXAMPLE_PLUGIN`; return its `dist-info` folder."""

    def install(name: str, source: str = EXAMPLE_PLUGIN, **metadata: str | None) -> Path:
        return wmtp_install_plugin(name, source, **metadata)

    return install


@pytest.fixture
def flat_weights(install_plugin: Callable[..., Path], flat_plugin: str) -> None:
    """Install the plugin `flat_weights` with its weighting `flat`."""
    install_plugin("flat_weights", flat_plugin)


@pytest.fixture
def example_plugin(install_plugin: Callable[..., Path]) -> str:
    """An installed plugin `example` with two weightings, two critics, a data source and a tracker."""
    install_plugin("example", version="1.2.3")
    return "example"


@pytest.fixture
def write_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a recipe file into an empty working folder and return its relative path."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def write(text: str, name: str = "recipe.toml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text).lstrip("\n"))
        return path

    return write


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository, for tests of `configs/` and `docs/`."""
    return Path(__file__).parents[2]
