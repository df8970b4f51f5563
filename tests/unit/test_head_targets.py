"""Heads 2..K learn the distribution with which head 1 predicts the token that they draft."""

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import kl_div
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.api import Batch, WeightingStrategy, Weights
from weighted_mtp_core.data.batches import split_rows
from weighted_mtp_core.model import chunked_unembedding
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.loss import weighted_mtp_loss
from weighted_mtp_core.model.targets import align_labels, target_mask
from weighted_mtp_core.recipe.schema import LossTable
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.weighting_inputs import Weighting

V = 23
SMALL = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
BASES = {
    "llama": lambda tied: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied)),
    "capped": lambda tied: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, tie_word_embeddings=tied, final_logit_softcapping=2.0)
    ),
}
HEADS = {
    "parallel": {"head_kind": "parallel"},
    "medusa": {"head_kind": "medusa"},
    "sequential": {"head_kind": "sequential"},
    "sequential for vllm": {"head_kind": "sequential", "shared": True, "serve": "vllm"},
}


@functools.cache
def policy(base="llama", head="parallel", *, n_future=3, tied=False):
    """Return a small policy whose heads differ from each other."""
    torch.manual_seed(0)
    made = make_policy(BASES[base](tied), n_future=n_future, **HEADS[head])
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.train()


def documents(seed, *, rows=2, length=8):
    """Rows of packed documents, of which some tokens are targets."""
    generator = torch.Generator().manual_seed(seed)
    starts_BT = torch.rand(rows, length, generator=generator) < 0.25
    starts_BT[:, 0] = True
    document_BT = starts_BT.cumsum(dim=1) - 1
    place_BT = torch.arange(length).expand(rows, length)
    first_BT = place_BT.where(starts_BT, 0).cummax(dim=1).values
    return Batch(
        ids_BT=torch.randint(0, V, (rows, length), generator=generator),
        document_BT=document_BT,
        response_BT=torch.rand(rows, length, generator=generator) < 0.8,
        reward_BT=torch.zeros(rows, length),
        group_BT=document_BT,
        position_BT=place_BT - first_BT,
    )


def case(seed, n_future, **shape):
    """Return a batch, and the loss's arguments with uneven weights, normalisers and shares."""
    batch = documents(seed, **shape)
    generator = torch.Generator().manual_seed(seed)
    labels_BTK = align_labels(
        batch.ids_BT, document_BT=batch.document_BT, response_BT=batch.response_BT, n_future=n_future
    )
    weight_BTK = torch.rand(labels_BTK.shape, generator=generator).mul(3).where(target_mask(labels_BTK), 0.0)
    return batch, {
        "labels_BTK": labels_BTK,
        "weight_BTK": weight_BTK,
        "normaliser_K": 1 + torch.rand(n_future, generator=generator),
        "head_share_K": torch.arange(1.0, n_future + 1),
    }


