"""Packages that `plugins new` writes work from their wheels, in an environment without this repository.

The venv has core and one new plugin of each kind, all installed from wheels; the wheel of core contains the
templates.
"""

import json
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
KINDS = ("weighting", "critic", "data", "tracker")
RECIPE = """
extends = ["{recipe}"]
run.name = "all_new"
data.use = "my_data"
critic.use = "my_critic"
critic.allow_uninformative_critic = true
critic.train = {{ steps = 8, warmup_steps = 2 }}
train = {{ steps = 8, warmup_steps = 2 }}
tracker = [{{ use = "my_tracker" }}]
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder outside the repository, for the new packages."""
    return tmp_path_factory.mktemp("workplace")


@pytest.fixture
def recipe(workplace, tmp_path):
    """The recipe and the data that `plugins new` wrote with the weighting."""
    for name in ("recipe.toml", "examples.jsonl"):
        (tmp_path / name).write_bytes((workplace / "weighted-mtp-my-weighting" / name).read_bytes())
    return tmp_path / "recipe.toml"


@pytest.fixture(scope="module")
def python(isolated, workplace, wmtp, install_wheels):
    """The interpreter of the venv."""
    python = isolated()
    install_wheels(python, REPOSITORY)
    for kind in KINDS:
        begun = wmtp("plugins", "new", f"my_{kind}", "--kind", kind, cwd=workplace, python=python)
        assert begun.returncode == 0, begun.stderr
        install_wheels(python, workplace / f"weighted-mtp-my-{kind}")
    return python


def test_core_is_the_one_from_the_wheel(python, workplace):
    code = "import weighted_mtp_core as core; print(core.__file__)"

    shown = subprocess.run([python, "-c", code], cwd=workplace, capture_output=True, text=True, check=True)

    assert not Path(shown.stdout).is_relative_to(REPOSITORY)
    assert Path(shown.stdout).is_relative_to(Path(python).parents[1])


def test_all_are_listed_and_work(wmtp, python, workplace):
    checked = wmtp("plugins", "check", cwd=workplace, python=python)

    assert checked.returncode == 0, checked.stdout
    assert [line.split()[:2] for line in checked.stdout.splitlines()] == [
        ["ok", name] for name in sorted(["core", *(f"my_{kind}" for kind in KINDS)])
    ]


def test_its_recipe_runs_and_is_tracked_under_its_name(wmtp, python, recipe, tracked):
    run = wmtp("run", recipe.name, "--preset", "ci", cwd=recipe.parent, python=python)

    assert run.returncode == 0, run.stderr
    assert run.folder.parts[-4:-2] == ("weighted_mtp", "my_weighting")
    found = tracked(run.storage)
    assert found.info.status == "FINISHED"
    assert found.data.tags["wmtp.weighting"] == "my_weighting.my_weighting"
    assert found.data.tags["wmtp.plugin.my_weighting"] == "weighted-mtp-my-weighting==0.1.0"
    assert any(name.endswith("matched_fraction") for name in found.data.metrics)


def test_one_recipe_takes_all_four_kinds(wmtp, python, recipe):
    (recipe.parent / "all.toml").write_text(RECIPE.format(recipe=recipe.name))

    run = wmtp("run", "all.toml", cwd=recipe.parent, python=python)

    assert run.returncode == 0, run.stderr
    (written,) = (run.storage / "my_tracker").glob("*/events.jsonl")
    events = [json.loads(line) for line in written.read_text().splitlines()]
    assert events[-1]["outcome"] == "FINISHED"
    assert {"value_loss"} <= {event["name"] for event in events if event["event"] == "metric"}
