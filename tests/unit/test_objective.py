"""The normaliser of stage 2: the steps of an epoch add up to one objective, that of the whole data set."""

import copy
from types import SimpleNamespace

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.api import Critic, CriticLoss, WeightingStrategy, Weights
from weighted_mtp_core.api.tensors import align_weights
from weighted_mtp_core.data.batches import StepBatches, collate
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.targets import batch_labels, target_mask
from weighted_mtp_core.recipe.schema import DataTable, LossTable, TrainTable
from weighted_mtp_core.runtime.device import Compute
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS
from weighted_mtp_core.training.critic_learner import CriticLearner
from weighted_mtp_core.training.objective import Normaliser
from weighted_mtp_core.training.optimisers import clip_gradients
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.weighting_inputs import Weighting

V, K = 13, 3
CPU = torch.device("cpu")
SHARES = torch.tensor([0.5, 0.25, 0.25])
PACKINGS = {"none": 4, "documents": 2}  # rows of a batch


def token_set():
    """Documents of different lengths: the prompts of some are longer than K, some have only K targets."""
    generator = np.random.default_rng(0)
    prompt_D, response_D = generator.integers(0, 6, size=18), 2 + generator.geometric(0.15, size=18)
    length_D = prompt_D + response_D
    return TokenSet(
        ids_N=generator.integers(V, size=length_D.sum()).astype(np.uint16),
        start_D1=np.concatenate([[0], np.cumsum(length_D)]),
        prompt_D=prompt_D.astype(np.int32),
        reward_D=np.ones(18, dtype=np.float32),
        problem_D=np.arange(18),
        example_ids=[str(d) for d in range(18)],
    )


TOKENS = token_set()


def chats():
    """The same documents; every third token after the prompt is no target, like other turns of a chat."""
    position_N = np.concatenate([np.arange(length) for length in TOKENS.length_D])
    after_N = position_N - np.repeat(TOKENS.prompt_D, TOKENS.length_D)
    return attrs.evolve(TOKENS, target_N=(after_N >= 0) & (after_N % 3 != 1))


def batches_of(packing, tokens=TOKENS):
    table = DataTable(use="documents", packing=packing, max_tokens=64, pack_tokens=64)
    return StepBatches(tokens, table, batch_size=PACKINGS[packing], seed=0, device=CPU)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    made = make_policy(LlamaForCausalLM(config), n_future=K, head_kind="parallel")
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


class ByToken(WeightingStrategy):
    """Uneven weights that depend on the token alone, times a factor that a test may change."""

    def __init__(self, spread=4, factor=1.0):
        self.spread, self.factor = spread, factor

    def weigh(self, view):
        weight_BT = self.factor * (1.0 + view.ids_BT % self.spread)
        return Weights(weight=weight_BT.where(view.response_BT, 0.0))


def learner(model, batches, weighting, *, normalise="weights", accumulation=1):
    return PolicyLearner(
        policy=copy.deepcopy(model),
        weighting=Weighting(strategy=weighting, needs=frozenset(), critic=None, label="by token"),
        loss=LossTable(head_weights=tuple(SHARES.tolist()), normalise=normalise),
        steps=20,
        pairs_per_step=batches.pairs_per_step(K),
        accumulation=accumulation,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        validation=list,
        best=None,
    )


def gradient(training, batch, *, step):
    """Return the gradient of one step, flat."""
    training.policy.zero_grad()
    training.learn(batch, step=step)
    return flat(training.policy)


