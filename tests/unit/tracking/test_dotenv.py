"""`.env`: listed variables only, without interpolation; the environment takes precedence."""

import os

import pytest
from weighted_mtp_core.tracking.dotenv import NAMES, load_dotenv, use_dotenv


@pytest.fixture
def dotenv(tmp_path, monkeypatch):
    """Load a `.env` file with this text."""
    for name in (*NAMES, "PATH_PLANTED"):
        monkeypatch.setenv(name, "")

    def dotenv(text, mode=0o600):
        path = tmp_path / ".env"
        path.write_text(text)
        path.chmod(mode)
        return load_dotenv(path)

    return dotenv


def test_known_names_are_taken(dotenv):
    found = dotenv("MLFLOW_TRACKING_USERNAME=ann\nAWS_DEFAULT_REGION=eu-1\n")

    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "ann"
    assert found.taken == ("MLFLOW_TRACKING_USERNAME", "AWS_DEFAULT_REGION")


def test_the_real_environment_wins(dotenv, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "real")

    dotenv("MLFLOW_TRACKING_USERNAME=ann\n")

    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "real"


def test_a_password_is_not_interpolated(dotenv):
    dotenv("MLFLOW_TRACKING_PASSWORD=a${HOME}c\n")

    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "a${HOME}c"


def test_other_names_are_left_alone_and_told(dotenv):
    found = dotenv("LD_PRELOAD=/evil.so\nPATH_PLANTED=/evil\n")

    assert "LD_PRELOAD" not in os.environ
    assert found.ignored == ("LD_PRELOAD", "PATH_PLANTED")


@pytest.mark.parametrize(("mode", "exposed"), [(0o600, False), (0o640, True), (0o604, True)])
def test_a_file_that_others_can_read_is_noticed(dotenv, mode, exposed):
    assert dotenv("", mode).exposed is exposed


def test_no_file_is_no_fault(tmp_path):
    assert load_dotenv(tmp_path / ".env") is None


def test_a_run_warns_once_of_a_file_that_others_can_read(dotenv, tmp_path, monkeypatch, caplog):
    dotenv("MLFLOW_TRACKING_USERNAME=ann\n", 0o644)
    monkeypatch.chdir(tmp_path)

    use_dotenv()
    use_dotenv()

    (said,) = caplog.messages
    assert said == f"WARNING: `{tmp_path}/.env` can be read by others: chmod 600 {tmp_path}/.env"
