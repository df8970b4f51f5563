"""The sandbox leaves no processes or files behind, whatever ends it, and replaces workers that end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from weighted_mtp_core.api import RunFailedError, VerdictKind

from weighted_mtp_code_tasks.sandbox import Job, Sandbox, available_backends
from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings

STATUS = {each.name: each for each in available_backends()}
NINE = "def check(candidate):\n    assert candidate(3) == 9\n"
SQUARE = Job("def square(n):\n    return n * n\n", "square", NINE)
FOREVER = Job("while True:\n    pass\n", "square", NINE)


def parameter(name: str) -> object:
    return pytest.param(
        name, marks=pytest.mark.skipif(not STATUS[name].available, reason=STATUS[name].detail)
    )


def settings(backend: str, *, workers: int = 2) -> SandboxSettings:
    return SandboxSettings(
        backend=backend, cpu_seconds=5.0, wall_seconds=20.0, memory_mb=256, workers=workers
    )


@pytest.fixture
def a_sandbox() -> Iterator[Sandbox]:
    with Sandbox(settings("auto")) as made:
        yield made


def kinds(sandbox: Sandbox, *jobs: Job) -> list[str]:
    return [verdict.kind.value for verdict in sandbox.judge(jobs)]


def descendants(pid: int) -> set[int]:
    found = set()
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found |= {child} | descendants(child)
    return found


def wait_until_gone(pids: set[int], *, seconds: float = 10) -> set[int]:
    end = time.monotonic() + seconds
    while pids and time.monotonic() < end:
        pids = {pid for pid in pids if is_alive(pid)}
        time.sleep(0.02)
    return pids


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def test_no_process_and_no_mount_outlives_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # sandboxes of other tests have folders in /tmp
    mounts = Path("/proc/self/mountinfo").read_text()
    before = descendants(os.getpid())
    with Sandbox(settings("auto")) as sandbox:
        started = descendants(os.getpid()) - before
        sandbox.judge([SQUARE] * 4)

        assert started

    assert wait_until_gone(started, seconds=2) == set()
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert list(tmp_path.iterdir()) == []


def test_an_exception_in_the_caller_ends_everything() -> None:
    def stop() -> None:
        started.update(descendants(os.getpid()) - before)
        raise KeyboardInterrupt

    before = descendants(os.getpid())
    started: set[int] = set()
    with pytest.raises(KeyboardInterrupt), Sandbox(settings("auto")) as sandbox:
        sandbox.judge([SQUARE, FOREVER, FOREVER], on_done=stop)

    assert started
    assert wait_until_gone(started, seconds=2) == set()


@pytest.mark.parametrize("backend", [parameter(name) for name in ("landlock", "bubblewrap")])
def test_killing_the_caller_ends_everything(backend: str) -> None:
    script = f"""
        from weighted_mtp_code_tasks.sandbox import Job, Sandbox
        from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings
        with Sandbox(SandboxSettings(backend="{backend}", cpu_seconds=60, workers=2)) as sandbox:
            print("judging", flush=True)
            sandbox.judge([Job("while True: pass", "f", "def check(candidate): pass")] * 2)
    """
    caller = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE)
    assert caller.stdout is not None
    caller.stdout.readline()
    end = time.monotonic() + 20
    while len(started := descendants(caller.pid)) < 8 and time.monotonic() < end:
        time.sleep(0.05)

    caller.send_signal(signal.SIGKILL)
    caller.wait()
    caller.stdout.close()

    assert len(started) >= 8  # two workers, each with zygote, candidate and judge
    assert wait_until_gone(started) == set()


def test_a_worker_that_is_killed_costs_one_verdict(a_sandbox: Sandbox) -> None:
    def kill_one() -> None:
        if not killed:
            killed.append(a_sandbox._workers[0]._process.pid)
            os.kill(killed[0], signal.SIGKILL)

    killed: list[int] = []
    found = [verdict.kind for verdict in a_sandbox.judge([SQUARE] * 20, on_done=kill_one)]

    assert found.count(VerdictKind.JUDGE_ERROR) <= 1
    assert found.count(VerdictKind.PASSED) >= 19
    assert kinds(a_sandbox, SQUARE, SQUARE) == ["passed", "passed"]


def test_too_many_programs_that_cannot_be_judged_stop_the_run() -> None:
    broken = Job(SQUARE.program, "square", "def check(candidate)\n")
    with Sandbox(settings("auto"), judge_errors_tolerated=2) as sandbox:
        assert kinds(sandbox, broken, broken) == ["judge_error", "judge_error"]
        with pytest.raises(RunFailedError, match=r"3 of \d+ programs could not be judged"):
            sandbox.judge([broken, SQUARE])
        with pytest.raises(RuntimeError, match="context manager"):
            sandbox.judge([SQUARE])


def test_two_sandboxes_work_side_by_side_in_threads() -> None:
    def work() -> None:
        with Sandbox(settings("auto", workers=1)) as sandbox:
            results.append(kinds(sandbox, *[SQUARE] * 10))

    results: list[list[str]] = []
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert results == [["passed"] * 10] * 2
