"""Messages of errors and of refused commands, and what causes them: installed plugins and a recipe."""

import pytest
from weighted_mtp_core.cli import main
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.plugins.discovery import find
from weighted_mtp_core.plugins.loading import PluginRegistry

RECIPE = """
    [run]
    name = "first"
    [data]
    use = "example"
    options = { folder = "f" }
    [weighting]
    use = "example.flat"
"""
OPTIONS = """
    from attrs import frozen
    from weighted_mtp_core.api import Component, hookimpl

    @frozen(kw_only=True)
    class Options:
        pass

    def declare(name, options=Options, build=lambda options, context: None):
        return Component(name=name, summary="", options=options, build=build)
"""


@pytest.fixture
def error_of():
    """Return the message and the hint of the error that an action raises."""

    def error_of(action):
        with pytest.raises(WmtpError) as caught:
            action()
        return f"error: {caught.value}" + (f"\nhint: {caught.value.hint}" if caught.value.hint else "")

    return error_of


@pytest.fixture
def cli_error(capsys):
    """Return the message of a command that is refused."""

    def cli_error(*arguments):
        assert main(arguments) == 2
        return capsys.readouterr().err

    return cli_error


@pytest.fixture
def registry(site):
    """Return a registry of the plugins that the test has installed so far."""
    return lambda: PluginRegistry(found=find([str(site)]))


@pytest.fixture
def recipe_text():
    """A valid recipe with the data source and a weighting of plugin `example`."""
    return RECIPE


@pytest.fixture
def plugin_source():
    """Return a plugin's source whose one hook has this body; the body may use `declare` and `Options`."""
    return lambda hook, body: f"{OPTIONS}\n    @hookimpl\n    def {hook}():\n        {body}\n"