def flat(policy):
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def sums(model, batch, weighting):
    """Return by head, `[K]`: the weighted sum of losses with its graph, the sum of weights, pair counts."""
    labels_BTK = batch_labels(batch, K)
    target_BTK = target_mask(labels_BTK)
    weight_BT = weighting.factor * (1.0 + batch.ids_BT % weighting.spread)
    weight_BTK = align_weights(weight_BT.where(batch.response_BT, 0.0), target_BTK)
    hidden_BTH = model.trunk_states(batch.ids_BT)
    logits_BTKV = torch.stack([model.logits(k, hidden_BTH) for k in range(1, K + 1)], dim=2)
    log_BTKV = logits_BTKV.log_softmax(dim=-1)
    loss_BTK = -log_BTKV.gather(3, labels_BTK.clamp(min=0)[..., None])[..., 0].where(target_BTK, 0.0)
    return (weight_BTK * loss_BTK).sum(dim=(0, 1)), weight_BTK.sum(dim=(0, 1)), target_BTK.sum(dim=(0, 1))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("normalise", ["weights", "tokens"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_the_mean_gradient_of_an_epoch_is_that_of_all_documents_one_by_one(
    model, packing, normalise, accumulation
):
    batches, weighting = batches_of(packing), ByToken(spread=1)
    whole = copy.deepcopy(model)
    loss_K, count_K = 0, 0
    for document in range(len(TOKENS)):
        each_K, _, pairs_K = sums(whole, collate(TOKENS, [document], device=CPU), weighting)
        loss_K, count_K = loss_K + each_K, count_K + pairs_K
    (SHARES * loss_K / count_K).sum().backward()
    training = learner(model, batches, weighting, normalise=normalise, accumulation=accumulation)
    steps = 1 + int(batches.first_steps().max())

    mean = sum(gradient(training, batches(step), step=step) for step in range(steps)) / steps

    torch.testing.assert_close(mean, flat(whole), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("packing", PACKINGS)
def test_uneven_weights_are_divided_by_their_mean_so_far(model, packing):
    batches, weighting = batches_of(packing), ByToken()
    training = learner(model, batches, weighting)
    weights_K, count_K = 0, 0
    for step in range(7):
        naive = copy.deepcopy(model)
        loss_K, weight_K, pairs_K = sums(naive, unpacked(batches, step), weighting)
        weights_K, count_K = weights_K + weight_K, count_K + pairs_K
        usual_K = torch.tensor(batches.pairs_per_step(K)) * weights_K / count_K
        (SHARES * loss_K / usual_K).sum().backward()

        found = gradient(training, batches(step), step=step)

        torch.testing.assert_close(found, flat(naive), rtol=1e-4, atol=1e-6)


def unpacked(batches, step):
    """Return the documents of a batch, one a row."""
    documents = [int(each) for name in batches(step).example_ids for each in name.split(" + ")]
    return collate(TOKENS, documents, device=CPU)


def test_the_reported_loss_is_the_batchs_own_weighted_mean(model):
    batches, weighting = batches_of("none"), ByToken()
    training = learner(model, batches, weighting)
    for step in range(4):
        loss_K, weight_K, _ = sums(model, batches(step), weighting)

        found = training.learn(batches(step), step=step).loss

        assert float(found) == pytest.approx(float((SHARES * loss_K.detach() / weight_K).sum()), rel=1e-5)


@pytest.mark.parametrize("normalise", ["weights", "tokens"])
def test_half_the_weights_in_one_batch_give_half_its_gradient(model, normalise):
    batches, weighting = batches_of("none"), ByToken(spread=1)
    batch = batches(0)
    usual, halved = (learner(model, batches, weighting, normalise=normalise) for _ in range(2))
    for step in range(9):
        whole = gradient(usual, batch, step=step), gradient(halved, batch, step=step)
    assert torch.equal(*whole)

    weighting.factor = 0.5
    found = gradient(halved, batch, step=9)

    mean = 9.5 / 10 if normalise == "weights" else 1  # the halved batch is one of ten in the mean
    torch.testing.assert_close(found, whole[0] * 0.5 / mean, rtol=1e-5, atol=1e-7)


def test_weights_of_both_signs_are_divided_by_the_mean_of_their_absolute_values():
    normaliser = Normaliser.make([4.0], "weights", device=CPU)
    target_BTK = torch.ones(1, 4, 1, dtype=torch.bool)

    # 4 pairs a step: mean |w| is 1 after the first step, and (4 + 2) / 8 after the second step, whose weights
    # sum to 0.
    first = normaliser.add(torch.tensor([1.0, -2.0, 1.0, 0.0]).view(1, 4, 1), target_BTK)
    second = normaliser.add(torch.tensor([-1.0, 0.0, 0.0, 1.0]).view(1, 4, 1), target_BTK)

    assert (first.tolist(), second.tolist()) == ([4.0], [3.0])


@given(st.floats(1e-3, 1e3), st.lists(st.lists(st.floats(0, 3), min_size=4, max_size=4), min_size=1))
def test_a_common_factor_of_all_weights_changes_nothing(factor, steps):
    plain, scaled = (Normaliser.make([4.0], "weights", device=CPU) for _ in range(2))
    target_BTK = torch.ones(1, 4, 1, dtype=torch.bool)
    for weights in steps:
        weight_BTK = torch.tensor(weights).view(1, 4, 1)
        expected = weight_BTK / plain.add(weight_BTK, target_BTK)

        found = factor * weight_BTK / scaled.add(factor * weight_BTK, target_BTK)

        if (weight_BTK == 0).logical_or(weight_BTK > 1e-30).all():
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_steps_whose_weights_are_all_0_have_no_gradient_and_lower_the_mean_weight(model):
    batches, weighting = batches_of("none"), ByToken(spread=1, factor=0.0)
    training, usual = (learner(model, batches, each) for each in (weighting, ByToken(spread=1)))
    for step in range(2):
        result = training.learn(batches(0), step=step)
        assert float(result.loss) == 0.0
    assert not flat(training.policy).any()

    weighting.factor = 1.0
    found = gradient(training, batches(0), step=2)

    torch.testing.assert_close(found, 3 * gradient(usual, batches(0), step=0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tokens", [TOKENS, chats()], ids=["responses", "chats"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_the_usual_number_of_pairs_is_that_of_an_epoch_over_its_steps(packing, tokens):
    batches = batches_of(packing, tokens)
    steps = 1 + int(batches.first_steps().max())
    targets = [target_mask(batch_labels(batches(step), K)) for step in range(steps)]
    total_K = sum(each.sum(dim=(0, 1)) for each in targets)

    assert batches.pairs_per_step(K) == pytest.approx((total_K / steps).tolist())


@pytest.mark.parametrize("tokens", [TOKENS, chats()], ids=["responses", "chats"])
def test_the_length_of_a_response_is_its_number_of_targets(tokens):
    response_BT = collate(tokens, range(len(tokens)), device=CPU).response_BT

    assert tokens.response_D.tolist() == response_BT.sum(dim=1).tolist()


def test_weights_before_a_change_to_their_normaliser_are_in_its_mean():
    before, after = (Normaliser.make([4.0], each, device=CPU) for each in ("tokens", "weights"))
    target_BTK = torch.ones(1, 4, 1, dtype=torch.bool)
    for _ in range(3):
        before.add(2.0 * target_BTK, target_BTK)

    after.load_state_dict(before.state_dict())

    assert after.add(2.0 * target_BTK, target_BTK).tolist() == [8.0]


def test_a_head_without_any_target_learns_nothing():
    normaliser = Normaliser.make([0.0], "tokens", device=CPU)
    none_BTK = torch.zeros(1, 4, 1)

    assert normaliser.add(none_BTK, none_BTK.bool()).tolist() == [1.0]


def test_a_restored_learner_goes_on_bit_for_bit(model):
    batches = batches_of("none")
    straight, first, second = (learner(model, batches, ByToken()) for _ in range(3))
    for step in range(3):
        gradient(straight, batches(step), step=step)
        gradient(first, batches(step), step=step)
    second.load_state_dict(first.state_dict())

    for step in range(3, 6):
        expected = gradient(straight, batches(step), step=step)

        assert torch.equal(gradient(second, batches(step), step=step), expected)


# ------------------------------------------------------------------ gradients that are too large


@pytest.mark.parametrize("size", [0.25, 1.0, 4.0])
def test_the_limit_of_a_gradient_grows_with_the_root_of_the_steps_size(size):
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([30.0, 40.0])

    norm = clip_gradients([parameter], 2.0, size=size)

    assert float(norm) == 50.0
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]) * 2.0 * size**0.5)


def test_the_size_of_a_step_is_its_share_of_the_usual_pairs(model):
    batches = batches_of("none")
    training = learner(model, batches, ByToken())
    usual_K = torch.tensor(batches.pairs_per_step(K))
    for step in range(4):
        pairs_K = target_mask(batch_labels(batches(step), K)).sum(dim=(0, 1))

        found = training.learn(batches(step), step=step).size

        torch.testing.assert_close(found, (pairs_K / usual_K).mean())


# ------------------------------------------------------------------ stage 1


class Fit(Critic):
    """Fits one number to the length of each response."""

    trainable, reads_policy = True, False

    def __init__(self):
        self.number = nn.Parameter(torch.zeros(()))

    def score(self, batch, hidden_BTH):
        raise AssertionError

    def parameters(self):
        return [self.number]

    def loss(self, batch, hidden_BTH):
        return CriticLoss(loss=(self.number - batch.response_BT.sum(dim=1)).square().mean())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_response_counts_alike_for_a_critic_also_in_a_batch_with_fewer_rows(accumulation):
    batches, critic = batches_of("none"), Fit()
    table = TrainTable(batch_size=4, accumulation=accumulation)
    prepared = SimpleNamespace(
        compute=Compute.resolve(device="cpu", dtype="float32"), plan=SimpleNamespace(critic_label="critic")
    )
    training = CriticLearner(
        critic=critic, prepared=prepared, table=table, distributed=SINGLE_PROCESS, best=None
    )
    steps = 1 + int(batches.first_steps().max())
    response_D = torch.tensor(TOKENS.length_D - TOKENS.prompt_D)
    rows = [len(batches(step).ids_BT) for step in range(steps)]

    losses = [float(training.learn(batches(step), step=step).loss) for step in range(steps)]

    assert sorted(set(rows)) != [4]
    assert float(critic.number.grad) == pytest.approx(float(-2 * response_D.sum() / 4))
    assert losses == pytest.approx(
        [float(batches(step).response_BT.sum(dim=1).float().square().mean()) for step in range(steps)]
    )
