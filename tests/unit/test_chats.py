"""Chats: rendered with the tokenizer's template; the assistant's turns are learned, each with its end."""

import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from weighted_mtp_core.api import BuildContext, Example, RowFiles, WmtpError
from weighted_mtp_core.builtin.chat import build_chat
from weighted_mtp_core.cli import main
from weighted_mtp_core.data.batches import collate, collate_packed
from weighted_mtp_core.data.texts import TextCodec
from weighted_mtp_core.data.tokens import open_tokens, tokenise
from weighted_mtp_core.model.targets import align_labels, target_mask

CPU = torch.device("cpu")
SMILE = "\N{SLIGHTLY SMILING FACE}"
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>"]

# ChatML, with and without marks; the turn's end is part of the marked text.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}MARK{{ m.content }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}END{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Llama 3's: BOS in the template, contents without blanks at their ends, tools in front.
HEADERS = (
    "{{ bos_token }}{% if tools %}"
    "{{ '<|header|>tools<|/header|>' + (tools | tojson) + '<|eot|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|header|>' + m.role + '<|/header|>\n\n' }}"
    "{% if m.role == 'assistant' %}MARK{{ m.content | trim }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '<|eot|>' }}END"
    "{% else %}{{ m.content | trim + '<|eot|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)
# Like Mistral's: instructions in brackets, EOS after each answer.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}MARK{{ ' ' + m.content + eos_token }}END"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
# Like Qwen 3's: thoughts of earlier turns are dropped.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FAMILIES = {"chatml": CHATML, "headers": HEADERS, "brackets": BRACKETS}


def marked(template):
    return template.replace("MARK", "{% generation %}").replace("END", "{% endgeneration %}")


def unmarked(template):
    return template.replace("MARK", "").replace("END", "")


def tokenizer(template, *, eos="<|im_end|>"):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["assistant user system hello there, how are you? 서울은 수도"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=eos,
        additional_special_tokens=[each for each in SPECIAL if each not in ("<s>", eos)],
        chat_template=template,
    )


def chats(count=200):
    """Return chats of three turns each; two have tool calls."""
    choose = random.Random(0)
    words = ["hello", "서울은", SMILE, "how are you?", "수도", "x\ny", "  two", "é"]
    made = []
    for i in range(count):
        messages = [{"role": "system", "content": "Be kind."}] if i % 3 == 0 else []
        for turn in range(3):
            messages += [
                {"role": "user", "content": f"{turn}: " + " ".join(choose.choices(words, k=3))},
                {"role": "assistant", "content": " ".join(choose.choices(words, k=4)).strip()},
            ]
        if i in (10, 20):
            call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
            messages[-1:] = [
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "2"},
                {"role": "assistant", "content": "It is 2."},
            ]
        made.append(messages)
    return made


CHATS = chats()


def example(messages, number=0, **keys):
    return Example(
        example_id=f"c{number}",
        problem_id=f"c{number}",
        prompt="p",
        response="r",
        reward=1.0,
        messages=tuple(messages),
        **keys,
    )


@pytest.fixture
def tokens(tmp_path):
    """Tokenise chats into a new folder."""

    def make(chosen, used, *, train_on="all", **keys):
        folder = tmp_path / f"tokens{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        examples = [example(each, number, **keys) for number, each in enumerate(chosen)]
        tokenise(examples, TextCodec(used), max_tokens=2000, folder=folder, train_on=train_on)
        return open_tokens(folder, sha256="")

    return make


def documents(made):
    """Return ids and targets of each document."""
    edges = made.start_D1.tolist()
    return [
        (made.ids_N[start:end].tolist(), made.target_N[start:end].tolist())
        for start, end in itertools.pairwise(edges)
    ]


def learned(used, document):
    """Return the texts of the runs of targets of a document."""
    ids, targets = document
    runs = re.finditer("1+", "".join(str(int(each)) for each in targets))
    return [used.decode(ids[run.start() : run.end()]) for run in runs]


