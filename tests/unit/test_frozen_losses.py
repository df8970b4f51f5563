"""The losses of a frozen copy of the policy are those of its ordinary language model, and never change."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.checkpointing.best_model import load_model, save_model
from weighted_mtp_core.model.frozen_losses import frozen_losses
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.testing.documents import APART


def language_model(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def policy(seed, head_kind="parallel"):
    return make_policy(language_model(seed), n_future=3, head_kind=head_kind)


def expected_losses(base, batch):
    """The loss of each response token that follows another token, from transformers' own logits."""
    with torch.no_grad():
        log_p_BTV = base(input_ids=batch.ids_BT).logits.log_softmax(dim=-1)
    loss_BT = torch.zeros(batch.ids_BT.shape)
    for b, t in batch.response_BT.nonzero().tolist():
        if t > 0:
            loss_BT[b, t] = -log_p_BTV[b, t - 1, batch.ids_BT[b, t]]
    return loss_BT


@pytest.mark.parametrize("head_kind", ["parallel", "medusa", "sequential"])
def test_the_losses_are_those_of_the_base_model(head_kind):
    batch = APART.batch()

    losses = frozen_losses(policy(0, head_kind), None, load=load_model)

    torch.testing.assert_close(losses(batch), expected_losses(language_model(0), batch), rtol=1e-4, atol=1e-5)


def test_training_the_policy_changes_nothing():
    learning = policy(0)
    losses = frozen_losses(learning, None, load=load_model)
    before = losses(APART.batch())

    with torch.no_grad():
        for parameter in learning.parameters():
            parameter.add_(1.0)

    assert torch.equal(losses(APART.batch()), before)
    assert not losses(APART.batch()).requires_grad


def test_a_checkpoint_gives_the_losses_of_the_run_that_wrote_it(tmp_path):
    save_model(policy(1), tmp_path / "best_model.pt")

    losses = frozen_losses(policy(0), tmp_path / "best_model.pt", load=load_model)

    expected_BT = expected_losses(language_model(1), APART.batch())
    torch.testing.assert_close(losses(APART.batch()), expected_BT, rtol=1e-4, atol=1e-5)


def test_the_policy_keeps_its_heads():
    learning = policy(0)

    frozen_losses(learning, None, load=load_model)

    assert len(learning.heads) == learning.n_future == 3
    assert all(parameter.requires_grad for parameter in learning.parameters())
