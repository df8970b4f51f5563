"""`--executor dask://`: a scheduler and two workers, one of them killed, give the results of one machine."""

import csv
import filecmp
import json
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from textwrap import dedent

import pytest

WARM_PYTHON = Path(__file__).with_name("warm_python.py")
WORKER = "import sys; sys.executable = sys.argv.pop(1); from distributed.cli.dask_worker import main; main()"
RECIPE = """
    extends = ["core:defaults.toml"]
    tracker = []
    [run]
    name = "tiny"
    [data]
    use = "code_tasks.micro_chain"
    options = { problems = 102, length = 3 }
    [model]
    n_future = 2
    [model.micro]
    vocab_size = 300
    hidden_size = 16
    layers = 2
    attention_heads = 1
    [weighting]
    use = "baseline_mtp.uniform"
    [train]
    steps = 12
    batch_size = 4
    validate_every = 12
    validation_examples = 8
    [checkpoint]
    every = 1
    [evaluate]
    problems = 1
    max_new_tokens = 8
"""
COMPARE = ("--grid", "train.learning_rate=1e-4,1e-3,1e-2,3e-2", "--seeds", "2", "--out", "table")


def end(process):
    process.kill()
    process.wait()


def wait_until(holds, what, *, seconds=120):
    until = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < until, what
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def python(environment, tmp_path_factory):
    """An interpreter for `-m weighted_mtp_core` that has already imported all modules."""
    folder = tmp_path_factory.mktemp("python")
    script, address = folder / "python", folder / "socket"
    script.write_text(
        f'#!/bin/sh\nexport WARM_PYTHON="$0"\nexec {sys.executable} -I -S {WARM_PYTHON} run {address} "$@"\n'
    )
    script.chmod(0o755)
    server = subprocess.Popen(
        [sys.executable, WARM_PYTHON, "serve", address, script], env=environment(), stdin=subprocess.PIPE
    )
    wait_until(address.exists, "the server of imports listens")
    yield str(script)
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for one machine, and a folder that a cluster shares."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "cluster")]
    for folder in folders:
        (folder / "recipe.toml").write_text(dedent(RECIPE))
    return folders


@pytest.fixture(scope="module")
def cluster(python, folders, environment, tmp_path_factory):
    """The address of a scheduler, and its two workers; this fixture starts and ends the processes."""
    file = tmp_path_factory.mktemp("dask") / "scheduler.json"
    with ExitStack() as processes:

        def start(*command):
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=folders[1],
                env=environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            processes.callback(end, process)
            return process

        loopback = ("--host", "127.0.0.1", "--no-dashboard")
        start("-m", "distributed.cli.dask_scheduler", *loopback, "--port", "0", "--scheduler-file", file)
        wait_until(lambda: file.is_file() and file.read_text().endswith("}"), "a scheduler")
        one_task = ("--no-nanny", "--nthreads", "1", "--local-directory", file.parent)
        address = json.loads(file.read_text())["address"]
        workers = [start("-c", WORKER, python, address, *loopback, *one_task) for _ in range(2)]
        yield address.replace("tcp://", "dask://"), workers


def test_workers_prepare_the_same_files_as_one_machine(wmtp, python, cluster, folders):
    one, shared = folders

    here = wmtp("data", "prepare", "recipe.toml", "--executor", "local:2", cwd=one, python=python)
    there = wmtp("data", "prepare", "recipe.toml", "--executor", cluster[0], cwd=shared, python=python)

    assert (here.returncode, there.returncode) == (0, 0), here.stderr + there.stderr
    assert here.stdout == there.stdout
    (data,) = (one / "storage" / "datasets_v2" / "micro_chain").glob("*/")
    names = [file.name for file in data.iterdir()]
    assert "manifest.json" in names
    same, _, _ = filecmp.cmpfiles(data, shared / data.relative_to(one), names, shallow=False)
    assert same == names


