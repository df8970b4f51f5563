"""A step of stage 2: micro-batches add up to the batch; one head with equal weights equals transformers."""

import copy
import functools
import hashlib
import math
from collections import defaultdict

import pytest
import torch
from attrs import evolve
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from weighted_mtp_core.api import Batch, Signal, WeightingStrategy, Weights, WmtpError
from weighted_mtp_core.api.tensors import align_weights
from weighted_mtp_core.data.batches import split_rows
from weighted_mtp_core.errors import RunFailedError
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.pair_predictions import PairPredictions
from weighted_mtp_core.model.targets import align_labels, target_mask
from weighted_mtp_core.recipe.schema import LossTable, TrainTable
from weighted_mtp_core.training import policy_learner
from weighted_mtp_core.training.optimisers import make_optimisers
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.weighting_inputs import Weighting

V, B, T = 31, 4, 12
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32, num_key_value_heads=1)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, intermediate_size=32, num_key_value_heads=1)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=16, n_layer=3, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ),
}
LABEL = "weighting `failing.late` of plugin `failing` (wmtp-failing 0.3.0)"


HEADS = ("parallel", "medusa", "sequential")

LATER = ("heads.1.", "heads.2.")
"""Prefixes of the names of the parameters of heads 2 and 3."""


@functools.cache
def base(name):
    torch.manual_seed(0)
    made = BASES[name]()
    for parameter in made.parameters():  # far from the initial scale, where gradients are all alike
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def policy(name="llama", *, n_future=3, head="parallel"):
    """Return a policy whose heads differ from each other."""
    made = make_policy(copy.deepcopy(base(name)), n_future=n_future, head_kind=head)
    torch.manual_seed(1)
    for parameter in made.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture
def batch():
    """Rows of uneven length: a prompt of two to five tokens, a response, padding."""
    generator = torch.Generator().manual_seed(0)
    place_T = torch.arange(T)
    length_B1, prompt_B1 = torch.tensor([[12], [7], [9], [6]]), torch.tensor([[2], [5], [3], [3]])
    inside_BT = place_T < length_B1
    response_BT = inside_BT & (place_T >= prompt_B1)
    return Batch(
        ids_BT=torch.randint(0, V, (B, T), generator=generator).where(inside_BT, 0),
        document_BT=torch.where(inside_BT, 0, -1),
        response_BT=response_BT,
        reward_BT=response_BT.float(),
        group_BT=torch.arange(B)[:, None].expand(B, T).where(inside_BT, -1),
    )


class Uniform(WeightingStrategy):
    """Gives every target the weight 1."""

    def weigh(self, view):
        return Weights(weight=view.response_BT.float())


class Fixed(WeightingStrategy):
    """Uneven weights that depend on the token alone."""

    def weigh(self, view):
        return Weights(weight=(0.1 + view.ids_BT % 5).where(view.response_BT, 0.0))


class ByLoss(WeightingStrategy):
    """More weight where the policy's loss is above the mean of the whole batch."""

    def weigh(self, view):
        loss_BTK = view.token_loss_BTK
        mean = loss_BTK[view.target_BTK].mean()
        return Weights(weight=torch.sigmoid(loss_BTK - mean).where(view.target_BTK, 0.0))


class Failing(WeightingStrategy):
    """Raises what it is given."""

    def __init__(self, error):
        self.error = error

    def weigh(self, view):
        raise self.error


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


def learner(model, weighting, **changes):
    arguments = {
        "policy": model,
        "weighting": Weighting(
            strategy=weighting,
            needs=frozenset({Signal.TOKEN_LOSS} if isinstance(weighting, ByLoss) else ()),
            critic=None,
            label=LABEL,
        ),
        "loss": LossTable(),
        "steps": 100,
        "pairs_per_step": (1.0,) * model.n_future,
        "accumulation": 1,
        "autocast": lambda: torch.autocast("cpu", enabled=False),
        "validation": list,
        "best": None,
    }
    return PolicyLearner(**arguments | changes)


def learnt(model, batch, weighting, **changes):
    """Return the loss of one step on a data set of this batch alone, and every gradient."""
    model.zero_grad()
    pairs = pairs_of(model, batch)
    result = learner(model, weighting, pairs_per_step=pairs, **changes).learn(batch, step=0)
    return float(result.loss), {name: p.grad for name, p in model.named_parameters()}


def labels_of(model, batch):
    return align_labels(
        batch.ids_BT, document_BT=batch.document_BT, response_BT=batch.response_BT, n_future=model.n_future
    )


def pairs_of(model, batch):
    return target_mask(labels_of(model, batch)).sum(dim=(0, 1)).tolist()


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


def close(one, other, *, rtol=1e-5, atol=1e-6):
    assert one[0] == pytest.approx(other[0], rel=rtol)
    torch.testing.assert_close(one[1], other[1], rtol=rtol, atol=atol)


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


# ------------------------------------------------------------------ a weighting's faults


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


def test_a_step_in_which_each_target_has_weight_zero_is_a_warning(batch):
    class OnlyPrompts(WeightingStrategy):
        def weigh(self, view):
            return Weights(weight=(~view.response_BT).float())

    said = []
    trained = learner(policy(), OnlyPrompts(), log=said.append)
    for step in range(2):
        trained.learn(batch, step=step)

    (warning,) = said
    assert warning == (
        f"WARNING: {LABEL} gave each target of a step the weight 0; "
        "the policy learns nothing from such a step"
    )


def test_a_metric_that_would_replace_one_of_core_ends_the_run(batch):
    class Hides(WeightingStrategy):
        def weigh(self, view):
            return Weights(weight=view.response_BT.float(), metrics={"train_ce_head_1": 0.0})

    with pytest.raises(RunFailedError, match="returned a metric `train_ce_head_1`, which is the name of"):
        learner(policy(), Hides()).learn(batch, step=0)


def test_a_weighting_that_raises_is_named_with_what_it_raised(batch):
    with pytest.raises(RunFailedError) as failed:
        learnt(policy(), batch, Failing(ZeroDivisionError("no weights at step 3")))

    assert str(failed.value) == f"{LABEL} failed: ZeroDivisionError: no weights at step 3"


def test_a_weighting_that_explains_itself_keeps_its_hint(batch):
    with pytest.raises(RunFailedError) as failed:
        learnt(policy(), batch, Failing(WmtpError("no values", hint="add a critic")))

    assert str(failed.value) == f"{LABEL} failed: no values"
    assert failed.value.hint == "add a critic"


@pytest.mark.parametrize("mode", [True, False])
def test_weights_without_training_leave_the_policy_in_its_mode_also_after_an_error(batch, mode):
    model = policy().train(mode)

    learner(model, Fixed()).weigh(batch, step=0)
    assert model.training is mode
    with pytest.raises(RunFailedError):
        learner(model, Failing(ZeroDivisionError())).weigh(batch, step=0)

    assert model.training is mode


def test_weights_that_were_bad_since_the_last_look_are_found_before_a_checkpoint():
    trained = learner(policy(), Failing(AssertionError()))
    trained._values.note(torch.tensor([1.0, -1.0]))  # as on an accelerator, where weights are read rarely

    with pytest.raises(RunFailedError, match="returned weights with a negative weight in them"):
        trained.state_dict()


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


# ------------------------------------------------------------------ heads


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
