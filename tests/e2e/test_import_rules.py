"""The import rules of pyproject.toml hold, and a wrong import breaks them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Copy the sources of core and of every plugin, side by side."""
    ignored = shutil.ignore_patterns("__pycache__")
    for package in [ROOT / "weighted_mtp_core", *ROOT.glob("plugins/*/src/*")]:
        if (package / "__init__.py").is_file():
            shutil.copytree(package, tmp_path / package.name, ignore=ignored)
    return tmp_path


def lint(sources: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache", ROOT / "pyproject.toml"],
        cwd=sources,
        env={**os.environ, "PYTHONPATH": str(sources), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_sources_keep_the_rules(sources: Path) -> None:
    done = lint(sources)

    assert (done.returncode, "0 broken" in done.stdout) == (0, True), done.stdout


@pytest.mark.parametrize(
    ("file", "wrong", "message"),
    [
        (
            "weighted_mtp_core/storage/manifest.py",
            "from weighted_mtp_core.training.loop import train",
            "weighted_mtp_core.storage is not allowed to import weighted_mtp_core.training",
        ),
        (
            "weighted_mtp_core/recipe/schema.py",
            "from weighted_mtp_core.recipe.load import load_recipe",
            "No cycles are allowed in weighted_mtp_core.recipe.",
        ),
        (
            "weighted_mtp_baseline_mtp/_uniform.py",
            "from weighted_mtp_core.model.policy import Policy",
            "weighted_mtp_baseline_mtp._uniform -> weighted_mtp_core.model.policy",
        ),
    ],
)
def test_a_wrong_import_breaks_a_rule(sources: Path, file: str, wrong: str, message: str) -> None:
    with (sources / file).open("a", encoding="utf-8") as source:
        source.write(f"\n\ndef wrong() -> None:\n    {wrong}\n")

    done = lint(sources)

    assert done.returncode == 1
    assert message in " ".join(done.stdout.split())
