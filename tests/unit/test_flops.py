"""The operations of a step, against torch's own counter and against the formula of a paper."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from weighted_mtp_core.api import WeightingStrategy, Weights
from weighted_mtp_core.data.batches import collate, collate_packed
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.model.adapters import adapt
from weighted_mtp_core.model.flops import StepFlops
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.recipe.schema import AdaptersTable, LossTable, ModelTable
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.weighting_inputs import Weighting

V, H = 61, 16
SMALL = {"vocab_size": V, "hidden_size": H, "num_hidden_layers": 3, "num_attention_heads": 2}
EAGER = {"attn_implementation": "eager"}  # torch's counter does not count fused attention on a CPU
WIDE = {**SMALL, "hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 2}
BASES = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SMALL, **EAGER, intermediate_size=24, num_key_value_heads=1, tie_word_embeddings=True)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=H, n_layer=3, n_head=2, **EAGER)),
}
FIRST_OF_MEDUSA = 2 * (2 * 16 * H * H)
"""The gradient of the input of two heads at 16 targets: counted, although a frozen trunk does not need it."""


class Flat(WeightingStrategy):
    def weigh(self, view):
        return Weights(weight=view.response_BT.float())


def tokens(lengths, prompts):
    return TokenSet(
        ids_N=np.random.default_rng(0).integers(0, V, size=sum(lengths)).astype(np.int32),
        start_D1=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_D=np.asarray(prompts, dtype=np.int64),
        reward_D=np.ones(len(lengths), dtype=np.float32),
        problem_D=np.arange(len(lengths)),
        example_ids=tuple(map(str, range(len(lengths)))),
    )


def unpadded():
    return collate(tokens([12, 12], [5, 3]), [0, 1], device=torch.device("cpu"))


def learner(policy, **loss):
    return PolicyLearner(
        policy=policy,
        weighting=Weighting(strategy=Flat(), needs=frozenset(), critic=None, label="weighting `my.flat`"),
        loss=LossTable(**loss),
        steps=10,
        pairs_per_step=(10.0,) * policy.n_future,
        accumulation=1,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        validation=list,
        best=None,
    )


def counted(training):
    """Return what torch counts in the matrix products of one step."""

    def accumulated(_, left, right, *__, **___):
        return 2 * left[0] * left[1] * right[1]

    def with_onednn(left, right, *_, **__):
        return 2 * left[0] * left[1] * right[0]

    formulas = {torch.ops.aten.addmm_: accumulated, torch.ops.mkldnn._linear_pointwise: with_onednn}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        training.learn(unpadded(), step=0)
    return counter.get_total_flops()


@pytest.mark.parametrize("detach_trunk", [False, True])
@pytest.mark.parametrize("head", ["parallel", "medusa"])
@pytest.mark.parametrize("name", BASES)
def test_the_operations_of_a_step_are_those_that_torch_counts(name, head, detach_trunk):
    training = learner(make_policy(BASES[name](), n_future=3, head_kind=head), detach_trunk=detach_trunk)
    found = training.flops(unpadded())

    assert found == counted(training) + (detach_trunk and head == "medusa") * FIRST_OF_MEDUSA


@pytest.mark.parametrize("head", ["parallel", "medusa"])
@pytest.mark.parametrize("name", BASES)
def test_a_frozen_base_has_no_backward_pass(name, head):
    policy = make_policy(BASES[name](), n_future=3, head_kind=head)
    policy.freeze_base()
    training = learner(policy)
    found = training.flops(unpadded())

    assert found == counted(training) + (head == "medusa") * FIRST_OF_MEDUSA


def test_sequential_heads_count_once_although_they_run_twice():
    policy = make_policy(BASES["llama"](), n_future=3, head_kind="sequential")
    training = learner(policy)
    found = training.flops(unpadded())

    module = 2 * 24 * (2 * H * H + H * (H + 2 * 8) + H * H) + 2 * 4 * H * 12**2
    network, pairs_of_head_3 = 2 * 3 * H * 24, 16
    again = 2 * module + network * (24 + pairs_of_head_3)
    assert counted(training) == found + again


def test_a_policy_of_one_head_needs_what_the_papers_formula_gives():
    policy = make_policy(BASES["llama"](), n_future=1, head_kind="parallel")
    flops = StepFlops.of(policy)
    layers = sum(each.numel() for name, each in policy.named_parameters() if "proj" in name)
    length_D = np.array([12, 12])

    kaplan = 6 * 24 * (layers + V * H)
    chowdhery = 24 * 12 * 3 * 2 * 8 * 12  # tokens x 12 L H Q T
    assert flops.of_batch(length_D, [24], sources=24) == kaplan + chowdhery


def test_documents_of_a_packed_row_attend_to_themselves_only():
    training = learner(make_policy(BASES["llama"](), n_future=2, head_kind="parallel"))
    some = tokens([9, 5, 7], [2, 0, 3])
    alone = collate(some, [0, 1, 2], device=torch.device("cpu"))
    packed = collate_packed(some, [np.array([0, 1]), np.array([2])], device=torch.device("cpu"))

    assert alone.ids_BT.numel() > some.start_D1[-1]
    assert training.flops(packed) == training.flops(alone)


def test_adapters_pass_gradients_through_frozen_matrices():
    policy = make_policy(BASES["llama"](), n_future=1, head_kind="medusa").requires_grad_(requires_grad=False)
    frozen = StepFlops.of(policy)
    q_proj = policy.trunk.layers[0].self_attn.q_proj
    adapter = nn.Linear(H, 2, bias=False)
    q_proj.adapter = adapter

    adapted = StepFlops.of(policy)

    matrices = sum(each.numel() for name, each in policy.trunk.named_parameters() if "proj.weight" in name)
    assert frozen.per_token == 2 * matrices
    assert adapted.per_token == 4 * matrices + 6 * adapter.weight.numel()
    assert (frozen.per_pair_K, adapted.per_pair_K) == ((2 * V * H,), (4 * V * H,))


@pytest.mark.parametrize("heads", ["whole", "adapted"])
def test_a_step_with_adapters_needs_what_torch_counts_apart_from_the_first_layer(heads):
    policy = make_policy(BASES["llama"](), n_future=3, head_kind="parallel")
    adapt(policy, ModelTable(train="adapters", adapters=AdaptersTable(rank=2, heads=heads)))
    training = learner(policy)
    found = training.flops(unpadded())

    own = counted(training)
    unused = 2 * 24 * H * (H + 2 * 8) + 3 * 2 * 24 * H * 2  # the gradient of its input, which is frozen
    assert own <= found <= own + unused


def test_a_base_of_four_bits_needs_the_same_operations():
    def adapted(base_dtype):
        torch.manual_seed(0)
        policy = make_policy(LlamaForCausalLM(LlamaConfig(**WIDE)), n_future=2, head_kind="parallel")
        adapt(policy, ModelTable(train="adapters", base_dtype=base_dtype))
        return StepFlops.of(policy)

    assert adapted("nf4") == adapted("float32")


def test_a_sliding_window_bounds_what_a_token_attends_to():
    flops = StepFlops(per_token=0.0, per_source=0.0, per_pair_K=(0.0,), attention=((2.0, None), (2.0, 4)))

    assert flops.of_batch(np.array([10, 3]), [0], sources=0) == 2 * (100 + 9) + 2 * (40 + 9)


def moe():
    config = Qwen3MoeConfig(
        **SMALL, intermediate_size=24, moe_intermediate_size=8, num_key_value_heads=1, head_dim=8,
        num_experts=8, num_experts_per_tok=2, **EAGER,
    )  # fmt: skip
    return make_policy(Qwen3MoeForCausalLM(config), n_future=1, head_kind="medusa")


def test_a_token_counts_only_the_experts_that_compute_it():
    per_layer = H * (2 * H + 16) + H * 8 + 2 * (3 * H * 8)  # attention, router, two experts

    assert StepFlops.of(moe()).per_token == 6 * 3 * per_layer


def test_experts_whose_share_is_unknown_are_not_counted():
    policy = moe()
    policy.config = LlamaConfig(**SMALL)

    assert StepFlops.of(policy) is None
    assert learner(policy).flops(unpadded()) == 0


@pytest.mark.parametrize(
    "experts",
    [
        lambda: nn.ModuleList([nn.Linear(H, H)] * 4),
        lambda: nn.ParameterDict({"all_in_one": nn.Parameter(torch.ones(4 * H, H))}),
    ],
    ids=["list", "one_matrix"],
)
def test_experts_in_another_form_than_one_parameter_are_not_counted(experts):
    policy = make_policy(BASES["llama"](), n_future=1, head_kind="medusa")
    policy.trunk.layers[0].mlp.experts = experts()

    assert StepFlops.of(policy) is None