def test_a_comparison_with_a_killed_worker_gives_the_table_of_one_machine(
    wmtp, start, python, cluster, folders
):
    one, shared = folders
    address, (doomed, _) = cluster
    process = start("compare", "recipe.toml", *COMPARE, "--executor", address, cwd=shared, python=python)

    unfinished = wait_until(lambda: half_way(doomed, shared, finished=3) or process.poll(), "3 runs")
    assert process.poll() is None
    doomed.send_signal(signal.SIGKILL)
    _, stderr = process.communicate(timeout=240)
    here = wmtp("compare", "recipe.toml", *COMPARE, "--executor", "local:1", cwd=one, python=python)

    assert (process.returncode, here.returncode) == (0, 0), stderr + here.stderr
    assert table(shared) == table(one)
    assert len(table(one)) > 8
    assert len(runs(shared)) == 8  # nothing is done twice
    log = (unfinished / "logs" / "training.log").read_text()
    assert f"continuing run {unfinished.name} from step" in log


def test_an_interrupt_cancels_what_waits_and_stops_what_runs_with_a_checkpoint(
    start, python, cluster, folders
):
    address, (_, worker) = cluster
    more = ("--set", "train.steps=5000", "--seeds", "3", "--executor", address)
    process = start("compare", "recipe.toml", *more, cwd=folders[1], python=python)
    unfinished = wait_until(lambda: half_way(worker, folders[1]) or process.poll(), "a checkpoint")

    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "0 of 3 runs are finished\nstopping 3 runs; the same command resumes them\n" in stderr
    wait_until(lambda: runs(folders[1])[unfinished]["status"] == "KILLED", "the end of the run")
    assert [path.parent.name for path in runs(folders[1])].count("tiny") < 3  # at most one for each worker


def test_no_secret_of_the_environment_is_sent_to_a_scheduler(wmtp, python, cluster, folders):
    secret = {"MLFLOW_TRACKING_PASSWORD": "swordfish"}
    more = ("--set", 'run.tags=["password:swordfish"]', "--seeds", "1", "--executor", cluster[0])

    found = wmtp("compare", "recipe.toml", *more, cwd=folders[1], python=python, env=secret)

    assert found.returncode == 2
    assert "error: a task for other machines contains a secret of the environment" in found.stderr
    assert "swordfish" not in found.stderr


def test_workers_without_the_storage_of_the_client_refuse_its_runs(wmtp, python, cluster, folders, tmp_path):
    (tmp_path / "recipe.toml").write_text(dedent(RECIPE))

    more = ("--seeds", "2", "--executor", cluster[0])
    found = wmtp("compare", "recipe.toml", *more, cwd=tmp_path, python=python)

    assert found.returncode == 2
    assert f"in `{folders[1]}` has no file `storage/comparisons/tiny-" in found.stderr
    assert "hint: share the storage with the worker" in found.stderr


def runs(folder):
    """The contents of `run.json` by run folder."""
    return {
        file.parent: json.loads(file.read_text())
        for file in (folder / "storage" / "runs").glob("*/*/*/[!.]*/run.json")
    }


def half_way(worker, folder, *, finished=0):
    """Return the folder of a run that a worker executes, between the first checkpoint and the last step.

    The result is None if there is no such run, or if fewer than `finished` runs are finished.
    """
    found = runs(folder)
    if sum(facts["status"] == "FINISHED" for facts in found.values()) < finished:
        return None
    children = " ".join(each.read_text() for each in Path(f"/proc/{worker.pid}/task").glob("*/children"))
    texts = []
    for child in children.split():
        with suppress(OSError):  # the process has just ended
            texts.append(Path(f"/proc/{child}/cmdline").read_text())
    for path, facts in found.items():
        name, seed = (facts.get("params", {}).get(f"run.{key}") for key in ("name", "seed"))
        named = [text for text in texts if f'run.name="{name}"' in text or "run.name=" not in text]
        own = any(f"run.seed={seed}" in text for text in named)
        steps = [int(each.name[-8:]) for each in (path / "checkpoints").glob("policy-????????")]
        last = int(facts.get("params", {}).get("train.steps", 0))
        # After its last step, a run may end before a signal arrives.
        if own and facts["status"] == "RUNNING" and steps and max(steps) < last:
            return path
    return None


def table(folder):
    """Return the rows of the table at equal steps, without the metrics that measure time."""
    rows = csv.DictReader((folder / "table" / "compare.csv").read_text().splitlines())
    return [row for row in rows if row["at"] == "equal steps" and "seconds" not in row["metric"]]
