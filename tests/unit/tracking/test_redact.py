"""Secrets are removed from text, and ordinary text is unchanged."""

import logging
import sys

import pytest
from weighted_mtp_core.redaction import redact, redact_log_records


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://ann:pw@host/x", "https://***@host/x"),
        ("https://token@git.example.org/r.git", "https://***@git.example.org/r.git"),
        ("https://ann:p@w@host/x", "https://***@host/x"),
        ("https://ann:p/w@host/x", "https://***@host/x"),
        ("postgresql+psycopg2://u:pw@h:5432/db", "postgresql+psycopg2://***@h:5432/db"),
        (
            "https://git.example.org/r.git?private_token=abc&x=1",
            "https://git.example.org/r.git?private_token=***&x=1",
        ),
        (
            "GET /b/k?X-Amz-Credential=AK%2F1&X-Amz-Signature=ab12",
            "GET /b/k?X-Amz-Credential=***&X-Amz-Signature=***",
        ),
        ("{'Authorization': 'Basic YW5uOnB3cHdwdw=='}", "{'Authorization': 'Basic ***'}"),
        ("https://host:8080/path", "https://host:8080/path"),
        ("git@github.com:team/repo.git", "git@github.com:team/repo.git"),
        ("pass@1 0.62 and a token 5", "pass@1 0.62 and a token 5"),
        (
            "http://127.0.0.1:5000/ then mail ann@example.org",
            "http://127.0.0.1:5000/ then mail ann@example.org",
        ),
    ],
)
def test_urls_and_headers(text, shown):
    assert redact(text) == shown


def test_values_of_the_secret_variables_in_every_spelling(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "p w/ä'1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKPLANTED")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sk-planted+/=")

    text = "p w/ä'1 p%20w%2F%C3%A4%271 YW5uOnAgdy/DpCcx AKPLANTED sk-planted+/= sk-planted%2B%2F%3D"

    assert redact(text) == "*** *** *** *** *** ***"


def test_a_value_too_short_to_be_a_secret_blanks_out_nothing(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a")

    assert redact("a value") == "a value"


def test_log_records_of_others_are_redacted(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sk-planted")
    before = logging.getLogRecordFactory()
    redact_log_records()
    redact_log_records()
    logger = logging.getLogger("botocore.planted")
    try:
        record = logger.makeRecord(logger.name, 10, "f", 1, "headers %s %d", ({"x": "sk-planted"}, 5), None)
    finally:
        logging.setLogRecordFactory(before)

    assert record.getMessage() == "headers {'x': '***'} 5"


def test_the_traceback_of_a_log_record_is_redacted(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sk-planted")
    before = logging.getLogRecordFactory()
    redact_log_records()
    logger = logging.getLogger("botocore.planted")
    try:
        int("sk-planted")
    except ValueError:
        record = logger.makeRecord(logger.name, 40, "f", 1, "failed", (), sys.exc_info())
    finally:
        logging.setLogRecordFactory(before)

    text = logging.Formatter().format(record)
    assert "ValueError: invalid literal for int() with base 10: '***'" in text
    assert "sk-planted" not in text
