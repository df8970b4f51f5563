"""Planted secrets are nowhere afterwards: screen, logs, journal, artifacts, database, process list."""

import os
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest
import stack as servers

pytestmark = pytest.mark.slow

RUN = """
    import logging, sys, time
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    from pathlib import Path
    from weighted_mtp_core.api import BuildContext, RunInfo
    from weighted_mtp_core.builtin.mlflow import MlflowOptions, build_mlflow
    from weighted_mtp_core.tracking.display import Display
    from weighted_mtp_core.tracking.recorder import Recorder
    from weighted_mtp_core.tracking.redact import redact_log_records
    from weighted_mtp_core.tracking.run_folder import RunFolder

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
            close_seconds=10,
        ) as record:
            record.metrics("policy", 1, {"loss": 1.0})
            (folder.checkpoints / "best_model.pt").write_bytes(b"x" * 9_000_000)
            record.artifact(folder.checkpoints / "best_model.pt", "checkpoints")
            time.sleep(2)
            import os
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


def test_planted_secrets_are_nowhere(stack, tmp_path):
    planted = [stack.password, stack.access_key, stack.secret_key]
    remote_secrets = ["planted-remote-1", "planted-remote-2", "planted-remote-3"]
    process = subprocess.Popen(
        [sys.executable, "-c", dedent(RUN), *REMOTES],
        env={**os.environ, **stack.environment},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    time.sleep(4)
    processes = process_list()
    stdout, _ = process.communicate(timeout=120)

    texts = {"screen": stdout, "process list": processes, "database": dump(stack)}
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != "best_model.pt":
            texts[str(path.relative_to(tmp_path))] = path.read_text(errors="replace")
    client = stack.s3_client()
    for each in client.list_objects_v2(Bucket=servers.BUCKET, Prefix="secrets/")["Contents"]:
        body = client.get_object(Bucket=servers.BUCKET, Key=each["Key"])["Body"].read()
        texts[each["Key"]] = body.decode(errors="replace")

    assert "DEBUG:" in stdout
    assert "RuntimeError: failed at https://***@host with ***" in "\n".join(texts.values())
    for secret in planted:
        assert [where for where, text in texts.items() if secret in text] == []
    for secret in remote_secrets:
        assert [where for where, text in texts.items() if secret in text and where != "process list"] == []


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
