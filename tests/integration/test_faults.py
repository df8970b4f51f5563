"""Faults injected into the real stack: training never waits, nothing is lost, nothing is doubled."""

import os
import signal
import threading
import time
from functools import partial

import pytest
from weighted_mtp_core.builtin.mlflow import MlflowOptions, build_mlflow
from weighted_mtp_core.tracking import sync as module
from weighted_mtp_core.tracking.sync import run_status, sync_run

pytestmark = pytest.mark.slow


class Training:
    """A thread that records five metrics a step, as a training loop does, and keeps the slowest step."""

    def __init__(self, record, *, step_seconds=0.05):
        self.record = record
        self.step = 0
        self.slowest = 0.0
        self.step_seconds = step_seconds
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()

    def _run(self):
        while not self._end.wait(self.step_seconds):
            self.step += 1
            began = time.perf_counter()
            self.record.metrics("policy", self.step, {f"m{i}": self.step / (i + 1) for i in range(5)})
            self.slowest = max(self.slowest, time.perf_counter() - began)


def last_step(stored, record):
    """The newest step at the server: `m0` has its step for a value."""
    return stored(record.folder.path).run.data.metrics.get("m0", 0)


def assert_whole(stored, record, screen):
    """The server has every point once, in order, and the outage was said once, and its end once."""
    run = stored(record.folder.path)

    assert run.status == "FINISHED"
    assert run.points() == run.journalled()
    assert screen.getvalue().count("`core.mlflow` is away") == 1
    assert screen.getvalue().count("`core.mlflow` is back") == 1


def test_a_server_killed_for_a_minute(stack, open_recorder, stored, wait):
    with open_recorder() as record, Training(record) as loop:
        wait.until(lambda: loop.step > 20)
        stack.mlflow.kill()
        time.sleep(60)
        stack.mlflow.start()
        back, missed = time.monotonic(), loop.step
        wait.until(lambda: last_step(stored, record) >= missed, seconds=10)
        caught_up = time.monotonic() - back

    assert caught_up < 10
    assert loop.slowest < 0.25
    assert_whole(stored, record, wait.screen)


def test_a_server_that_hangs_for_half_a_minute(stack, open_recorder, stored, wait):
    with open_recorder() as record, Training(record) as loop:
        wait.until(lambda: loop.step > 20)
        stack.mlflow.send(signal.SIGSTOP)
        time.sleep(30)
        stack.mlflow.send(signal.SIGCONT)
        wait.for_words("is back")

    assert loop.slowest < 0.25
    assert_whole(stored, record, wait.screen)


def test_a_database_restarted_after_five_seconds(stack, open_recorder, stored, wait):
    with open_recorder() as record, Training(record) as loop:
        wait.until(lambda: loop.step > 20)
        stack.postgres.stop(signal.SIGINT)
        time.sleep(5)
        stack.postgres.start()
        wait.for_words("is back")

    assert_whole(stored, record, wait.screen)


@pytest.mark.parametrize("status", [503, 429])
def test_a_proxy_that_turns_requests_away(stack, open_recorder, stored, wait, status):
    with open_recorder() as record, Training(record) as loop:
        wait.until(lambda: loop.step > 20)
        stack.configure_nginx(extra=f"return {status};")
        wait.for_words(f"({status})")
        stack.configure_nginx()
        wait.for_words("is back")

    assert "<html>" not in wait.screen.getvalue()
    assert_whole(stored, record, wait.screen)


def test_a_login_that_is_revoked_and_given_back(stack, open_recorder, stored, wait, monkeypatch):
    with open_recorder() as record, Training(record) as loop:
        wait.until(lambda: loop.step > 20)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-the-password")
        wait.for_words("refuses the login")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", stack.password)
        wait.for_words("is back")

    assert_whole(stored, record, wait.screen)


def test_a_server_gone_for_good_leaves_a_run_that_can_be_sent_later(
    stack, open_recorder, stored, wait, monkeypatch
):
    with open_recorder(close_seconds=3.0) as record:
        with Training(record) as loop:
            wait.until(lambda: loop.step > 20)
            stack.mlflow.kill()
            wait.until(lambda: loop.step > 40)
        began = time.monotonic()
    took = time.monotonic() - began
    before = run_status(record.folder.path)
    stack.mlflow.start()
    monkeypatch.setattr(module, "make_plan", lambda _: None)
    monkeypatch.setattr(
        module, "build_trackers", lambda _: {"0-core.mlflow": build_mlflow(MlflowOptions(), None)}
    )

    left = sync_run(record.folder.path, say=print, limit_s=30)

    assert took < 10
    assert before.pending["0-core.mlflow"].lines > 0
    assert "`core.mlflow` did not get " in wait.screen.getvalue()
    assert not left["0-core.mlflow"]
    run = stored(record.folder.path)
    assert run.status == "FINISHED"
    assert run.points() == run.journalled()


def test_s3_killed_during_the_upload_of_a_checkpoint(stack, open_recorder, stored, wait, direct):
    """Two runs at once, one whose files the server stores, one that stores them itself."""
    with open_recorder() as proxied, open_recorder(**direct) as straight, Training(proxied) as loop:
        checkpoint = os.urandom(50_000_000)
        for record in (proxied, straight):
            best = record.folder.checkpoints / "best_model.pt"
            best.write_bytes(checkpoint)
            record.artifact(best, "checkpoints")
        time.sleep(0.5)
        stack.s3.kill()
        behind = loop.step
        time.sleep(20)
        stack.s3.start()
        assert last_step(stored, proxied) > behind
        for record in (proxied, straight):
            wait.until(partial(has_every_file, record), seconds=60)

    for record in (proxied, straight):
        run = stored(record.folder.path)
        files = run.client.list_artifacts(run.run.info.run_id, "checkpoints")
        assert [file.path for file in files] == ["checkpoints/best_model.pt"]
        assert run.file("checkpoints/best_model.pt") == checkpoint
        assert run.status == "FINISHED"
        assert run.points() == run.journalled()


def has_every_file(record):
    return run_status(record.folder.path).pending["0-core.mlflow"].files == 0


def test_s3_gone_for_good_keeps_the_local_file_and_says_so(stack, open_recorder, screen, stored):
    with open_recorder(close_seconds=20.0, keep_local=False) as record:
        stack.s3.kill()
        best = record.folder.checkpoints / "best_model.pt"
        best.write_bytes(b"weights")
        record.artifact(best, "checkpoints")

    assert best.exists()
    assert "`core.mlflow` did not get " in screen.getvalue()
    assert "file" in screen.getvalue().splitlines()[-1]
    assert stored(record.folder.path).status == "FINISHED"


def test_a_body_limit_is_named_and_not_tried_again(stack, open_recorder, screen, stored):
    stack.configure_nginx(body="1m")
    with open_recorder() as record:
        best = record.folder.checkpoints / "best_model.pt"
        best.write_bytes(os.urandom(3_000_000))
        record.artifact(best, "checkpoints")

    said = [line for line in screen.getvalue().splitlines() if "413" in line]
    assert len(said) == 1
    assert "client_max_body_size" in said[0]
    assert stored(record.folder.path).status == "FINISHED"
    assert best.exists()
