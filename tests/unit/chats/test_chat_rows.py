"""`core.chat` reads chats from files and names what is wrong with a row."""

import json

import pytest
from weighted_mtp_core.api import BuildContext, RowFiles, WmtpError
from weighted_mtp_core.builtin.chat import build_chat

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({}, "needs `messages`, a list that is not empty"),
        ({"messages": TURNS[:1]}, "the last message is of the role `user`, expected `assistant`"),
        (
            {"messages": [{"role": "bot", "content": "a"}]},
            'message 1 has the role "bot", expected one of `system`, `user`, `assistant`, `tool`',
        ),
        (
            {"messages": [TURNS[0], {"role": "assistant", "content": ""}]},
            "message 2 of the assistant is empty",
        ),
        (
            {"messages": [{"role": "user", "content": None}, TURNS[1]]},
            "message 1 needs `content`, a string or a list of parts of text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, TURNS[1]]},
            'message 1 has a part that is not text: expected {"type": "text", "text": "..."}',
        ),
        ({"messages": ["hi"]}, "message 1 must be an object, got str"),
        (
            {"messages": [{**TURNS[0], "weight": 0.5}, TURNS[1]]},
            "message 1 has `weight`, but only the assistant's are learned",
        ),
        (
            {"messages": [TURNS[0], {**TURNS[1], "weight": -0.5}]},
            "`weight` -0.5 of message 2 is negative: `loss.negative_weights = true` allows it",
        ),
        (
            {"messages": TURNS, "weights": [[0, 1, 0.5]]},
            "`weights` is for a message of a chat, not for a whole chat",
        ),
        (
            {"messages": [TURNS[0], {**TURNS[1], "weights": [[0, 2, 0.5]]}]},
            "message 2: the span [0, 2, 0.5] is not within the 1 characters of the text",
        ),
        (
            {"messages": [TURNS[0], {**TURNS[1], "weights": [[0, 0.5, 0.5]]}]},
            "message 2: `weights` must be a list of [start, end, weight]; start and end count characters",
        ),
        (
            {"messages": [{**TURNS[0], "weights": [[0, 1, 0.5]]}, TURNS[1]]},
            "message 1 has `weights`, but only the assistant's are learned",
        ),
        (
            {"messages": [TURNS[0], {**TURNS[1], "weights": [[0, 1, -0.5]]}]},
            (
                "the weight of the span [0, 1, -0.5] of message 2 is negative: "
                "`loss.negative_weights = true` allows it"
            ),
        ),
        (
            {"messages": [TURNS[0], {**TURNS[1], "Weight": 0}]},
            "message 2: has `Weight`: did you mean `weight`?",
        ),
        ({"messages": TURNS, "correct": True}, "has `correct`: did you mean `is_correct`?"),
        ({"messages": TURNS, "tools": "add"}, "`tools` must be a list of objects"),
    ],
)
def test_what_is_wrong_with_a_chat_is_named_with_file_and_line(tmp_path, row, fault):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(row) + "\n")

    with pytest.raises(WmtpError) as caught:
        build_chat(RowFiles(train=str(path)), BuildContext(seed=0, storage=tmp_path))

    assert str(caught.value) == f"{path}: 1 bad line\n  line 1: {fault}"


def test_parts_of_text_are_joined(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    path = tmp_path / "chats.jsonl"
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": parts}, TURNS[1]], "weight": 2}) + "\n"
    )

    source = build_chat(RowFiles(train=str(path)), BuildContext(seed=0, storage=tmp_path))
    (found,) = source.examples("train")

    assert found.messages[0] == {"role": "user", "content": "ab"}
    assert (found.prompt, found.response, found.weight, found.reward) == ("user: ab\n", "b", 2.0, 1.0)
