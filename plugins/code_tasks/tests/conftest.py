"""Fixtures: a recipe in an empty folder, with the weighting that every recipe must name, and public data."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

WEIGHTING = """
    from attrs import frozen
    from weighted_mtp_core.api import Component, WeightingStrategy, hookimpl

    @frozen
    class NoOptions:
        pass

    @hookimpl
    def wmtp_weighting_strategies():
        yield Component(name="none", summary="None.", options=NoOptions, build=lambda options, context: None)
"""
RECIPE = """
[run]
name = "small"
[data]
use = "{use}"
[weighting]
use = "none"
"""


@pytest.fixture
def write_recipe(
    tmp_path: Path, wmtp_install_plugin: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], str]:
    """Return a function that writes a recipe with a data source, goes to its folder and returns its path."""

    def write(use: str) -> str:
        wmtp_install_plugin("none", WEIGHTING)
        monkeypatch.chdir(tmp_path)
        Path("recipe.toml").write_text(RECIPE.format(use=use))
        return "recipe.toml"

    return write


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of public data, `WMTP_TEST_DATA` or `shared/data`; without it, skip the test."""
    folder = Path(os.environ.get("WMTP_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
    if not (folder / "mbpp.jsonl").is_file():
        pytest.skip(f"no public data in `{folder}`; set WMTP_TEST_DATA to a folder with mbpp.jsonl")
    return folder
