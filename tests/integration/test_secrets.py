"""The secrets of a run appear nowhere: screen, logs, journal, artifacts, database, process list."""

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import stack as servers

pytestmark = pytest.mark.slow

BASELINE = Path(__file__).parents[2] / "configs" / "baseline.toml"

RUN = """
    import logging, os, sys, time
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    from pathlib import Path
    from weighted_mtp_core.api import BuildContext, RunInfo
    from weighted_mtp_core.builtin.mlflow import MlflowOptions, build_mlflow
    from weighted_mtp_core.tracking.display import Display
    from weighted_mtp_core.tracking.delivery import count_pending
    from weighted_mtp_core.tracking.recorder import Recorder
    from weighted_mtp_core.redaction import redact_log_records
    from weighted_mtp_core.tracking.run_folder import RunFolder

    def wait_until(condition):
        end = time.monotonic() + 60
        while not condition() and time.monotonic() < end:
            time.sleep(0.1)

    redact_log_records()
    options = MlflowOptions(artifact_root="s3://wmtp/secrets", experiment_prefix="secrets")
    tracker = build_mlflow(options, BuildContext(seed=0, storage=Path("storage")))
    folder = RunFolder.create(Path("runs"), experiment="secrets/x", name="run")
    remotes = {f"git.{i}": remote for i, remote in enumerate(sys.argv[1:])}
    info = RunInfo(
        run_id=folder.run_id, name="run", experiment="secrets/x", params=remotes, tags=remotes, datasets=(),
        folder=folder.path,
    )
    try:
        with Recorder.open(
            folder, info, trackers={"0-core.mlflow": tracker}, recipe_toml="", display=Display(),
            close_seconds=5,
        ) as record:
            record.metrics("policy", 1, {"loss": 1.0})
            (folder.checkpoints / "best_model.pt").write_bytes(b"x" * 9_000_000)
            record.artifact(folder.checkpoints / "best_model.pt", "checkpoints")
            wait_until(lambda: not count_pending(folder.journal, folder.delivery("0-core.mlflow")))
            print("S3, please go", flush=True)
            sys.stdin.readline()
            record.artifact(folder.checkpoints / "best_model.pt", "again")
            wait_until(lambda: "cannot store" in folder.log.read_text())
            raise RuntimeError(
                f"failed at https://{os.environ['MLFLOW_TRACKING_USERNAME']}:"
                f"{os.environ['MLFLOW_TRACKING_PASSWORD']}@host with {os.environ['AWS_SECRET_ACCESS_KEY']}"
            )
    except RuntimeError:
        pass
"""
REMOTES = (
    "https://ann:planted-remote-1@git.example.org/r.git",
    "https://planted-remote-2@git.example.org/r.git",
    "https://git.example.org/r.git?private_token=planted-remote-3",
)


def process_list():
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(lines)


@pytest.fixture
def repository(tmp_path):
    """A Git repository with a secret in the URL of its remote, which MLflow would record."""
    for command in (["init", "-q"], ["remote", "add", "origin", REMOTES[0]]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def test_planted_secrets_are_nowhere(stack, repository):
    """A run with debug logging, a failing upload and an exception that contains secrets."""
    process = subprocess.Popen(
        [sys.executable, "-c", dedent(RUN), *REMOTES],
        env={**os.environ, **stack.environment, "AWS_SESSION_TOKEN": "", "MLFLOW_TRACKING_TOKEN": ""},
        cwd=repository,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    while not lines or (lines[-1] and "S3, please go" not in lines[-1]):  # or the process ended
        lines.append(process.stdout.readline())
    processes = process_list()
    stack.s3.kill()
    rest, _ = process.communicate("gone\n", timeout=120)
    stack.s3.start()
    stdout = "".join(lines) + rest

    texts = {"screen": stdout, "process list": processes, "database": dump(stack)}
    for path in (repository / "runs").rglob("*"):
        if path.is_file() and path.name != "best_model.pt":
            texts[str(path.relative_to(repository))] = path.read_text(errors="replace")
    client = stack.s3_client()
    for each in client.list_objects_v2(Bucket=servers.BUCKET, Prefix="secrets/")["Contents"]:
        body = client.get_object(Bucket=servers.BUCKET, Key=each["Key"])["Body"].read()
        texts[each["Key"]] = body.decode(errors="replace")

    assert "DEBUG:" in stdout
    assert "cannot store `checkpoints/best_model.pt` now" in stdout
    assert "RuntimeError: failed at https://***@host with ***" in "\n".join(texts.values())
    assert any(name.endswith("logs/training.log") for name in texts)
    for secret in (stack.user, stack.password, stack.access_key, stack.secret_key):
        assert [where for where, text in texts.items() if secret in text] == []
    for secret in ("planted-remote-1", "planted-remote-2", "planted-remote-3"):
        # the test itself puts these secrets on the command line
        assert [where for where, text in texts.items() if secret in text and where != "process list"] == []


def test_a_tracking_uri_with_a_password_is_refused_without_showing_it(stack, wmtp, tmp_path):
    uri = stack.uri.replace("http://", "http://planted-user:planted-password@")

    for process in (
        wmtp("run", BASELINE, "--preset", "ci", "--traceback", cwd=tmp_path, MLFLOW_TRACKING_URI=uri),
        wmtp("doctor", cwd=tmp_path, MLFLOW_TRACKING_URI=uri),
    ):
        stdout, stderr = process.communicate(timeout=60)

        assert process.returncode != 0
        assert "holds a user or a password" in stdout + stderr
        assert "planted" not in stdout + stderr


def dump(stack):
    """Everything in the database, as SQL."""
    binary = Path(servers._binary("initdb")).resolve().parent / "pg_dump"
    port = str(stack.ports["postgres"])
    return subprocess.run(
        [binary, "-h", "127.0.0.1", "-p", port, "-U", "mlflow", "mlflow"],
        env={**os.environ, "PGPASSWORD": stack.database_password},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
