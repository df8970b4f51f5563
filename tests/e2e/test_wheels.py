"""With the wheels of core and two plugins, three commands in an empty folder give a finished, tracked run."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = (REPOSITORY, REPOSITORY / "plugins" / "code_tasks", REPOSITORY / "plugins" / "baseline_mtp")
COMPONENTS = ("--data", "code_tasks.micro_code", "--weighting", "baseline_mtp.uniform")
FEW = ("--set", "data.options.problems=40")
COMMANDS = (
    ("recipe", "new", "first.toml", *COMPONENTS, *FEW),
    ("check", "first.toml", "--preset", "local-light"),
    ("run", "first.toml", "--preset", "ci"),
)


@pytest.fixture(scope="module")
def python(isolated, install_wheels):
    python = isolated()
    install_wheels(python, *PACKAGES)
    return python


def test_three_commands_in_an_empty_folder_give_a_finished_tracked_run(python, wmtp, tracked, tmp_path):
    for command in COMMANDS:
        done = wmtp(*command, cwd=tmp_path, python=python)
        assert done.returncode == 0, done.stderr

    found = tracked(done.storage)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "first"
    assert found.data.tags["wmtp.data"] == "code_tasks.micro_code"
    assert found.data.tags["wmtp.plugin.core"].startswith("weighted-mtp-core==")
    assert {path.name for path in tmp_path.iterdir()} == {"first.toml", "storage"}


def test_only_the_three_are_installed(python, wmtp, tmp_path):
    checked = wmtp("plugins", "check", cwd=tmp_path, python=python)

    names = [line.split()[1] for line in checked.stdout.splitlines()]
    assert (checked.returncode, names) == (0, ["baseline_mtp", "code_tasks", "core"])
