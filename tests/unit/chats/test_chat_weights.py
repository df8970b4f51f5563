"""Weights in chats: of a row, of a message, and of spans of characters of a message."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weighted_mtp_core.api import Example, WmtpError
from weighted_mtp_core.data.documents import encode
from weighted_mtp_core.data.given_weights import given_weights
from weighted_mtp_core.data.texts import TextCodec

SMILE = "\N{SLIGHTLY SMILING FACE}"
USER = {"role": "user", "content": "a"}


def answer(content, **keys):
    return {"role": "assistant", "content": content, **keys}


@pytest.fixture
def weights(tokenizer, tokens):
    """Return the text and the weight of each token of a chat; targets only."""

    def weights(family, chat, *, marks=False, **keys):
        used = tokenizer(family, marks=marks)
        made = tokens([chat], used, **keys)
        assert not made.given_N[~made.target_N].any()
        ids = made.ids_N[made.target_N].tolist()
        return [
            (used.decode([each]), float(weight))
            for each, weight in zip(ids, made.given_N[made.target_N].tolist(), strict=True)
        ]

    return weights


def test_a_weight_of_a_row_is_the_weight_of_its_targets(chats, tokenizer, tokens):
    made = tokens(chats[:1], tokenizer("chatml"), weight=0.5)

    assert made.given_N.tolist() == [0.5 * each for each in made.target_N.tolist()]


@pytest.mark.parametrize(("family", "marks"), [("chatml", True), ("chatml", False), ("brackets", True)])
def test_a_weight_of_a_message_is_the_weight_of_its_turn_and_of_the_end_of_the_turn(weights, family, marks):
    chat = [USER, answer("b", weight=0.25), USER, answer("c"), USER, answer("d", weight=0)]

    every = weights(family, chat, marks=marks, weight=2)
    last = weights(family, chat, marks=marks, weight=2, train_on="last")

    count = len(every) // 3
    assert [weight for _, weight in every] == [0.5] * count + [2.0] * count + [0.0] * count
    assert last == every[-count:]


def test_weights_of_messages_need_a_template_that_marks_each_once(tokenizer, tokens):
    change = ("{{ m.content }}", "{{ m.content }}{% endgeneration %}{% generation %}")
    used = tokenizer("chatml", marks=True, change=change)

    with pytest.raises(WmtpError, match="the chat template marks 2 turns for 1 messages of the assistant"):
        tokens([[USER, answer("b", weight=0.5)]], used)


# ------------------------------------------------------------------ spans


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("family", ["chatml", "headers", "brackets"])
def test_the_tokens_of_a_span_have_exactly_its_weight_also_in_korean_and_emoji(weights, family, marks):
    text = f"서울 {SMILE}{SMILE} ok 서울"
    chat = [USER, answer("hello"), USER, answer(text, weights=[(3, 5, 0.25), (9, 11, 3.0)], weight=0.5)]

    found = weights(family, chat, marks=marks, weight=2)

    inside = {value: sum(weight == value for _, weight in found) for value in (0.25, 3.0)}
    emoji, korean = SMILE.encode(), "서울".encode()
    # The spans are two emoji and the last word. The smallest tokens are bytes, so a span has at most as many
    # tokens as bytes.
    assert 2 <= inside[0.25] <= 2 * len(emoji)
    assert 1 <= inside[3.0] <= len(korean)
    assert {weight for _, weight in found} == {2.0, 1.0, 0.25, 3.0}
    assert [weight for _, weight in found][-1] == 1.0  # the end of the turn: row times message


def test_each_character_has_the_weight_of_its_span(weights):
    chat = [USER, answer("abcdef", weights=[[1, 3, 0.0], [3, 4, 0.5]])]

    assert weights("chatml", chat) == [
        ("a", 1.0),
        ("b", 0.0),
        ("c", 0.0),
        ("d", 0.5),
        ("e", 1.0),
        ("f", 1.0),
        ("<|im_end|>", 1.0),
    ]


def test_a_text_that_occurs_several_times_is_weighted_where_the_span_is(weights):
    chat = [USER, answer("b", weights=[[0, 1, 0.5]]), {"role": "user", "content": "b"}]
    chat += [answer("b b", weights=[[2, 3, 0.25]])]

    found = weights("chatml", chat, marks=True)

    assert [each for each in found if each[0].strip()] == [
        ("b", 0.5),
        ("<|im_end|>", 1.0),
        ("b", 1.0),
        ("b", 0.25),
        ("<|im_end|>", 1.0),
    ]


def test_spans_over_blanks_that_the_template_strips_keep_the_rest(weights):
    chat = [USER, answer("  xy  ", weights=[[0, 3, 0.5], [4, 6, 0.25]])]

    found = [each for each in weights("headers", chat) if each[0] in "xy"]

    assert found == [("x", 0.5), ("y", 1.0)]


def test_spans_of_other_turns_than_the_last_do_not_matter_if_only_the_last_is_learned(weights):
    chat = [
        USER,
        answer("<think>a</think>b", weights=[[7, 8, 0.5]]),
        USER,
        answer("cd", weights=[[0, 1, 0.25]]),
    ]

    found = weights("thinking", chat, train_on="last")

    assert found == [("c", 0.25), ("d", 1.0), ("<|im_end|>", 1.0)]


@pytest.mark.parametrize(
    "change",
    [
        "{{ m.content.split('</think>')[-1] }}",  # drops a part
        "{{ m.content + ' ' + m.content }}",  # repeats it
        "{{ m.content | replace('ab', 'AB') }}",  # replaces text across the edge of the span
        "{{ m.content[:1] + '-' + m.content[1:] }}",  # inserts by position
    ],
)
def test_a_template_that_changes_a_text_with_spans_is_refused(tokenizer, tokens, change):
    changed = tokenizer("chatml", marks=True, change=("{{ m.content }}", change))
    chat = [USER, answer("hi"), USER, answer("a</think>ab", weights=[[0, 1, 0.5], [10, 11, 0.5]])]

    with pytest.raises(WmtpError) as caught:
        tokens([chat], changed)

    assert str(caught.value) == (
        "example `c0`: message 4 has weights of spans, but the chat template changes the text of the message"
    )
    assert caught.value.hint == "one `weight` a message, or another template in `data.chat_template`"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    text=st.text(alphabet=f"ab 서울한{SMILE}é", min_size=1, max_size=12).filter(str.strip),
    edges=st.lists(st.integers(0, 12), min_size=2, max_size=6, unique=True).map(sorted),
    values=st.lists(st.sampled_from([-1.0, 0.0, 0.3, 2.5]), min_size=3, max_size=3),
)
def test_spans_of_a_message_weigh_its_tokens_as_spans_of_a_response_do(tokenizer, text, edges, values):
    codec = TextCodec(tokenizer("chatml"))
    pairs = zip(edges[::2], edges[1::2], values, strict=False)
    spans = tuple((start, end, value) for start, end, value in pairs if end <= len(text))
    keys = {"example_id": "e", "problem_id": "e", "prompt": "a", "response": text, "reward": 1.0}
    row = Example(**keys, spans=spans)
    chat = Example(**keys, messages=(USER, answer(text, weights=spans)))

    (of_row, of_chat) = encode([row, chat], codec, max_tokens=99, train_on="all")

    expected = given_weights([of_row], codec)[of_row.prompt :]
    assert of_chat.ids[of_chat.prompt :] == of_row.ids[of_row.prompt :]
    assert given_weights([of_chat], codec)[of_chat.prompt :].tolist() == expected.tolist()


def test_spans_do_not_change_the_tokens(chats, tokenizer, tokens):
    used = tokenizer("chatml")
    with_spans = [
        [
            {**each, "weights": [(0, 1, 0.5)]} if each["role"] == "assistant" and each["content"] else each
            for each in chat
        ]
        for chat in chats[:20]
    ]

    plain, weighted = tokens(chats[:20], used), tokens(with_spans, used)

    assert plain.ids_N.tolist() == weighted.ids_N.tolist()
    assert plain.target_N.tolist() == weighted.target_N.tolist()
    assert 0.5 in weighted.given_N
