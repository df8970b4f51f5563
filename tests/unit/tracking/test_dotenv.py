"""`.env`: listed variables only, without interpolation; the environment takes precedence."""

import os

import pytest
from weighted_mtp_core.cli import main
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.tracking.dotenv import NAMES, load_dotenv, use_dotenv


@pytest.fixture
def dotenv(tmp_path, monkeypatch):
    """Load a `.env` file with this text."""
    for name in (*NAMES, "PATH_PLANTED"):
        monkeypatch.setenv(name, "")

    def dotenv(text, mode=0o600):
        path = tmp_path / ".env"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("\ufeffMLFLOW_TRACKING_PASSWORD=abc\n", "abc"),
        ("MLFLOW_TRACKING_PASSWORD=p w\r\n", "p w"),
        ("export MLFLOW_TRACKING_PASSWORD=abc\n", "abc"),
        ("MLFLOW_TRACKING_PASSWORD = abc\n", "abc"),
        ("MLFLOW_TRACKING_PASSWORD=\xa0 abc\n", "abc"),
        ("MLFLOW_TRACKING_PASSWORD=p@ss#word\n", "p@ss#word"),
        ("MLFLOW_TRACKING_PASSWORD=p@ss #word\n", "p@ss"),  # documented: a comment
        ("MLFLOW_TRACKING_PASSWORD='p@ss #word'\n", "p@ss #word"),
        ("MLFLOW_TRACKING_PASSWORD=\"a 'b'\"\nOTHER\n", "a 'b'"),
    ],
)
def test_a_file_is_read_as_editors_write_it(dotenv, text, value):
    dotenv(text)

    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == value


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("MLFLOW_TRACKING_URI: http://h:5000\n", 1),
        ("# server\n\n\nMLFLOW_TRACKING_URI http://h\n", 4),
        ("AWS_DEFAULT_REGION=x\nMLFLOW_TRACKING_URI\n", 2),
        ('MLFLOW_TRACKING_PASSWORD="abc\nMLFLOW_TRACKING_URI=http://h:5000\n', 1),
        ('MLFLOW_TRACKING_PASSWORD="abc\nMLFLOW_TRACKING_URI="http://h:5000"\n', 1),
    ],
)
def test_a_line_that_cannot_be_read_is_an_error_without_its_secret(dotenv, tmp_path, text, line):
    with pytest.raises(WmtpError) as refused:
        dotenv(text)

    assert str(refused.value).startswith(f"{tmp_path}/.env: line {line}: expected NAME=VALUE")
    assert "abc" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("MLFLOW_TRACKING_URI=http://h\n".encode("utf-16"), "the file is UTF-16; expected UTF-8"),
        ("MLFLOW_TRACKING_URI=http://h\n".encode("utf-32"), "the file is UTF-32; expected UTF-8"),
        ("MLFLOW_TRACKING_URI=http://h\n".encode("utf-16-le"), "the file is UTF-16 or binary"),
        (b"AWS_DEFAULT_REGION=x\n# gr\xfcn\n", "line 2: not UTF-8 (byte 0xfc)"),
    ],
)
def test_another_encoding_is_named(dotenv, content, message):
    with pytest.raises(WmtpError) as refused:
        dotenv(content)

    assert message in str(refused.value)


def test_doctor_lists_a_file_that_cannot_be_read(dotenv, tmp_path, monkeypatch, capsys):
    with pytest.raises(WmtpError):
        dotenv("MLFLOW_TRACKING_URI: http://h\n")
    monkeypatch.chdir(tmp_path)

    assert main(["doctor"]) == 1
    assert "FAILED  .env: .env: line 1: expected NAME=VALUE" in capsys.readouterr().out
