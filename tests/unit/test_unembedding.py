"""Scale, soft-cap and bias of a model's logits hold in the loss, its gradients, decoding and export."""

import copy
import functools

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    GPTJConfig,
    GraniteConfig,
    PhiConfig,
)
from weighted_mtp_core.export.transformers import language_model
from weighted_mtp_core.generation.generate import generate
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.loss import normalisers, weighted_mtp_loss
from weighted_mtp_core.model.pair_predictions import PairPredictions
from weighted_mtp_core.model.targets import align_labels, target_mask

V = 60
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA_LIKE = {**SMALL, "num_key_value_heads": 1, "intermediate_size": 32, "pad_token_id": 0}
CONFIGS = {
    "granite": lambda: GraniteConfig(**LLAMA_LIKE, logits_scaling=4.0, embedding_multiplier=3.0),
    "cohere": lambda: CohereConfig(**LLAMA_LIKE, logit_scale=0.25),
    "cohere2": lambda: Cohere2Config(**LLAMA_LIKE, logit_scale=0.25),
    "gemma2": lambda: Gemma2Config(**LLAMA_LIKE, head_dim=8, final_logit_softcapping=3.0),
    "gptj": lambda: GPTJConfig(vocab_size=V, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_inner=32),
    "phi": lambda: PhiConfig(**LLAMA_LIKE, partial_rotary_factor=0.5),
}
every_family = pytest.mark.parametrize("family", CONFIGS)


@functools.cache
def made(family):
    """A base model, and a policy with linear heads made of its copy."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return base, make_policy(copy.deepcopy(base), n_future=1, head_kind="medusa").eval()


def batch():
    ids_BT = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(1))
    real_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    labels_BTK = align_labels(ids_BT, document_BT=torch.zeros_like(ids_BT), response_BT=real_BT, n_future=1)
    weight_BTK = torch.rand(labels_BTK.shape, generator=torch.Generator().manual_seed(2))
    return ids_BT, labels_BTK, weight_BTK * target_mask(labels_BTK)


@every_family
def test_the_loss_and_every_gradient_are_those_of_the_models_own_logits(family):
    base, policy = made(family)
    base, policy = copy.deepcopy(base), copy.deepcopy(policy)
    ids_BT, labels_BTK, weight_BTK = batch()
    normaliser_K = normalisers(weight_BTK, target_mask(labels_BTK), normalise="weights")

    ours = weighted_mtp_loss(
        policy,
        policy.trunk_states(ids_BT),
        labels_BTK=labels_BTK,
        weight_BTK=weight_BTK,
        normaliser_K=normaliser_K,
        head_share_K=torch.ones(1),
    )
    logits_BTV = base(input_ids=ids_BT).logits
    ce_BT = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].mT, ids_BT[:, 1:], reduction="none")
    theirs = (weight_BTK[:, :-1, 0] * ce_BT).sum() / normaliser_K[0]
    theirs.backward()

    torch.testing.assert_close(ours.loss, theirs.detach(), rtol=1e-5, atol=1e-6)
    gradients = {id(own): other.grad for own, other in zip(*both_parameters(policy, base), strict=True)}
    for parameter in policy.parameters():
        expected = gradients[id(parameter)]
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5)
    assert (policy.unembedding.bias is not None) == (family in {"gptj", "phi"})


def both_parameters(policy, base):
    """Return the parameters of body and unembedding in the same order, of the policy and of its base."""
    own = [*policy.trunk.parameters(), *policy.unembedding.parameters()]
    return own, [*base.base_model.parameters(), *base.get_output_embeddings().parameters()]


@every_family
def test_signals_are_read_from_the_models_own_logits(family):
    base, policy = made(family)
    ids_BT, labels_BTK, _ = batch()
    predictions = PairPredictions(policy, policy.trunk_states(ids_BT), labels_BTK)

    log_p = base(input_ids=ids_BT).logits[:, :-1].log_softmax(dim=-1)
    ce_BT = -log_p.gather(2, ids_BT[:, 1:, None])[..., 0]

    torch.testing.assert_close(predictions.losses()[:, :-1, 0], ce_BT)
    torch.testing.assert_close(predictions.entropies()[:, :-1, 0], -(log_p.exp() * log_p).sum(dim=-1))
    torch.testing.assert_close(predictions.sums().ce_sum_K[0], ce_BT.sum())


@every_family
def test_what_is_written_is_what_transformers_writes(family):
    base, policy = made(family)
    prompts = [[5, 9, 20], [7, 8, 30, 31, 12]]

    found = generate(policy, prompts, max_new_tokens=6, eos_id=V + 1)

    for prompt, tokens in zip(prompts, found.tokens, strict=True):
        whole = base.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert list(tokens) == whole[0, len(prompt) :].tolist()


@every_family
def test_an_export_holds_every_tensor_of_the_unembedding(family):
    base, policy = made(family)

    written = language_model(policy).state_dict()

    assert written.keys() == base.state_dict().keys()
    for name, tensor in base.state_dict().items():
        assert torch.equal(written[name], tensor)


def test_a_soft_cap_that_small_logits_do_not_show_is_found():
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(Gemma2Config(**LLAMA_LIKE, head_dim=8))  # initial logits: 0.1

    policy = make_policy(base, n_future=2, head_kind="medusa")

    assert policy.unembedding.soft_cap == 30.0


def test_an_option_that_a_family_does_not_read_is_not_applied():
    torch.manual_seed(0)
    config = CONFIGS["granite"]()
    config.final_logit_softcapping = 2.0

    policy = make_policy(AutoModelForCausalLM.from_config(config), n_future=2, head_kind="medusa")

    assert policy.unembedding.scale == 0.25
    assert policy.unembedding.soft_cap is None
