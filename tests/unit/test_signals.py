"""A weighting gets the policy signals that it declares, for the whole batch, and no others."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.api import Batch, Critic, Scores, Signal, WeightingStrategy, Weights
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.pair_predictions import PairPredictions
from weighted_mtp_core.model.targets import align_labels
from weighted_mtp_core.recipe.schema import LossTable
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.weighting_inputs import Weighting

FIELDS = {
    Signal.TOKEN_LOSS: ("token_loss_BTK", PairPredictions.losses),
    Signal.TOKEN_ENTROPY: ("token_entropy_BTK", PairPredictions.entropies),
}


class Remembering(WeightingStrategy):
    """Gives equal weights and keeps the view."""

    def weigh(self, view):
        self.view = view
        return Weights(weight=view.response_BT.float())


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return make_policy(LlamaForCausalLM(config), n_future=2, head_kind="medusa")


@pytest.fixture(scope="module")
def batch():
    ids_BT = torch.arange(4 * 6).view(4, 6) % 19
    response_BT = (torch.arange(6) >= 2).expand(4, 6)
    zeros = torch.zeros(4, 6, dtype=torch.long)
    return Batch(
        ids_BT=ids_BT,
        document_BT=zeros,
        response_BT=response_BT,
        reward_BT=response_BT.float(),
        group_BT=zeros,
        example_ids=("a", "b", "c", "d"),
    )


def learner_of(policy, weighting, needs, *, accumulation, critic=None):
    return PolicyLearner(
        policy=policy,
        weighting=Weighting(strategy=weighting, needs=frozenset(needs), critic=critic, label="`remembering`"),
        loss=LossTable(),
        steps=21,
        pairs_per_step=(16.0,) * policy.n_future,
        accumulation=accumulation,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        validation=list,
        best=None,
    )


def seen(policy, batch, needs, *, accumulation, critic=None):
    weighting = Remembering()
    learner_of(policy, weighting, needs, accumulation=accumulation, critic=critic).learn(batch, step=0)
    return weighting.view


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("needs", [set(), {Signal.TOKEN_LOSS}, {Signal.TOKEN_ENTROPY}, set(FIELDS)])
def test_the_view_holds_the_declared_signals(policy, batch, needs, accumulation):
    view = seen(policy, batch, needs, accumulation=accumulation)

    for signal, (field, compute) in FIELDS.items():
        if signal not in needs:
            assert getattr(view, field) is None
            continue
        labels_BTK = align_labels(
            batch.ids_BT, document_BT=batch.document_BT, response_BT=batch.response_BT, n_future=2
        )
        with torch.no_grad():
            expected_BTK = compute(PairPredictions(policy, policy.trunk_states(batch.ids_BT), labels_BTK))
        torch.testing.assert_close(getattr(view, field), expected_BTK)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_weights_for_the_report_use_the_same_signals_without_training(policy, batch, accumulation):
    weighting = Remembering()

    weights = learner_of(policy, weighting, FIELDS, accumulation=accumulation).weigh(batch, step=7)

    assert torch.equal(weights.weight, batch.response_BT.float())
    assert (weighting.view.step, weighting.view.training) == (7, False)
    learnt_from = seen(policy, batch, FIELDS, accumulation=accumulation)
    torch.testing.assert_close(weighting.view.token_loss_BTK, learnt_from.token_loss_BTK)


class Scoring(Critic):
    """Gives the same number to every token, as the signals that it provides."""

    reads_policy = False

    def __init__(self, **scores):
        self.scores = scores

    def score(self, batch, hidden_BTH):
        return Scores(**{name: torch.full(batch.ids_BT.shape, value) for name, value in self.scores.items()})


@pytest.mark.parametrize(
    ("critic", "expected"),
    [
        (Scoring(value_BT=0.25), math.log(0.25)),
        (Scoring(value_BT=0.0), -math.inf),
        (Scoring(log_value_BT=-200.0), -200.0),
        (Scoring(value_BT=0.25, log_value_BT=-200.0), -200.0),
    ],
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_logarithm_of_a_value_comes_from_the_critic_or_from_its_value(
    policy, batch, critic, expected, accumulation
):
    view = seen(policy, batch, {Signal.LOG_VALUE}, accumulation=accumulation, critic=critic)

    torch.testing.assert_close(view.log_value_BT, torch.full(batch.ids_BT.shape, expected))
    assert view.value_BT is None
