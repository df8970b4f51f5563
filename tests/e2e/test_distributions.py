"""The distributions of this repository: all have one version, and core's range in each plugin contains it."""

from pathlib import Path

import pytest
import tomli
import weighted_mtp_core
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]
FILES = (REPOSITORY / "pyproject.toml", *REPOSITORY.glob("plugins/*/pyproject.toml"))
PROJECTS = [tomli.loads(file.read_text(encoding="utf-8"))["project"] for file in FILES]
PLUGINS = [project for project in PROJECTS if project["name"] != "weighted-mtp-core"]


def test_all_distributions_have_one_version():
    assert len(PROJECTS) >= 8
    assert {project["version"] for project in PROJECTS} == {weighted_mtp_core.__version__}


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin["name"])
def test_the_version_is_in_the_range_for_core_of_each_plugin(plugin):
    requirements = map(Requirement, plugin["dependencies"])
    (core,) = (each for each in requirements if each.name == "weighted-mtp-core")

    assert core.specifier.contains(weighted_mtp_core.__version__)
    assert {each.operator for each in core.specifier} == {">=", "<"}
