"""Remove secrets from text before the text is shown or stored; known secrets come from the environment."""

from __future__ import annotations

import base64
import logging
import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from urllib.parse import quote

SECRET_VARIABLES = (
    "MLFLOW_TRACKING_PASSWORD",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    # core does not read these from `.env`, but MLflow, boto3 and PostgreSQL read them from the environment
    "MLFLOW_TRACKING_TOKEN",
    "AWS_SESSION_TOKEN",
    "PGPASSWORD",
    "OPENAI_API_KEY",  # key of the server from which `data sample --endpoint` samples texts
)
"""Environment variables with values that must never be shown."""

_SHORTEST = 4  # characters; removing shorter values would also remove ordinary words
_PATTERNS = (
    # https://user:password@host, also https://token@host and a password that contains `@` or `/`
    (re.compile(r"(?<=://)(?:[^\s/'\"`<>]*|[^\s/'\"`<>]*:[^\s'\"`<>]*)@"), "***@"),
    # https://host/?private_token=..., presigned URLs
    (
        re.compile(
            r"(?i)((?:private_token|access_token|auth_token|token|password|x-amz-signature|x-amz-credential"
            r"|x-amz-security-token|awsaccesskeyid|signature)=)[^&\s'\"`<>]+"
        ),
        r"\1***",
    ),
    (re.compile(r"(?i)\b(basic|bearer) [a-z0-9+/=._~-]{8,}"), r"\1 ***"),
)


def secrets() -> list[str]:
    """Return the secrets of at least 4 characters in the environment, longest first.

    The result also contains each secret as it is quoted in URLs and in Python, and MLflow's login in base64.
    """
    found = {value for name in SECRET_VARIABLES if len(value := os.environ.get(name, "")) >= _SHORTEST}
    user = os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    if user and password:
        found.add(base64.b64encode(f"{user}:{password}".encode()).decode())
    found |= {quote(secret, safe="") for secret in found} | {repr(secret)[1:-1] for secret in found}
    return sorted(found, key=len, reverse=True)


def redact_log_records() -> None:
    """Remove secrets from messages and tracebacks of all later log records of this process, of all loggers.

    Debug records of botocore and urllib3, for example, contain signatures, keys and headers.
    """
    make = logging.getLogRecordFactory()
    if getattr(make, "func", None) is not _redacted_record:
        logging.setLogRecordFactory(partial(_redacted_record, make))


def _redacted_record(
    make: Callable[..., logging.LogRecord], *args: object, **kwargs: object
) -> logging.LogRecord:
    record = make(*args, **kwargs)
    with suppress(TypeError, ValueError):  # the arguments do not fit the format, which logging reports
        record.msg, record.args = redact(record.getMessage()), None
    if record.exc_info and record.exc_info[0] is not None:
        record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
    return record


def redact(text: str) -> str:
    """Return the text with `***` instead of passwords, tokens, signatures and the environment's secrets."""
    for secret in secrets():
        text = text.replace(secret, "***")
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text
