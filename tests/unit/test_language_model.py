"""The losses of a copy of the policy, frozen or trainable, are those of its ordinary language model."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from weighted_mtp_core.api import Stateful, WmtpError
from weighted_mtp_core.checkpointing.best_model import load_component, save_component, save_model
from weighted_mtp_core.model import language_model as module
from weighted_mtp_core.model.language_model import LanguageModel, frozen_losses, trainable_losses
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.testing.documents import APART, PACKED
from weighted_mtp_core.training.reference_models import VOCABULARY, load_reference, vocabulary_sha256

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def language_model(seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def tokenizer(first="<eos>"):
    vocabulary = {first: 0, **{f"w{i}": i for i in range(1, 32)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w1")), eos_token=first
    )


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

    losses = frozen_losses(LanguageModel.copy_of(policy(0, head_kind)))

    torch.testing.assert_close(losses(batch), expected_losses(language_model(0), batch), rtol=1e-4, atol=1e-5)


def test_training_the_policy_changes_nothing():
    learning = policy(0)
    losses = frozen_losses(LanguageModel.copy_of(learning))
    before = losses(APART.batch())

    with torch.no_grad():
        for parameter in learning.parameters():
            parameter.add_(1.0)

    assert torch.equal(losses(APART.batch()), before)
    assert not losses(APART.batch()).requires_grad


def test_a_checkpoint_gives_the_losses_of_the_run_that_wrote_it(tmp_path):
    save_model(policy(1), tmp_path / "best_model.pt")

    losses = frozen_losses(load_reference(tmp_path / "best_model.pt", policy(0), tokenizer=tokenizer()))

    expected_BT = expected_losses(language_model(1), APART.batch())
    torch.testing.assert_close(losses(APART.batch()), expected_BT, rtol=1e-4, atol=1e-5)


def test_the_policy_keeps_its_heads():
    learning = policy(0)

    frozen_losses(LanguageModel.copy_of(learning))

    assert len(learning.heads) == learning.n_future == 3
    assert all(parameter.requires_grad for parameter in learning.parameters())


def gradients(model):
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("chunks", [1, 5])
def test_the_gradient_of_trainable_losses_is_that_of_the_base_model(chunks, monkeypatch):
    batch, base = APART.batch(), language_model(0)
    row_N, column_N = batch.target_positions()
    size = -(-len(row_N) // chunks)
    monkeypatch.setattr(module, "_BUDGET", size * 4 * 32)
    model = trainable_losses(policy(0))

    loss_BT = model(batch)
    loss_BT.sum().backward()

    log_p_NV = base(input_ids=batch.ids_BT).logits.log_softmax(dim=-1)[row_N, column_N - 1]
    torch.nn.functional.nll_loss(log_p_NV, batch.ids_BT[row_N, column_N], reduction="sum").backward()
    torch.testing.assert_close(
        loss_BT.detach(), expected_losses(language_model(0), batch), rtol=1e-4, atol=1e-5
    )
    found = model.policy.trunk.embed_tokens.weight.grad
    torch.testing.assert_close(found, base.model.embed_tokens.weight.grad, rtol=1e-3, atol=1e-4)
    found = model.policy.unembedding.weight.grad
    torch.testing.assert_close(found, base.lm_head.weight.grad, rtol=1e-3, atol=1e-4)
    assert len(gradients(model)) == len(list(model.parameters()))


def test_trainable_losses_of_packed_documents_are_those_of_the_documents_alone():
    model = trainable_losses(policy(0))
    packed, apart = PACKED.batch(), APART.batch()

    for one, other in zip(PACKED.cut(model(packed)), APART.cut(model(apart)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_packed_documents_have_the_positions_of_the_documents_alone():
    packed = PACKED.batch()
    rows = [[(row[:t] == row[t]).sum() for t in range(len(row))] for row in packed.document_BT]

    assert torch.equal(packed.position_BT, torch.tensor(rows).where(packed.document_BT >= 0, 0))
    assert APART.batch().position_BT is None


@pytest.mark.parametrize("train", ["all", "heads"])
def test_every_parameter_of_trainable_losses_is_trained(train):
    learning = policy(0)
    if train == "heads":
        learning.freeze_base()

    assert all(each.requires_grad for each in trainable_losses(learning).parameters())


def run_of(model, folder, recorded):
    """A run folder with the weights of a policy."""
    (folder / "checkpoints").mkdir(parents=True)
    save_model(model, folder / "checkpoints" / "best_model.pt")
    (folder / "run.json").write_text(json.dumps({VOCABULARY: vocabulary_sha256(recorded)}))
    return folder


def test_a_run_folder_stands_for_the_best_policy_of_the_run(tmp_path):
    run = run_of(policy(1), tmp_path / "run", tokenizer())

    losses = frozen_losses(load_reference(run, policy(0), tokenizer=tokenizer()))

    expected_BT = expected_losses(language_model(1), APART.batch())
    torch.testing.assert_close(losses(APART.batch()), expected_BT, rtol=1e-4, atol=1e-5)


def test_a_transformers_directory_may_hold_a_model_of_another_shape(tmp_path):
    other = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "hidden_size": 8, "num_hidden_layers": 1})).eval()
    other.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)

    losses = frozen_losses(load_reference(tmp_path, policy(0), tokenizer=tokenizer()))

    torch.testing.assert_close(
        losses(APART.batch()), expected_losses(other, APART.batch()), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("what", ["run", "file", "directory"])
def test_a_model_of_another_tokenizer_is_refused(tmp_path, what):
    if what == "directory":
        language_model(1).save_pretrained(tmp_path)
        tokenizer("</s>").save_pretrained(tmp_path)
        path = tmp_path
    else:
        run = run_of(policy(1), tmp_path / "run", tokenizer("</s>"))
        path = run / "checkpoints" / "best_model.pt" if what == "file" else run

    with pytest.raises(WmtpError, match=r"the tokenizer of `.*` differs from the policy's"):
        load_reference(path, policy(0), tokenizer=tokenizer())


def test_a_component_may_save_tied_embeddings(tmp_path):
    """A tensor with two names is stored under both, and safetensors refuses tensors that share memory."""

    class Tied(Stateful):
        def __init__(self, value):
            shared = torch.full((3,), value)
            self.state = {"embedding": shared, "unembedding": shared}

        def state_dict(self):
            return self.state

        def load_state_dict(self, state):
            self.state = dict(state)

    save_component(Tied(2.0), tmp_path)
    loaded = Tied(0.0)
    load_component(loaded, tmp_path)

    assert {name: each.tolist() for name, each in loaded.state.items()} == {
        "embedding": [2.0] * 3,
        "unembedding": [2.0] * 3,
    }
