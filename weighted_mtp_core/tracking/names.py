"""Check names of experiments, runs, artifacts and metrics, because MLflow itself accepts `../../evil`."""

from __future__ import annotations

import re

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.identifiers import check_path

_METRIC = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_. :-]|/(?=[A-Za-z0-9_]))*")
_LONGEST = 250  # characters; the width of the columns in MLflow's database


def check_path_name(text: str, *, what: str) -> str:
    """Return `text` if it is a valid path for an experiment, a run or an artifact.

    Raises:
        WmtpError: A part of the path between `/` is empty or is not a valid folder name.
    """
    try:
        check_path(text)
    except ValueError as error:
        raise WmtpError(
            f"`{_shown(text)}` is not a valid name for {what}",
            hint="use letters, digits, `.`, `_` and `-`, but not `..`; each part between `/` begins with a "
            "letter or digit",
        ) from error
    return text


def check_metric_name(name: str) -> str:
    """Return `name` if it is a valid name for a metric, which every tracker must accept.

    Raises:
        WmtpError: The name is longer than 250 characters, contains a character that MLflow refuses, or has a
            part between `/` that does not begin with a letter, a digit or `_`.
    """
    if len(name) > _LONGEST or not _METRIC.fullmatch(name):
        raise WmtpError(
            f"`{_shown(name)}` is not a valid name for a metric",
            hint="use letters, digits, `_`, `-`, `.`, `:`, spaces and `/` between parts",
        )
    return name


def _shown(text: str) -> str:
    return text.encode("unicode_escape").decode()[:80]
