"""A step of stage 2 waits for the device only to read the weights.

The weights are read at every tenth step and at the last step. The host knows everything else that it needs
when it makes the batch. A CPU never waits, so these tests forbid the operations that would make an
accelerator's host wait.
"""

import sys

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from weighted_mtp_core.api import Batch, Signal, WeightingStrategy, Weights
from weighted_mtp_core.data.batches import collate, collate_packed, split_rows
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.errors import RunFailedError
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.targets import align_labels, pair_index, source_index, target_mask
from weighted_mtp_core.recipe.schema import LossTable
from weighted_mtp_core.recipe.train_table import OptimiserTable, TrainTable
from weighted_mtp_core.training.nonfinite_steps import NonfiniteSteps
from weighted_mtp_core.training.optimisers import clip_gradients, make_optimisers
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.weight_checks import ValueCheck
from weighted_mtp_core.training.weighting_inputs import Weighting

V = 31
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32, num_key_value_heads=1)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, intermediate_size=32, num_key_value_heads=1)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=3, n_head=2)),
}
CPU = torch.device("cpu")
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "bincount"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
READING_WEIGHTS = ValueCheck.raise_if_bad.__code__
"""On a CPU weights are read at every step, on an accelerator at every tenth."""


@pytest.fixture(autouse=True)
def as_on_a_cuda_device(monkeypatch):
    """Make the loss do what it does on a CUDA device with 24 GiB of memory."""
    monkeypatch.setattr("weighted_mtp_core.model.chunked_unembedding.memory_of", lambda _: 24 << 30)


class NoWaiting(TorchDispatchMode):
    """Fails at an operation for which a GPU's host would wait; reads of the weights are only counted."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING or by_mask:
            assert is_running(READING_WEIGHTS), f"`{name}` waits for the device"
            self.reads += 1
        return func(*args, **(kwargs or {}))


def is_running(code):
    frame = sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


class Fixed(WeightingStrategy):
    """Uneven weights that depend on the token only."""

    def weigh(self, view):
        return Weights(weight=(0.1 + view.ids_BT % 5).where(view.response_BT, 0.0))


class ByLoss(WeightingStrategy):
    """More weight where the policy's loss is high."""

    def weigh(self, view):
        return Weights(weight=torch.sigmoid(view.token_loss_BTK).where(view.target_BTK, 0.0))


class Negative(WeightingStrategy):
    """Negative weights, which core refuses."""

    def weigh(self, view):
        return Weights(weight=-view.response_BT.float())


def tokens(lengths, prompts):
    count = len(lengths)
    generator = np.random.default_rng(0)
    return TokenSet(
        ids_N=generator.integers(0, V, size=sum(lengths)).astype(np.int32),
        start_D1=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_D=np.asarray(prompts, dtype=np.int64),
        reward_D=np.ones(count, dtype=np.float32),
        problem_D=np.arange(count),
        example_ids=tuple(f"e{i}" for i in range(count)),
    )


def batch():
    return collate(tokens([12, 7, 9, 6], [2, 5, 3, 0]), [0, 1, 2, 3], device=CPU)


