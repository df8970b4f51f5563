"""The documentation says what the code does: every key, type and default, and a plugin that works."""

import importlib.util
import re

import attrs
import pytest
import tomli
from weighted_mtp_core import run_tags
from weighted_mtp_core.plugins.loading import Kind, PluginRegistry
from weighted_mtp_core.recipe import schema

FILE = r"`([\w./]+/[\w./]*|\w+\.py)`"


@pytest.fixture(scope="module")
def recipes_md(repository):
    return (repository / "docs" / "recipes.md").read_text()


@pytest.fixture(scope="module")
def plugins_md(repository):
    return (repository / "docs" / "plugins.md").read_text()


def test_the_tables_of_the_documentation_are_those_of_a_recipe(recipes_md):
    documented = {re.sub(r"[\[\]]", "", each) for each in re.findall(r"### `(\[.*\])`", recipes_md)}

    assert documented == {field.name for field in attrs.fields(schema.Recipe)} | {
        "model.adapters",
        "model.heads",
        "model.micro",
        "critic.pairs",
        "train.optimiser",
    }


@pytest.fixture(scope="module")
def reference(repository):
    """scripts/recipe_reference.py, which writes the tables."""
    spec = importlib.util.spec_from_file_location("reference", repository / "scripts" / "recipe_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_keys_types_defaults_and_ranges_are_those_of_the_classes(reference, recipes_md):
    assert reference.generated(recipes_md) == recipes_md, "run: python scripts/recipe_reference.py"


def test_a_key_that_nobody_explained_is_an_error(reference, recipes_md):
    (row,) = re.findall(r"^\| `seed` .*\n", recipes_md, re.MULTILINE)

    with pytest.raises(SystemExit, match="does not say what `seed`"):
        reference.generated(recipes_md.replace(row, ""))


def test_the_smallest_recipe_is_one(recipes_md):
    (smallest,) = re.findall(r"```toml\n(.*?)```", recipes_md, re.DOTALL)
    table = tomli.loads(smallest)

    assert table.pop("extends") == ["core:defaults.toml"]
    assert set(table) == {"run", "data", "weighting"}


def test_the_plugin_in_the_documentation_loads(plugins_md, install_plugin):
    pyproject, _ = (tomli.loads(each) for each in re.findall(r"```toml\n(.*?)```", plugins_md, re.DOTALL))
    source, _ = re.findall(r"```python\n(.*?)```", plugins_md, re.DOTALL)
    project = pyproject["project"]
    ((name, module),) = project["entry-points"]["weighted_mtp_core"].items()
    install_plugin(
        name, source, module=module, distribution=project["name"], requires=project["dependencies"][1]
    )

    loaded = PluginRegistry().load(name)

    assert loaded.addresses(Kind.WEIGHTING) == ["reward_floor.reward_floor"]
    assert len([line for line in source.splitlines() if line]) <= 30


@pytest.fixture(scope="module")
def architecture_md(repository):
    return (repository / "docs" / "architecture.md").read_text()


def test_the_files_in_the_table_of_features_exist(repository, architecture_md):
    section = architecture_md.partition("## Where to find a feature")[2].partition("## Layers")[0]
    _, core, plugins = section.split("|---|---|")
    files = [
        *(repository / "weighted_mtp_core" / file for file in re.findall(FILE, core)),
        *(repository / "plugins" / file for file in re.findall(FILE, plugins)),
    ]

    assert len(files) > 60
    assert [file for file in files if not file.exists()] == []


def test_the_documented_layers_are_those_that_are_checked(repository, architecture_md):
    table = architecture_md.partition("## Layers")[2].partition("`make lint`")[0]
    rows = [
        set(re.findall(r"`(\w+)`", row.split("|")[1])) for row in table.splitlines() if row.startswith("| `")
    ]
    settings = tomli.loads((repository / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = (each["layers"] for each in settings["contracts"] if each["type"] == "layers")

    assert rows == [set(re.split(r"\W+", layer)) for layer in layers]


def test_every_tag_of_a_run_is_documented(repository):
    tags = {value for name, value in vars(run_tags).items() if name.isupper() and isinstance(value, str)}
    documented = (repository / "docs" / "commands.md").read_text()

    assert len(tags) > 5
    assert {tag for tag in tags if f"`{tag}" not in documented} == set()


def test_every_kind_is_documented_with_its_hook(plugins_md):
    for kind in Kind:
        assert f"| {kind.label} | `{kind.hook}` |" in plugins_md
