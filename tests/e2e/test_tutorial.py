"""The commands of docs/tutorial.md, executed outside the repository, have the results that the page shows.

The environment has only dependencies: the first command installs core and plugins, here from wheels. The
blocks are processed in order. bash executes each `sh` block in the folder in which the previous `sh` block
ended. A block below the name of a file is the content of that file. Each line of a `text` block occurs in the
output of the `sh` block before it.
"""

import re
import subprocess
from pathlib import Path

import pytest
from attrs import frozen

REPOSITORY = Path(__file__).parents[2]
TUTORIAL = REPOSITORY / "docs" / "tutorial.md"
BLOCK = re.compile(
    r"^(?:`(?P<file>[^`\n]+)`:\n\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
VENV = re.compile(r"`(python3 -m venv [^`]+|source [^`]+/activate)`")
PACKAGES = (REPOSITORY, REPOSITORY / "plugins" / "baseline_mtp", REPOSITORY / "plugins" / "controls")
pytestmark = pytest.mark.timeout(600)


@frozen(kw_only=True)
class Followed:
    """The result of following the tutorial.

    Attributes:
        folder: The folder in which the last command ended.
        python: The interpreter of the tutorial's environment.
        missing: Lines that the tutorial shows but no command printed.
    """

    folder: Path
    python: str
    missing: list[str]


def commands():
    """Return the two commands in the prose of step 1, and the commands of all blocks, each in one line."""
    text = TUTORIAL.read_text(encoding="utf-8")
    blocks = "".join(block["text"] for block in BLOCK.finditer(text) if block["kind"] == "sh")
    return [*VENV.findall(text), *blocks.replace("\\\n", " ").splitlines()]


@pytest.fixture(scope="module")
def followed(isolated, environment, wheel, tmp_path_factory):
    python = isolated()
    wheels = [wheel(package) for package in PACKAGES]
    settings = environment(
        PIP_NO_INDEX="1",  # the dependencies are installed; PIP_FIND_LINKS has the rest
        PIP_FIND_LINKS=" ".join(str(each.parent) for each in wheels),
        PIP_NO_BUILD_ISOLATION="0",  # 0 turns isolation off: pip reads it as `--no-build-isolation`
        MYPY_CACHE_DIR=str(REPOSITORY / ".mypy_cache" / "scaffold"),
    )
    settings["PATH"] = f"{Path(python).parent}:{settings['PATH']}"
    folder = tmp_path_factory.mktemp("tutorial")
    printed, missing = "", []
    for block in BLOCK.finditer(TUTORIAL.read_text(encoding="utf-8")):
        text = block["text"]
        if block["file"]:
            (folder / block["file"]).write_text(text, encoding="utf-8")
        elif block["kind"] == "sh":
            printed, folder = carry_out(text, folder, settings)
        else:
            assert block["kind"] == "text", f"nobody knows what to do with {block[0]}"
            missing += [line for line in text.splitlines() if line not in printed]
    return Followed(folder=folder, python=python, missing=missing)


def carry_out(commands, folder, settings):
    """Run commands in one shell; return their output and the folder in which they ended."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{commands}\necho; pwd"],
        cwd=folder,
        env=settings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout}"
    printed, ended_in = done.stdout.removesuffix("\n").rsplit("\n", maxsplit=1)
    return printed, Path(ended_in)


def test_everything_is_printed_that_the_tutorial_shows(followed):
    assert followed.missing == []


def test_it_takes_at_most_16_commands():
    written = commands()

    assert written[:2] == ["python3 -m venv .venv", "source .venv/bin/activate"]
    assert all(
        any(f"weighted_mtp_core {name}" in each for each in written) for name in ("data preview", "compare")
    )
    assert len(written) <= 16


def test_the_plugin_is_listed(followed, wmtp):
    listed = wmtp("plugins", "list", cwd=followed.folder, python=followed.python)

    assert [line.split()[0] for line in listed.stdout.splitlines()[1:]] == [
        "baseline_mtp",
        "characters",
        "controls",
        "core",
    ]


def test_each_arm_is_in_mlflow_under_its_own_experiment_and_tags(followed):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{followed.folder / 'storage' / 'mlflow.db'}")
    arms = {each.name: each.experiment_id for each in client.search_experiments()}
    names = {f"weighted_mtp/{name}" for name in ("characters", "baseline_mtp", "controls", "compare")}

    assert set(arms) - {"Default"} == names
    runs = client.search_runs([arms["weighted_mtp/characters"]])
    assert sorted(run.data.params["run.seed"] for run in runs) == ["42", "43"]
    for run in runs:
        assert run.info.status == "FINISHED"
        assert run.data.tags["algo"] == "characters"
        assert run.data.tags["wmtp.weighting"] == "characters.characters"
        assert run.data.tags["wmtp.plugin.characters"] == "weighted-mtp-characters==0.1.0"
        assert run.data.metrics["mean_weight"] > 1


def test_a_wheel_is_left_to_give_away(followed):
    assert [wheel.name for wheel in (followed.folder / "dist").iterdir()] == [
        "weighted_mtp_characters-0.1.0-py3-none-any.whl"
    ]
