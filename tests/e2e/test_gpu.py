"""Whole runs on CUDA devices (`make gpu`), for example resumed, in bfloat16, or with several processes."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
CONFIGS = Path(__file__).parents[2] / "configs"
BASELINE, VERIFIABLE = str(CONFIGS / "baseline.toml"), str(CONFIGS / "verifiable.toml")
ON_GPU = (
    *("--preset", "ci", "--set", "tracker=[]", "--set", "checkpoint.every=2", "--set", "train.log_every=1"),
    *("--set", "model.device=cuda", "--set", "model.dtype=float32"),
)
TOLERANCE = 1e-3  # sums on a GPU may be ordered differently from run to run; differences grow over the steps


def lines(cwd, name, kind):
    """Return {(stage, step, metric): value} of the lines of this kind in the journal of the run `name`."""
    (journal,) = (cwd / "storage" / "runs").glob(f"*/*/{name}/*/metrics.jsonl")
    found = map(json.loads, journal.read_text().splitlines())
    return {
        (line["stage"], line["step"], metric): value
        for line in found
        if line["kind"] == kind
        for metric, value in line["metrics"].items()
    }


def losses(cwd, name):
    return {
        key: value
        for key, value in lines(cwd, name, "metrics").items()
        if key[2] == "train_loss" or "_ce_head_" in key[2]
    }


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module", autouse=True)
def whole(wmtp, cwd):
    """The losses of a run that was never stopped."""
    run = wmtp("run", BASELINE, *ON_GPU, "--run-name", "whole", cwd=cwd)
    assert run.returncode == 0, run.stderr
    return losses(cwd, "whole")


def test_a_run_records_the_memory_and_the_rates_of_its_gpu(cwd):
    found = {name: value for (_, _, name), value in lines(cwd, "whole", "timings").items()}

    assert found["system/policy_peak_device_memory_megabytes"] > 0
    assert 0 < found["system/policy_matrix_rate_share"] < 1


def test_a_killed_run_goes_on_with_the_losses_of_the_whole_one(wmtp, start, cwd, whole):
    process = start("run", BASELINE, *ON_GPU, "--run-name", "killed", cwd=cwd)
    end = time.monotonic() + 120
    while not list((cwd / "storage" / "runs").glob("*/*/killed/*/checkpoints/policy-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (folder,) = (cwd / "storage" / "runs").glob("*/*/killed/*")
    resumed = wmtp("run", BASELINE, *ON_GPU, "--run-name", "killed", "--resume", str(folder), cwd=cwd)

    assert resumed.returncode == 0, resumed.stderr
    assert losses(cwd, "killed") == pytest.approx(whole, rel=TOLERANCE)


def test_a_run_in_bfloat16_learns_as_one_in_float32(wmtp, cwd, whole):
    run = wmtp("run", BASELINE, *ON_GPU, "--set", "model.dtype=bfloat16", "--run-name", "bf16", cwd=cwd)

    assert run.returncode == 0, run.stderr
    assert losses(cwd, "bf16") == pytest.approx(whole, rel=0.02)
    assert all(map(math.isfinite, losses(cwd, "bf16").values()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_runs_give_the_same_bits_from_the_critic_to_samples(wmtp, cwd, dtype):
    deterministic = ("model.deterministic=true", f"model.dtype={dtype}", "evaluate.temperature=0.8")
    settings = [each for key in deterministic for each in ("--set", key)]
    found = []
    for number in (1, 2):
        name = f"deterministic-{dtype}-{number}"
        run = wmtp("run", VERIFIABLE, *ON_GPU, *settings, "--run-name", name, cwd=cwd)
        assert run.returncode == 0, run.stderr
        found.append(lines(cwd, name, "metrics"))

    assert found[0] == found[1]


def test_a_run_in_tf32_learns_as_one_in_float32(wmtp, cwd, whole):
    run = wmtp("run", BASELINE, *ON_GPU, "--set", "model.tf32=true", "--run-name", "tf32", cwd=cwd)

    assert run.returncode == 0, run.stderr
    assert losses(cwd, "tf32") == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("shard", ["false", "true"])
def test_a_process_for_each_gpu_has_the_losses_of_one_process(environment, cwd, whole, shard):
    import torch

    processes = min(torch.cuda.device_count(), 4)
    if processes < 2:
        pytest.skip("there is one CUDA device here, and NCCL needs one for each process")
    name = f"many-{shard}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [
            *(*launcher, "--nproc-per-node", str(processes), "-m", "weighted_mtp_core", "run", BASELINE),
            *(*ON_GPU, "--set", f"model.shard={shard}", "--run-name", name),
        ],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert losses(cwd, name) == pytest.approx(whole, rel=TOLERANCE)
