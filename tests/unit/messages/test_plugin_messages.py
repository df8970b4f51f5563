"""The exact texts of messages about plugins that cannot be found or loaded, or that build too early."""

import pytest
from weighted_mtp_core.api import BuildContext

NOT_CALLABLE = "'build' must be callable (got None that is a <class 'NoneType'>)."


@pytest.fixture
def load_error(install_plugin, registry, error_of):
    """Install plugin `mine` with the given source; return the error of loading it."""

    def load_error(source, **metadata):
        install_plugin("mine", source, **metadata)
        return error_of(lambda: registry().load("mine"))

    return load_error


def test_no_such_plugin(install_plugin, registry, error_of):
    for name in ("first", "second", "third"):
        install_plugin(name, "")

    assert error_of(lambda: registry().load("secnd")) == (
        "error: no plugin named `secnd` is installed; installed: `first`, `second`, `third`\n"
        "hint: did you mean `second`?"
    )
    assert error_of(lambda: registry().load("x")) == (
        "error: no plugin named `x` is installed; installed: `first`, `second`, `third`\n"
        "hint: install the package that offers it, then: plugins list"
    )


def test_two_packages_claim_a_name(install_plugin, registry, error_of):
    install_plugin("mine", distribution="wmtp-dup", version="0.3.0")
    install_plugin("mine", distribution="weighted-mtp-mine", version="0.1.0")

    assert error_of(lambda: registry().load("mine")) == (
        "error: two installed packages both claim the plugin name `mine`: "
        "weighted-mtp-mine 0.1.0 and wmtp-dup 0.3.0\n"
        "hint: uninstall one, for example: pip uninstall wmtp-dup"
    )


def test_a_name_that_is_no_address(install_plugin, registry, error_of):
    install_plugin("My-Plugin", "", distribution="mine")

    assert error_of(lambda: registry().load("My-Plugin")) == (
        "error: plugin `My-Plugin` (mine 0.3.0) has a name that is not valid in an address: "
        "expected `[a-z][a-z0-9_]*`"
    )


@pytest.mark.parametrize("written", [">=0.4,<0.5", "<0.5,>=0.4"])
def test_made_for_another_core(load_error, written):
    """Build back ends sort the parts of the range; the message shows the range as people write it."""
    assert load_error("", requires=f"weighted-mtp-core{written}") == (
        "error: plugin `mine` (wmtp-mine 0.3.0) needs weighted-mtp-core>=0.4,<0.5, but 0.1.0 is installed\n"
        "hint: install a version of wmtp-mine made for weighted-mtp-core 0.1.0"
    )


@pytest.mark.parametrize("before", ["", "weighted-mtp-core>=0.1\nRequires-Dist: "])
def test_metadata_that_cannot_be_read(load_error, before):
    assert load_error("", requires=f"{before}numpy >>> 1") == (
        "error: plugin `mine` (wmtp-mine 0.3.0) has metadata that cannot be read: `numpy >>> 1`"
    )


def test_a_failing_import(load_error):
    assert load_error("import package_that_does_not_exist") == (
        "error: plugin `mine` (wmtp-mine 0.3.0) failed to import `wmtp_mine`: "
        "ModuleNotFoundError: No module named 'package_that_does_not_exist'"
    )


def test_an_import_that_exits_the_program(load_error):
    assert load_error("raise SystemExit('bye')") == (
        "error: plugin `mine` (wmtp-mine 0.3.0) failed to import `wmtp_mine`: SystemExit: bye"
    )


def test_a_hook_that_core_does_not_have(load_error):
    source = """
        from weighted_mtp_core.api import hookimpl

        @hookimpl
        def wmtp_weighting_strategy():
            return []
    """

    assert load_error(source) == (
        "error: plugin `mine` (wmtp-mine 0.3.0) declares a hook core does not have: "
        "unknown hook `wmtp_weighting_strategy`\n"
        "hint: did you mean `wmtp_weighting_strategies`?"
    )


def test_an_unknown_hook_without_a_near_miss(load_error):
    assert load_error("from weighted_mtp_core.api import hookimpl\n@hookimpl\ndef zzz(): pass\n") == (
        "error: plugin `mine` (wmtp-mine 0.3.0) declares a hook core does not have: unknown hook `zzz`\n"
        "hint: core has `wmtp_data_sources`, `wmtp_critics`, `wmtp_weighting_strategies`, `wmtp_trackers`"
    )


def test_a_hook_with_arguments(load_error):
    assert load_error(
        "from weighted_mtp_core.api import hookimpl\n@hookimpl\ndef wmtp_critics(config): return []\n"
    ) == (
        "error: plugin `mine` (wmtp-mine 0.3.0) declares arguments of `wmtp_critics`: `config`; "
        "hooks have none"
    )


def test_an_undecorated_hook(load_error):
    assert load_error("def wmtp_weighting_strategies(): return []") == (
        "error: plugin `mine` (wmtp-mine 0.3.0) defines `wmtp_weighting_strategies` without @hookimpl, "
        "so core would never call it\n"
        "hint: from weighted_mtp_core.api import hookimpl"
    )


def test_two_plugins_that_are_one_module(install_plugin, registry, error_of):
    install_plugin("first", "")
    install_plugin("second", "", module="wmtp_first")
    both = registry()
    both.load("first")

    assert error_of(lambda: both.load("second")) == (
        "error: plugin `second` (wmtp-second 0.3.0) and plugin `first` are the same module: `wmtp_first`"
    )


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("raise KeyError('x')", "failed in `wmtp_critics`: KeyError: 'x'"),
        ("pass", "failed in `wmtp_critics`: TypeError: 'NoneType' object is not iterable"),
        ("return [Options]", "returns a type from `wmtp_critics`; expected a Component"),
        ("return [declare('a'), declare('a')]", "declares two critics named `mine.a`"),
        (
            "return [declare('a', options=dict)]",
            "declares options of `mine.a` that are not an attrs class: <class 'dict'>",
        ),
        (
            "return [declare('A-b')]",
            "failed in `wmtp_critics`: ValueError: 'name' must match regex '[a-z][a-z0-9_]*' ('A-b' doesn't)",
        ),
        (
            "return [declare('a', build=None)]",
            f"failed in `wmtp_critics`: NotCallableError: {NOT_CALLABLE}",
        ),
    ],
)
def test_a_hook_that_declares_nonsense(load_error, plugin_source, body, text):
    source = plugin_source("wmtp_critics", body)

    assert load_error(source) == f"error: plugin `mine` (wmtp-mine 0.3.0) {text}"


def test_options_of_a_type_that_cannot_be_found(load_error):
    source = """
        from __future__ import annotations
        from attrs import frozen
        from weighted_mtp_core.api import Component, hookimpl

        @frozen
        class Options:
            size: Missing = 1

        @hookimpl
        def wmtp_critics():
            yield Component(name="a", summary="", options=Options, build=print)
    """

    assert load_error(source) == (
        "error: plugin `mine` (wmtp-mine 0.3.0) declares an option of `mine.a` with an unknown type: "
        "name 'Missing' is not defined"
    )


def test_building_too_early(tmp_path, error_of):
    assert error_of(lambda: BuildContext(seed=0, storage=tmp_path).model) == (
        "error: this component is built before the policy exists, so `context.model` is empty"
    )
