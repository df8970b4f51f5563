"""Examples become one flat array of ids: prompt, response, EOS."""

import numpy as np
import pytest
from weighted_mtp_core.api import Example, WmtpError
from weighted_mtp_core.data.tokens import tokenise


class CharacterTokenizer:
    """One token a character; EOS is 1."""

    eos_token_id = 1

    def __call__(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[ord(letter) for letter in one] for one in text]}


def example(number, prompt="ab", response="cd", problem="p", reward=1.0):
    return Example(
        example_id=f"e{number}", problem_id=problem, prompt=prompt, response=response, reward=reward
    )


def test_a_document_is_prompt_response_and_eos():
    tokens = tokenise([example(0)], CharacterTokenizer(), max_tokens=10)

    assert tokens.ids_N.tolist() == [ord("a"), ord("b"), ord("c"), ord("d"), 1]
    assert tokens.prompt_D.tolist() == [2]


def test_documents_lie_one_after_the_other():
    tokens = tokenise([example(0), example(1, response="xyz")], CharacterTokenizer(), max_tokens=10)

    assert tokens.start_D1.tolist() == [0, 5, 11]
    assert tokens.length_D.tolist() == [5, 6]


def test_longer_documents_are_left_out_and_counted():
    tokens = tokenise([example(0), example(1, response="x" * 9)], CharacterTokenizer(), max_tokens=6)

    assert tokens.example_ids == ("e0",)
    assert tokens.left_out == 1


def test_responses_to_one_problem_share_its_number():
    examples = [example(0, problem="a"), example(1, problem="b"), example(2, problem="a")]

    assert tokenise(examples, CharacterTokenizer(), max_tokens=9).problem_D.tolist() == [0, 1, 0]


def test_nothing_short_enough_is_an_error():
    with pytest.raises(WmtpError, match="none of the 1 examples has at most 3 tokens"):
        tokenise([example(0)], CharacterTokenizer(), max_tokens=3)


def test_many_documents_come_out_as_one_by_one():
    examples = [example(i, response="r" * (i % 7 + 1)) for i in range(2500)]
    tokens = tokenise(examples, CharacterTokenizer(), max_tokens=20)

    expected = np.concatenate([[*map(ord, e.prompt), *map(ord, e.response), 1] for e in examples])

    assert np.array_equal(tokens.ids_N, expected)
