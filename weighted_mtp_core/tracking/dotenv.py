"""Read variables from `.env`: only the variables in NAMES, without interpolation.

A variable that is already set in the environment takes precedence over `.env`, unless its value is empty.
"""

from __future__ import annotations

import io
import logging
import os
import shlex
import stat
from functools import cache
from pathlib import Path

from attrs import frozen

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.text_files import read_utf8

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
    """The result of reading a `.env` file.

    Attributes:
        path: The path of the file.
        taken: Names of the variables that were set from the file.
        ignored: Names of other variables that have a value in the file; they are not set.
        exposed: Whether users other than the owner have any permission for the file.
    """

    path: Path
    taken: tuple[str, ...]
    ignored: tuple[str, ...]
    exposed: bool


def load_dotenv(path: Path = Path(".env")) -> DotEnv | None:
    """Set the variables in NAMES that have a value in `.env` and have no value in the environment.

    Returns:
        A description of the file, or None if there is no such file.

    Raises:
        WmtpError: The file or one of its lines cannot be read.
    """
    if not path.is_file():
        return None
    # only names in NAMES are allowed, because the file must not be able to set PATH or LD_PRELOAD
    values = {name: value for name, value in _read(path).items() if value}
    taken = tuple(name for name in NAMES if name in values and not os.environ.get(name))
    for name in taken:
        os.environ[name] = values[name]
    return DotEnv(
        path=path,
        taken=taken,
        ignored=tuple(sorted(values.keys() - set(NAMES))),
        exposed=bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)),
    )


def _read(path: Path) -> dict[str, str]:
    """Return all variables, without interpolation, because a password may contain text such as `${HOME}`."""
    from dotenv.parser import parse_stream

    try:
        text = read_utf8(path)
    except OSError as error:
        raise WmtpError(f"cannot read `{path}`: {error.strerror}") from error
    values: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(text)):
        written = binding.original.string
        value = binding.value or ""
        lacks_value = binding.key in NAMES and binding.value is None
        if binding.error or lacks_value or (binding.key in NAMES and "\n" in value):
            line = binding.original.line + written[: len(written) - len(written.lstrip())].count("\n")
            # the message does not quote the line, which may contain a password
            raise WmtpError(
                f"{path}: line {line}: expected NAME=VALUE; a quoted value ends with its quote",
                hint="quote a value with ` #` or quotes in it: NAME='p@ss #word'",
            )
        if binding.key is not None:
            values[binding.key] = value
    return values


def use_dotenv() -> None:
    """Load `.env`, and warn once if users other than the owner have any permission for it.

    Raises:
        WmtpError: The file or one of its lines cannot be read.
    """
    found = load_dotenv()
    if found is not None and found.exposed:
        _warn_of(found.path.absolute())


@cache
def _warn_of(path: Path) -> None:
    mend = shlex.join(["chmod", "600", str(path)])
    logging.getLogger(__name__).warning("WARNING: `%s` can be read by others: %s", path, mend)
