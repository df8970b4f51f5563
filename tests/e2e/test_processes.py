"""Several processes train like one process, resume runs of more or fewer processes, and end together."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs"
CI = ("--preset", "ci", "--set", "checkpoint.every=2", "--set", "tracker=[]")
LAUNCH = Path(__file__).parents[2] / "scripts" / "launch.sh"
TOLERANCE = 1e-5
RANKS = {"auc", "accuracy", "correlation"}  # these jump if rounding changes the order of two values
RANK_TOLERANCE = 0.1  # swapping a right and a wrong one of 16 responses changes an AUC by 1/64 or more


def torchrun(processes, *arguments, cwd):
    """Start `torchrun --nproc-per-node processes -m weighted_mtp_core run ...`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*launcher, "--standalone", "-m", "weighted_mtp_core", "run", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def recipe(algorithm):
    return str(CONFIGS / f"{algorithm}.toml"), *CI


def folder_of(cwd, name):
    (found,) = (file.parent for file in (cwd / "storage" / "runs").glob(f"*/*/{name}/*/run.json"))
    return found


def metrics(cwd, name):
    """Return {(stage, step, metric): value} of a run's journal."""
    lines = map(json.loads, (folder_of(cwd, name) / "metrics.jsonl").read_text().splitlines())
    return {
        (line["stage"], line["step"], metric): value
        for line in lines
        if line["kind"] == "metrics"
        for metric, value in line["metrics"].items()
    }


def differences(first, second):
    assert first.keys() == second.keys()
    return {
        key: (value, second[key])
        for key, value in first.items()
        if not math.isclose(value, second[key], rel_tol=tolerance(*key), abs_tol=tolerance(*key))
    }


def tolerance(_, __, metric):
    return RANK_TOLERANCE if RANKS & set(metric.split("_")) else TOLERANCE


@pytest.fixture
def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module", params=["baseline", "verifiable"])
def alone(request, wmtp, cwd):
    """Execute a run of one process; return the parameter that selects its recipe."""
    run = wmtp("run", *recipe(request.param), "--run-name", f"alone-{request.param}", cwd=cwd)
    assert run.returncode == 0, run.stderr
    return request.param


@pytest.mark.parametrize("shard", ["false", "true"])
def test_two_processes_have_the_losses_of_one(alone, cwd, shard):
    name = f"two-{alone}-{shard}"
    process = torchrun(2, *recipe(alone), "--run-name", name, "--set", f"model.shard={shard}", cwd=cwd)
    _, stderr = process.communicate(timeout=240)

    assert process.returncode == 0, stderr
    assert differences(metrics(cwd, f"alone-{alone}"), metrics(cwd, name)) == {}
    assert (folder_of(cwd, name) / "logs" / "rank-1.log").is_file()


@pytest.mark.parametrize("alone", ["baseline"], indirect=True)
def test_two_nodes_that_the_launch_script_starts_are_one_run(alone, cwd, free_port):
    name = f"nodes-{alone}"
    nodes = [
        subprocess.Popen(
            ["bash", str(LAUNCH), *recipe(alone), "--run-name", name],
            cwd=cwd,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHON": sys.executable,
                "PORT": str(free_port),
                "NODES": "2",
                "NODE_RANK": str(rank),
                "PROCESSES": "1",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    ends = [node.communicate(timeout=240) for node in nodes]

    assert [node.returncode for node in nodes] == [0, 0], ends
    assert differences(metrics(cwd, f"alone-{alone}"), metrics(cwd, name)) == {}


def stop_at(process, cwd, name, checkpoint):
    """Wait for a checkpoint of this step or a later one, then end the run with SIGTERM."""
    end = time.monotonic() + 120
    while max(steps(cwd, name), default=-1) < checkpoint:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


def steps(cwd, name):
    found = (cwd / "storage" / "runs").glob(f"*/*/{name}/*/checkpoints/policy-*")
    return [int(path.name.removeprefix("policy-")) for path in found if path.name[-1].isdigit()]


def parts_of_the_newest(cwd, name):
    newest = folder_of(cwd, name) / "checkpoints" / f"policy-{max(steps(cwd, name)):08d}"
    return [path for path in newest.rglob("*.safetensors") if path.parent.name != "best"]


def test_a_run_goes_on_with_any_number_of_processes(wmtp, cwd):
    long = (*recipe("baseline"), "--set", "train.steps=60", "--set", "model.shard=true", "--run-name")
    whole = wmtp("run", *long, "whole", cwd=cwd)
    assert whole.returncode == 0, whole.stderr

    going_on = ()
    for processes in (2, 4, 1):
        checkpoint = max(steps(cwd, "moved"), default=0) + 4
        stop_at(torchrun(processes, *long, "moved", *going_on, cwd=cwd), cwd, "moved", checkpoint)
        assert len(parts_of_the_newest(cwd, "moved")) == processes
        going_on = ("--resume", str(folder_of(cwd, "moved")))
    stdout, stderr = (process := torchrun(2, *long, "moved", *going_on, cwd=cwd)).communicate(timeout=240)

    assert process.returncode == 0, stderr
    assert "processes 1 -> 2" in stdout
    assert differences(metrics(cwd, "whole"), metrics(cwd, "moved")) == {}


def test_a_killed_process_ends_the_others_and_the_run_can_go_on(wmtp, cwd):
    name = "one-killed"
    endless = (*recipe("baseline"), "--set", "train.steps=100000", "--run-name", name)
    process = torchrun(2, *endless, cwd=cwd)
    end = time.monotonic() + 120
    while not any((cwd / "storage" / "runs").glob(f"*/*/{name}/*/checkpoints/policy-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    second = max(int(pid) for pid in children_of(process.pid))

    os.kill(second, signal.SIGKILL)
    killed = time.monotonic()
    _, stderr = process.communicate(timeout=60)

    assert process.returncode != 0
    assert time.monotonic() - killed < 30
    status = json.loads((folder_of(cwd, name) / "run.json").read_text())["status"]
    # the other process sees either the lost connection first or torchrun's SIGTERM
    assert status in {"FAILED", "KILLED"}, stderr
    done = max(step for stage, step, _ in metrics(cwd, name) if stage == "policy")
    again = (*endless, "--set", f"train.steps={done + 4}", "--resume", str(folder_of(cwd, name)))
    run = wmtp("run", *again, cwd=cwd)
    assert run.returncode == 0, run.stderr


def children_of(pid):
    return (Path("/proc") / str(pid) / "task" / str(pid) / "children").read_text().split()
