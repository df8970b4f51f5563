"""Scores read from a table are those that the critic gives; no table is ever taken for another critic's."""

import attrs
import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.api import Batch, Critic, Scores, Signal, WeightingStrategy, Weights, WmtpError
from weighted_mtp_core.data.batches import StepBatches, split_rows
from weighted_mtp_core.data.samplers import PackedSampler, Sampler, pointwise
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.errors import RunFailedError
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.plugins.loading import Kind
from weighted_mtp_core.plugins.selection import ComponentSelector
from weighted_mtp_core.recipe.schema import DataTable, LossTable
from weighted_mtp_core.runtime.device import Compute
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.score_cache import CachedCritic, scores_key, state_sha256
from weighted_mtp_core.training.weighting_inputs import Weighting

CPU = torch.device("cpu")
V = 40
PACKED = DataTable(use="x", packing="documents", pack_tokens=40, max_tokens=20)
APART = DataTable(use="x")


class Judge(Critic):
    """Gives each token id a value; counts the documents that it has scored."""

    trainable = True
    reads_policy = False
    cacheable = True

    def __init__(self, seed=0):
        self.net = nn.Embedding(V, 1)
        nn.init.normal_(self.net.weight, generator=torch.Generator().manual_seed(seed))
        self.asked = 0

    def score(self, batch, hidden_BTH):
        assert hidden_BTH is None
        self.asked += sum(len(set(row)) - (-1 in row) for row in batch.document_BT.tolist())
        return Scores(value_BT=torch.sigmoid(self.net(batch.ids_BT).squeeze(-1)).detach())

    def state_dict(self):
        return dict(self.net.state_dict())


class Reference(Judge):
    """Returns the numbers that `Judge` returns as values, but as reference losses."""

    def score(self, batch, hidden_BTH):
        return Scores(reference_loss_BT=super().score(batch, hidden_BTH).value_BT)


class Whitened(WeightingStrategy):
    """Weights from values minus their moving mean, which the mean of each whole batch updates."""

    mean = 0.0

    def weigh(self, view):
        value_BT = view.value_BT.where(view.response_BT, 0.0)
        count = view.response_BT.sum()
        self.mean = 0.9 * self.mean + 0.1 * value_BT.sum() / count
        weight_BT = torch.exp(value_BT - self.mean).where(view.response_BT, 0.0)
        return Weights(weight=weight_BT, metrics={"mean_value": value_BT.sum() / count})


@pytest.fixture
def tokens():
    generator = np.random.default_rng(0)
    lengths = generator.integers(4, 20, size=37)
    return TokenSet(
        ids_N=generator.integers(0, V, size=lengths.sum()),
        start_D1=np.concatenate([[0], np.cumsum(lengths)]),
        prompt_D=np.full(37, 2),
        reward_D=np.ones(37, dtype=np.float32),
        problem_D=np.arange(37),
        example_ids=[f"e{i}" for i in range(37)],
        sha256="a" * 64,
    )


def batches(tokens, table=APART, **changes):
    return StepBatches(tokens, table, **{"batch_size": 6, "seed": 1, "device": CPU, **changes})


def cached(critic, made, folder, *, accumulation=1):
    return CachedCritic(critic, made, accumulation=accumulation, folder=folder)


