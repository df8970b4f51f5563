"""The exact texts of messages about recipe files that do not exist or cannot be read."""


def test_no_such_recipe(write_recipe, cli_error):
    write_recipe("", "configs/first.toml")
    write_recipe("", "configs/second.toml")

    assert cli_error("check", "configs/frist.toml") == (
        "error: there is no recipe `configs/frist.toml`\nhint: did you mean `first.toml`?\n"
    )
    assert cli_error("check", "configs/zzz") == (
        "error: there is no recipe `configs/zzz`\nhint: `configs` holds `first.toml`, `second.toml`\n"
    )
    assert cli_error("check", "nowhere/x.toml") == "error: there is no recipe `nowhere/x.toml`\n"


def test_no_such_file_to_extend(write_recipe, cli_error):
    write_recipe('extends = ["default.toml"]')

    assert cli_error("check", "recipe.toml") == (
        "error: there is no recipe `default.toml`, which `recipe.toml` extends\n"
        "hint: did you mean `core:defaults.toml`?\n"
    )


def test_no_such_file_of_core_to_extend(write_recipe, cli_error):
    write_recipe('extends = ["core:default.toml"]')
    write_recipe('extends = ["core:../../x"]', "outside.toml")
    names = "`core:defaults.toml`, `core:presets/ci.toml`, `core:presets/local-light.toml`"

    assert cli_error("check", "recipe.toml") == (
        "error: there is no recipe `core:default.toml`, which `recipe.toml` extends\n"
        "hint: did you mean `core:defaults.toml`?\n"
    )
    assert cli_error("check", "outside.toml") == (
        f"error: there is no recipe `core:../../x`, which `outside.toml` extends\nhint: core holds {names}\n"
    )


def test_a_folder_or_bytes_instead_of_a_recipe(write_recipe, cli_error):
    path = write_recipe("", "configs/first.toml")
    path.write_bytes(b"\xff")

    assert cli_error("check", "configs") == ("error: cannot read the recipe `configs`: Is a directory\n")
    assert cli_error("check", str(path)) == (
        "error: configs/first.toml: line 1: not UTF-8 (byte 0xff)\nhint: save it as UTF-8\n"
    )


def test_a_file_that_is_no_toml(write_recipe, cli_error):
    write_recipe("[run]\nname = first")

    assert cli_error("check", "recipe.toml") == (
        "error: recipe.toml: not valid TOML: Invalid value (at line 2, column 8)\n"
    )


def test_extends_that_is_no_array(write_recipe, cli_error):
    write_recipe('\nextends = "defaults.toml"')

    assert cli_error("check", "recipe.toml") == (
        "error: recipe.toml: line 1, extends: expected array of str, got str 'defaults.toml'\n"
    )


def test_recipes_that_extend_each_other(write_recipe, cli_error):
    write_recipe('extends = ["b.toml"]', "a.toml")
    write_recipe('extends = ["a.toml"]', "b.toml")

    assert cli_error("check", "a.toml") == (
        "error: recipes extend each other in a circle: `a.toml` -> `b.toml` -> `a.toml`\n"
    )
