"""List, show and check installed plugins; write a new plugin.

An installed plugin has no effect by itself: a recipe names the components that it uses, and only the plugins
that declare these components are imported.

examples:
  plugins list                           names, distributions and versions; imports nothing
  plugins show core                      components and their options
  plugins check                          load each plugin and report its mistakes
  plugins new top_k --kind weighting     write a complete package with one component
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import attrs

from weighted_mtp_core.cli.arguments import add_actions
from weighted_mtp_core.cli.table import print_rows
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.exit_codes import EXIT_BAD_INPUT, EXIT_DONE
from weighted_mtp_core.plugins.discovery import FoundPlugin, find, metadata_faults
from weighted_mtp_core.plugins.loading import AnyComponent, Kind, PluginRegistry
from weighted_mtp_core.recipe.structure import default_of, expected, plain
from weighted_mtp_core.scaffold import SUMMARIES, Scaffold, check_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _, show, check, new = add_actions(parser, _list, _show, _check, _new)
    show.add_argument("name", metavar="NAME", help="a name from `plugins list`")
    check.add_argument("names", metavar="NAME", nargs="*", help="names from `plugins list` (default: all)")
    new.add_argument("name", metavar="NAME", help="name in recipes: lower-case letters, digits, `_`")
    new.add_argument("--kind", required=True, choices=[each.value for each in SUMMARIES])
    new.add_argument(
        "folder", metavar="DIR", nargs="?", help="folder of the package (default: weighted-mtp-NAME)"
    )
    new.intermixed = True  # NAME --kind KIND DIR


def _list(_: argparse.Namespace) -> None:
    """List the installed plugins; imports nothing."""
    rows = [("NAME", "DISTRIBUTION", "VERSION", "WORKS WITH CORE")]
    for plugin in find().values():
        note = "  (name claimed twice)" if plugin.conflicts else ""
        note = "  (several versions)" if len(plugin.folders) > 1 else note
        rows += [_listed(each, note) for each in (plugin, *plugin.conflicts)]
    print_rows(rows)
    for fault in metadata_faults():
        print(f"warning: {fault}")


def _listed(plugin: FoundPlugin, note: str) -> tuple[str, str, str, str]:
    try:
        works_with = plugin.core_range or "any"
    except WmtpError as error:
        works_with = str(error)
    return plugin.name, plugin.distribution, plugin.version, works_with + note


def _show(args: argparse.Namespace) -> None:
    """Show the components of a plugin and their options."""
    plugin = PluginRegistry().load(args.name)
    print(f"{plugin.found.name}: {plugin.found.distribution} {plugin.found.version}, `{plugin.found.module}`")
    for kind in Kind:
        for name, component in plugin.components[kind].items():
            print(f"\n{kind.label} {plugin.found.name}.{name}\n  {component.summary}")
            _print_signals("needs", component.needs)
            _print_signals("provides", component.provides)
            if component.negative_weights:
                print("  weights may be negative, if the recipe allows it")
            print_rows(_option_rows(component), indent="    ")


def _print_signals(verb: str, signals: Any) -> None:
    if signals:
        print(f"  {verb} {', '.join(sorted(signal.value for signal in signals))}")


def _option_rows(component: AnyComponent) -> list[tuple[str, ...]]:
    return [
        (str(attribute.alias), expected(attribute.type), _default(attribute))
        for attribute in attrs.fields(attrs.resolve_types(component.options))
        if attribute.init
    ]


def _default(attribute: Any) -> str:
    value = default_of(attribute)
    if value is attrs.NOTHING:
        return "required"
    return "optional" if value is None else f"default {plain(value)!r}"


def _check(args: argparse.Namespace) -> int:
    """Load all plugins, or the given ones, and report mistakes."""
    registry = PluginRegistry()
    code = EXIT_DONE
    for name in args.names or registry.found:
        try:
            plugin = registry.load(name)
        except WmtpError as error:
            code = EXIT_BAD_INPUT
            print(f"FAIL {name}: {error}")
            if error.hint:
                print(f"     hint: {error.hint}")
            continue
        offers = [address for kind in Kind for address in plugin.addresses(kind)]
        origin = f"{plugin.found.distribution} {plugin.found.version}"
        print(f"ok   {name} ({origin}): {', '.join(offers) or 'no components'}")
    return code


def _new(args: argparse.Namespace) -> None:
    """Write a complete plugin package."""
    check_name(args.name, find())
    scaffold = Scaffold(name=args.name, kind=next(each for each in Kind if each.value == args.kind))
    folder = Path(args.folder or scaffold.distribution)
    scaffold.write(folder)
    print(f"{folder}: a package `{scaffold.distribution}` with the {scaffold.kind.label} `{args.name}`\n")
    print("next:")
    steps = [
        (shlex.join(["cd", str(folder)]), ""),
        ("pip install -e '.[dev]'", "where core is installed"),
        (f"python -m weighted_mtp_core plugins check {args.name}", ""),
        ("pytest", "core's checks, and numbers worked out by hand"),
        (f"edit src/{scaffold.module}/_{args.name}.py", "to implement your idea"),
    ]
    print_rows(steps, indent="  ")
