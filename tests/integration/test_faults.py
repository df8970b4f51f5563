"""Faults in the real stack: training never waits, and nothing is lost or duplicated."""

import os
import signal
import time
from functools import partial

import pytest
from recording import TRACKER, Stored, Training, shown, wait_for_words, wait_until
from weighted_mtp_core.tracking.sync import run_status

pytestmark = pytest.mark.slow


def last_step(record):
    """Return the last step that the server has, which is the value of `m0`; 0 if it has none."""
    return Stored(record.folder.path).run.data.metrics.get("m0", 0)


def assert_whole(record, reason):
    """Check that the server has every point once; the log has the reason once, and the end of each outage."""
    run = Stored(record.folder.path)

    assert run.status == "FINISHED"
    assert run.points() == run.journalled()
    away = [line for line in shown(record).splitlines() if "`core.mlflow` is unavailable" in line]
    assert len([line for line in away if reason in line]) == 1
    assert shown(record).count("`core.mlflow` is available again") == len(away)


def is_uploading(record):
    return any(uploader.outbox.allowance_s() > 0 for uploader in record._uploaders)


def has_every_file(record):
    return run_status(record.folder.path).pending[TRACKER].files == 0


def test_s3_killed_during_an_upload_and_back_after_20_seconds_or_gone_while_the_server_hangs_for_30(
    stack, open_recorder, direct
):
    """Runs without files and in each artifact mode; one ends and one begins while S3 is down."""
    checkpoint = os.urandom(50_000_000)
    plain, proxied, straight = open_recorder(), open_recorder(), open_recorder(**direct)
    gone = open_recorder(keep_local=False, close_seconds=2)
    with plain, proxied, straight, Training(plain) as loop:
        for record in (proxied, straight, gone):
            (record.folder.checkpoints / "best_model.pt").write_bytes(checkpoint)
        for record in (proxied, straight):
            record.artifact(record.folder.checkpoints / "best_model.pt", "checkpoints")
        wait_until(lambda: is_uploading(proxied) or is_uploading(straight))
        stack.s3.kill()
        killed, behind = time.monotonic(), loop.step
        wait_until(lambda: last_step(plain) > behind)
        with gone:
            gone.artifact(gone.folder.checkpoints / "best_model.pt", "checkpoints")
            wait_for_words(gone, "cannot store `checkpoints/best_model.pt` now")
        with open_recorder(close_seconds=1) as late:
            late.metrics("policy", 1, {"m0": 1.0})
            wait_until(lambda: last_step(late) == 1)
        stack.mlflow.send(signal.SIGSTOP)
        hung = time.monotonic()
        time.sleep(max(0.0, killed + 20 - time.monotonic()))
        stack.s3.start()
        time.sleep(max(0.0, hung + 30 - time.monotonic()))
        stack.mlflow.send(signal.SIGCONT)
        wait_for_words(plain, "is available again")
        for record in (proxied, straight):
            wait_until(partial(has_every_file, record), seconds=60, said=shown(record))

    assert loop.slowest < 1  # waiting for a server would take as long as its timeout
    assert_whole(plain, "did not answer in time")
    for record in (proxied, straight):
        run = Stored(record.folder.path)
        files = run.client.list_artifacts(run.run.info.run_id, "checkpoints")
        assert [file.path for file in files] == ["checkpoints/best_model.pt"]
        assert run.file("checkpoints/best_model.pt") == checkpoint
        assert run.status == "FINISHED"
        assert "cannot store `checkpoints/best_model.pt` now" in shown(record)
    assert (gone.folder.checkpoints / "best_model.pt").read_bytes() == checkpoint
    assert "`core.mlflow` has not received " in shown(gone)
    assert "file" in shown(gone).splitlines()[-1]


def test_a_database_restarted_after_five_seconds(stack, open_recorder):
    with open_recorder() as record, Training(record) as loop:
        wait_until(lambda: loop.step > 20)
        stack.postgres.stop(signal.SIGINT)
        time.sleep(5)
        stack.postgres.start()
        wait_for_words(record, "is available again")

    assert_whole(record, "the tracking server")


@pytest.mark.parametrize("status", [503, 429, 500])
def test_a_proxy_that_turns_requests_away(stack, open_recorder, status):
    with open_recorder() as record, Training(record) as loop:
        wait_until(lambda: loop.step > 5)
        stack.configure_nginx(extra=f"return {status};")
        wait_for_words(record, f"({status})")
        stack.configure_nginx()
        wait_for_words(record, "is available again")

    assert "<html>" not in shown(record)
    assert_whole(record, f"({status})")


def test_a_login_that_is_revoked_and_given_back(stack, open_recorder, monkeypatch):
    with open_recorder() as record, Training(record) as loop:
        wait_until(lambda: loop.step > 5)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-the-password")
        wait_for_words(record, "refuses the login")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", stack.password)
        wait_for_words(record, "is available again")

    assert_whole(record, "refuses the login")


def test_a_body_limit_is_named_and_not_tried_again(stack, open_recorder):
    stack.configure_nginx(body="1m")
    with open_recorder() as record:
        best = record.folder.checkpoints / "best_model.pt"
        best.write_bytes(os.urandom(3_000_000))
        record.artifact(best, "checkpoints")

    said = [line for line in shown(record).splitlines() if "413" in line]
    assert len(said) == 1
    assert "client_max_body_size" in said[0]
    assert Stored(record.folder.path).status == "FINISHED"
    assert best.exists()
