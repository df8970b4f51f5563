"""The last layer of a trunk skips positions that `medusa` heads do not read, without any other effect."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.api import Critic, Scores, Signal, WeightingStrategy, Weights
from weighted_mtp_core.data.batches import collate, collate_packed
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.targets import batch_labels, sources, target_mask
from weighted_mtp_core.recipe.schema import LossTable
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.weighting_inputs import Weighting

V, K = 31, 3
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32, num_key_value_heads=1)),
    "tied": lambda: LlamaForCausalLM(
        LlamaConfig(**SMALL, intermediate_size=32, num_key_value_heads=1, tie_word_embeddings=True)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=16, n_layer=3, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ),
}
LENGTHS, PROMPTS = [12, 9, 7, 10], [8, 2, 5, 6]


class ByLoss(WeightingStrategy):
    """More weight where the policy's loss is high."""

    def weigh(self, view):
        loss_BTK = view.token_loss_BTK * view.token_entropy_BTK
        return Weights(weight=torch.sigmoid(loss_BTK - 3).where(view.target_BTK, 0.0))


class ReadsTrunk(Critic):
    """Keeps the states that it gets."""

    reads_policy = True

    def score(self, batch, hidden_BTH):
        self.hidden_BTH = hidden_BTH
        return Scores(value_BT=torch.full(batch.ids_BT.shape, 0.5))


def policy(name="llama", head="medusa"):
    torch.manual_seed(0)
    made = make_policy(BASES[name](), n_future=K, head_kind=head)
    for parameter in made.parameters():  # far from the initial scale, at which all positions are alike
        nn.init.normal_(parameter, std=0.3)
    return made


def tokens(lengths=LENGTHS, prompts=PROMPTS):
    return TokenSet(
        ids_N=np.random.default_rng(0).integers(0, V, size=sum(lengths)).astype(np.int32),
        start_D1=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_D=np.asarray(prompts, dtype=np.int64),
        reward_D=np.ones(len(lengths), dtype=np.float32),
        problem_D=np.arange(len(lengths)),
        example_ids=tuple(map(str, range(len(lengths)))),
    )


def padded(some=None):
    return collate(some or tokens(), [0, 1, 2, 3], device=torch.device("cpu"))


def packed():
    return collate_packed(tokens(), [np.array([0, 2]), np.array([1, 3])], device=torch.device("cpu"))


def learner(policy, *, critic=None, accumulation=1, **loss):
    needs = {Signal.TOKEN_LOSS, Signal.TOKEN_ENTROPY} | ({Signal.VALUE} if critic else set())
    return PolicyLearner(
        policy=policy,
        weighting=Weighting(strategy=ByLoss(), needs=frozenset(needs), critic=critic, label="weighting"),
        loss=LossTable(**loss),
        steps=10,
        pairs_per_step=(10.0,) * K,
        accumulation=accumulation,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        validation=list,
        best=None,
    )


def step(policy, batch, **options):
    """Return the loss, the metrics and the gradients of a step, and the operations in its matrix products."""

    def accumulated(_, left, right, *__, **___):
        return 2 * left[0] * left[1] * right[1]

    def with_onednn(left, right, *_, **__):
        return 2 * left[0] * left[1] * right[0]

    formulas = {torch.ops.aten.addmm_: accumulated, torch.ops.mkldnn._linear_pointwise: with_onednn}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        found = learner(policy, **options).learn(batch, step=3)
    metrics = {name: torch.as_tensor(value) for name, value in found.metrics().items()}
    gradients = {name: each.grad for name, each in policy.named_parameters() if each.grad is not None}
    return {"loss": found.loss, **metrics, **gradients}, counter.get_total_flops()


def with_whole_trunk(policy):
    made = copy.deepcopy(policy)
    made.sparse_trunk = False
    return made


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulation": 2},
        {"heads": "kl"},
        {"heads": "both", "detach_trunk": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("make_batch", [padded, packed])
@pytest.mark.parametrize("name", BASES)
def test_a_step_is_the_same_with_fewer_operations(name, make_batch, options):
    made = policy(name)

    expected, most = step(with_whole_trunk(made), make_batch(), **options)
    found, fewer = step(made, make_batch(), **options)

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert fewer < most


def test_a_frozen_base_skips_positions_too():
    made = policy()
    made.freeze_base()

    expected, most = step(with_whole_trunk(made), padded())
    found, fewer = step(made, padded())

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert fewer < most


def test_a_batch_without_a_target_has_gradients_of_zero():
    without = padded(tokens(prompts=LENGTHS))

    found, _ = step(policy(), without)

    assert not any(each.any() for name, each in found.items() if "." in name)


def test_a_critic_that_reads_the_trunk_gets_the_states_of_all_positions():
    made, critic = policy(), ReadsTrunk()

    learner(made, critic=critic).learn(padded(), step=0)

    torch.testing.assert_close(critic.hidden_BTH, policy().trunk_states(padded().ids_BT))


@pytest.mark.parametrize("head", ["parallel", "sequential"])
def test_heads_that_attend_to_other_positions_need_all_states(head):
    assert not policy(head=head).sparse_trunk


def test_recomputed_layers_compute_all_positions():
    made = policy()
    expected, _ = step(copy.deepcopy(made), padded())
    made.recompute_activations()

    found, _ = step(made, padded())

    assert not made.sparse_trunk
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


class MixesPositions(nn.Module):
    """A feed-forward network that also reads the previous position."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, hidden_BTH):
        return self.network(hidden_BTH + nn.functional.pad(hidden_BTH, (0, 0, 1, 0))[:, :-1])


class NeedsTwoRows(nn.Module):
    """A feed-forward network that cannot be called with the positions of all rows in one row."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, hidden_BTH):
        assert len(hidden_BTH) == 2
        return self.network(hidden_BTH)


@pytest.mark.parametrize("network", [MixesPositions, NeedsTwoRows])
def test_a_network_that_gives_other_states_at_some_positions_is_computed_at_all(network):
    base = BASES["llama"]()
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.3)
    base.model.layers[-1].mlp = network(base.model.layers[-1].mlp)

    assert not make_policy(base, n_future=K, head_kind="medusa").sparse_trunk


@given(
    documents=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=4, max_size=4),
    n_future=st.integers(1, 4),
)
def test_sources_are_the_positions_with_a_target_of_any_head(documents, n_future):
    lengths, prompts = zip(*((length, min(prompt, length)) for length, prompt in documents), strict=True)
    batch = padded(tokens(lengths, prompts))

    expected = target_mask(batch_labels(batch, n_future)).any(dim=-1).flatten().nonzero()[:, 0]

    assert sources(batch.preceding_BT, n_future).tolist() == expected.tolist()
