"""The documentation says what the code does: every key, type and default, and a plugin that works."""

import re
import typing

import attrs
import pytest
import tomli
from weighted_mtp_core.api import SandboxSettings
from weighted_mtp_core.plugins import Kind, find, load
from weighted_mtp_core.recipe import schema
from weighted_mtp_core.recipe.structure import default_of, plain

TABLES = {
    "[run]": schema.RunTable,
    "[model]": schema.ModelTable,
    "[model.micro]": schema.MicroTable,
    "[data]": schema.DataTable,
    "[critic]": schema.CriticTable,
    "[critic.pairs]": schema.PairsTable,
    "[weighting]": schema.Selection,
    "[loss]": schema.LossTable,
    "[train]": schema.TrainTable,
    "[checkpoint]": schema.CheckpointTable,
    "[evaluate]": schema.EvaluateTable,
    "[sandbox]": SandboxSettings,
    "[[tracker]]": schema.TrackerTable,
}


@pytest.fixture(scope="module")
def recipes_md(repository):
    return (repository / "docs" / "recipes.md").read_text()


@pytest.fixture(scope="module")
def plugins_md(repository):
    return (repository / "docs" / "plugins.md").read_text()


def rows(text, table):
    """Return {key: (type, default)} of a table of keys."""
    section = text.split(f"### `{table}`\n")[1].split("\n### ")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line[:3] == "| `"
    ]
    return {cell[0].strip("`"): (cell[1], cell[2].strip("`")) for cell in cells}


def test_the_tables_of_the_documentation_are_those_of_a_recipe(recipes_md):
    documented = {re.sub(r"[\[\]]", "", each) for each in re.findall(r"### `(\[.*\])`", recipes_md)}

    assert documented == {field.name for field in attrs.fields(schema.Recipe)} | {
        "model.micro",
        "critic.pairs",
    }


@pytest.mark.parametrize("table", TABLES)
def test_every_key_is_documented_with_its_default(recipes_md, table):
    documented = rows(recipes_md, table)

    fields = attrs.fields(attrs.resolve_types(TABLES[table]))
    assert set(documented) == {field.name for field in fields}
    for field in fields:
        kind, default = documented[field.name]
        value = default_of(field)
        if kind == "table":
            continue
        shown = None if value is attrs.NOTHING or value is None else plain(value)
        assert (None if default == "-" else tomli.loads(f"x = {default}")["x"]) == shown, field.name
        if typing.get_origin(field.type) is typing.Literal:
            assert kind == ", ".join(f'`"{choice}"`' for choice in typing.get_args(field.type))


def test_the_smallest_recipe_is_one(recipes_md):
    (smallest,) = re.findall(r"```toml\n(.*?)```", recipes_md, re.DOTALL)
    table = tomli.loads(smallest)

    assert table.pop("extends") == ["defaults.toml"]
    assert set(table) == {"run", "data", "weighting"}


def test_the_plugin_in_the_documentation_loads(plugins_md, install_plugin, site):
    pyproject, _ = (tomli.loads(each) for each in re.findall(r"```toml\n(.*?)```", plugins_md, re.DOTALL))
    source, _ = re.findall(r"```python\n(.*?)```", plugins_md, re.DOTALL)
    project = pyproject["project"]
    ((name, module),) = project["entry-points"]["weighted_mtp_core"].items()
    install_plugin(
        name, source, module=module, distribution=project["name"], requires=project["dependencies"][1]
    )

    loaded = load(find([str(site)]), [name])

    assert loaded[name].addresses(Kind.WEIGHTING) == ["reward_floor.reward_floor"]
    assert len([line for line in source.splitlines() if line]) <= 30


def test_every_kind_is_documented_with_its_hook(plugins_md):
    for kind in Kind:
        assert f"| {kind.label} | `{kind.hook}` |" in plugins_md
