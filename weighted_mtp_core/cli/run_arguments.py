"""The arguments of commands that read a finished run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_run_arguments(parser: argparse.ArgumentParser, *, also: str = "") -> None:
    """Add RUN and `--runs`; `also` names what else RUN may be, for the help text."""
    parser.add_argument("run", metavar="RUN", help=f"a run folder, a run id, or a part of one{also}")
    parser.add_argument(
        "--runs",
        metavar="FOLDER",
        type=Path,
        default=Path("storage/runs"),
        help="where runs are looked up by id (default: storage/runs)",
    )


def list_of(kind: Callable[[str], float]) -> Callable[[str], list[float]]:
    """Return an argparse type for comma-separated numbers."""

    def parse(text: str) -> list[float]:
        return [kind(each) for each in text.split(",")]

    parse.__name__ = f"list of {kind.__name__}"  # shown in argparse's error messages
    return parse


def evaluate_overrides(args: argparse.Namespace, *keys: str) -> list[str]:
    """Return the arguments that were given as overrides of the recipe's table `[evaluate]`."""
    given = {key: getattr(args, key) for key in keys}
    return [f"evaluate.{key}={_toml(value)}" for key, value in given.items() if value is not None]


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
