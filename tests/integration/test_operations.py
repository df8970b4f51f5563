"""The files in docs/tracking and the commands of the page for operators, executed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import botocore.exceptions
import pytest
import stack as servers
import yaml
from recording import Stored
from weighted_mtp_core.api import RunOutcome
from weighted_mtp_core.redaction import SECRET_VARIABLES
from weighted_mtp_core.tracking.dotenv import NAMES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "tracking"


@pytest.fixture
def bucket(stack):
    """The client of an admin, for whom the bucket `operations` was created."""
    client = stack.s3_client()
    client.create_bucket(Bucket="operations")
    yield client
    client.delete_bucket(Bucket="operations")


def test_s3_takes_the_life_cycle_rule(bucket):
    rule = json.loads((DOCS / "lifecycle.json").read_text())

    bucket.put_bucket_lifecycle_configuration(Bucket="operations", LifecycleConfiguration=rule)

    (kept,) = bucket.get_bucket_lifecycle_configuration(Bucket="operations")["Rules"]
    assert kept["Status"] == "Enabled"


def test_s3_takes_the_bucket_policy(bucket):
    policy = (DOCS / "bucket-policy.json").read_text().replace("arn:aws:s3:::wmtp", "arn:aws:s3:::operations")

    bucket.put_bucket_policy(Bucket="operations", Policy=policy)

    kept = json.loads(bucket.get_bucket_policy(Bucket="operations")["Policy"])
    assert [each["Sid"] for each in kept["Statement"]] == ["ReadAndWriteFiles", "SeeTheBucket"]
    bucket.delete_bucket_policy(Bucket="operations")


def test_the_files_of_a_failed_run_go_with_mlflow_gc(stack, open_recorder):
    record = open_recorder()
    (record.folder.checkpoints / "best_model.pt").write_bytes(b"weights")
    record.artifact(record.folder.checkpoints / "best_model.pt", "checkpoints")
    record.finish(RunOutcome.FAILED, error=ZeroDivisionError())
    failed = Stored(record.folder.path)
    prefix = failed.run.info.artifact_uri.removeprefix("mlflow-artifacts:/")
    key = f"mlflow-artifacts/{prefix}/checkpoints/best_model.pt"
    s3 = stack.s3_client()
    s3.head_object(Bucket=servers.BUCKET, Key=key)

    failed.client.delete_run(failed.run.info.run_id)
    subprocess.run(
        [
            *(sys.executable, "-m", "mlflow", "gc", "--older-than", "0d"),
            *("--backend-store-uri", stack.database_uri),
            *("--artifacts-destination", f"s3://{servers.BUCKET}/mlflow-artifacts"),
        ],
        env={**os.environ, "PGPASSWORD": stack.database_password},
        check=True,
    )

    assert failed.run.data.tags["wmtp.error_class"] == "ZeroDivisionError"
    with pytest.raises(botocore.exceptions.ClientError, match="404"):
        s3.head_object(Bucket=servers.BUCKET, Key=key)


def test_the_vessl_template_takes_every_secret_from_the_store():
    template = yaml.safe_load((DOCS / "vessl.yaml").read_text())
    variables = template["env"]

    assert set(variables) <= set(NAMES)
    for name in {*SECRET_VARIABLES, "MLFLOW_TRACKING_USERNAME"} & set(NAMES):
        assert list(variables[name]) == ["secret"]


def test_the_commands_of_the_vessl_template_work(start, tmp_path):
    """Without the installation, and with `check` instead of `run`, because other tests run this recipe."""
    (job,) = yaml.safe_load((DOCS / "vessl.yaml").read_text())["run"]
    doctor, run, sync = (
        line.split()[1:] for line in job["command"].splitlines() if line.startswith("python ")
    )
    run[run.index("run")] = "check"
    sync[-1] = sync[-1].replace("example-bucket", servers.BUCKET)
    start("-m", "weighted_mtp_core", "storage", "add-dataset", "some", "1", DOCS, cwd=tmp_path).wait()

    for command in (doctor, run, sync):
        found = [str(ROOT / word) if (ROOT / word).is_file() else word for word in command]
        process = start(*found, cwd=tmp_path)
        stdout, stderr = process.communicate(timeout=100)

        assert process.returncode == 0, stdout + stderr
