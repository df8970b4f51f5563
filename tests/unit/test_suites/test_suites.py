"""The conformance suites detect the faults that they should detect, and accept correct components.

All mutants are checked in one pytest process of their own, as a plugin author would check them.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from filelock import FileLock
from weighted_mtp_core.api import Critic, DataSource, Tracker
from weighted_mtp_core.testing import (
    ComponentSuite,
    CriticSuite,
    DataSourceSuite,
    TrackerSuite,
    WeightingStrategySuite,
)

HERE = Path(__file__).parent
SUITES = (WeightingStrategySuite, CriticSuite, DataSourceSuite, TrackerSuite)


def import_mutants():
    spec = importlib.util.spec_from_file_location("wmtp_mutants", HERE / "wmtp_mutants" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["wmtp_mutants"] = module  # the modules of the package import each other
    spec.loader.exec_module(module)
    return module


MUTANTS = import_mutants()
CLASSES = MUTANTS.every_class()


def suite_of(cls):
    kinds = {Critic: CriticSuite, DataSource: DataSourceSuite, Tracker: TrackerSuite}
    return next((suite for kind, suite in kinds.items() if issubclass(cls, kind)), WeightingStrategySuite)


HEADER = """
import json
import pytest
from filelock import FileLock
from weighted_mtp_core.testing import CriticSuite, DataSourceSuite, TrackerSuite, WeightingStrategySuite

class WithOtherData(DataSourceSuite):
    @pytest.fixture
    def changed_options(self):
        return {"shift": 1}

class WithStore(TrackerSuite):
    @pytest.fixture
    def read_back(self, context):
        def read(run):
            stored = json.loads((context.storage / "tracked" / f"{run.run_id}.json").read_text())
            histories = {}
            for key, value in stored["metrics"].items():
                name, _, step = key.rpartition("@")
                histories.setdefault(name, []).append((int(step), value))
            return histories
        return read

class TestHeavy(WeightingStrategySuite):
    address = "heavy.weighting"
"""
HEAVY = """
import torch
from weighted_mtp_core.api import Component, hookimpl
from wmtp_mutants import NoOptions
from wmtp_mutants.weightings import SoundStateless

@hookimpl
def wmtp_weighting_strategies():
    yield Component(
        name="weighting", summary="Imports torch.", options=NoOptions, build=SoundStateless,
        needs=SoundStateless.needs,
    )
"""
OWN_SUITES = {DataSourceSuite: "WithOtherData", TrackerSuite: "WithStore"}


def install(site, name):
    metadata = site / f"wmtp_{name}-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: wmtp-{name}\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text(f"[weighted_mtp_core]\n{name} = wmtp_{name}\n")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Outcome by class and check: `passed`, `skipped` or `failed`."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # shared by all workers; the first one checks the mutants for all
    results = shared / "suites" / "results.xml"
    with FileLock(shared / "suites.lock"):
        if not results.exists():
            check_mutants(results)
    return read_outcomes(results)


def check_mutants(results):
    site = results.parent / "site-packages"
    site.mkdir(parents=True)
    shutil.copytree(HERE / "wmtp_mutants", site / "wmtp_mutants")
    (site / "wmtp_heavy.py").write_text(HEAVY)
    install(site, "mutants")
    install(site, "heavy")
    tests = [HEADER]
    for cls in CLASSES:
        suite = suite_of(cls)
        tests.append(f"class Test{cls.__name__}({OWN_SUITES.get(suite, suite.__name__)}):")
        tests.append(f'    address = "mutants.{MUTANTS.name_of(cls)}"\n')
    (results.parent / "test_mutants.py").write_text("\n".join(tests))
    # There are 2,400 tests, so everything that pytest does around a test takes noticeable time.
    off = ["cacheprovider", "xdist", "timeout", "hypothesispytest", "logging"]
    options = [*(f"-pno:{name}" for name in off), "--assert=plain", "--tb=no", "-qq"]
    options += ["--import-mode=importlib", "--rootdir=.", "--override-ini=tmp_path_retention_policy=none"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--junitxml={results.name}", "test_mutants.py"],
        cwd=results.parent,
        env={**os.environ, "PYTHONPATH": str(site), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr


def read_outcomes(path):
    found = {}
    for case in ET.parse(path).iter("testcase"):
        name = case.get("name").partition("[")[0]
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        checks = found.setdefault(case.get("classname").rpartition(".")[2], {})
        if checks.get(name) != "failed":
            checks[name] = outcome
    return found


def failed(checks):
    return {name for name, outcome in checks.items() if outcome == "failed"}


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls.caught_by], ids=lambda cls: cls.__name__)
def test_a_mutant_is_caught_by_exactly_the_check_meant_for_it(outcomes, cls):
    assert failed(outcomes[f"Test{cls.__name__}"]) == cls.caught_by


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if not cls.caught_by], ids=lambda cls: cls.__name__)
def test_a_sound_component_passes(outcomes, cls):
    assert failed(outcomes[f"Test{cls.__name__}"]) == set()


def test_a_plugin_that_imports_torch_is_caught(outcomes):
    assert failed(outcomes["TestHeavy"]) == {"test_importing_the_plugin_imports_nothing_heavy"}


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__)
def test_every_check_of_a_suite_has_a_mutant_that_it_catches(outcomes, suite):
    checks = {name for name in dir(suite) if name.startswith("test_")}
    own = checks if suite is WeightingStrategySuite else checks - set(dir(ComponentSuite))
    caught = {name for cls in CLASSES if suite_of(cls) is suite for name in cls.caught_by}

    assert own - caught - {"test_importing_the_plugin_imports_nothing_heavy"} == set()


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__)
def test_every_check_runs_on_some_sound_component(outcomes, suite):
    checks = {name for name in dir(suite) if name.startswith("test_")}
    sound = [cls for cls in CLASSES if suite_of(cls) is suite and not cls.caught_by]
    ran = {
        name
        for cls in sound
        for name, outcome in outcomes[f"Test{cls.__name__}"].items()
        if outcome == "passed"
    }

    assert checks - ran == set()
