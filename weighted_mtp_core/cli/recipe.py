"""Write a new recipe for installed components.

The recipe contains all options of the data source, the critic and the weighting; options that are not set are
comments with their defaults. The command `check` accepts the new recipe.

examples:
  recipe new --list                                              the components to choose from
  recipe new my.toml --data core.jsonl --set data.options.path=my.jsonl --weighting my_plugin
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from weighted_mtp_core.cli.arguments import add_actions, add_set_argument
from weighted_mtp_core.cli.table import print_rows
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import python_command
from weighted_mtp_core.plugins.loading import Kind, PluginRegistry
from weighted_mtp_core.scaffold.recipe import write_recipe

_KEYS = {
    "--data": ("data.use", "address of the data source, such as core.jsonl"),
    "--weighting": ("weighting.use", "address of the weighting"),
    "--critic": ("critic.use", "address of the critic, if the weighting needs one"),
    "--base": (
        "model.base",
        "base model: a folder, a .gguf file or a hub id; default: micro, a small new model",
    ),
}
_REQUIRED = ("--data", "--weighting")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    (new,) = add_actions(parser, _new)
    new.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        type=Path,
        default=Path("recipe.toml"),
        help="file to write (default: recipe.toml)",
    )
    new.add_argument("--list", action="store_true", help="list the components to choose from; write nothing")
    for option, (_, text) in _KEYS.items():
        new.add_argument(option, metavar="ADDRESS" if option != "--base" else "MODEL", help=text)
    add_set_argument(new)
    new.intermixed = True  # --data ADDRESS FILE


def _new(args: argparse.Namespace) -> None:
    """Write a recipe with the options of its components as comments."""
    if args.list:
        _list()
        return
    given = {option: getattr(args, option.removeprefix("--")) for option in _KEYS}
    if missing := [option for option in _REQUIRED if given[option] is None]:
        raise WmtpError(
            f"`recipe new` needs {' and '.join(missing)}", hint="`recipe new --list` shows what is installed"
        )
    settings = {"FILE": ("run.name", args.file.stem)}
    settings |= {
        option: (key, given[option]) for option, (key, _) in _KEYS.items() if given[option] is not None
    }
    write_recipe(args.file, settings, args.overrides)
    print(f"{args.file}: a recipe\n\nnext:")
    commands = [("data", "preview"), ("run",)]
    for command in commands:
        print("  " + python_command("weighted_mtp_core", *command, str(args.file)))


def _list() -> None:
    registry = PluginRegistry()
    rows: list[tuple[str, ...]] = []
    for name in registry.found:
        try:
            registry.load(name)
        except WmtpError as error:
            print(f"warning: {error}", file=sys.stderr)
    for kind in Kind:
        for name, plugin in sorted(registry.loaded.items()):
            rows += [
                (kind.label, f"{name}.{component.name}", component.summary)
                for component in plugin.components[kind].values()
            ]
    print_rows(rows)
