"""Read `.env`: only the variables listed here, without interpolation; the environment takes precedence."""

from __future__ import annotations

import logging
import os
import stat
from functools import cache
from pathlib import Path

from attrs import frozen

NAMES = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_DEFAULT_REGION",
    "MLFLOW_S3_ENDPOINT_URL",
)


@frozen(kw_only=True)
class DotEnv:
    """What was read from a `.env` file.

    Attributes:
        path: The file.
        taken: Variables that it set.
        ignored: Variables in it that this framework does not read.
        exposed: Whether other users can read it.
    """

    path: Path
    taken: tuple[str, ...]
    ignored: tuple[str, ...]
    exposed: bool


def load_dotenv(path: Path = Path(".env")) -> DotEnv | None:
    """Set the listed variables of `.env` that are not set yet; return None without a file."""
    if not path.is_file():
        return None
    from dotenv import dotenv_values

    # no interpolation: `a${HOME}c` may be part of a password; a list of names: a file must not be able to
    # set PATH or LD_PRELOAD
    values = {name: value for name, value in dotenv_values(path, interpolate=False).items() if value}
    taken = tuple(name for name in NAMES if name in values and not os.environ.get(name))
    for name in taken:
        os.environ[name] = values[name]
    return DotEnv(
        path=path,
        taken=taken,
        ignored=tuple(sorted(values.keys() - set(NAMES))),
        exposed=bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)),
    )


def use_dotenv() -> None:
    """Load `.env`, and warn once if other users can read it."""
    found = load_dotenv()
    if found is not None and found.exposed:
        _warn_of(found.path.absolute())


@cache
def _warn_of(path: Path) -> None:
    logging.getLogger(__name__).warning("WARNING: `%s` can be read by others: chmod 600 %s", path, path)
