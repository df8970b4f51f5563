"""A run that cannot work stops in seconds, before anything is loaded, with a message that has no secret."""

import time
from pathlib import Path

import pytest
from weighted_mtp_core.api import WmtpError
from weighted_mtp_core.tracking.run_folder import find_runs, read_run

pytestmark = pytest.mark.slow

BASELINE = str(Path(__file__).parents[2] / "configs" / "baseline.toml")


@pytest.fixture
def start_error(open_recorder, tmp_path):
    """Return the error at the start of a run, after checks that hold for every such error."""

    def start_error(**options):
        began = time.monotonic()
        with pytest.raises(WmtpError) as error:
            open_recorder(**options)
        text = f"{error.value}\n{error.value.hint}"

        assert time.monotonic() - began < 5
        assert "\n" not in str(error.value)
        assert "<" not in text
        assert [read_run(path)["status"] for path in find_runs(tmp_path / "runs")] == ["FAILED"]
        return text

    return start_error


def test_a_wrong_password(start_error, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "planted-wrong-password")

    text = start_error()

    assert "refuses the login in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in text
    assert "planted" not in text


def test_a_missing_password(start_error, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")

    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD are not both set" in start_error()


def test_a_host_that_nobody_knows(start_error, stack, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stack.uri.replace("127.0.0.1", "tracking.invalid"))

    assert "the host of the tracking server" in start_error()


def test_a_port_where_nobody_listens(start_error, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")

    assert "nothing answers at the tracking server `http://127.0.0.1:9`" in start_error()


def test_a_host_name_that_is_not_among_the_allowed_ones(start_error, stack, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stack.uri.replace("127.0.0.1", "localhost"))

    assert "--allowed-hosts" in start_error()


def test_https_where_there_is_no_tls(start_error, stack, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", stack.uri.replace("http://", "https://"))

    assert "no secure connection" in start_error()


def test_a_missing_bucket(start_error):
    text = start_error(artifact_root="s3://no-such-bucket/files", experiment_prefix="missing")

    assert "there is no bucket `no-such-bucket`" in text
    assert "`s3://` address" in text


def test_wrong_s3_keys(start_error, direct, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-wrong-secret")

    text = start_error(**direct)

    assert "refuses AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in text
    assert "planted" not in text


def test_missing_s3_keys(start_error, direct, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    assert "AWS_SECRET_ACCESS_KEY" in start_error(**direct)


def test_an_s3_server_that_is_not_there(start_error, direct, monkeypatch):
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "http://127.0.0.1:9")

    assert "check MLFLOW_S3_ENDPOINT_URL" in start_error(**direct)


def test_the_command_line_says_it_in_two_lines_before_a_model_is_loaded(wmtp, tmp_path):
    process = wmtp(
        *("run", BASELINE, "--preset", "ci"),
        cwd=tmp_path,
        MLFLOW_TRACKING_PASSWORD="planted-wrong-password",
    )
    stdout, stderr = process.communicate(timeout=60)

    assert process.returncode == 2
    error, hint = stderr.strip().splitlines()
    assert error.startswith("error: the tracking server `http://127.0.0.1:")
    assert hint == "hint: correct them in the environment or in `.env`"
    assert "planted" not in stdout + stderr
    assert "policy" not in stdout
