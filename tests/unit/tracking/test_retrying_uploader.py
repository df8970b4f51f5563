"""The uploader: a thread that never makes training wait and, in an outage, tries until the run ends."""

import threading
import time

import pytest
from weighted_mtp_core.api import WmtpError
from weighted_mtp_core.tracking import retrying_uploader as module
from weighted_mtp_core.tracking.retrying_uploader import RetryingUploader


@pytest.fixture
def said():
    return []


@pytest.fixture
def delivery(outbox, said, monkeypatch):
    monkeypatch.setattr(module, "_PAUSE_S", 0.02)
    monkeypatch.setattr(module, "_BACK_OFF_S", (0.01, 0.05))
    delivery = RetryingUploader(name="notebook", outbox=outbox, log=said.append)
    yield delivery
    delivery.close(0)


@pytest.fixture
def checkpoint(folder, journal):
    """Write a checkpoint and its line in the journal; return the journal."""

    def checkpoint():
        (folder.checkpoints / "best_model.pt").write_bytes(b"weights")
        journal.append("artifact", {"path": "checkpoints/best_model.pt", "subdir": "checkpoints"})
        return journal

    return checkpoint


def metrics(journal, *steps):
    for step in steps:
        journal.append("metrics", {"step": step, "stage": "policy", "metrics": {"loss": float(step)}})


def steps(notebook):
    return [step for _, step, _ in notebook.points()]


def test_lines_arrive_while_the_run_goes_on(delivery, journal, notebook, wait_until):
    delivery.start()
    metrics(journal, 1, 2)

    wait_until(lambda: steps(notebook) == [1, 2])


def test_points_are_sent_from_another_thread(delivery, journal, notebook, wait_until):
    delivery.start()
    notebook.threads.clear()
    metrics(journal, 1)
    wait_until(lambda: steps(notebook) == [1])

    assert threading.current_thread() not in notebook.threads


def test_a_tracker_that_will_never_take_the_run_stops_it(delivery, notebook):
    notebook.refuses = "start"

    with pytest.raises(WmtpError, match="no start here"):
        delivery.start()


def test_an_outage_is_said_once_and_its_end_once_and_loses_nothing(
    delivery, journal, notebook, said, wait_until
):
    delivery.start()
    metrics(journal, 1)
    wait_until(lambda: steps(notebook) == [1])
    notebook.away = True
    metrics(journal, 2, 3)
    wait_until(lambda: len(said) == 1)
    notebook.away = False
    metrics(journal, 4)
    wait_until(lambda: steps(notebook) == [1, 2, 3, 4] and len(said) == 2)

    away, back = said
    assert away == (
        "`notebook` is unavailable (nobody there); the run continues, and its records are kept in the run "
        "folder and sent later"
    )
    assert back == "`notebook` is available again; sending what it missed"


def test_a_tracker_that_is_away_at_the_start_is_opened_later(delivery, journal, notebook, wait_until):
    notebook.away = True
    delivery.start()
    metrics(journal, 1)
    notebook.away = False

    wait_until(lambda: steps(notebook) == [1])

    assert notebook.told[0][0] == "start"


def test_closing_sends_the_rest_without_a_pause(delivery, journal, notebook, monkeypatch):
    monkeypatch.setattr(module, "_PAUSE_S", 60.0)
    delivery.start()
    metrics(journal, *range(50))

    pending = delivery.close(5.0)

    assert not pending
    assert steps(notebook) == list(range(50))


def test_closing_gives_up_at_the_limit_and_says_what_is_pending(delivery, journal, notebook):
    delivery.start()
    notebook.away = True
    metrics(journal, 1, 2)
    began = time.monotonic()

    pending = delivery.close(0.5)

    assert time.monotonic() - began < 10
    assert pending.lines == 2
    assert pending.reason == "nobody there"


def test_several_that_are_away_share_the_limit(delivery, new_outbox, journal, notebook):
    other = RetryingUploader(name="other", outbox=new_outbox(notebook), log=print)
    notebook.away = True
    for each in (delivery, other):
        each.start()
    metrics(journal, 1)
    began = time.monotonic()
    for each in (delivery, other):
        each.flush()

    pending = [each.close(3.0) for each in (delivery, other)]

    assert time.monotonic() - began < 5
    assert all(pending)


def test_closing_outlasts_an_outage_shorter_than_the_limit(delivery, journal, notebook):
    delivery.start()
    notebook.away = True
    metrics(journal, 1)
    threading.Timer(0.5, lambda: setattr(notebook, "away", False)).start()

    assert not delivery.close(10)

    assert steps(notebook) == [1]


def test_a_file_that_cannot_be_stored_is_said_once_and_stored_when_it_can_be(
    delivery, checkpoint, notebook, said, wait_until
):
    delivery.start()
    notebook.no_files = True
    journal = checkpoint()
    for step in range(30):  # new lines must not delay the file
        metrics(journal, step)
        time.sleep(0.01)
    wait_until(lambda: len(said) == 1)
    notebook.no_files = False
    wait_until(lambda: len(said) == 2)

    best = "`checkpoints/best_model.pt`"
    assert said[0] == f"`notebook` cannot store {best} now (no room for files); the file is sent later"
    assert said[1] == f"`notebook` has {best} now"
    assert notebook.all("artifact") == ["checkpoints/best_model.pt"]


def test_closing_gives_up_on_a_file_too(delivery, checkpoint, notebook):
    delivery.start()
    notebook.no_files = True
    journal = checkpoint()
    metrics(journal, 1)
    began = time.monotonic()

    pending = delivery.close(0.5)

    assert time.monotonic() - began < 10
    assert (pending.lines, pending.files, pending.reason) == (0, 1, "no room for files")
    assert steps(notebook) == [1]


def test_reasons_hold_no_secret(delivery, notebook, said, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2-hunter2")
    notebook.away = True
    notebook._tell = lambda *_: (_ for _ in ()).throw(
        ConnectionError("https://ann:hunter2-hunter2@host/?token=abc hunter2-hunter2")
    )

    delivery.start()

    assert "https://***@host/?token=*** ***" in said[0]
