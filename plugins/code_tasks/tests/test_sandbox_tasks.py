"""Programs judged as tasks of an executor get the verdicts that one sandbox gives."""

from __future__ import annotations

from concurrent.futures import Executor, Future, ThreadPoolExecutor

import pytest
from weighted_mtp_core.api import RunFailedError, Verdict, VerdictKind, WmtpError

from weighted_mtp_code_tasks.sandbox import Job, Sandbox, tasks
from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings

NINE = "def check(candidate):\n    assert candidate(3) == 9\n"
JOBS = [Job(f"def square(n):\n    return n * n + {more}\n", "square", NINE) for more in (0, 1, 0, 0, 2)]


class Answers(Executor):
    """An executor whose tasks return given verdicts and provenances, as if from several machines."""

    def __init__(self, *answers: tasks.Judged) -> None:
        self._answers = iter(answers)

    def submit(self, *_: object, **__: object) -> Future[tasks.Judged]:  # type: ignore[override]
        future: Future[tasks.Judged] = Future()
        future.set_result(next(self._answers))
        return future


def facts(**more: str) -> dict[str, str]:
    return {"backend": "landlock", "kernel": "6.1", **more}


@pytest.fixture
def one_program_per_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_CHUNK", 1)


def test_tasks_give_the_verdicts_of_one_sandbox_in_the_order_of_the_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks, "_CHUNK", 3)
    done: list[int] = []
    with Sandbox(SandboxSettings(workers=1)) as sandbox, ThreadPoolExecutor(2) as executor:
        wanted = sandbox.judge(JOBS)
        verdicts, provenance = tasks.judge_as_tasks(
            JOBS, SandboxSettings(), executor, on_done=lambda: done.append(1)
        )

    assert verdicts == wanted
    assert [verdict.kind.value for verdict in verdicts] == ["passed", "wrong", "passed", "passed", "wrong"]
    assert len(done) == 5
    assert provenance == sandbox.provenance


def test_no_program_gives_no_verdict() -> None:
    assert tasks.judge_as_tasks([], SandboxSettings(), Answers()) == ([], {})


def test_labels_record_every_kernel(one_program_per_task: None) -> None:
    passed = [Verdict(kind=VerdictKind.PASSED)]
    machines = Answers((passed, facts(kernel="6.5")), (passed, facts()))

    _, provenance = tasks.judge_as_tasks(JOBS[:2], SandboxSettings(), machines)

    assert provenance == facts(kernel="6.1, 6.5")


def test_machines_with_different_sandboxes_are_refused(one_program_per_task: None) -> None:
    passed = [Verdict(kind=VerdictKind.PASSED)]
    machines = Answers((passed, facts()), (passed, facts(backend="bubblewrap")))

    with pytest.raises(WmtpError, match="sandboxes that differ in `backend`: bubblewrap, landlock") as error:
        tasks.judge_as_tasks(JOBS[:2], SandboxSettings(), machines)

    assert "data.options.sandbox.backend" in str(error.value.hint)


def test_programs_that_cannot_be_judged_are_counted_over_all_tasks(one_program_per_task: None) -> None:
    broken = ([Verdict(kind=VerdictKind.JUDGE_ERROR, detail="no memory")], facts())

    with pytest.raises(RunFailedError, match="6 of 6 programs could not be judged: no memory"):
        tasks.judge_as_tasks([JOBS[0]] * 6, SandboxSettings(), Answers(*[broken] * 6))
