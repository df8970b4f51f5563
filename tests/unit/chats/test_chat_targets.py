"""Which tokens of a chat are learned: the assistant's turns, each with its end."""

import copy

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.api import WmtpError
from weighted_mtp_core.data.batches import collate, collate_packed
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.loss import normalisers, weighted_mtp_loss
from weighted_mtp_core.model.targets import align_labels, batch_labels, target_mask

CPU = torch.device("cpu")
SMILE = "\N{SLIGHTLY SMILING FACE}"
FAMILIES = ["chatml", "headers", "brackets"]


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_those_of_transformers_token_by_token(chats, tokenizer, tokens, documents, family):
    used = tokenizer(family, marks=True)
    made = documents(chats, used)

    for messages, (ids, targets) in zip(chats, made, strict=True):
        expected = used.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        count = len(ids) - (family == "headers")  # in this family, the turn ends with another token than EOS
        assert ids[:count] == expected["input_ids"][:count]
        assert targets[:count] == [bool(each) for each in expected["assistant_masks"][:count]]
        assert ids[-1] == used.eos_token_id
        assert targets[-1]
        assert not any(expected["assistant_masks"][count:])


@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_without_marks_gives_the_same_masks(chats, tokenizer, documents, family, train_on):
    with_marks = documents(chats, tokenizer(family, marks=True), train_on=train_on)
    without = documents(chats, tokenizer(family), train_on=train_on)

    assert without == with_marks


def test_all_turns_or_the_last_with_their_ends_and_without_the_generation_prompt(
    tokenizer, tokens, documents, learned
):
    used = tokenizer("chatml")
    chat = [
        {"role": "user", "content": "안녕?"},
        {"role": "assistant", "content": f"안녕 {SMILE}"},
        {"role": "user", "content": "Bye."},
        {"role": "assistant", "content": "Bye!"},
    ]
    (every,), (last,) = (documents([chat], used, train_on=each) for each in ("all", "last"))

    assert learned(used, every) == [f"안녕 {SMILE}<|im_end|>", "Bye!<|im_end|>"]
    assert learned(used, last) == ["Bye!<|im_end|>"]
    assert every[0] == last[0]


@pytest.mark.parametrize(
    ("family", "pairs"),
    [
        # Two turns of two targets, "b" and its end; each target has at least four tokens before it.
        ("chatml", [4, 4, 4, 4]),
        # The same, and EOS after the last turn, whose end is another token.
        ("headers", [5, 5, 5, 5]),
        # Two turns of " b" in two tokens and EOS.
        ("brackets", [6, 6, 6, 6]),
    ],
)
def test_pairs_are_counted_by_their_targets(tokenizer, tokens, family, pairs):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    batch = collate(tokens([chat], tokenizer(family)), [0], device=CPU)
    labels_BTK = align_labels(
        batch.ids_BT, document_BT=batch.document_BT, response_BT=batch.response_BT, n_future=4
    )

    assert target_mask(labels_BTK).sum(dim=(0, 1)).tolist() == pairs
    assert (batch.preceding_BT > 0).sum() == pairs[0]


def test_a_source_in_a_users_message_may_predict_the_first_tokens_of_the_answer(tokenizer, tokens):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    batch = collate(tokens([chat], tokenizer("chatml")), [0], device=CPU)
    target_TK = target_mask(batch_labels(batch, 8))[0]
    first = int(batch.response_BT[0].int().argmax())

    # Head k predicts the answer's first token from k tokens before it, down to the start of the chat.
    assert [bool(target_TK[first - k, k - 1]) for k in range(1, 9)] == [k <= first for k in range(1, 9)]
    assert first > 4