# ------------------------------------------------------------------ which tokens are learned


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_those_of_transformers_token_by_token(tokens, family):
    used = tokenizer(marked(FAMILIES[family]), eos="</s>" if family == "brackets" else "<|im_end|>")
    made = documents(tokens(CHATS, used))

    for messages, (ids, targets) in zip(CHATS, made, strict=True):
        expected = used.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        count = len(ids) - (family == "headers")  # there the turn ends with another token than EOS
        assert ids[:count] == expected["input_ids"][:count]
        assert targets[:count] == [bool(each) for each in expected["assistant_masks"][:count]]
        assert ids[-1] == used.eos_token_id
        assert targets[-1]
        assert not any(expected["assistant_masks"][count:])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_without_marks_gives_the_same_masks(tokens, family):
    eos = "</s>" if family == "brackets" else "<|im_end|>"
    with_marks = documents(tokens(CHATS, tokenizer(marked(FAMILIES[family]), eos=eos)))
    without = documents(tokens(CHATS, tokenizer(unmarked(FAMILIES[family]), eos=eos)))

    assert without == with_marks


def test_all_turns_or_the_last_with_their_ends_and_without_the_generation_prompt(tokens):
    used = tokenizer(unmarked(CHATML))
    chat = [
        {"role": "user", "content": "안녕?"},
        {"role": "assistant", "content": f"안녕 {SMILE}"},
        {"role": "user", "content": "Bye."},
        {"role": "assistant", "content": "Bye!"},
    ]
    (every,), (last,) = (documents(tokens([chat], used, train_on=each)) for each in ("all", "last"))

    assert learned(used, every) == [f"안녕 {SMILE}<|im_end|>", "Bye!<|im_end|>"]
    assert learned(used, last) == ["Bye!<|im_end|>"]
    assert every[0] == last[0]


def test_pairs_are_counted_by_their_targets(tokens):
    used = tokenizer(unmarked(CHATML))
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    made = tokens([chat], used)
    batch = collate(made, [0], device=CPU)
    labels_BTK = align_labels(
        batch.ids_BT, document_BT=batch.document_BT, response_BT=batch.response_BT, n_future=4
    )

    # Two turns of two targets, "b" and its end; each has at least four tokens before it.
    assert documents(made)[0][1].count(True) == 4
    assert target_mask(labels_BTK).sum(dim=(0, 1)).tolist() == [4, 4, 4, 4]
    assert (batch.preceding_BT > 0).sum() == 4


def test_packed_chats_are_those_alone(tokens):
    made = tokens(CHATS[:3], tokenizer(unmarked(CHATML)))
    packed = collate_packed(made, [np.array([0, 1, 2])], device=CPU)
    alone = [collate(made, [i], device=CPU) for i in range(3)]

    assert torch.equal(packed.ids_BT[0], torch.cat([each.ids_BT[0] for each in alone]))
    assert torch.equal(packed.response_BT[0], torch.cat([each.response_BT[0] for each in alone]))


def test_a_weight_of_a_row_is_the_weight_of_its_targets(tokens):
    made = tokens(CHATS[:1], tokenizer(unmarked(CHATML)), weight=0.5)

    assert made.given_N.tolist() == [0.5 * each for each in made.target_N.tolist()]


@pytest.mark.parametrize("template", [marked(CHATML), unmarked(CHATML), marked(BRACKETS)])
def test_a_weight_of_a_message_is_the_weight_of_its_turn_and_of_the_end_of_the_turn(tokens, template):
    used = tokenizer(template, eos="</s>" if "INST" in template else "<|im_end|>")
    user = {"role": "user", "content": "a"}
    chat = [user, {"role": "assistant", "content": "b", "weight": 0.25}]
    chat += [user, {"role": "assistant", "content": "c"}, user]
    chat += [{"role": "assistant", "content": "d", "weight": 0}]

    made = tokens([chat], used, weight=2)
    ((ids, targets),) = documents(made)
    (last,) = (documents(tokens([chat], used, train_on="last")),)

    runs = [len(text) for text in ("b", "c", "d")]
    assert len(runs) == len(learned(used, (ids, targets)))
    count = targets.count(True) // 3
    assert made.given_N[targets].tolist() == [0.5] * count + [2.0] * count + [0.0] * count
    assert not made.given_N[~np.array(targets)].any()
    assert learned(used, last[0]) == learned(used, (ids, targets))[-1:]


def test_weights_of_messages_need_a_template_that_marks_each_once(tokens):
    template = marked(CHATML).replace("{{ m.content }}", "{{ m.content }}{% endgeneration %}{% generation %}")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]

    with pytest.raises(WmtpError, match="the chat template marks 2 turns for 1 messages of the assistant"):
        tokens([chat], tokenizer(template))