def training(tokens, critic, table, *, accumulation):
    """Train a small policy for three epochs; return what was logged and the parameters."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=16,
        )
    )
    policy = make_policy(base, n_future=2, head_kind="medusa")
    made = batches(tokens, table)
    learner = PolicyLearner(
        policy=policy,
        weighting=Weighting(
            strategy=Whitened(),
            needs=frozenset({Signal.VALUE}),
            critic=critic(made),
            label="weighting `test.whitened`",
        ),
        loss=LossTable(),
        steps=21,
        pairs_per_step=made.pairs_per_step(2),
        accumulation=accumulation,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        validation=list,
        best=None,
    )
    optimiser = torch.optim.SGD(policy.parameters(), lr=0.1)
    journal = []
    for step in range(21):
        result = learner.learn(made(step), step=step)
        scalars = {"train_loss": result.loss, **result.metrics()}
        journal.append({name: float(value) for name, value in scalars.items()})
        optimiser.step()
        optimiser.zero_grad()
    return journal, state_sha256(policy.state_dict())


@pytest.mark.parametrize("table", [APART, PACKED])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_training_on_cached_scores_gives_the_same_bits(tokens, tmp_path, table, accumulation):
    def made(critic):
        return lambda order: cached(critic, order, tmp_path / "scores", accumulation=accumulation)

    live = training(tokens, lambda _: Judge(), table, accumulation=accumulation)
    first, later = Judge(), Judge()

    assert training(tokens, made(first), table, accumulation=accumulation) == live
    assert training(tokens, made(later), table, accumulation=accumulation) == live
    assert (first.asked, later.asked) == (37, 0)


@pytest.mark.parametrize("table", [APART, PACKED])
def test_each_document_is_scored_in_the_batch_that_first_draws_it(tokens, tmp_path, table):
    asked = []

    class Attentive(Judge):
        def score(self, batch, hidden_BTH):
            asked.append(batch.ids_BT.tolist())
            return super().score(batch, hidden_BTH)

    order = batches(tokens, table)
    later = int(order.first_steps().max()) + 2
    reader = cached(Attentive(), order, tmp_path / "scores")
    reader.score(order(later), None)  # as a run that goes on in its second epoch
    drawn = np.unique(order.first_steps()[_documents(tokens, order(later))])

    assert asked == [order(int(step)).ids_BT.tolist() for step in drawn]


def _documents(tokens, batch):
    return np.unique(np.searchsorted(tokens.start_D1, batch.token_BT[batch.token_BT >= 0], side="right") - 1)


@pytest.mark.parametrize("kind", [Judge, Reference])
def test_scores_are_the_critics_and_0_on_padding(tokens, tmp_path, kind):
    order = batches(tokens)
    for step in range(9):
        batch = order(step)
        read = cached(kind(), order, tmp_path / "scores").score(batch, None)
        expected = kind().score(batch, None)
        for each in attrs.fields(Scores):
            one, other = getattr(read, each.name), getattr(expected, each.name)

            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other.where(batch.document_BT >= 0, 0.0))


def test_a_part_of_a_batch_gets_the_scores_of_the_batch(tokens, tmp_path):
    order = batches(tokens)
    reader = cached(Judge(), order, tmp_path / "scores", accumulation=2)
    parts = [reader.score(part, None).value_BT for part in split_rows(order(0), 2)]

    assert torch.equal(torch.cat(parts), reader.score(order(0), None).value_BT)


def test_an_unfinished_table_is_left_to_nobody(tokens, tmp_path):
    order = batches(tokens)
    reader = cached(Judge(), order, tmp_path / "signals" / "scores")
    reader.score(order(0), None)
    del reader

    assert list((tmp_path / "signals").iterdir()) == []


def test_a_flipped_bit_stops_the_run(tokens, tmp_path):
    order = batches(tokens)
    reader = cached(Judge(), order, tmp_path / "scores")
    for step in range(7):
        reader.score(order(step), None)
    path = tmp_path / "scores" / "value_BT.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    with pytest.raises(WmtpError, match=r"value_BT\.npy` changed since it was written"):
        cached(Judge(), order, tmp_path / "scores")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_that_are_not_float32_are_refused_as_without_the_cache(tokens, tmp_path, dtype):
    class Imprecise(Judge):
        def score(self, batch, hidden_BTH):
            return Scores(value_BT=super().score(batch, hidden_BTH).value_BT.to(dtype))

    order = batches(tokens)

    with pytest.raises(RunFailedError, match=f"`score` returned `value_BT` as {dtype}"):
        cached(Imprecise(), order, tmp_path / "scores").score(order(0), None)


def test_a_batch_of_unknown_origin_is_refused(tokens, tmp_path):
    order = batches(tokens)
    one = order(0)
    batch = Batch(**{each.name: getattr(one, each.name) for each in attrs.fields(Batch)})

    with pytest.raises(WmtpError, match="the score cache needs batches made from the token set of stage 2"):
        cached(Judge(), order, tmp_path / "scores").score(batch, None)


# ------------------------------------------------------------------ what a table is known by


def key(
    tokens, *, critic=None, inputs=(), accumulation=1, table=APART, options=None, dtype="float32", **changes
):
    chosen = ComponentSelector().select(Kind.DATA, "core.jsonl", options=options or {})
    order = batches(tokens, table, **changes)
    compute = Compute.resolve(device="cpu", dtype=dtype)
    return scores_key(
        critic or Judge(), chosen, inputs=inputs, batches=order, accumulation=accumulation, compute=compute
    )


def test_equal_critics_data_and_batches_share_a_table(tokens):
    assert key(tokens) == key(tokens)


@pytest.mark.parametrize(
    "other",
    [
        {"critic": Judge(seed=1)},
        {"inputs": ["another base model"]},
        {"accumulation": 2},
        {"table": PACKED},
        {"options": {"seed": 2}},
        {"seed": 2},
        {"batch_size": 5},
        {"dtype": "bfloat16"},
    ],
)
def test_another_critic_or_other_batches_have_another_table(tokens, other):
    assert key(tokens, **other) != key(tokens)


def test_other_tokens_have_another_table(tokens):
    assert key(attrs.evolve(tokens, sha256="b" * 64)) != key(tokens)


@pytest.mark.parametrize(
    "other",
    [
        {"w": torch.tensor([1.0, 2.5])},
        {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)},
        {"w": torch.tensor([[1.0, 2.0]])},
        {"v": torch.tensor([1.0, 2.0])},
        {"w": torch.tensor([1.0, 2.0]), "n": 1},
    ],
)
def test_a_state_is_known_by_names_types_shapes_and_bytes(other):
    assert state_sha256(other) != state_sha256({"w": torch.tensor([1.0, 2.0])})


def test_a_state_of_half_precision_is_known_too():
    assert state_sha256({"w": torch.ones(3, dtype=torch.bfloat16), "empty": torch.zeros(0)})


# ------------------------------------------------------------------ first steps


@pytest.mark.parametrize("count", [1, 5, 431])
@pytest.mark.parametrize("packed", [False, True])
def test_the_first_step_of_a_document_is_when_it_is_first_drawn(tokens, count, packed):
    lengths = np.random.default_rng(0).integers(2, 30, size=count)
    if packed:
        sampler = PackedSampler(lengths, row_tokens=64, batch_size=3, seed=2)
    else:
        only = attrs.evolve(tokens, prompt_D=np.zeros(count))
        sampler = Sampler(pointwise(only), lengths, batch_size=3, seed=2)
    first = sampler.first_steps()

    for step in range(first.max() + 1):
        drawn = np.concatenate(sampler.rows(step)) if packed else sampler.rows(step)

        assert sorted(np.flatnonzero(first == step)) == sorted(drawn)
