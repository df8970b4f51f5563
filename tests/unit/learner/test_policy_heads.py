"""Heads learn by their shares, also on a detached or frozen trunk, and validation measures each head."""

import hashlib
import math

import pytest
import torch
from attrs import evolve
from small_policy import (
    BASES,
    HEADS,
    ByLoss,
    Fixed,
    Uniform,
    close,
    labels_of,
    learner,
    learnt,
    pairs_of,
    policy,
)
from weighted_mtp_core.api import Batch
from weighted_mtp_core.data.batches import split_rows
from weighted_mtp_core.model.pair_predictions import PairPredictions
from weighted_mtp_core.model.targets import target_mask
from weighted_mtp_core.recipe.schema import LossTable, TrainTable
from weighted_mtp_core.training.optimisers import make_optimisers

LATER = ("heads.1.", "heads.2.")
"""Prefixes of the names of the parameters of heads 2 and 3."""


# ------------------------------------------------------------------ shares and detached heads


def test_the_shares_follow_the_step(batch):
    forward = LossTable(head_schedule="forward", head_schedule_end=1.0)
    first = learnt(policy(), batch, Fixed(), loss=forward)
    alone = learnt(policy(), batch, Fixed(), loss=LossTable(head_weights=(1.0, 0.0, 0.0)))
    model = policy()
    learner(model, Fixed(), loss=forward, pairs_per_step=pairs_of(model, batch)).learn(batch, step=99)
    last = {name: p.grad for name, p in model.named_parameters()}

    close(first, alone, rtol=0, atol=0)
    torch.testing.assert_close(last, learnt(policy(), batch, Fixed())[1], rtol=0, atol=0)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", BASES)