def test_packed_chats_have_the_loss_and_the_gradient_of_chats_alone(chats, tokenizer, tokens):
    used = tokenizer("chatml")
    made = tokens(chats[9:12], used)
    packed = collate_packed(made, [np.array([0, 1, 2])], device=CPU)
    alone = collate(made, [0, 1, 2], device=CPU)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(used),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )

    def learn(batch):
        torch.manual_seed(1)
        policy = make_policy(copy.deepcopy(model), n_future=3, head_kind="parallel")
        policy.zero_grad()
        labels_BTK = batch_labels(batch, 3)
        found = weighted_mtp_loss(
            policy,
            policy.trunk_states(batch.ids_BT, position_BT=batch.position_BT),
            labels_BTK=labels_BTK,
            weight_BTK=None,
            normaliser_K=normalisers(
                target_mask(labels_BTK).float(), target_mask(labels_BTK), normalise="tokens"
            ),
            head_share_K=torch.full((3,), 1 / 3),
            position_BT=batch.position_BT,
        )
        return found, [each.grad.clone() for each in policy.parameters()]

    (one, one_gradients), (other, other_gradients) = learn(alone), learn(packed)

    assert torch.equal(one.count_K, other.count_K)
    torch.testing.assert_close(one.loss_K, other.loss_K)
    for left, right in zip(one_gradients, other_gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    packed_ids = packed.ids_BT[0].tolist()
    assert packed_ids == [
        each for row in range(3) for each in collate(made, [row], device=CPU).ids_BT[0].tolist()
    ]


def test_tools_reach_the_template(chats, tokenizer, documents):
    used = tokenizer("headers")
    tool = {"type": "function", "function": {"name": "add"}}

    ((ids, _),) = documents(chats[:1], used, tools=(tool,))

    assert '"add"' in used.decode(ids)


# ------------------------------------------------------------------ what cannot be right is refused


def test_a_template_that_drops_thoughts_is_found_and_the_last_turn_is_possible(
    tokenizer, tokens, documents, learned
):
    used = tokenizer("thinking")
    chat = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<think>easy</think>2"},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>hm</think>4"},
    ]

    with pytest.raises(WmtpError, match="example `c0`: the chat template changes message 2") as caught:
        tokens([chat], used)
    (last,) = documents([chat], used, train_on="last")

    assert caught.value.hint.startswith('data.train_on = "last"')
    assert learned(used, last) == ["<think>hm</think>4<|im_end|>"]


def test_blanks_that_a_template_strips_from_a_turn_are_not_learned(tokenizer, documents, learned):
    used = tokenizer("headers")
    chat = [
        {"role": "user", "content": " a "},
        {"role": "assistant", "content": " b \n"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d  "},
    ]
    (every,) = documents([chat], used)

    assert used.decode(every[0]).count("b<|eot|>") == 1
    assert learned(used, every) == ["b<|eot|>", "d<|eot|><|im_end|>"]


def test_a_template_that_moves_a_turn_to_another_place_is_refused(tokenizer, tokens):
    used = tokenizer("chatml")
    used.chat_template = used.chat_template.replace("for m in messages", "for m in messages | reverse")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2

    with pytest.raises(WmtpError, match="example `c0`: the chat template changes message 2"):
        tokens([chat], used)


def test_a_message_that_spells_a_control_token_is_refused(tokenizer, tokens):
    chat = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "a"}]

    with pytest.raises(WmtpError, match=r"a message contains `<\|im_end\|>`, which is a control token"):
        tokens([chat], tokenizer("chatml"))


@pytest.mark.parametrize("template", ["{{ raise_exception('no tools') }}", "{% for %}"])
def test_a_template_that_refuses_a_chat_or_is_not_valid_is_named_with_the_example(
    chats, tokenizer, tokens, template
):
    used = tokenizer("chatml")
    used.chat_template = template

    with pytest.raises(WmtpError, match=r"example `c0`: the chat template cannot render the messages \("):
        tokens(chats[:1], used)


def test_without_a_template_the_recipe_must_name_one(chats, tokenizer, tokens):
    with pytest.raises(WmtpError, match="the tokenizer has no chat template") as caught:
        tokens(chats[:1], tokenizer(None))

    assert caught.value.hint == "give one in the recipe: `data.chat_template`"
