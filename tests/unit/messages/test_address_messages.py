"""The exact texts of messages about addresses in a recipe that lead to no component."""

import pytest
from weighted_mtp_core.plugins.loading import Kind
from weighted_mtp_core.plugins.selection import resolve

BROKEN = "raise RuntimeError('broken')"


@pytest.fixture
def resolve_error(example_plugin, registry, error_of):
    """Return the error of looking an address up in plugin `example`."""

    return lambda kind, use: error_of(lambda: resolve(registry(), kind, use))


@pytest.fixture
def declaring(plugin_source):
    """Return a plugin's source whose one hook declares components of these names."""
    return lambda hook, *names: plugin_source(hook, f"return [declare(n) for n in {names}]")


def test_no_such_component(resolve_error):
    assert resolve_error(Kind.WEIGHTING, "example.valud") == (
        "error: plugin `example` has no weighting named `valud`; it has `example.flat`, `example.valued`\n"
        "hint: did you mean `example.valued`?"
    )
    assert resolve_error(Kind.WEIGHTING, "example.zzz") == (
        "error: plugin `example` has no weighting named `zzz`; it has `example.flat`, `example.valued`"
    )


def test_a_component_of_another_kind(resolve_error):
    assert resolve_error(Kind.WEIGHTING, "example.judge") == (
        "error: plugin `example` has no weighting named `judge`; it has `example.flat`, `example.valued`\n"
        "hint: `example.judge` is a critic: name it in `[critic]`"
    )


def test_a_plugin_alone_that_offers_several(resolve_error):
    assert resolve_error(Kind.WEIGHTING, "example") == (
        "error: plugin `example` has 2 weightings: `example.flat`, `example.valued`\n"
        'hint: name one: use = "example.flat"'
    )


def test_a_plugin_that_offers_none_of_the_kind(install_plugin, registry, declaring, error_of):
    install_plugin("mine", declaring("wmtp_critics", "a"))

    assert error_of(lambda: resolve(registry(), Kind.DATA, "mine")) == (
        "error: plugin `mine` has no data source\nhint: it has `mine.a`"
    )


@pytest.fixture
def moved(install_plugin, registry, declaring, error_of):
    """`core_like` has data `jsonl`, `tasks` has data `micro` and weighting `jsonl`; `broken` raises."""
    install_plugin("broken", BROKEN)
    install_plugin("core_like", declaring("wmtp_data_sources", "jsonl"))
    install_plugin(
        "tasks",
        declaring("wmtp_data_sources", "micro")
        + "\n    @hookimpl\n    def wmtp_weighting_strategies():\n        return [declare('jsonl')]\n",
    )
    return lambda use: error_of(lambda: resolve(registry(), Kind.DATA, use))


def test_a_component_that_another_plugin_has(moved):
    assert moved("core_like.micro") == (
        "error: plugin `core_like` has no data source named `micro`; it has `core_like.jsonl`\n"
        "hint: did you mean `tasks.micro`?"
    )
    # A weighting named `jsonl` is no data source: only components of the same kind are suggested.
    assert moved("tasks.jsonl") == (
        "error: plugin `tasks` has no data source named `jsonl`; it has `tasks.micro`\n"
        "hint: `tasks.jsonl` is a weighting: name it in `[weighting]`"
    )


def test_a_component_of_a_plugin_that_is_not_installed(moved):
    none_named = "is installed; installed: `broken`, `core_like`, `tasks`"

    assert moved("zzz.micro") == (
        f"error: no plugin named `zzz` {none_named}\nhint: did you mean `tasks.micro`?"
    )
    assert moved("micro") == f"error: no plugin named `micro` {none_named}\nhint: did you mean `tasks.micro`?"
    assert moved("core_lik.micro") == (
        f"error: no plugin named `core_lik` {none_named}\nhint: did you mean `core_like` or `tasks.micro`?"
    )
    assert moved("task.micro") == f"error: no plugin named `task` {none_named}\nhint: did you mean `tasks`?"
    assert moved("zzz.zzz") == (
        f"error: no plugin named `zzz` {none_named}\n"
        "hint: install the package that offers it, then: plugins list"
    )


def test_a_near_miss_beside_a_component_that_other_plugins_have(
    install_plugin, registry, declaring, error_of
):
    install_plugin("one", declaring("wmtp_critics", "value_heads"))
    install_plugin("two", declaring("wmtp_critics", "value_head"))
    install_plugin("three", declaring("wmtp_critics", "value_head"))

    assert error_of(lambda: resolve(registry(), Kind.CRITIC, "one.value_head")) == (
        "error: plugin `one` has no critic named `value_head`; it has `one.value_heads`\n"
        "hint: did you mean `one.value_heads`, `three.value_head` or `two.value_head`?"
    )


def test_a_plugin_with_no_component_of_the_kind_and_one_with_one(
    install_plugin, registry, declaring, error_of
):
    install_plugin("one", declaring("wmtp_critics", "head"))
    install_plugin("two", declaring("wmtp_data_sources", "micro"))

    assert error_of(lambda: resolve(registry(), Kind.DATA, "one.micro")) == (
        "error: plugin `one` has no data source\nhint: did you mean `two.micro`?"
    )
