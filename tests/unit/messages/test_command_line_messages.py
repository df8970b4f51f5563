"""The exact texts of messages about commands, arguments, presets and overrides that cannot be used."""

import pytest
from weighted_mtp_core import cli
from weighted_mtp_core.messages import quoted

COMMANDS = quoted(module.__name__.rpartition(".")[2] for module in cli.COMMANDS)
NUMBERED = "its elements are numbered from 0; to replace the whole array: --set 'tracker=[...]'"


def test_no_such_command(cli_error):
    assert cli_error("chek", "x") == (
        f"error: there is no command `chek`; commands: {COMMANDS}\nhint: did you mean `check`?\n"
    )
    assert cli_error("zzz") == (
        f"error: there is no command `zzz`; commands: {COMMANDS}\n"
        "hint: see: python -m weighted_mtp_core --help\n"
    )


def test_wrong_arguments(cli_error):
    assert cli_error("check") == (
        "error: the following arguments are required: RECIPE\n"
        "hint: see: python -m weighted_mtp_core check --help\n"
    )
    assert cli_error("run", "x.toml", "--fast") == (
        "error: unrecognized arguments: --fast\nhint: see: python -m weighted_mtp_core --help\n"
    )


def test_no_such_preset(write_recipe, recipe_text, cli_error):
    write_recipe(recipe_text)

    write_recipe("", "presets/mine.toml")

    assert cli_error("check", "recipe.toml", "--preset", "local-lite") == (
        "error: there is no preset `local-lite`; available: `ci`, `local-light`, `mine`\n"
        "hint: did you mean `local-light`?\n"
    )
    assert cli_error("check", "recipe.toml", "--preset", "../x") == (
        "error: there is no preset `../x`; available: `ci`, `local-light`, `mine`\n"
        "hint: presets are files like `presets/NAME.toml`\n"
    )


@pytest.mark.parametrize("text", ["train.steps", "=3", "train..steps=3", "train.st eps=3"])
def test_an_override_that_is_no_key_and_value(write_recipe, recipe_text, cli_error, text):
    write_recipe(recipe_text)

    assert cli_error("check", "recipe.toml", "--set", text) == (
        f"error: cannot read `--set {text}`\nhint: write --set KEY=VALUE, for example: --set train.steps=50\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "loss.head_weights=[1, 2",
            "cannot read the value in `--set loss.head_weights=[1, 2`: Unclosed array (at end of document)",
        ),
        ("run.name.x=3", "--set run.name.x: `run.name` is not a table but str 'first'"),
        ("run.name.x.y=3", "--set run.name.x: `run.name` is not a table but str 'first'"),
        (
            "tracker.1.use=x",
            f"--set tracker.1: `tracker` is an array of 1\nhint: {NUMBERED}",
        ),
        (
            "tracker.use=x",
            f"--set tracker.use: `tracker` is an array of 1\nhint: {NUMBERED}",
        ),
    ],
)
def test_an_override_that_leads_nowhere(write_recipe, recipe_text, cli_error, text, message):
    write_recipe(recipe_text + '    [[tracker]]\n    use = "example.paper"\n')

    assert cli_error("check", "recipe.toml", "--set", text) == f"error: {message}\n"
