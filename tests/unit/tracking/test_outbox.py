"""The outbox: what one tracker receives, in which order and how often."""

import tracemalloc

import pytest
from weighted_mtp_core.api import DatasetVersion, RunOutcome
from weighted_mtp_core.tracking.journal import Journal
from weighted_mtp_core.tracking.run_history import read_history


def metrics(journal, *steps, name="loss", kind="metrics"):
    for step in steps:
        journal.append(kind, {"step": step, "stage": "policy", "metrics": {name: step / 2}})


def send_all(outbox):
    while outbox.step():
        pass


def test_points_arrive_in_order_and_together(outbox, journal, notebook):
    metrics(journal, 1, 2)
    metrics(journal, 3, kind="timings")

    send_all(outbox)

    assert notebook.all("metrics") == [[("loss", 1, 0.5), ("loss", 2, 1.0), ("loss", 3, 1.5)]]


def test_a_tracker_never_gets_more_than_1000_points_at_once(outbox, journal, notebook):
    for step in range(7):
        journal.append(
            "metrics", {"step": step, "stage": "policy", "metrics": {f"m{i}": 1.0 for i in range(400)}}
        )

    send_all(outbox)

    assert [len(points) for points in notebook.all("metrics")] == [1000, 200, 1000, 200, 400]


def test_lines_of_other_kinds_keep_their_place_between_points(outbox, journal, notebook):
    metrics(journal, 1)
    journal.append("tags", {"tags": {"model_version": "micro"}})
    metrics(journal, 2)
    journal.append("status", {"status": "FINISHED"})

    send_all(outbox)

    assert [what for what, _ in notebook.told] == ["start", "metrics", "tags", "metrics", "finish"]
    assert notebook.all("finish") == [RunOutcome.FINISHED]


def test_nan_and_inf_are_not_sent(outbox, journal, notebook):
    journal.append("metrics", {"step": 1, "stage": "policy", "metrics": {"a": "nan", "b": "inf", "c": 1.0}})

    send_all(outbox)

    assert notebook.points() == [("c", 1, 1.0)]


def test_what_becomes_known_later_opens_the_run_again_with_all_of_it(outbox, journal, notebook):
    outbox.open()
    journal.append("params", {"params": {"data.version": "3"}})
    journal.append("datasets", {"datasets": [{"name": "d", "version": "3", "sha256": "ab"}]})

    send_all(outbox)

    last = notebook.all("start")[-1]
    assert last.params == {"data.version": "3"}
    assert last.datasets == (DatasetVersion(name="d", version="3", sha256="ab"),)


def test_a_failed_batch_is_sent_again(outbox, journal, notebook):
    metrics(journal, 1)
    outbox.open()
    notebook.away = True
    with pytest.raises(ConnectionError):
        send_all(outbox)
    notebook.away = False

    send_all(outbox)

    assert notebook.points() == [("loss", 1, 0.5)]


def test_another_process_goes_on_where_the_last_one_stopped(outbox, journal, notebook, new_outbox):
    metrics(journal, 1)
    send_all(outbox)
    metrics(journal, 2)

    send_all(new_outbox(notebook))

    assert notebook.points() == [("loss", 1, 0.5), ("loss", 2, 1.0)]


def test_a_file_that_cannot_be_stored_does_not_hold_up_the_lines_behind_it(outbox, journal, notebook, folder):
    (folder.checkpoints / "best_model.pt").write_bytes(b"weights")
    notebook.no_files = True
    journal.append("artifact", {"path": "checkpoints/best_model.pt", "subdir": "checkpoints"})
    metrics(journal, 1)
    send_all(outbox)
    assert not outbox.retry_aside()
    before = (notebook.points(), outbox.pending())
    notebook.no_files = False

    assert outbox.retry_aside()

    assert before[0] == [("loss", 1, 0.5)]
    assert (before[1].lines, before[1].files) == (0, 1)
    assert notebook.all("artifact") == ["checkpoints/best_model.pt"]
    assert not outbox.pending()


def test_what_the_tracker_refuses_is_left_out_and_said(outbox, journal, notebook):
    notebook.refuses = "tags"
    journal.append("tags", {"tags": {"a": "b"}})
    metrics(journal, 1)

    send_all(outbox)

    assert outbox.take_notes() == ["refused a line of the kind `tags`: no tags here"]
    assert notebook.points() == [("loss", 1, 0.5)]
    assert outbox.pending().lines == 1


def test_a_damaged_line_is_left_out_and_said(outbox, journal, notebook):
    metrics(journal, 1, 2, 3)
    journal.path.write_bytes(journal.path.read_bytes().replace(b'"step":2', b'"step":7'))

    send_all(outbox)

    assert [step for _, step, _ in notebook.points()] == [1, 3]
    assert outbox.take_notes()[0].endswith("of the journal: damaged")


def test_a_missing_file_is_said(outbox, journal, notebook):
    journal.append("artifact", {"path": "checkpoints/gone.pt", "subdir": "checkpoints"})

    send_all(outbox)

    (refusal,) = outbox.take_notes()
    assert refusal.startswith("refused the file `checkpoints/gone.pt`: ")
    assert refusal.endswith(" no longer exists")


def test_pending_counts_lines_and_files(outbox, journal, folder):
    metrics(journal, 1, 2)
    journal.append("artifact", {"path": "recipe.toml", "subdir": ""})

    pending = outbox.pending()

    assert (pending.lines, pending.files) == (3, 1)  # two steps and the line that describes the run
    assert str(pending) == "3 journal lines and 1 file"


def test_a_run_is_described_by_all_its_lines(journal: Journal, folder):
    journal.append("params", {"params": {"a": "1"}})
    journal.append("tags", {"tags": {"algo": "flat"}})
    metrics(journal, 1)
    journal.append("tags", {"tags": {"model_version": "micro"}})

    info = read_history(folder.path).info(folder.path)

    assert info.run_id == folder.run_id
    assert info.params == {"a": "1"}
    assert info.tags == {"algo": "flat", "model_version": "micro"}
    assert info.started_ms > 0


def test_what_waits_takes_disk_and_no_memory(outbox, journal):
    outbox.open()
    metrics(journal, *range(20_000))
    tracemalloc.start()

    pending = outbox.pending()
    outbox.step()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert pending.lines > 20_000
    assert most < 4_000_000
