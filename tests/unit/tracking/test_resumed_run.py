"""A run that is resumed in its folder: nothing is recorded twice or lost, and the tracker has one run."""

import pytest
from weighted_mtp_core.api import RunOutcome
from weighted_mtp_core.tracking.journal import Damage, read_journal
from weighted_mtp_core.tracking.run_folder import RunFolder, read_run


def steps(folder):
    return [
        entry.fields["step"]
        for entry in read_journal(folder.journal, kinds=("metrics",))
        if not isinstance(entry, Damage)
    ]


@pytest.fixture
def begin(open_recorder, folder, notebook):
    """Record steps in the folder, as a process that begins or resumes the run and ends it or is killed."""

    def begin(*steps, killed=False):
        # every process opens the folder again; this one closes it in between
        reopened = RunFolder.open(folder.path) if folder._lock is None else folder
        folder._lock = reopened._lock
        with open_recorder(notebook=notebook) as record:
            for step in steps:
                record.metrics("policy", step, {"loss": 1.0 / step})
            if killed:
                raise KeyboardInterrupt

    return begin


def test_steps_that_were_recorded_before_are_not_recorded_again(begin, folder, notebook):
    with pytest.raises(KeyboardInterrupt):
        begin(1, 2, 3, killed=True)
    begin(2, 3, 4)

    assert steps(folder) == [1, 2, 3, 4]
    assert notebook.points() == [("loss", step, 1.0 / step) for step in (1, 2, 3, 4)]


def test_the_tracker_sees_one_run_that_ends_as_it_ends_at_last(begin, folder, notebook):
    with pytest.raises(KeyboardInterrupt):
        begin(1, killed=True)
    began = read_run(folder.path)["started_ms"]
    begin(1, 2)

    assert {run.run_id for run in notebook.all("start")} == {folder.run_id}
    assert notebook.all("finish")[-1] is RunOutcome.FINISHED
    assert read_run(folder.path)["status"] == "FINISHED"
    assert read_run(folder.path)["started_ms"] == began


def test_a_resumed_run_says_so_in_a_tag(begin, notebook):
    begin(1)
    begin(2)

    assert {"wmtp.resumed": "true"} in notebook.all("tags")


@pytest.mark.parametrize("harm", ["cut off", "changed"])
def test_what_a_damaged_end_of_the_journal_lost_is_recorded_again(begin, folder, screen, harm):
    with pytest.raises(KeyboardInterrupt):
        begin(1, 2, 3, killed=True)
    content = folder.journal.read_bytes()
    last = content.index(b'{"kind":"metrics","step":3')
    end = content.index(b"\n", last)
    folder.journal.write_bytes(
        content[: last + 30] if harm == "cut off" else content[:end].replace(b'"step":3', b'"step":8') + b"\n"
    )

    begin(2, 3, 4)

    assert steps(folder) == [1, 2, 3, 4]
    assert ("a damaged line in" in screen.getvalue()) == (harm == "changed")
