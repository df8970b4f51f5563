"""Plugins to test with: a module and a `dist-info` folder on `sys.path`, as an installer would leave them."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

EXAMPLE_PLUGIN = """
    from attrs import field, frozen
    from attrs import validators as v
    from weighted_mtp_core.api import Component, Signal, hookimpl

    @frozen(kw_only=True)
    class WeightOptions:
        beta: float = field(default=0.9, validator=v.gt(0))
        clip: tuple[float, float] = (0.1, 3.0)
        mode: str | None = None

    @frozen(kw_only=True)
    class DataOptions:
        folder: str
        count: int = 3

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
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages, on `sys.path` for this test only."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if (file := getattr(sys.modules[name], "__file__", None)) and Path(file).is_relative_to(folder):
            del sys.modules[name]


@pytest.fixture
def install_plugin(site: Path) -> Callable[..., Path]:
    """Install a plugin `name` whose module holds `source`; return its `dist-info` folder."""

    def install(
        name: str,
        source: str = EXAMPLE_PLUGIN,
        *,
        distribution: str | None = None,
        version: str = "0.3.0",
        module: str | None = None,
        requires: str | None = "weighted-mtp-core>=0.1,<0.2",
    ) -> Path:
        distribution = distribution or f"wmtp-{name}"
        module = module or f"wmtp_{name.replace('-', '_')}"
        (site / f"{module}.py").write_text(dedent(source))
        metadata = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
        lines += [f"Requires-Dist: {requires}"] if requires else []
        (metadata / "METADATA").write_text("\n".join([*lines, ""]))
        (metadata / "entry_points.txt").write_text(f"[weighted_mtp_core]\n{name} = {module}\n")
        importlib.invalidate_caches()
        return metadata

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
