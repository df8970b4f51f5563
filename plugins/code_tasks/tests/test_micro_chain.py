"""Chains with typical slips: positions and frequencies of the slips, and labels by running the programs."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from weighted_mtp_core.api import SPLITS, BuildContext, WmtpError
from weighted_mtp_core.testing import DataSourceSuite

from weighted_mtp_code_tasks.micro_chain import MicroChainOptions, build_micro_chain
from weighted_mtp_code_tasks.micro_chain.chains import draw_chains, slip_spans, typical_slips
from weighted_mtp_code_tasks.micro_code.grammar import STEPS, random_function
from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings

DRAWING = {
    "problems": 300,
    "length": 4,
    "kinds": ("int",),
    "responses": 1,
    "twins": 0,
    "slip_rates": (0.7, 0.05),
    "slipping_types": 0.5,
    "seed": 0,
}
LIMITS = SandboxSettings(workers=1)


def draw(**options):
    return draw_chains(**{**DRAWING, **options})


@pytest.fixture(scope="module")
def drawn():
    return draw()


def responses(problems):
    return [(one, each) for one in problems for each in one.candidates if each.is_example]


def steps_of(problem):
    """Return the words of the steps that the docstring names."""
    text = problem.prompt.split('"""')[1].removesuffix(".")
    return [words[0].lower() + words[1:] for words in text.split(", then ")]


@pytest.mark.parametrize("kind", ["int", "list", "text"])
def test_a_slip_is_the_same_step_with_the_next_constant(kind):
    slips = {step.words: slip.words for step, slip in typical_slips(kind)}
    some = {
        "int": {"add 3": "add 4", "add 9": "add 2", "raise it to at least 5": "raise it to at least 6"},
        "list": {"keep the multiples of 5": "keep the multiples of 2", "append 2": "append 3"},
        "text": {"turn 'a' into 'b'": "turn 'a' into 'c'", "remove every 'o'": "remove every 'a'"},
    }[kind]

    assert {words: slips[words] for words in some} == some
    assert len(slips) == len(set(slips.values()))


def test_a_step_without_a_constant_has_no_slip():
    slipping = {step.words for step, _ in typical_slips("int")}

    assert {step.words for step in STEPS["int"]} - slipping == {
        "square it",
        "negate it",
        "take the absolute value",
    }


@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["int", "list", "text"]), length=st.integers(1, 6))
def test_without_its_spans_a_slipped_body_is_the_right_body(seed, kind, length):
    generator = random.Random(seed)
    slips = {step.words: slip for step, slip in typical_slips(kind)}
    function = random_function(generator, level=length, kinds=(kind,))
    forms = tuple(generator.randrange(2) for _ in range(length))
    chosen = [generator.random() < 0.5 and step.words in slips for step in function.steps]
    steps = tuple(
        slips[step.words] if slipped else step for step, slipped in zip(function.steps, chosen, strict=True)
    )
    right = function.body(forms, style="chain")
    written = type(function)(kind=function.kind, steps=steps).body(forms, style="chain")
    spans = list(slip_spans(right, written))

    lines = [written[:start].count("\n") for start, _, _ in spans]
    assert lines == [number for number, slipped in enumerate(chosen) if slipped]
    assert all(weight == 0.0 for _, _, weight in spans)
    left, others = 0, []
    for start, end, _ in spans:
        others.append(written[left:start])
        left = end
    others.append(written[left:])
    position = 0
    for part in others:  # the parts outside the spans occur in the right body, in order
        position = right.index(part, position) + len(part)


def test_spans_cover_the_constants_only(drawn):
    texts = {
        candidate.response[start:end]
        for _, candidate in responses(drawn)
        for start, end, _ in candidate.spans
    }

    assert texts == set("23456789")


