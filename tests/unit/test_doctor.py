"""`doctor`: general checks, then the checks of a recipe's components, or of all that need no option."""

import pytest
from weighted_mtp_core.cli import main

EXAMINED = """
    from attrs import field, frozen
    from weighted_mtp_core.api import Component, Finding, WeightingChoice, WmtpError, hookimpl

    @frozen(kw_only=True)
    class Options:
        level: int = 1
        of: tuple[WeightingChoice, ...] = ()

    @frozen(kw_only=True)
    class NeedsAnOption:
        folder: str

    def examine(options, storage):
        yield Finding(mark="ok", name="server", text=f"level {options.level}, {storage}")
        if options.level == 2:
            yield Finding(mark="FAILED", name="server", text="is down", hint="start it")
        if options.level == 3:
            raise OSError("no wire")
        if options.level == 4:
            raise WmtpError("no such server", hint="name another")

    def build(options, context):
        return options

    @hookimpl
    def wmtp_weighting_strategies():
        yield Component(name="flat", summary="Flat.", options=Options, build=build, examine=examine)

    @hookimpl
    def wmtp_data_sources():
        yield Component(
            name="lines", summary="Lines.", options=NeedsAnOption, build=build,
            examine=lambda options, storage: [Finding(mark="warning", name="lines", text=options.folder)],
        )
"""
RECIPE = """
    [run]
    name = "tried"
    storage = "kept"
    [data]
    use = "tried.lines"
    options.folder = "here"
    [weighting]
    use = "tried.flat"
    [weighting.options]
    level = {level}
    of = [{{ use = "tried.flat", options.level = 7 }}]
"""


@pytest.fixture
def doctor(install_plugin, write_recipe, capsys):
    """Run `doctor` on a recipe with this level, or without one; return exit code and lines."""
    install_plugin("tried", EXAMINED)

    def doctor(level=None):
        recipe = [] if level is None else [str(write_recipe(RECIPE.format(level=level)))]
        code = main(["doctor", *recipe])
        return code, capsys.readouterr().out.splitlines()

    return doctor


def test_without_a_recipe_components_are_tried_that_need_no_option(doctor):
    code, lines = doctor()

    assert code == 0
    assert "✓ ok      plugin: tried (wmtp-tried 0.3.0)" in lines
    assert "✓ ok      server: level 1, storage" in lines
    assert not any("lines" in line for line in lines)


def test_with_a_recipe_its_components_and_their_parts_are_tried_with_its_options(doctor):
    code, lines = doctor(level=1)

    assert code == 0
    assert lines[-4:] == [
        "! warning lines: here",
        "✓ ok      server: level 1, kept",
        "✓ ok      server: level 7, kept",
        "! warning tracking: the recipe names no tracker",
    ]


def test_a_failure_is_shown_with_its_hint_and_the_exit_code(doctor):
    code, lines = doctor(level=2)

    assert code == 1
    assert lines[lines.index("✗ FAILED  server: is down") + 1] == "          hint: start it"


def test_a_check_that_fails_itself_is_a_line_and_stops_no_other(doctor):
    code, lines = doctor(level=3)

    assert code == 1
    assert "✗ FAILED  flat: OSError: no wire" in lines
    assert "✓ ok      server: level 7, kept" in lines


def test_a_check_that_raises_an_error_with_a_hint_shows_both(doctor):
    code, lines = doctor(level=4)

    assert code == 1
    assert lines[lines.index("✗ FAILED  flat: no such server") + 1] == "          hint: name another"


def test_a_plugin_that_cannot_be_loaded_is_a_line(doctor, install_plugin):
    install_plugin("broken", "import a_module_that_is_not_there")

    code, lines = doctor()

    assert code == 0
    assert any(line.startswith("! warning plugin: plugin `broken` (wmtp-broken 0.3.0)") for line in lines)