def test_detached_heads_learn_and_leave_everything_else_to_head_1(batch, name, head):
    shared = LossTable(head_weights=(1.0, 1.0, 2.0))
    _, together = learnt(policy(name, head=head), batch, Fixed(), loss=shared)
    _, detached = learnt(policy(name, head=head), batch, Fixed(), loss=evolve(shared, detach_trunk=True))
    _, head_1 = learnt(policy(name, head=head), batch, Fixed(), loss=LossTable(head_weights=(1.0, 0.0, 0.0)))

    for parameter, gradient in detached.items():
        if parameter.startswith(LATER):
            assert torch.equal(gradient, together[parameter]), parameter
        else:
            torch.testing.assert_close(gradient, head_1[parameter] / 4, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", BASES)
def test_detached_heads_alone_give_everything_else_a_gradient_of_exactly_0(batch, name, head):
    alone = LossTable(head_weights=(0.0, 1.0, 1.0), detach_trunk=True)

    _, gradients = learnt(policy(name, head=head), batch, Fixed(), loss=alone)

    for parameter, gradient in gradients.items():
        assert bool(gradient.any()) == parameter.startswith(LATER), parameter


# ------------------------------------------------------------------ training heads 2..K alone


def sha256(tensor):
    return hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", BASES)
def test_a_frozen_base_stays_bit_for_bit_what_it_is(batch, name, head, accumulation):
    model = policy(name, head=head)
    model.freeze_base()
    before = {each: sha256(tensor) for each, tensor in model.state_dict().items()}
    trained = learner(model, ByLoss(), accumulation=accumulation)
    (optimiser,) = make_optimisers(trained.parameters(), TrainTable(learning_rate=0.1, weight_decay=0.5))

    for step in range(3):
        trained.learn(batch, step=step)
        optimiser.step()
        optimiser.zero_grad()

    after = {each: sha256(tensor) for each, tensor in model.state_dict().items()}
    later = [parameter for each, parameter in model.named_parameters() if each.startswith(LATER)]
    assert {each for each in before if after[each] != before[each]} == {
        each for each, _ in model.named_parameters() if each.startswith(LATER)
    }
    assert {id(each) for each in optimiser.state} == {id(each) for each in later}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", BASES)
def test_heads_on_a_frozen_base_learn_as_detached_ones_do(batch, name, head):
    loss, expected = learnt(policy(name, head=head), batch, Fixed(), loss=LossTable(detach_trunk=True))
    frozen = policy(name, head=head)
    frozen.freeze_base()

    frozen_loss, found = learnt(frozen, batch, Fixed())

    assert frozen_loss == pytest.approx(loss, rel=1e-6)
    for parameter, gradient in found.items():
        if parameter.startswith(LATER):
            torch.testing.assert_close(gradient, expected[parameter], rtol=1e-5, atol=1e-6)
        else:
            assert gradient is None


def test_a_frozen_trunk_keeps_no_graph_and_drops_nothing_out(batch):
    model = policy()
    model.freeze_base()
    model.train()

    assert not model.trunk_states(batch.ids_BT).requires_grad
    assert {id(each) for each in model.modules() if each.training} == {
        id(each) for each in (model, model.unembedding, model.heads, *model.heads[1].modules())
    } | {id(each) for each in model.heads[2].modules()}


# ------------------------------------------------------------------ validation


def test_validation_averages_over_targets_not_over_batches(batch):
    model = policy()
    rows = list(split_rows(batch, 4))  # 10, 2, 6 and 3 response tokens
    with torch.no_grad():
        hidden_BTH = model.trunk_states(batch.ids_BT)
        labels_BTK = labels_of(model, batch)
        loss_BTK = PairPredictions(model, hidden_BTH, labels_BTK).losses()
        top_BTK = torch.stack([model.logits(k + 1, hidden_BTH).argmax(dim=-1) for k in range(3)], dim=2)
    count_K = target_mask(labels_BTK).sum(dim=(0, 1))
    ce_K = loss_BTK.sum(dim=(0, 1)) / count_K
    accuracy_K = (top_BTK == labels_BTK).sum(dim=(0, 1)) / count_K

    found = learner(model, Fixed(), validation=lambda: rows).validate(step=0)

    for k in range(3):
        assert found.metrics[f"validation_ce_head_{k + 1}"] == pytest.approx(float(ce_K[k]), rel=1e-5)
        assert found.metrics[f"validation_accuracy_head_{k + 1}"] == pytest.approx(float(accuracy_K[k]))
    assert found.score == pytest.approx(-float(ce_K[0]), rel=1e-5)


def test_a_head_without_targets_has_no_loss_instead_of_a_perfect_one():
    """A response of one token is a target of heads 1 and 2, and of no token three before it."""
    short = Batch(
        ids_BT=torch.tensor([[3, 4, 5]]),
        document_BT=torch.zeros(1, 3, dtype=torch.long),
        response_BT=torch.tensor([[False, False, True]]),
        reward_BT=torch.zeros(1, 3),
        group_BT=torch.zeros(1, 3, dtype=torch.long),
    )
    found = learner(policy(), Uniform(), validation=lambda: [short]).validate(step=0).metrics

    assert math.isfinite(found["validation_ce_head_2"])
    assert math.isnan(found["validation_ce_head_3"])
    assert math.isnan(found["validation_accuracy_head_3"])


@pytest.mark.parametrize(("select_by", "heads"), [("head_1", [1]), ("later_heads", [2, 3])])
def test_the_best_state_is_chosen_by_the_heads_that_select(batch, select_by, heads):
    found = learner(policy(), Fixed(), validation=lambda: [batch], select_by=select_by).validate(step=0)

    losses = [found.metrics[f"validation_ce_head_{k}"] for k in heads]
    assert found.score == pytest.approx(-sum(losses) / len(losses))


def test_a_head_without_targets_does_not_select():
    short = Batch(
        ids_BT=torch.tensor([[3, 4, 5]]),
        document_BT=torch.zeros(1, 3, dtype=torch.long),
        response_BT=torch.tensor([[False, True, True]]),
        reward_BT=torch.zeros(1, 3),
        group_BT=torch.zeros(1, 3, dtype=torch.long),
    )

    found = learner(policy(), Fixed(), validation=lambda: [short], select_by="later_heads").validate(step=0)

    assert math.isnan(found.metrics["validation_ce_head_3"])
    assert found.score == -found.metrics["validation_ce_head_2"]


def test_the_best_state_can_be_chosen_by_acceptance(batch):
    found = learner(policy(), Fixed(), validation=lambda: [batch], select_by="acceptance").validate(step=0)

    assert found.score == found.metrics["validation_acceptance_length"] >= 1