def gradients(model):
    """Return every parameter's gradient, 0 for None."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def fused(model, batch, **arguments):
    model.zero_grad()
    hidden_BTH = model.trunk_states(batch.ids_BT, position_BT=batch.position_BT)
    result = weighted_mtp_loss(
        model, hidden_BTH, ids_BT=batch.ids_BT, position_BT=batch.position_BT, **arguments
    )
    return result, gradients(model)


def plain(model, batch, *, labels_BTK, weight_BTK, normaliser_K, head_share_K, heads, detach_trunk):
    """Return losses, cross-entropies and gradients by the formula, one pair at a time, by autograd."""
    model.zero_grad()
    hidden_BTH = model.trunk_states(batch.ids_BT, position_BT=batch.position_BT)
    states = model.each_head_states(
        hidden_BTH, ids_BT=batch.ids_BT, position_BT=batch.position_BT, detach=detach_trunk
    )
    fixed = copy.deepcopy(model.unembedding).requires_grad_(requires_grad=False)
    losses, ces, log_1_BTV = [], [], None
    for k, state_BTH in enumerate(states, start=1):
        unembedding = fixed if detach_trunk and k > 1 else model.unembedding
        log_BTV = unembedding(state_BTH).log_softmax(dim=-1)
        log_1_BTV = log_BTV.detach() if k == 1 else log_1_BTV
        loss, ce = 0 * log_BTV.sum(), torch.zeros(())
        for b, t in target_mask(labels_BTK[:, :, k - 1]).nonzero().tolist():
            of_label = -log_BTV[b, t, labels_BTK[b, t, k - 1]]
            of_head_1 = kl_div(log_BTV[b, t], log_1_BTV[b, t + k - 1], log_target=True, reduction="sum")
            learnt = {"labels": of_label, "kl": of_head_1, "both": (of_label + of_head_1) / 2}
            ce = ce + of_label.detach()
            loss = loss + weight_BTK[b, t, k - 1] * learnt["labels" if k == 1 else heads]
        losses.append(head_share_K[k - 1] / normaliser_K[k - 1] * loss)
        ces.append(ce)
    torch.stack(losses).sum().backward()
    return torch.stack(losses).detach(), torch.stack(ces), gradients(model)


POLICIES = st.tuples(st.sampled_from(list(BASES)), st.sampled_from(list(HEADS)), st.booleans())


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    kind=POLICIES,
    shape=st.tuples(st.integers(2, 4), st.integers(1, 9)),
    chunk=st.integers(1, 12),
    learns=st.fixed_dictionaries(
        {"heads": st.sampled_from(["labels", "kl", "both"]), "detach_trunk": st.booleans()}
    ),
)
def test_losses_and_every_gradient_are_those_of_the_formula(seed, kind, shape, chunk, learns):
    n_future, length = shape
    model = policy(*kind[:2], n_future=n_future, tied=kind[2])
    batch, arguments = case(seed, n_future, length=length)
    arguments |= learns
    loss_K, ce_K, expected = plain(model, batch, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_unembedding, "CHUNK", chunk)
        found, found_gradients = fused(model, batch, **arguments)

    torch.testing.assert_close(found.loss_K, loss_K, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.ce_sum_K, ce_K, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found_gradients, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("heads", ["kl", "both"])
def test_the_teacher_gets_no_gradient(heads):
    """Heads 2 and 3 alone have a share of the loss, and the trunk is detached."""
    model = policy()
    batch, arguments = case(1, 3)
    arguments |= {"head_share_K": torch.tensor([0.0, 1.0, 1.0]), "heads": heads, "detach_trunk": True}

    _, found = fused(model, batch, **arguments)

    for name, gradient in found.items():
        assert bool(gradient.any()) == name.startswith(("heads.1.", "heads.2.")), name


def test_a_head_that_predicts_what_head_1_will_predict_has_nothing_to_learn():
    """With an unembedding of zeros all predictions are uniform."""
    model = copy.deepcopy(policy())
    model.unembedding.weight = torch.nn.Parameter(torch.zeros(V, 16))
    batch, arguments = case(2, 3)
    arguments["head_share_K"] = torch.tensor([0.0, 1.0, 1.0])

    result, found = fused(model, batch, **arguments, heads="kl")

    torch.testing.assert_close(result.loss_K, torch.zeros(3), rtol=0, atol=1e-5)
    assert all(gradient.abs().max() < 1e-6 for gradient in found.values())


def test_a_frozen_policy_still_measures_the_divergence():
    model = policy()
    batch, arguments = case(3, 3)
    learnt, _ = fused(model, batch, **arguments, heads="kl")

    with torch.no_grad():
        hidden_BTH = model.trunk_states(batch.ids_BT, position_BT=batch.position_BT)
    frozen = copy.deepcopy(model).requires_grad_(requires_grad=False)
    measured = weighted_mtp_loss(frozen, hidden_BTH, position_BT=batch.position_BT, **arguments, heads="kl")

    torch.testing.assert_close(measured.loss_K, learnt.loss_K)


# ------------------------------------------------------------------ a step


class Fixed(WeightingStrategy):
    """Uneven weights that depend on the token alone."""

    def weigh(self, view):
        return Weights(weight=(0.1 + view.ids_BT % 5).where(view.response_BT, 0.0))


def learnt(model, batch, *, heads, accumulation=1, dtype=torch.float32):
    """Return the loss of one step on a data set of this batch alone, every gradient, and the learner."""
    model.zero_grad()
    labels_BTK = align_labels(
        batch.ids_BT, document_BT=batch.document_BT, response_BT=batch.response_BT, n_future=model.n_future
    )
    learner = PolicyLearner(
        policy=model,
        weighting=Weighting(strategy=Fixed(), needs=frozenset(), critic=None, label="fixed"),
        loss=LossTable(heads=heads),
        steps=100,
        pairs_per_step=target_mask(labels_BTK).sum(dim=(0, 1)).tolist(),
        accumulation=accumulation,
        autocast=lambda: torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32),
        validation=lambda: [batch],
        best=None,
    )
    loss = learner.learn(batch, step=0).loss
    return float(loss), gradients(model), learner


@pytest.mark.parametrize("heads", ["kl", "both"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("accumulation", [2, 4])
def test_parts_of_a_batch_add_up_to_the_whole(head, heads, accumulation):
    model, batch = policy(head=head), documents(4, rows=4, length=12)

    loss, whole, _ = learnt(model, batch, heads=heads)
    found, parts, _ = learnt(model, batch, heads=heads, accumulation=accumulation)

    assert found == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_bf16_autocast_costs_no_more_than_bf16_rounding():
    batch = documents(4, rows=4, length=12)

    loss, gradients_of, _ = learnt(policy(), batch, heads="kl")
    found, in_bf16, _ = learnt(policy(), batch, heads="kl", dtype=torch.bfloat16)

    assert found == pytest.approx(loss, rel=0.02)
    for name, gradient in gradients_of.items():
        assert (in_bf16[name] - gradient).norm() < 0.08 * gradient.norm().clamp(min=1e-3), name


@pytest.mark.parametrize("head", HEADS)
def test_packed_documents_learn_as_they_do_alone(head):
    batch = documents(5, rows=3, length=12)
    ones_K = torch.ones(3)

    def summed(batches):
        total = {}
        for one in batches:
            labels_BTK = align_labels(
                one.ids_BT, document_BT=one.document_BT, response_BT=one.response_BT, n_future=3
            )
            arguments = {"labels_BTK": labels_BTK, "weight_BTK": None, "heads": "kl"}
            _, found = fused(policy(head=head), one, **arguments, normaliser_K=ones_K, head_share_K=ones_K)
            total = {name: gradient + total.get(name, 0) for name, gradient in found.items()}
        return total

    torch.testing.assert_close(summed([batch]), summed(apart(batch)), rtol=1e-3, atol=1e-4)


def apart(batch):
    """Yield each document of packed rows as a batch of its own."""
    for row in split_rows(batch, len(batch.ids_BT)):
        for document in row.document_BT.unique().tolist():
            (inside_N,) = (row.document_BT[0] == document).nonzero(as_tuple=True)
            names = ("ids_BT", "response_BT", "reward_BT", "group_BT", "position_BT")
            tensors = {name: getattr(row, name)[:, inside_N] for name in names}
            yield Batch(document_BT=torch.zeros_like(tensors["ids_BT"]), **tensors)


def test_validation_measures_cross_entropy_whatever_the_heads_learn():
    batch = documents(6, rows=3, length=12)

    _, _, by_labels = learnt(policy(), batch, heads="labels")
    _, _, by_kl = learnt(policy(), batch, heads="kl")

    assert by_kl.validate(step=0).metrics == by_labels.validate(step=0).metrics
    assert "train_ce_head_2" in by_kl.learn(batch, step=0).metrics()


def test_heads_that_learn_from_head_1_are_confirmed_more_often():
    """The text is random, so labels teach nothing about what head 1 will choose."""
    batch = documents(7, rows=16, length=24)
    model = copy.deepcopy(policy())
    model.freeze_base()
    _, _, learner = learnt(model, batch, heads="kl")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    before = learner.validate(step=0).metrics

    for step in range(60):
        optimiser.step()
        optimiser.zero_grad()
        learner.learn(batch, step=step)

    after = learner.validate(step=60).metrics
    assert after["validation_acceptance_head_2"] > before["validation_acceptance_head_2"] + 0.2
    assert after["validation_acceptance_length"] > before["validation_acceptance_length"] + 0.2
