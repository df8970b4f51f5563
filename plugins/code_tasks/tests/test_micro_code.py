"""The grammar's functions: distinct, described, tested, solved in several forms, each in one split."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from weighted_mtp_core.api import BuildContext, WmtpError

from weighted_mtp_code_tasks.micro_code import MicroCodeOptions, build_micro_code
from weighted_mtp_code_tasks.micro_code.generate import draw_problems
from weighted_mtp_code_tasks.micro_code.grammar import random_argument, random_function
from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings


@pytest.fixture(scope="module")
def drawn():
    return draw_problems(problems=2000, level=2, solutions=2, mutants_per_solution=1, seed=0)


def behaviour(one):
    """Return the type of a problem's arguments, and the solution's values for 24 arguments; tests have 10."""
    scope = {}
    exec(one.problem.prompt + one.problem.solution, scope)
    kind = {"xs": "list", "s": "text", "n": "int"}[
        one.problem.prompt.removeprefix("def f(").partition(")")[0]
    ]
    return kind, repr([scope["f"](random_argument(kind, random.Random(i))) for i in range(24)])


def test_two_thousand_functions_are_distinct_in_text_and_in_behaviour(drawn):
    assert len({one.problem.prompt for one in drawn}) == 2000
    behaviours = {behaviour(one) for one in drawn}
    assert len(behaviours) == 2000


def test_every_function_has_a_docstring_and_at_least_five_tests(drawn):
    for one in drawn:
        assert '"""' in one.problem.prompt
        assert one.problem.tests.count("assert candidate(") >= 5


def test_functions_are_split_eight_to_one_to_one(drawn):
    splits = [one.split for one in drawn]

    assert [splits.count(name) for name in ("train", "validation", "test")] == [1600, 200, 200]


def test_right_bodies_come_in_more_than_one_form(drawn):
    forms = [sum(candidate.made == "solution" for candidate in one.candidates) for one in drawn]

    assert min(forms) == 2


@given(seed=st.integers(0, 10**6), level=st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_every_form_of_a_body_does_what_the_reference_does(seed, level):
    generator = random.Random(seed)
    function = random_function(generator, level=level)
    reference = function.reference()
    arguments = [random_argument(function.kind, generator) for _ in range(10)]
    for body in function.bodies(6, generator):
        scope = {}
        exec(function.prompt + body, scope)

        assert [scope["f"](argument) for argument in arguments] == [reference(one) for one in arguments]


def test_the_docstring_names_every_step(drawn):
    assert all(one.problem.prompt.count(", then ") == 1 for one in drawn)


def test_more_functions_than_the_grammar_has_is_an_error():
    with pytest.raises(WmtpError, match="distinct functions of level 1, not 5000"):
        draw_problems(problems=5000, level=1, solutions=1, mutants_per_solution=0, seed=0)


DRAW = """
import hashlib
from weighted_mtp_code_tasks.micro_code.generate import draw_problems
drawn = draw_problems(problems=60, level=2, solutions=2, mutants_per_solution=2, seed=5)
print(hashlib.sha256(repr(drawn).encode()).hexdigest())
"""


def test_the_hash_seed_changes_nothing():
    found = {
        subprocess.run(
            [sys.executable, "-c", DRAW],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }

    assert len(found) == 1


# ------------------------------------------------------------------ labelled by running

LIMITS = SandboxSettings(workers=1)


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("storage")


def source(storage: Path, **options):
    options = MicroCodeOptions(**{"problems": 60, "mutants": 2, "sandbox": LIMITS, **options})
    return build_micro_code(options, BuildContext(seed=0, storage=storage))


def test_splits_share_no_function(storage):
    data = source(storage)
    problems = [{example.problem_id for example in data.examples(s)} for s in ("train", "validation", "test")]

    assert all(problems)
    assert len(set.union(*problems)) == sum(map(len, problems))


def test_there_are_right_and_wrong_responses_and_the_policy_sees_the_right_ones(storage):
    data = source(storage)

    assert {example.reward for example in data.examples("train")} == {0.0, 1.0}
    assert {example.reward for example in data.policy_examples("train")} == {1.0}


def test_reading_back_gives_the_same_data(storage):
    first, again = source(storage), source(storage)

    assert first.examples("train") == again.examples("train")
    assert first.version() == again.version()


def test_a_changed_byte_of_the_data_is_an_error_that_names_the_file(tmp_path):
    file = source(tmp_path, problems=10).folder / "examples.jsonl"
    file.write_text(file.read_text().replace("1.0", "0.0", 1))

    with pytest.raises(WmtpError, match=r"examples\.jsonl` changed since it was written"):
        source(tmp_path, problems=10)


@pytest.mark.parametrize("fraction", [0.25, 0.4])
def test_incorrect_fraction_is_the_share_of_wrong_responses_in_training_only(storage, fraction):
    data = source(storage, incorrect_fraction=fraction)
    rewards = [example.reward for example in data.policy_examples("train")]

    assert rewards.count(0.0) / len(rewards) == pytest.approx(fraction, abs=0.01)
    assert {example.reward for example in data.policy_examples("validation")} == {1.0}


def test_too_few_wrong_responses_for_the_fraction_is_an_error(storage):
    with pytest.raises(WmtpError, match=r"`incorrect_fraction = 0.9` needs \d+ wrong responses for"):
        source(storage, incorrect_fraction=0.9).policy_examples("train")


def test_a_reference_solution_passes_and_a_wrong_one_does_not(storage):
    data = source(storage)
    problem = data.problems("test")[0]
    right, wrong, broken = data.verify(
        [(problem, problem.solution), (problem, "    return 'neither'\n"), (problem, "    return (\n")]
    )

    assert right.passed
    assert wrong.kind.value == "wrong"
    assert broken.kind.value == "error"


def test_length_does_not_tell_right_from_wrong(storage):
    examples = source(storage).examples("train")
    auc = roc_auc_score([e.reward for e in examples], [len(e.response) for e in examples])

    assert 0.35 < auc < 0.65