def test_tools_reach_the_template(tokens):
    used = tokenizer(unmarked(HEADERS))
    tool = {"type": "function", "function": {"name": "add"}}

    ((ids, _),) = documents(tokens(CHATS[:1], used, tools=(tool,)))

    assert '"add"' in used.decode(ids)


# ------------------------------------------------------------------ what cannot be right is refused


def test_a_template_that_drops_thoughts_is_found_and_the_last_turn_is_possible(tokens):
    used = tokenizer(THINKING)
    chat = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<think>easy</think>2"},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>hm</think>4"},
    ]

    with pytest.raises(WmtpError, match="example `c0`: the chat template changes message 2") as caught:
        tokens([chat], used)
    (last,) = documents(tokens([chat], used, train_on="last"))

    assert caught.value.hint.startswith('data.train_on = "last"')
    assert learned(used, last) == ["<think>hm</think>4<|im_end|>"]


def test_a_message_that_spells_a_control_token_is_refused(tokens):
    chat = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "a"}]

    with pytest.raises(
        WmtpError, match=re.escape("a message contains `<|im_end|>`, which is a control token")
    ):
        tokens([chat], tokenizer(unmarked(CHATML)))


def test_without_a_template_the_recipe_must_name_one(tokens):
    with pytest.raises(WmtpError, match="the tokenizer has no chat template") as caught:
        tokens(CHATS[:1], tokenizer(None))

    assert caught.value.hint == "give one in the recipe: `data.chat_template`"


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
            "message 1 has a `weight`, but only the assistant's are learned",
        ),
        (
            {"messages": [TURNS[0], {**TURNS[1], "weight": -0.5}]},
            "the `weight` -0.5 of message 2 is negative: `loss.negative_weights = true` allows it",
        ),
        (
            {"messages": TURNS, "weights": [[0, 1, 0.5]]},
            "`weights` is for rows of `core.jsonl`, not for chats",
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


# ------------------------------------------------------------------ a run


def test_a_trained_model_answers_turns_it_has_not_seen_and_stops(
    tmp_path, monkeypatch, install_plugin, capsys
):
    install_plugin("flat", FLAT_PLUGIN)
    monkeypatch.chdir(tmp_path)
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A: {{ m.content }}\n"
        "{% else %}U: {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
    )
    letters = "abcdefgh"
    rows = []
    for one in letters:
        for other in letters:
            turns = [("user", f"echo {one}"), ("assistant", f"{one} {SMILE}"), ("user", f"echo {other}")]
            turns += [("assistant", f"{other} {SMILE}")]
            rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("recipe.toml").write_text(
        'tracker = []\nrun.name = "x"\nweighting.use = "flat"\ndata.use = "core.chat"\n'
        'data.options.path = "chats.jsonl"\ndata.options.validation_share = 0.2\n'
        f"data.chat_template = {json.dumps(template)}\n"
        "model.n_future = 2\nmodel.micro = { hidden_size = 64, layers = 2, vocab_size = 300 }\n"
        "train = { steps = 120, batch_size = 16, learning_rate = 3e-3, validate_every = 60 }\n"
    )

    assert main(["run", "recipe.toml"]) == 0
    (folder,) = (file.parent for file in Path("storage/runs").rglob("run.json"))
    capsys.readouterr()
    for letter in "cg":
        prompt = f"U: echo a\nA: a {SMILE}\nU: echo {letter}\nA: "
        assert main(["generate", str(folder), "--prompt", prompt, "--max-new-tokens", "20"]) == 0
        assert capsys.readouterr().out.strip("\n") == f"{letter} {SMILE}"


FLAT_PLUGIN = """
    from attrs import frozen
    from weighted_mtp_core.api import Component, WeightingStrategy, Weights, hookimpl

    @frozen(kw_only=True)
    class Options:
        pass

    class Flat(WeightingStrategy):
        def weigh(self, view):
            return Weights(weight=view.response_BT.float())

    @hookimpl
    def wmtp_weighting_strategies():
        yield Component(
            name="flat", summary="Flat.", options=Options, build=lambda options, context: Flat(),
        )
"""
