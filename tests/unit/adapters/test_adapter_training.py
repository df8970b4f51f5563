"""Training changes adapters and heads only, with exact gradients and without dropout in signals."""

import pytest
import torch
from adapted_policies import BASES, HEADS, OPTIONS, K, adapted, batch_of, digests, learner
from weighted_mtp_core.api import WeightingStrategy, Weights
from weighted_mtp_core.api.tensors import align_weights
from weighted_mtp_core.model.loss import weighted_mtp_loss
from weighted_mtp_core.model.targets import batch_labels, target_mask
from weighted_mtp_core.recipe.schema import AdaptersTable, LossTable, TrainTable
from weighted_mtp_core.training.optimisers import make_optimisers

LATER = ("heads.1.", "heads.2.")


class Watching(WeightingStrategy):
    """Keeps the token losses that it is given."""

    def __init__(self):
        self.seen = []

    def weigh(self, view):
        self.seen.append(view.token_loss_BTK)
        return Weights(weight=view.response_BT.float())


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(
    ("head", "options"), [("parallel", "plain"), ("sequential", "adapted"), ("medusa", "plain")]
)
def test_only_adapters_and_heads_get_gradients_and_optimiser_state(name, head, options):
    policy = adapted(name, head=head, options=OPTIONS[options])
    before = digests(policy)
    training = learner(policy)
    (optimiser,) = make_optimisers(training.parameters(), TrainTable(learning_rate=0.1, weight_decay=0.5))

    for step in range(3):
        training.learn(batch_of(step), step=step)
        assert all(each.grad is None for each in policy.parameters() if not each.requires_grad)
        optimiser.step()
        optimiser.zero_grad()

    after = digests(policy)
    changed = {name for name in before if after[name] != before[name]}
    trained = {name for name, each in policy.named_parameters() if each.requires_grad}
    assert changed == trained
    assert len(optimiser.state) == len(trained)
    assert any("trunk." in name for name in trained)
    assert all("lora_" in name or name.startswith(LATER) for name in trained)
    whole = {name for name in trained if "lora_" not in name}
    assert any("mlp" in name or "linear" in name or "fc1" in name for name in whole) == (options == "plain")
    if head != "medusa" and options == "adapted":
        assert any(name.startswith(LATER) for name in trained - whole)


def weighted_loss(policy, batch, labels_BTK, weight_BTK, share_K):
    """Return the loss from whole logits, in float64."""
    hidden_BTH = policy.trunk_states(batch.ids_BT)
    states = policy.each_head_states(hidden_BTH, ids_BT=batch.ids_BT, position_BT=None)
    total = torch.zeros((), dtype=torch.float64)
    for k, states_BTH in enumerate(states):
        logits_BVT = policy.unembedding(states_BTH).transpose(1, 2)
        ce_BT = torch.nn.functional.cross_entropy(
            logits_BVT, labels_BTK[:, :, k], ignore_index=-100, reduction="none"
        )
        total = total + share_K[k] * (weight_BTK[:, :, k] * ce_BT).sum()
    return total


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("options", ["plain", "rslora", "dora"])
def test_gradients_of_adapters_equal_finite_differences(head, options):
    policy = adapted("opt", head=head, options=OPTIONS[options], moved=True).double()
    batch, share_K = batch_of(0), torch.tensor([0.5, 0.3, 0.2])
    labels_BTK = batch_labels(batch, K)
    weight_BTK = align_weights(0.1 + (batch.ids_BT % 5).float(), target_mask(labels_BTK))
    weighted_mtp_loss(
        policy,
        policy.trunk_states(batch.ids_BT),
        labels_BTK=labels_BTK,
        weight_BTK=weight_BTK,
        normaliser_K=torch.ones(K),
        head_share_K=share_K,
        ids_BT=batch.ids_BT,
    )

    # DoRA takes the norms of the adapted rows as constants in the gradients of A and B (section 4.3).
    kind = "lora_magnitude" if options == "dora" else "lora_"
    adapters = [name for name, _ in policy.named_parameters() if kind in name]
    generator = torch.Generator().manual_seed(0)
    for name in adapters[:: len(adapters) // 8]:
        parameter = policy.get_parameter(name)
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        ends = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                parameter.data += step * direction
                ends.append(float(weighted_loss(policy, batch, labels_BTK, weight_BTK, share_K)))
            parameter.data += 1e-5 * direction
        expected = float((parameter.grad * direction).sum())
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def test_signals_are_computed_without_the_dropout_of_adapters():
    policy, watching = adapted(options=AdaptersTable(rank=2, dropout=0.5), moved=True), Watching()
    training = learner(policy, weighting=watching)

    losses = {float(training.learn(batch_of(0), step=0).loss) for _ in range(3)}

    assert len(losses) == 3
    assert torch.equal(watching.seen[0], watching.seen[1])
    assert torch.equal(watching.seen[0], watching.seen[2])


def test_detached_heads_train_no_adapter_of_the_trunk():
    policy = adapted(moved=True)
    only_later = LossTable(head_weights=(0.0, 1.0, 1.0), detach_trunk=True)

    learner(policy, loss=only_later).learn(batch_of(0), step=0)

    touched = {name for name, each in policy.named_parameters() if each.grad is not None and each.grad.any()}
    assert touched
    assert all(name.startswith(LATER) for name in touched)


@pytest.mark.parametrize("base_dtype", ["float32", "nf4"])
def test_recomputed_activations_give_the_same_gradients(base_dtype):
    found = []
    for recomputes in (False, True):
        policy = adapted(base_dtype=base_dtype, moved=True)
        if recomputes:
            policy.recompute_activations()
        learner(policy).learn(batch_of(0), step=0)
        found.append({name: each.grad for name, each in policy.named_parameters() if each.requires_grad})

    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)
