"""Refuse credentials in recipes, which are logged and shared: they belong in the environment or `.env`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from weighted_mtp_core.recipe.describe import shown
from weighted_mtp_core.recipe.line_numbers import KeyPath
from weighted_mtp_core.recipe.structure import Fault

_USER_AND_PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s]*@")
_HINT = (
    "a recipe holds no secrets: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD "
    "in the environment or in `.env`"
)


def credential_faults(value: Any, *, at: KeyPath = ()) -> list[Fault]:
    """Find every `scheme://user:password@host` below `value`; the faults do not show the password."""
    if isinstance(value, str) and _USER_AND_PASSWORD.search(value):
        return [Fault(at, f"holds a user name and password: {shown(value)}", hint=_HINT)]
    if isinstance(value, list):
        value = dict(enumerate(value))
    items = value.items() if isinstance(value, Mapping) else ()
    return [fault for key, item in items for fault in credential_faults(item, at=(*at, key))]
