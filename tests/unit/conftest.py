"""Plugins to test with: a module and a `dist-info` folder on `sys.path`, as an installer would leave them."""

import os
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


@pytest.fixture(scope="session")
def shared_data(repository: Path) -> Path:
    """Public data sets that are not part of the repository: `WMTP_TEST_DATA`, or `shared/data` beside it."""
    folder = Path(os.environ.get("WMTP_TEST_DATA", repository.parent / "shared" / "data"))
    if not (folder / "mbpp.jsonl").is_file():
        pytest.skip(f"no public data in `{folder}`; set WMTP_TEST_DATA to a folder with mbpp.jsonl")
    return folder
