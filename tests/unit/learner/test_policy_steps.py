"""A step follows the formula of the whole batch, however it is split and whatever the trunk runs under."""

import copy
from collections import defaultdict

import pytest
import torch
from attrs import evolve
from small_policy import BASES, HEADS, ByLoss, Fixed, Uniform, base, close, labels_of, learnt, policy
from torch.utils._python_dispatch import TorchDispatchMode
from weighted_mtp_core.api.tensors import align_weights
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.targets import target_mask
from weighted_mtp_core.training import policy_learner


class Operations(TorchDispatchMode):
    """Records the sizes of the results of each operation."""

    def __init__(self):
        super().__init__()
        self.sizes = defaultdict(list)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor):
            self.sizes[function.overloadpacket.__name__].append(result.shape)
        return result


def formula(model, batch, weigh):
    """Return the same as `learnt`, by the formula for the whole batch; `weigh` maps losses to weights."""
    labels_BTK = labels_of(model, batch)
    target_BTK = target_mask(labels_BTK)
    share_K = torch.full((model.n_future,), 1 / model.n_future)
    model.zero_grad()
    hidden_BTH = model.trunk_states(batch.ids_BT)
    logits_BTKV = torch.stack(
        [model.logits(k + 1, hidden_BTH, ids_BT=batch.ids_BT) for k in range(model.n_future)], dim=2
    )
    log_BTKV = logits_BTKV.log_softmax(dim=-1)
    loss_BTK = -log_BTKV.gather(3, labels_BTK.clamp(min=0)[..., None])[..., 0].where(target_BTK, 0.0)
    weight_BTK = weigh(loss_BTK.detach(), target_BTK)
    loss = (share_K * (weight_BTK * loss_BTK).sum(dim=(0, 1)) / weight_BTK.sum(dim=(0, 1))).sum()
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


# ------------------------------------------------------------------ one step


@pytest.mark.parametrize("accumulation", [1, 2, 3, 4])
@pytest.mark.parametrize("head", HEADS)
def test_parts_of_a_batch_add_up_to_the_formula_of_the_whole(batch, head, accumulation):
    weight_BT = (0.1 + batch.ids_BT % 5).where(batch.response_BT, 0.0)
    whole = formula(policy(head=head), batch, lambda _, target_BTK: align_weights(weight_BT, target_BTK))

    close(learnt(policy(head=head), batch, Fixed(), accumulation=accumulation), whole, atol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_weights_from_current_losses_see_the_whole_batch_however_it_is_split(batch, accumulation):
    def weigh(loss_BTK, target_BTK):
        return torch.sigmoid(loss_BTK - loss_BTK[target_BTK].mean()).where(target_BTK, 0.0)

    whole = formula(policy(), batch, weigh)

    close(learnt(policy(), batch, ByLoss(), accumulation=accumulation), whole, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", BASES)
def test_one_head_and_equal_weights_are_transformers_own_training(batch, name, head):
    model = copy.deepcopy(base(name))
    labels_BT = batch.ids_BT.where(batch.response_BT, -100)
    loss = model(input_ids=batch.ids_BT, labels=labels_BT).loss
    loss.backward()
    parameters = list(model.parameters())
    gradients = [parameter.grad.clone() for parameter in parameters]

    found, _ = learnt(make_policy(model, n_future=1, head_kind=head), batch, Uniform())

    close((found, [parameter.grad for parameter in parameters]), (float(loss.detach()), gradients))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("head", HEADS)
def test_a_tied_embedding_gets_its_gradient_without_a_second_tensor_of_its_size(batch, head, accumulation):
    weight_BT = (0.1 + batch.ids_BT % 5).where(batch.response_BT, 0.0)
    model = policy("gpt2", head=head)
    assert model.trunk.get_input_embeddings().weight is model.unembedding.weight
    whole = formula(policy("gpt2", head=head), batch, lambda _, mask_BTK: align_weights(weight_BT, mask_BTK))

    with Operations() as operations:
        found = learnt(model, batch, Fixed(), accumulation=accumulation)

    assert model.unembedding.weight.shape not in operations.sizes["embedding_dense_backward"]
    close(found, whole, atol=1e-5)


@pytest.mark.parametrize("head", ["parallel", "medusa"])
def test_the_gradient_of_a_tied_embedding_has_the_bits_of_two_gradients_and_their_sum(
    batch, head, monkeypatch
):
    _, found = learnt(policy("gpt2", head=head), batch, Fixed())
    monkeypatch.setattr(policy_learner, "add_embedding_rows", lambda _: None)
    _, expected = learnt(policy("gpt2", head=head), batch, Fixed())

    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_tied_embedding_has_a_gradient_of_0_without_targets(batch):
    model = policy("gpt2")

    _, gradients = learnt(model, evolve(batch, response_BT=torch.zeros_like(batch.response_BT)), Uniform())

    matrix = gradients["unembedding.weight"]
    assert torch.equal(matrix, torch.zeros_like(matrix))
    assert matrix.layout == torch.strided


def test_the_trunk_runs_once_where_the_batch_is_in_one_part(batch):
    for weighting, accumulation, runs in (
        (Fixed(), 1, 1),
        (ByLoss(), 1, 1),
        (Fixed(), 2, 2),
        (ByLoss(), 2, 4),
    ):
        model, calls = policy(), []
        model.trunk.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        learnt(model, batch, weighting, accumulation=accumulation)

        assert len(calls) == runs


# ------------------------------------------------------------------ whatever the trunk runs under


def compiled(model):
    model.trunk.compile(backend="aot_eager")  # what inductor compiles, without waiting for a C++ compiler
    return model


def checkpointed(model):
    model.recompute_activations()
    return model


@pytest.mark.parametrize(
    ("prepare", "weighting", "accumulation"),
    [(compiled, ByLoss, 2), (checkpointed, Fixed, 1), (checkpointed, ByLoss, 2)],
)
def test_a_compiled_trunk_and_recomputed_activations_change_nothing(batch, prepare, weighting, accumulation):
    expected = learnt(policy(), batch, weighting())

    close(learnt(prepare(policy()), batch, weighting(), accumulation=accumulation), expected, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", BASES)
def test_recomputed_activations_change_no_bit_and_keep_less(batch, name, head, caplog):
    def step(model):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
            return learnt(model, batch, Fixed()), sum(kept)

    expected, plain = step(policy(name, head=head))
    found, recomputed = step(checkpointed(policy(name, head=head)))

    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())
    assert recomputed < plain / 2
    assert not [text for text in caplog.messages if "incompatible" in text]


def test_activation_checkpointing_runs_each_layer_again(batch):
    model, calls = checkpointed(policy()), []
    for body in (model.trunk, *model.heads):
        body.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    learnt(model, batch, Fixed())

    assert len(calls) == 2 * (1 + model.n_future)


@pytest.mark.parametrize(
    ("prepare", "weighting", "accumulation"),
    [
        (lambda model: model, Fixed, 1),
        (lambda model: model, ByLoss, 2),
        (compiled, ByLoss, 1),
        (checkpointed, Fixed, 2),
    ],
)
def test_bf16_autocast_costs_no_more_than_bf16_rounding(batch, prepare, weighting, accumulation):
    loss, gradients = learnt(policy(), batch, weighting())

    found_loss, found = learnt(
        prepare(policy()),
        batch,
        weighting(),
        accumulation=accumulation,
        autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    )

    assert found_loss == pytest.approx(loss, rel=0.02)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    for name, gradient in gradients.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-3)
        assert error < 0.08, name
