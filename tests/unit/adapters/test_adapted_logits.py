"""New adapters change no logit, and merged adapters give the same logits as before the merge."""

import pytest
import torch
from adapted_policies import HEADS, OPTIONS, adapted, all_logits, batch_of, new_policy
from weighted_mtp_core.model.adapters import merge_adapters
from weighted_mtp_core.model.trunk import frozen_trunk, trainable_trunk

COMBINATIONS = [
    (head, options) for head in HEADS for options in OPTIONS if (head, options) != ("medusa", "adapted")
]


@pytest.mark.parametrize(("head", "options"), COMBINATIONS)
def test_new_adapters_change_no_logit(head, options):
    expected = all_logits(new_policy(head=head), batch_of(0).ids_BT)

    found = all_logits(adapted(head=head, options=OPTIONS[options]), batch_of(0).ids_BT)

    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "head", "options"),
    [("llama", *each) for each in COMBINATIONS] + [("gpt2", "parallel", "plain"), ("tied", "medusa", "dora")],
)
def test_merged_adapters_give_the_same_logits(name, head, options):
    policy = adapted(name, head=head, options=OPTIONS[options], moved=True)
    expected = all_logits(policy, batch_of(0).ids_BT)

    merge_adapters(policy)

    assert {*policy.state_dict()} == {*new_policy(name, head=head).state_dict()}
    assert float((all_logits(policy, batch_of(0).ids_BT) - expected).abs().max()) <= 1e-5


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16", "nf4"])
def test_a_critic_of_its_own_gets_a_float32_copy_of_the_trunk_with_merged_adapters(base_dtype):
    policy = adapted(base_dtype=base_dtype, moved=True)
    ids_BT = batch_of(0).ids_BT

    trunk = trainable_trunk(policy, None, storage=None, tokenizer=None)

    assert not any("lora" in name for name, _ in trunk.named_parameters())
    assert all(each.requires_grad and each.dtype == torch.float32 for each in trunk.parameters())
    expected = policy.eval().trunk_states(ids_BT)
    torch.testing.assert_close(trunk.body(input_ids=ids_BT).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(frozen_trunk(policy)(batch_of(0)), expected)
