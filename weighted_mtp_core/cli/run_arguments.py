"""The arguments that say which finished run is meant, and how text is to be written."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def add_run_arguments(parser: argparse.ArgumentParser, *, also: str = "") -> None:
    """Add RUN and `--runs`; `also` says what else RUN may be."""
    parser.add_argument("run", metavar="RUN", help=f"a run folder, a run id, or a part of one{also}")
    parser.add_argument(
        "--runs", metavar="FOLDER", type=Path, default=Path("storage/runs"), help="(storage/runs)"
    )


def list_of(kind: Callable[[str], float]) -> Callable[[str], list[float]]:
    """Return an argparse type for numbers with commas between them."""

    def parse(text: str) -> list[float]:
        return [kind(each) for each in text.split(",")]

    parse.__name__ = f"list of {kind.__name__}"  # argparse names it in its messages
    return parse


def evaluate_overrides(args: argparse.Namespace, *keys: str) -> list[str]:
    """Return those arguments that were given as changes of the recipe's table `[evaluate]`."""
    given = {key: getattr(args, key) for key in keys}
    return [f"evaluate.{key}={_toml(value)}" for key, value in given.items() if value is not None]


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