def test_steps_slip_at_the_two_rates():
    problems = draw(responses=20, slipping_types=0.25)
    slips = {step.words: slip for step, slip in typical_slips("int")}
    count = {}
    for one, candidate in responses(problems):
        lines = {candidate.response[:start].count("\n") for start, _, _ in candidate.spans}
        for number, words in enumerate(steps_of(one.problem)):
            if words in slips:
                total, slipped = count.get(words, (0, 0))
                count[words] = total + 1, slipped + (number in lines)
    rates = {words: slipped / total for words, (total, slipped) in count.items() if total > 200}
    often = {words for words, rate in rates.items() if rate > 0.375}

    assert len(slips) == 56
    assert abs(len(often) - 14) <= len(slips) - len(rates)
    assert all(abs(rate - (0.7 if words in often else 0.05)) < 0.12 for words, rate in rates.items())


def test_a_problem_has_as_many_responses_and_twins_as_asked_for():
    problems = draw(problems=20, responses=3, twins=2)

    for one in problems:
        given = [each for each in one.candidates if each.is_example]
        assert len(given) == 5
        assert all(each.made == "solution" for each in given[3:])
        assert len(one.candidates) == 6  # one more: the solution, which is not an example


def test_other_slips_leave_the_functions_as_they_are(drawn):
    often = draw(slip_rates=(0.9, 0.3))

    assert [one.problem.prompt for one in often] == [one.problem.prompt for one in drawn]


def test_chains_have_the_length_and_the_kinds_of_the_options():
    problems = draw(problems=40, length=3, kinds=("text", "list"))

    assert all(one.problem.prompt.count(", then ") == 2 for one in problems)
    assert {one.problem.prompt.partition(")")[0] for one in problems} == {"def f(s", "def f(xs"}


def test_more_chains_than_the_grammar_has_is_an_error_that_names_the_options():
    with pytest.raises(WmtpError, match="distinct functions of level 1, not 300") as caught:
        draw(length=1)

    assert caught.value.hint == "lower `data.options.problems` or raise `data.options.length`"


# ------------------------------------------------------------------ labelled by running


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("storage")


def source(storage: Path, **options):
    options = MicroChainOptions(**{"problems": 60, "sandbox": LIMITS, **options})
    return build_micro_chain(options, BuildContext(seed=0, storage=storage))


def test_responses_are_labelled_by_running_them_whatever_their_slips(storage):
    examples = source(storage, responses=4).examples("train")

    assert {bool(example.spans) for example in examples if example.reward == 0.0} == {True}
    assert {bool(example.spans) for example in examples if example.reward == 1.0} == {True, False}


def test_spans_are_read_back_as_they_were_drawn(storage):
    drawn = draw_chains(**{**DRAWING, "problems": 60})
    expected = [
        (candidate.response, candidate.spans) for one, candidate in responses(drawn) if one.split == "train"
    ]

    assert [(each.response, each.spans) for each in source(storage).examples("train")] == expected


def test_the_policy_imitates_all_training_responses_or_only_the_right_ones(storage):
    everything, right = source(storage), source(storage, imitate="right")

    assert everything.policy_examples("train") == everything.examples("train")
    assert right.policy_examples("train") == [e for e in right.examples("train") if e.reward == 1.0]
    assert everything.version() == right.version()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_policy_is_measured_on_a_solution_of_each_held_out_problem(storage, split):
    data = source(storage)
    problems, found = data.problems(split), data.policy_examples(split)

    assert [each.response for each in found] == [problem.solution for problem in problems]
    assert all(verdict.passed for verdict in data.verify([(p, p.solution) for p in problems]))
    assert not {each.example_id for each in found} & {each.example_id for each in data.examples(split)}


def test_the_weights_of_the_data_are_marked_as_knowledge_of_an_oracle(storage):
    data = source(storage)

    assert data.oracle_weights
    assert all(example.has_weights for split in SPLITS for example in data.examples(split))


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"slip_rates": (0.7, 1.5)}, "must be <= 1: 1.5"), ({"kinds": ()}, "must be >= 1")],
)
def test_options_that_make_no_sense_are_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        MicroChainOptions(**options)


class TestConformance(DataSourceSuite):
    address = "code_tasks.micro_chain"

    @pytest.fixture
    def options(self):
        return {"problems": 20, "sandbox": {"workers": 1}}

    @pytest.fixture
    def changed_options(self):
        return {"problems": 20, "sandbox": {"workers": 1}, "seed": 1}
