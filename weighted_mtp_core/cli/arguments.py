"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from weighted_mtp_core.plan import Plan, make_plan

ItemT = TypeVar("ItemT", str, int, float)


def add_actions(
    parser: argparse.ArgumentParser, *functions: Callable[[argparse.Namespace], int | None]
) -> list[Any]:
    """Add an action for each function; the docstring of a function is the help of its action.

    The name of an action is the name of the function with dashes: `_add_model` becomes `add-model`.

    Returns:
        The parser of each action.
    """
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    parsers = []
    for function in functions:
        name = function.__name__.strip("_").replace("_", "-")
        parsers.append(actions.add_parser(name, help=str(function.__doc__).rstrip(".")))
        parsers[-1].set_defaults(main=function)
    return parsers


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add RECIPE, `--preset`, `--set`, `--run-name` and `--micro`."""
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="a file such as configs/baseline.toml")
    add_override_arguments(parser)
    parser.add_argument("--run-name", metavar="NAME", help="short for --set run.name=NAME")
    parser.add_argument(
        "--micro", action="store_true", help="short for --set model.base=micro: a small model, no download"
    )


def add_override_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--preset` and `--set`."""
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="change the recipe with presets/NAME.toml in its folder, or a preset of core: ci, local-light",
    )
    add_set_argument(parser)


def add_set_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--set`."""
    add_repeatable(
        parser,
        "--set",
        metavar="KEY=VALUE",
        dest="overrides",
        help="change one key: train.steps=50, weighting.options.clip=[0,2], tracker.0.use=core.mlflow; "
        "overrides files and preset",
    )


def add_repeatable(parser: argparse.ArgumentParser, name: str, **details: str) -> None:
    """Add an option that may be given several times; the values form a list."""
    details["help"] += "; repeatable"
    parser.add_argument(name, action="append", default=[], **details)  # type: ignore[arg-type]


def add_run_arguments(parser: argparse.ArgumentParser, *, also: str = "") -> None:
    """Add RUN and `--runs`; `also` is appended to the help text of RUN."""
    add_run(parser, also=also)
    add_folder(parser, "--runs", default="storage/runs")


def add_run(parser: argparse.ArgumentParser, *, also: str = "") -> None:
    """Add RUN; `also` is appended to the help text of RUN and names what RUN may be besides a run."""
    parser.add_argument("run", metavar="RUN", help=f"a run folder, a run id or a part of a run id{also}")


def add_executor(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Add `--executor`; its help text contains `default`, the executor that is used without this option."""
    parser.add_argument(
        "--executor", metavar="WHERE", help=f"local:N, or dask://HOST:PORT of a scheduler ({default})"
    )


def add_folder(parser: argparse.ArgumentParser, name: str, *, default: str) -> None:
    """Add an option for the path of a folder, such as `--storage` or `--runs`."""
    parser.add_argument(name, metavar="FOLDER", type=Path, default=Path(default), help=f"default: {default}")


def list_of(kind: Callable[[str], ItemT]) -> Callable[[str], list[ItemT]]:
    """Return an argparse type for values separated by commas."""

    def parse(text: str) -> list[ItemT]:
        return [kind(each) for each in text.split(",")]

    parse.__name__ = f"list of {kind.__name__}"  # shown in argparse's error messages
    return parse


def plan_from(args: argparse.Namespace, *more: str) -> Plan:
    """Make the plan of the recipe in the arguments; the overrides in `more` follow the user's overrides."""
    overrides = [*(["model.base=micro"] if args.micro else []), *args.overrides, *more]
    return make_plan(args.recipe, preset=args.preset, overrides=overrides, run_name=args.run_name)


def evaluate_overrides(args: argparse.Namespace, *keys: str) -> list[str]:
    """Return the given arguments among `keys` as overrides of the recipe's table `[evaluate]`."""
    given = {key: getattr(args, key) for key in keys}
    return [f"evaluate.{key}={_toml(value)}" for key, value in given.items() if value is not None]


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
