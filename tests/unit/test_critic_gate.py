"""The test that a critic must pass (critics without information rarely pass), and the data of the test."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata
from weighted_mtp_core.data.halves import documents_of
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.metrics.critic_gate import (
    LEVEL,
    PROBLEMS_NEEDED,
    chance_p_value,
    problems_by_outcome,
)


def token_set(rewards, problems):
    """Documents of one token each."""
    return TokenSet(
        ids_N=np.zeros(len(rewards), dtype=np.int32),
        start_D1=np.arange(len(rewards) + 1),
        prompt_D=np.zeros(len(rewards), dtype=np.int32),
        reward_D=np.asarray(rewards, dtype=np.float32),
        problem_D=np.asarray(problems, dtype=np.int64),
        example_ids=tuple(map(str, range(len(rewards)))),
    )


# ------------------------------------------------------------------------------------ the test over problems


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.integers(0, 5)), min_size=6, max_size=20))
def test_the_p_value_is_the_share_of_all_sign_choices_that_reach_the_sum(scored):
    values, correct, problems = (np.array(each) for each in zip(*scored, strict=True))
    names, ranks = sorted(set(problems)), [(values < v).sum() + (values <= v).sum() for v in values]
    parts = [
        2
        * sum(
            (correct[d] - correct.mean()) * (ranks[d] - np.mean(ranks)) for d in np.flatnonzero(problems == p)
        )
        for p in names
    ]
    least = sum(parts) * (len(names) - 1) / len(names) - 1e-6
    every = [np.dot(signs, parts) >= least for signs in itertools.product((-1, 1), repeat=len(names))]
    exact = np.mean(every)

    found = chance_p_value(values.astype(float), correct, problems)

    assert found == pytest.approx(exact, abs=5 * (exact * (1 - exact) / 4000) ** 0.5 + 1 / 4000)


def test_a_constant_critic_has_the_p_value_one():
    correct = np.tile([True, False], 20)

    assert chance_p_value(np.full(40, 0.3), correct, np.arange(40)) == 1.0


def test_copies_of_a_response_to_the_same_problem_add_no_evidence():
    generator = np.random.default_rng(0)
    correct = np.arange(16) % 2 == 0
    values = correct + 1.5 * generator.standard_normal(16)
    once = chance_p_value(values, correct, np.arange(16))

    assert once > 2 * LEVEL  # if copies counted as independent, the p-value would become tiny
    assert chance_p_value(
        np.repeat(values, 20), np.repeat(correct, 20), np.repeat(np.arange(16), 20)
    ) == pytest.approx(once, abs=0.01)


def test_six_problems_can_decide_and_five_cannot():
    """Six fair coins show six heads in 1.6 % of all tosses, five show five in 3.1 %."""
    assert 0.5**PROBLEMS_NEEDED < LEVEL < 0.5 ** (PROBLEMS_NEEDED - 1)


def test_problems_are_counted_once_for_each_outcome():
    correct = np.array([True, True, False, True, False, False])

    assert problems_by_outcome(correct, np.array([7, 7, 7, 8, 9, 9])) == (2, 2)


# ------------------------------------------------------------------------------------------------ the halves

DOCUMENTS = st.lists(st.tuples(st.booleans(), st.integers(0, 12)), min_size=1, max_size=60)


@given(DOCUMENTS)
def test_each_document_is_in_one_half_together_with_all_others_of_its_problem(scored):
    tokens = token_set(*zip(*scored, strict=True))
    choosing, judging = documents_of("choosing", tokens), documents_of("judging", tokens)

    assert sorted([*choosing, *judging]) == list(range(len(scored)))
    assert not set(tokens.problem_D[choosing]) & set(tokens.problem_D[judging])


@given(DOCUMENTS)
def test_problems_of_each_kind_are_shared_equally(scored):
    tokens = token_set(*zip(*scored, strict=True))
    outcomes = {}
    for correct, problem in scored:
        outcomes.setdefault(problem, set()).add(correct)
    judging = set(tokens.problem_D[documents_of("judging", tokens)])

    for kind in ({True, False}, {True}, {False}):
        members = {problem for problem, found in outcomes.items() if found == kind}
        assert abs(2 * len(members & judging) - len(members)) <= 1


def test_the_halves_depend_on_the_problems_only():
    first = token_set([1, 0] * 30, np.repeat(np.arange(30), 2))
    longer_responses = TokenSet(
        ids_N=np.zeros(180, dtype=np.int32),
        start_D1=3 * np.arange(61),
        prompt_D=first.prompt_D,
        reward_D=first.reward_D,
        problem_D=first.problem_D,
        example_ids=first.example_ids,
    )

    assert documents_of("judging", first).tolist() == documents_of("judging", longer_responses).tolist()
    assert documents_of("judging", first).tolist() != list(range(30, 60))  # not the order of the file


# ------------------------------------------------------------------------------------------ the two together

TRIALS, LEARNERS = 600, 11


def noise(generator, prompt_share):
    """Return labels of 4 responses to each of 30 problems, and values of 11 critics without information.

    Some problems are hard and some are easy. A value is a mixture of a random number of the problem, with the
    share `prompt_share`, and a random number of the response.
    """
    problems = np.repeat(np.arange(30), 4)
    correct = generator.random(120) < generator.beta(0.5, 0.5, size=30)[problems]
    values = [
        prompt_share * generator.standard_normal(30)[problems]
        + (1 - prompt_share) * generator.standard_normal(120)
        for _ in range(LEARNERS)
    ]
    return token_set(correct, problems), values


@pytest.mark.parametrize("prompt_share", [0.0, 1.0])
def test_the_best_of_many_critics_without_information_passes_in_at_most_2_5_percent(prompt_share):
    generator = np.random.default_rng(3)
    passed = {1: 0, 4: 0, LEARNERS: 0}
    for _ in range(TRIALS):
        tokens, values = noise(generator, prompt_share)
        choosing, judging = documents_of("choosing", tokens), documents_of("judging", tokens)
        correct = tokens.reward_D == 1
        ranks = [rankdata(each[choosing]) for each in values]
        scores = [each[correct[choosing]].sum() for each in ranks]  # the AUC is linear in this sum
        for validations in passed:
            best = values[int(np.argmax(scores[:validations]))][judging]
            passed[validations] += chance_p_value(best, correct[judging], tokens.problem_D[judging]) <= LEVEL

    error = (LEVEL * (1 - LEVEL) / TRIALS) ** 0.5
    assert {
        count: number / TRIALS for count, number in passed.items() if number / TRIALS > LEVEL + 3 * error
    } == {}
    assert sum(passed.values()) > 0  # the test does not refuse every critic
