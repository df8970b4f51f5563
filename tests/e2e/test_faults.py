"""Faults of the machine: the run ends with a clear message, and it can be resumed afterwards."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

BASELINE = str(Path(__file__).parents[2] / "configs" / "baseline.toml")
CI = ("--preset", "ci", "--set", "tracker=[]", "--set", "checkpoint.every=1")


def test_read_only_storage_is_an_error_before_anything_is_loaded(tmp_path):
    storage = tmp_path / "storage"
    storage.mkdir()
    mount = f'mount --bind {storage} {storage} && mount -o remount,bind,ro {storage} && exec "$@"'
    command = [sys.executable, "-m", "weighted_mtp_core", "run", BASELINE, *CI]
    ran = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare:" in ran.stderr or "mount:" in ran.stderr:
        pytest.skip(f"this machine lets nobody mount anything: {ran.stderr.strip()}")

    assert ran.returncode == 2
    assert ran.stderr.startswith("error: cannot make the run folder `")
    assert "Read-only file system" in ran.stderr
    assert "hint: choose another `run.output_dir`" in ran.stderr


# C++ code aborts the process if a small allocation fails. So all small allocations come from one heap, which
# always has 64 MiB in reserve, and memory runs out for a tensor of more than 1 MiB.
RESERVE = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**20),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
    "PYTHONMALLOC": "malloc",
}


def test_a_run_that_is_out_of_memory_fails_and_can_go_on(start, wmtp, tmp_path):
    endless = ("run", BASELINE, *CI, "--set", "train.steps=100000", "--set", "train.batch_size=64")
    process = start(*endless, cwd=tmp_path, env=RESERVE)
    folders = list_when(tmp_path / "storage" / "runs", "*/*/*/*/checkpoints/policy-*", process)
    status = (Path("/proc") / str(process.pid) / "status").read_text()
    used = int(status.split("VmData:")[1].split()[0]) * 1024
    resource.prlimit(process.pid, resource.RLIMIT_DATA, (used, resource.RLIM_INFINITY))
    _, stderr = process.communicate(timeout=100)

    assert process.returncode == 1, stderr
    assert stderr.splitlines()[-2].startswith("error: ")
    run = folders[0].parents[1]
    facts = json.loads((run / "run.json").read_text())
    assert facts["status"] == "FAILED"
    done = max(int(path.name[-8:]) for path in run.glob("checkpoints/policy-????????"))
    again = wmtp(*endless, "--set", f"train.steps={done + 2}", "--resume", str(run), cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def list_when(folder, pattern, process, *, seconds=120):
    end = time.monotonic() + seconds
    while not (found := list(folder.glob(pattern))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    return found