def learner(weighting, *, name="llama", head="parallel", heads="labels", accumulation=1):
    torch.manual_seed(0)
    policy = make_policy(BASES[name](), n_future=3, head_kind=head)
    return PolicyLearner(
        policy=policy,
        weighting=Weighting(
            strategy=weighting,
            needs=frozenset(
                {Signal.TOKEN_LOSS, Signal.TOKEN_ENTROPY} if isinstance(weighting, ByLoss) else ()
            ),
            critic=None,
            label="weighting `my.own`",
        ),
        loss=LossTable(heads=heads),
        steps=100,
        pairs_per_step=(20.0,) * 3,
        accumulation=accumulation,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        validation=list,
        best=None,
    )


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("weighting", "heads"),
    [(Fixed(), "labels"), (ByLoss(), "labels"), (Fixed(), "both")],
    ids=["known", "from_losses", "from_head_1"],
)
@pytest.mark.parametrize(
    ("name", "head"), [(n, h) for n in BASES for h in ("parallel", "medusa", "sequential")]
)
def test_a_step_never_waits_except_to_read_the_weights(name, head, weighting, heads, accumulation):
    training = learner(weighting, name=name, head=head, heads=heads, accumulation=accumulation)
    parameters = list(training.parameters())
    (optimiser,) = make_optimisers(parameters, TrainTable())
    bad = NonfiniteSteps(limit=5, device=CPU)
    before = parameters[0].detach().clone()

    with NoWaiting() as watched:
        result = training.learn(batch(), step=0)
        result.metrics()
        norm = clip_gradients(parameters, 1.0)
        bad.skip_if_not_finite([optimiser], result.loss, norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    assert watched.reads == 1
    assert not torch.equal(parameters[0], before)


@pytest.mark.parametrize("name", ["adamw_8bit", "muon"])
def test_other_optimisers_do_not_wait_either(name):
    matrix = torch.nn.Parameter(torch.zeros(64, 64))
    optimisers = make_optimisers([matrix], TrainTable(optimiser=OptimiserTable(name=name)))
    bad = NonfiniteSteps(limit=5, device=CPU)

    for norm in (1.0, float("nan"), 1.0):
        matrix.grad = torch.randn(64, 64)
        with NoWaiting():
            bad.skip_if_not_finite(optimisers, torch.zeros(()), torch.tensor(norm))
            for each in optimisers:
                each.step()

    assert bad.total == 1
    assert matrix.detach().any()


def without_host_facts(one):
    return Batch(**{each.name: getattr(one, each.name) for each in attrs.fields(Batch)})


def test_what_the_host_knows_changes_no_bit():
    def learnt(one):
        training = learner(ByLoss(), accumulation=2)
        result = training.learn(one, step=0)
        gradients = {name: p.grad for name, p in training.policy.named_parameters()}
        return {"train_loss": result.loss, **result.metrics(), **gradients}

    with_known, without = learnt(batch()), learnt(without_host_facts(batch()))

    assert with_known.keys() == without.keys()
    for name, value in with_known.items():
        assert value is without[name] is None or torch.equal(value, without[name]), name


@given(
    documents=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=6),
    packed=st.booleans(),
    parts=st.integers(1, 3),
    n_future=st.integers(1, 5),
)
def test_the_host_knows_the_pairs_that_count(documents, packed, parts, n_future):
    some = tokens([length for length, _ in documents], [min(prompt, n) for n, prompt in documents])
    numbers = np.arange(len(documents))
    whole = (
        collate_packed(some, np.array_split(numbers, min(2, len(numbers))), device=CPU)
        if packed
        else collate(some, numbers, device=CPU)
    )
    for one in split_rows(whole, parts):
        labels_BTK = align_labels(
            one.ids_BT, document_BT=one.document_BT, response_BT=one.response_BT, n_future=n_future
        )
        target_BTK = target_mask(labels_BTK)

        with NoWaiting():
            known = one.target_positions()
        for found, expected in zip(known, without_host_facts(one).target_positions(), strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(
            pair_index(target_BTK, preceding_BT=one.preceding_BT), target_BTK.flatten().nonzero()[:, 0]
        )
        for k in range(1, n_future + 1):
            label_BT = labels_BTK[:, :, k - 1]
            found = source_index(label_BT, k=k, preceding_BT=one.preceding_BT)
            assert torch.equal(found, target_mask(label_BT).flatten().nonzero()[:, 0])


# ------------------------------------------------------------------ reading the weights


def test_bad_weights_end_a_run_at_once_on_a_cpu():
    with pytest.raises(RunFailedError) as failed:
        learner(Negative()).learn(batch(), step=0)

    assert str(failed.value) == "weighting `my.own` returned weights with a negative weight in them"


def test_an_accelerator_is_read_every_tenth_step_and_at_the_end():
    check = ValueCheck(label="weighting `my.own`")
    check.note(torch.empty(3, device="meta"))

    assert [step for step in range(25) if check.due(step, 25)] == [9, 19, 24]


def test_bad_weights_between_two_reads_are_found():
    check = ValueCheck(label="weighting `my.own`")
    for weight in (1.0, float("inf"), -1.0, 1.0):
        check.note(torch.tensor([weight, 1.0]))

    with pytest.raises(RunFailedError, match="returned weights with NaN or infinity in them"):
        check.raise_if_bad()
    check.raise_if_bad()
