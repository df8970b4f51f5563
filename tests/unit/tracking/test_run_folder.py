"""The run folder: its path, its contents, and that one process at a time writes it."""

import errno
import fcntl
import subprocess
import sys
from textwrap import dedent

import pytest
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.tracking.run_folder import (
    RunFolder,
    find_run,
    find_runs,
    is_held,
    new_run_id,
    read_run,
)

HOLD_WITH_A_CHILD = """
    import os, sys, time
    from pathlib import Path
    from weighted_mtp_core.tracking.run_folder import RunFolder
    folder = RunFolder.open(Path(sys.argv[1]))
    if os.fork() == 0:
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_folder_is_named_by_experiment_run_and_id(tmp_path, folder):
    assert folder.path == tmp_path / "runs" / "weighted_mtp" / "flat" / "first" / folder.run_id
    assert folder.checkpoints.is_dir()
    assert folder.log.parent.is_dir()


def test_run_ids_are_unique_and_sort_by_time():
    ids = [new_run_id() for _ in range(50)]

    assert len(set(ids)) == 50
    assert [each[:15] for each in ids] == sorted(each[:15] for each in ids)


@pytest.mark.parametrize("experiment", ["../evil", "a//b", "a/../b", "/a", "", "a\0b", "-x"])
def test_names_that_leave_the_folder_are_refused(tmp_path, experiment):
    with pytest.raises(WmtpError, match="is not a valid name for an experiment"):
        RunFolder.create(tmp_path, experiment=experiment, name="first")

    assert list(tmp_path.iterdir()) == []


def test_facts_are_merged_into_run_json(folder):
    folder.record(status="RUNNING")
    folder.record(status="FINISHED", ended_ms=5)

    facts = read_run(folder.path)

    assert facts["status"] == "FINISHED"
    assert facts["ended_ms"] == 5
    assert facts["pid"] > 0


def test_runs_are_found_oldest_first(tmp_path):
    made = []
    for name in ("b", "a"):
        folder = RunFolder.create(tmp_path, experiment="x", name=name)
        folder.record(name=name)
        made.append(folder.path)

    assert sorted(made, key=lambda path: path.name) == list(find_runs(tmp_path))


def test_a_second_process_is_refused(folder, holder):
    with pytest.raises(WmtpError, match=f"is in use by process `{holder.pid}`"):
        RunFolder.open(folder.path)

    assert is_held(folder.path)


def test_a_killed_holder_keeps_nothing(folder, holder):
    holder.kill()
    holder.wait()

    RunFolder.open(folder.path).close()

    assert not is_held(folder.path)


def test_a_child_that_outlives_a_killed_holder_does_not_hold_the_folder(folder):
    folder.close()
    process = subprocess.Popen(
        [sys.executable, "-c", dedent(HOLD_WITH_A_CHILD), folder.path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()

    process.kill()
    process.wait()

    RunFolder.open(folder.path).close()
    subprocess.run(["kill", "-KILL", *children], check=True)


def test_looking_whether_a_folder_is_held_does_not_let_go_of_it(tmp_path):
    folder = RunFolder.create(tmp_path, experiment="group/idea", name="first")

    held = is_held(folder.path)
    other = (
        "from weighted_mtp_core.tracking.run_folder import is_held; import sys; from pathlib import Path; "
    )
    code = other + "print(is_held(Path(sys.argv[1])))"
    seen = subprocess.run(
        [sys.executable, "-c", code, folder.path], capture_output=True, text=True, check=True
    ).stdout

    assert held
    assert seen == "True\n"


@pytest.mark.parametrize("level", ["", "group", "group/idea", "group/idea/first", "group/idea/first/ID"])
def test_a_run_is_found_and_locked_once_through_a_link_at_any_level(tmp_path, level):
    folder = RunFolder.create(tmp_path / "disk", experiment="group/idea", name="first")
    folder.record(name="first")
    level = level.replace("ID", folder.run_id)
    runs = tmp_path / "runs"
    linked = runs / level
    linked.parent.mkdir(parents=True, exist_ok=True)
    linked.symlink_to(tmp_path / "disk" / level)
    through = runs / folder.path.relative_to(tmp_path / "disk")
    (tmp_path / "disk" / "group" / "circle").symlink_to(tmp_path / "disk")

    assert list(find_runs(runs)) == [through]
    assert find_run(runs, folder.run_id) == through
    assert is_held(through)
    with pytest.raises(WmtpError, match="is in use by process"):
        RunFolder.open(through)
    folder.close()
    assert not is_held(through)


def test_a_file_system_without_locks_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / "runs" / "group").mkdir(parents=True)
    monkeypatch.setattr(fcntl, "lockf", lockf)

    with pytest.raises(WmtpError, match=r"the file system of .* lacks locks \(No locks available\)") as error:
        RunFolder.create(tmp_path / "runs" / "group", experiment="x/y", name="first")

    assert "--set run.output_dir=/tmp/runs" in error.value.hint
    assert list((tmp_path / "runs").rglob("*")) == [tmp_path / "runs" / "group"]


def test_what_a_killed_process_left_unfinished_is_deleted(folder):
    folder.close()
    unfinished = [
        folder.path / ".run.json.x1",
        folder.checkpoints / ".best_model.pt.x1",
        folder.checkpoints / "critic" / ".state.json.x1",
        folder.checkpoints / ".policy-00000001.x1" / "state.json",
        folder.delivery("0-core.mlflow").with_name(".0-core.mlflow.json.x1"),
    ]
    kept = folder.checkpoints / "policy-00000001" / "state.json"
    for file in (*unfinished, kept):
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    before = folder.path.parent / ".new.01234567"
    before.mkdir()

    RunFolder.open(folder.path).close()
    RunFolder.create(folder.path.parents[3], experiment="weighted_mtp/flat", name="first").close()

    assert not any(file.exists() for file in unfinished)
    assert not list(folder.checkpoints.glob(".*"))
    assert not before.exists()
    assert kept.exists()
