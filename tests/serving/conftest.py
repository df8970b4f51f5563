"""The tests of this folder share `served_model.py` and the labelled data of configs/baseline.toml."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from served_model import BASELINE, wmtp


@pytest.fixture(scope="session")
def storage(tmp_path_factory):
    """A storage folder with the data of configs/baseline.toml."""
    folder = tmp_path_factory.mktemp("data")
    wmtp("data", "prepare", BASELINE, cwd=folder)
    return folder / "storage"
