"""HumanEval: every canonical solution passes, and broken variants are labelled by running them."""

import json

import pytest
from weighted_mtp_core.api import BuildContext

from weighted_mtp_code_tasks.humaneval import HumanEvalOptions, build_humaneval
from weighted_mtp_code_tasks.humaneval.problems import read_problems
from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    context = BuildContext(seed=0, storage=tmp_path_factory.mktemp("storage"))
    return build_humaneval(HumanEvalOptions(mutants=1, sandbox=SandboxSettings(cpu_seconds=2)), context)


def test_all_164_canonical_solutions_pass_their_tests(data):
    statistics = json.loads((data.folder / "statistics.json").read_text())

    assert set(statistics["solution"]) == {"passed"}
    assert sum(len(data.problems(split)) for split in ("train", "validation", "test")) == 164


def test_variants_are_right_and_wrong(data):
    assert {example.reward for example in data.examples("train")} == {0.0, 1.0}


def test_a_problem_is_in_one_split_only_and_every_split_has_some():
    splits = {one.problem.problem_id: one.split for one in read_problems(mutants_per_solution=0, seed=0)}
    counts = [list(splits.values()).count(name) for name in ("train", "validation", "test")]

    assert counts == [103, 33, 28]


def test_the_solution_is_a_completion_of_the_prompt_as_published():
    for one in read_problems(mutants_per_solution=1, seed=0):
        first = one.candidates[0].response

        assert first == one.problem.solution
        assert first.startswith((" ", "\t", "\n"))
        for candidate in one.candidates:
            compile(one.problem.prompt + candidate.response, one.problem.problem_id, "exec")
