"""The drafts that head 1 confirms on held-out text are those that decoding would accept."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.api import Batch
from weighted_mtp_core.generation.decoding import Decoder
from weighted_mtp_core.generation.draft_heads import DecodingHeads
from weighted_mtp_core.generation.generate import generate
from weighted_mtp_core.model import chunked_unembedding
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.recipe.train_table import default_selection
from weighted_mtp_core.training.head_quality import head_quality, selection_score

V = 4  # few tokens, so that heads often agree
KINDS = st.sampled_from(["parallel", "medusa", "sequential"])


@functools.cache
def small_policy(*, n_future, head_kind="parallel", scale=0.5):
    """Return a policy whose heads differ from each other."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    policy = make_policy(LlamaForCausalLM(config), n_future=n_future, head_kind=head_kind)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return policy


def texts(seed, *, rows=3, length=9):
    """Return rows of random documents with padding; some documents are chats with several answers."""
    generator = torch.Generator().manual_seed(seed)
    ends_BT = torch.rand(rows, length, generator=generator) < 0.2
    document_BT = ends_BT.cumsum(dim=1)
    padding_B1 = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
    inside_BT = torch.arange(length) < padding_B1
    return Batch(
        ids_BT=torch.randint(0, V, (rows, length), generator=generator),
        document_BT=document_BT.where(inside_BT, -1),
        response_BT=inside_BT & (torch.rand(rows, length, generator=generator) < 0.8),
        reward_BT=torch.zeros(rows, length),
        group_BT=torch.zeros(rows, length, dtype=torch.long),
    )


def measured(policy, *batches):
    return head_quality(
        policy, batches, split="validation", autocast=lambda: torch.autocast("cpu", enabled=False)
    )


def by_hand(policy, batch):
    """Return confirmed and counted drafts by head, and the accepted drafts of each pass."""
    policy.eval()
    with torch.no_grad():
        hidden_BTH = policy.trunk_states(batch.ids_BT)
        states = policy.each_head_states(hidden_BTH, ids_BT=batch.ids_BT, position_BT=None)
        choice_KBT = [policy.unembedding(state_BTH).argmax(dim=-1) for state_BTH in states]
    rows, length = batch.ids_BT.shape

    def counts(b, t, k):
        one_document = t + k < length and batch.document_BT[b, t + k] == batch.document_BT[b, t] >= 0
        return bool(one_document and batch.response_BT[b, t + k])

    def confirmed(b, t, k):
        return bool(choice_KBT[k - 1][b, t] == choice_KBT[0][b, t + k - 1])

    confirmed_K, count_K, passes = [0] * policy.n_future, [0] * policy.n_future, []
    for b in range(rows):
        for t in range(length):
            for k in range(1, policy.n_future + 1):
                if counts(b, t, k):
                    count_K[k - 1] += 1
                    confirmed_K[k - 1] += confirmed(b, t, k)
            if counts(b, t, 1) and counts(b, t, 2):
                accepted = 0
                while (k := accepted + 2) <= policy.n_future and counts(b, t, k) and confirmed(b, t, k):
                    accepted += 1
                passes.append(accepted)
    return confirmed_K, count_K, passes


@given(st.integers(0, 2**16), st.integers(2, 4), KINDS, st.integers(1, 9))
def test_acceptance_is_that_of_a_loop_over_pairs(seed, n_future, kind, chunk):
    policy = small_policy(n_future=n_future, head_kind=kind)
    batches = [texts(seed), texts(seed + 1, rows=1, length=5)]
    by_batch = [by_hand(policy, batch) for batch in batches]
    passes = [accepted for _, _, passes in by_batch for accepted in passes]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_unembedding, "CHUNK", chunk)
        found = measured(policy, *batches)

    for k in range(2, n_future + 1):
        confirmed, count = (sum(each[kind][k - 1] for each in by_batch) for kind in (0, 1))
        expected = confirmed / count if count else math.nan
        assert found[f"validation_acceptance_head_{k}"] == pytest.approx(expected, nan_ok=True)
    length = 1 + sum(passes) / len(passes) if passes else math.nan
    assert found["validation_acceptance_length"] == pytest.approx(length, nan_ok=True)


@given(st.integers(0, 2**16), st.integers(2, 4), st.sampled_from(["parallel", "medusa"]))
def test_on_text_of_the_policy_itself_each_pass_of_decoding_accepts_these_drafts(seed, n_future, kind):
    policy = small_policy(n_future=n_future, head_kind=kind)
    prompt = torch.randint(0, V, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    text = [*prompt, *generate(policy, [prompt], max_new_tokens=12, eos_id=-1).tokens[0]]
    batch = Batch(
        ids_BT=torch.tensor([text]),
        document_BT=torch.zeros(1, len(text), dtype=torch.long),
        response_BT=torch.arange(len(text))[None] >= len(prompt),
        reward_BT=torch.zeros(1, len(text)),
        group_BT=torch.zeros(1, len(text), dtype=torch.long),
    )

    found = measured(policy, batch)

    accepted = []
    policy.eval()
    for length in range(len(prompt), len(text) - 1):  # after each prefix, head 1 chooses the next token
        heads = DecodingHeads.of(policy, drafts=n_future - 1)
        decoder = Decoder(heads=heads, temperature=0.0, generators=[torch.Generator()])
        with torch.inference_mode():
            decoder.start([text[:length]])
            (new,) = decoder.step()
        accepted.append(min(len(new) - 1, len(text) - length - 1))  # drafts after the end of the text
    assert found["validation_acceptance_length"] == pytest.approx(1 + sum(accepted) / len(accepted))


def test_heads_that_always_choose_the_same_token_are_always_confirmed():
    policy = small_policy(n_future=3, head_kind="medusa", scale=0.0)  # all logits are equal: always token 0

    found = measured(policy, texts(0))

    assert found["validation_acceptance_head_2"] == found["validation_acceptance_head_3"] == 1.0
    assert 2.0 <= found["validation_acceptance_length"] <= 3.0  # the third token may be outside the response


def test_a_single_head_drafts_nothing():
    assert not [name for name in measured(small_policy(n_future=1), texts(0)) if "acceptance" in name]


@pytest.mark.parametrize(
    ("train", "heads", "select_by"),
    [
        ("all", "kl", "head_1"),
        ("heads", "labels", "later_heads"),
        ("heads", "both", "later_heads"),
        ("heads", "kl", "acceptance"),
        ("heads", None, "later_heads"),
    ],
)
def test_what_is_trained_selects_the_state_to_keep(train, heads, select_by):
    assert default_selection(train, heads) == select_by


@pytest.mark.parametrize(
    ("select_by", "score"), [("head_1", -2.0), ("later_heads", -4.0), ("acceptance", 1.5)]
)
def test_the_score_is_that_of_what_selects(select_by, score):
    metrics = {f"validation_ce_head_{k}": loss for k, loss in ((1, 2.0), (2, 3.0), (3, 5.0))}

    assert selection_score(metrics | {"validation_acceptance_length": 1.5}, select_by) == score
