"""Labels come from running programs, not from what is known about the origin of the programs."""

import json
from concurrent.futures import Executor, Future

import pytest
from weighted_mtp_core.api import Problem, WmtpError

from weighted_mtp_code_tasks.judging import FunctionJudge
from weighted_mtp_code_tasks.labelled import LabelledSource
from weighted_mtp_code_tasks.labelling import Candidate, LabelledProblem
from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings

PROBLEM = Problem(
    problem_id="double",
    prompt='def f(n):\n    """Double it."""\n',
    entry_point="f",
    tests="def check(candidate):\n    assert candidate(3) == 6\n    assert candidate(-1) == -2\n",
    solution="    return 2 * n\n",
)


def source(tmp_path, *candidates, executor=None, **settings):
    return LabelledSource(
        name="planted",
        recipe={},
        draw=lambda: [LabelledProblem(problem=PROBLEM, split="train", candidates=candidates)],
        storage=tmp_path,
        executor=executor,
        judge=FunctionJudge(sandbox=SandboxSettings(**{"workers": 1, "cpu_seconds": 1} | settings)),
    )


def solution(text):
    return Candidate(response=text, made="solution")


def mutant(text):
    return Candidate(response=text, made="mutant")


RIGHT = solution("    return 2 * n\n")


def test_a_mutant_that_passes_every_test_is_labelled_right(tmp_path):
    data = source(tmp_path, RIGHT, mutant("    return n + n\n"), mutant("    return n * n\n"))

    assert [example.reward for example in data.examples("train")] == [1.0, 1.0, 0.0]


def test_a_solution_that_fails_its_own_tests_is_refused(tmp_path):
    with pytest.raises(WmtpError) as caught:
        source(tmp_path, solution("    return n\n"))

    assert str(caught.value).startswith(
        "no reference solution passes the tests for 1 of 1 problems of `planted`, for example `double`: wrong"
    )
    assert not list((tmp_path / "datasets_v2" / "planted").glob("*/manifest.json"))


def test_files_without_a_problem_are_refused(tmp_path):
    with pytest.raises(WmtpError, match="the files of `planted` hold no problem of any split"):
        LabelledSource(
            name="planted",
            recipe={},
            draw=list,
            storage=tmp_path,
            judge=FunctionJudge(sandbox=SandboxSettings(workers=1)),
        )


def test_a_program_that_ran_out_of_time_is_no_label(tmp_path):
    data = source(tmp_path, RIGHT, mutant("    while True:\n        pass\n"))
    statistics = json.loads((data.folder / "statistics.json").read_text())

    assert len(data.examples("train")) == 1
    assert statistics["mutant"] == {"cpu_limit": 1}


def test_the_labels_remember_the_sandbox_that_made_them(tmp_path):
    provenance = json.loads((source(tmp_path, RIGHT).folder / "provenance.json").read_text())

    assert provenance["sandbox"]["backend"] in {"bubblewrap", "landlock"}


def test_labels_made_under_other_limits_are_another_version(tmp_path):
    version = source(tmp_path, RIGHT).version().version

    assert source(tmp_path, RIGHT, workers=2).version().version == version
    for changed in ({"cpu_seconds": 5}, {"wall_seconds": 20}, {"memory_mb": 256}):
        assert source(tmp_path, RIGHT, **changed).version().version != version


def test_the_labels_remember_their_tests(tmp_path):
    folders = [source(tmp_path / name, RIGHT).folder for name in ("one", "two")]
    digests = {json.loads((folder / "provenance.json").read_text())["tests_sha256"] for folder in folders}

    assert len(digests) == 1
    assert len(digests.pop()) == 64


def test_statistics_count_responses_rewards_lengths_and_how_difficult_problems_are(tmp_path):
    data = source(tmp_path, RIGHT, mutant("    return n\n"), mutant("    return n * n\n"))
    found = json.loads((data.folder / "statistics.json").read_text())["splits"]["train"]

    assert found["responses"] == 3
    assert found["reward_rate"] == pytest.approx(1 / 3)
    assert found["problems"] == 1
    assert found["difficulty"] == {"0-20 %": 0, "20-40 %": 1, "40-60 %": 0, "60-80 %": 0, "80-100 %": 0}
    assert found["response_characters"] == {"least": 13, "median": 17, "p95": 17, "most": 17}


def test_a_problem_stays_if_another_of_its_solutions_passes(tmp_path):
    data = source(tmp_path, solution("    return n\n"), RIGHT)
    (problem,) = data.problems("train")

    assert problem.solution == RIGHT.response


def test_line_separators_inside_a_response_do_not_break_a_line(tmp_path):
    text = '    return 2 * n  # "\u2028"\n'

    assert source(tmp_path, RIGHT, mutant(text)).examples("train")[1].response == text


class Interrupted(Executor):
    """An executor whose tasks end as if Ctrl-C were pressed."""

    def submit(self, *_, **__):
        future = Future()
        future.set_exception(KeyboardInterrupt())
        return future


def test_an_interrupt_says_that_nothing_is_stored(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        source(tmp_path, RIGHT, executor=Interrupted())

    assert "labelling planted: 0 responses were judged; nothing is stored\n" in capsys.readouterr().err
    assert not list((tmp_path / "datasets_v2" / "planted").glob("*/manifest.json"))
