"""A run that is killed at any moment and restarted with `run.resume = "auto"` equals a run without kills.

The environment variable KILLS is the number of kills; `make test-kills` sets it to 100. A process is killed
at a random moment between its start and its usual end. Half of the processes that resume a run are killed,
too.
"""

import json
import os
import random
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path
from textwrap import dedent

import pytest
from mlflow import MlflowClient

KILLS = int(os.environ.get("KILLS", "6"))
SEED = int(os.environ.get("KILLS_SEED", "0"))
RECIPE = """
    [run]
    name = "killed"
    resume = "auto"
    [data]
    use = "code_tasks.micro_code"
    options = { problems = 24 }
    [model]
    n_future = 2
    [model.micro]
    vocab_size = 300
    hidden_size = 16
    layers = 2
    attention_heads = 1
    [critic]
    use = "verifiable.value_head"
    allow_uninformative_critic = true
    [critic.train]
    steps = 4
    batch_size = 4
    log_every = 1
    validate_every = 2
    validation_examples = 8
    [weighting]
    use = "verifiable.td_error"
    [train]
    steps = 6
    batch_size = 4
    log_every = 1
    validate_every = 2
    validation_examples = 8
    [checkpoint]
    every = 1
    [evaluate]
    problems = 2
    max_new_tokens = 8
    [[tracker]]
    use = "core.mlflow"
"""


class Program:
    """Starts `run` in a fork of a process that has imported everything."""

    def __init__(self, environment):
        server = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
        self._server = subprocess.Popen(
            server, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, cwd, *, kill_after_s=None):
        """Return the exit code of a run in `cwd`, and the seconds that it took."""
        request = {
            "cwd": str(cwd),
            "arguments": ["run", "recipe.toml"],
            "output": f"{cwd}/output",
            "kill_after_s": kill_after_s,
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        code, seconds = self._server.stdout.readline().split()
        return int(code), float(seconds)

    def close(self):
        self._server.stdin.close()
        self._server.wait()


@pytest.fixture(scope="module")
def program(environment):
    program = Program(environment())
    yield program
    program.close()


def new_folder(path):
    path.mkdir()
    (path / "recipe.toml").write_text(dedent(RECIPE))
    return path


@pytest.fixture(scope="module")
def whole(program, tmp_path_factory):
    """The working folder of a run that was not killed, and the seconds that it took."""
    cwd = new_folder(tmp_path_factory.mktemp("whole") / "0")
    code, seconds = program.run(cwd)
    assert code == 0, (cwd / "output").read_text()
    return cwd, seconds


def run_folder(cwd):
    """The only run folder below a working folder, finished or not."""
    (folder,) = (cwd / "storage/runs/weighted_mtp/verifiable/killed").iterdir()
    return folder


def is_complete(cwd):
    """Return whether the run is finished: its process may have been killed just before it exited."""
    runs = list((cwd / "storage/runs").rglob("[!.]*/run.json"))
    return any(json.loads(run.read_text())["status"] == "FINISHED" for run in runs)


def journal(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def metrics(folder):
    """The lines of metrics, without the time that is different in every run."""
    return [{**line, "time": None} for line in journal(folder) if line["kind"] == "metrics"]


def recorded_points(folder):
    """Every finite point of the journal."""
    return sorted(
        (name, line["step"], value, round(line["time"] * 1000))
        for line in journal(folder)
        if line["kind"] in {"metrics", "timings"}
        for name, value in line["metrics"].items()
        if not isinstance(value, str)
    )


def check(cwd, whole):
    """Check that a folder has one run, equal to the one that was not killed, in the journal and in MLflow."""
    folder = run_folder(cwd)
    assert json.loads((folder / "run.json").read_text())["status"] == "FINISHED"
    assert metrics(folder) == metrics(run_folder(whole))
    client = MlflowClient(f"sqlite:///{cwd}/storage/mlflow.db")
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert recorded_points(folder) == sorted(
        (name, point.step, point.value, point.timestamp)
        for name in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, name)
    )
    sent = Path(client.download_artifacts(run.info.run_id, "", str(cwd)))
    for name in ("recipe.toml", "report.md", "checkpoints/best_model.pt", "evaluation/samples.jsonl"):
        assert (sent / name).read_bytes() == (folder / name).read_bytes()
    assert files(cwd) == files(whole)


def files(cwd):
    """The paths in the storage folder, with `RUN` for the id of the run, and without MLflow's artifacts."""
    storage, run = cwd / "storage", run_folder(cwd).name
    found = {str(path.relative_to(storage)).replace(run, "RUN") for path in storage.rglob("*")}
    return {path for path in found if not path.startswith("mlartifacts")}


@pytest.mark.timeout(300 + 60 * KILLS)
def test_a_run_that_is_killed_at_any_moment_and_started_again_is_one_whole_run(
    program, whole, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    reference, seconds = whole
    chance = random.Random(SEED)
    killed = 0
    for number in count():
        cwd = new_folder(tmp_path / str(number))
        for attempt in count():
            is_to_die = killed < KILLS and (attempt == 0 or chance.random() < 0.5)
            code, took = program.run(cwd, kill_after_s=chance.uniform(0, seconds) if is_to_die else None)
            print(f"run {number}, process {attempt}: exit code {code} after {took:.2f} s")
            assert code in {0, -signal.SIGKILL}, (cwd / "output").read_text()
            killed += code != 0
            if code == 0 and attempt == 0:
                seconds = min(seconds, took)
            if code == 0 or is_complete(cwd):
                break
        check(cwd, reference)
        print(f"run {number} is whole; {killed} kills")
        if killed >= KILLS:
            return
