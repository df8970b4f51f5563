"""The documents are correct; for example, links have targets, and all commands are listed."""

import re
from pathlib import Path

import pytest
import tomli
from weighted_mtp_core.plugins.loading import PluginRegistry

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    *REPOSITORY.glob("*.md"),
    *REPOSITORY.glob("docs/**/*.md"),
    *REPOSITORY.glob("plugins/**/README.md"),
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_relative_links_lead_to_files(document):
    links = re.findall(r"\]\((?!\w+:|#)([^)#]+)", document.read_text(encoding="utf-8"))

    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_recipe_in_the_readme_is_valid(wmtp, tmp_path):
    text, _ = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "mine.toml").write_text(text)

    checked = wmtp("check", "mine.toml", cwd=tmp_path)

    assert checked.stderr == ""
    assert checked.returncode == 0


def test_the_plugin_in_the_readme_is_small_and_trains(wmtp_install_plugin, wmtp_tiny_run):
    _, pyproject = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    (source,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    project = tomli.loads(pyproject)["project"]
    ((name, module),) = project["entry-points"]["weighted_mtp_core"].items()
    (requires,) = project["dependencies"]
    wmtp_install_plugin(name, source, module=module, distribution=project["name"], requires=requires)

    run = wmtp_tiny_run({"weighting": {"use": name}})

    assert run.metrics["train_loss"] > 0
    assert len([line for line in (pyproject + source).splitlines() if line]) < 30


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_the_overview_of_plugins_lists_each_with_its_components():
    text = (REPOSITORY / "plugins" / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \[(\w+)\]\(\1\) \| (.*)", text, re.MULTILINE))
    registry = PluginRegistry()

    assert set(rows) == set(registry.found) - {"core"} != set()
    for name, row in rows.items():
        components = [each for by_name in registry.load(name).components.values() for each in by_name]
        assert [each for each in components if f"`{each}`" not in row] == []


def test_the_documentation_lists_every_command(wmtp, tmp_path):
    described = re.findall(r"^    (\w+)  ", wmtp("--help", cwd=tmp_path).stdout, re.MULTILINE)
    commands = (REPOSITORY / "docs" / "commands.md").read_text(encoding="utf-8")
    listed = re.findall(r"^python -m weighted_mtp_core (\w+)", commands, re.MULTILINE)

    assert {"run", "check"} <= set(described) <= set(listed)
