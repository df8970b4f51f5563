"""Heads 2..K have a learning rate of their own, with the schedule of all others."""

import copy
import functools
import os
import signal

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.api import Batch, WeightingStrategy, Weights
from weighted_mtp_core.checkpointing.manager import Checkpoints
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.recipe.schema import CheckpointTable, LossTable, PolicyTrainTable
from weighted_mtp_core.training.loop import Validation, train
from weighted_mtp_core.training.optimisers import make_optimisers
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.schedules import learning_rate
from weighted_mtp_core.training.weighting_inputs import Weighting

TABLE = PolicyTrainTable(
    steps=4,
    learning_rate=0.01,
    head_learning_rate=0.05,
    warmup_steps=2,
    weight_decay=0.0,
    max_grad_norm=1e9,
    log_every=1,
)
LATER = ("heads.1.", "heads.2.")
"""Prefixes of the names of the parameters of heads 2 and 3."""


@functools.cache
def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return make_policy(LlamaForCausalLM(config), n_future=3, head_kind="parallel")


def batch(step):
    ids_BT = torch.randint(0, 23, (2, 9), generator=torch.Generator().manual_seed(step))
    return Batch(
        ids_BT=ids_BT,
        document_BT=torch.zeros_like(ids_BT),
        response_BT=torch.ones_like(ids_BT).bool(),
        reward_BT=torch.ones(2, 9),
        group_BT=torch.zeros_like(ids_BT),
    )


class Flat(WeightingStrategy):
    """Gives every target the weight 1."""

    def weigh(self, view):
        return Weights(weight=view.response_BT.float())


class Latest(PolicyLearner):
    """Has its best state at the last validation."""

    def validate(self, *, step):
        return Validation(metrics={}, score=float(step))


def learner(folder, *, head_rate, embedding_rate=1.0):
    return Latest(
        policy=copy.deepcopy(base()),
        weighting=Weighting(strategy=Flat(), needs=frozenset(), critic=None, label="flat"),
        loss=LossTable(),
        steps=TABLE.steps,
        pairs_per_step=(16.0, 14.0, 12.0),
        accumulation=1,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        validation=list,
        best=folder / "best_model.pt",
        head_rate=head_rate,
        embedding_rate=embedding_rate,
    )


class Reports:
    """Keeps the metrics of each step, and calls `at[step]` when they are reported."""

    def __init__(self, at):
        self.at = at
        self.found = {}

    def metrics(self, stage, step, values):
        self.found.setdefault(step, {}).update(values)
        self.at.get(step, lambda: None)()

    def timings(self, stage, step, values):
        pass

    def progress(self, step, values):
        pass


def trained(folder, **changes):
    """Return the parameters after all steps."""
    parameters, _ = parameters_and_metrics(folder, **changes)
    return parameters


def parameters_and_metrics(folder, *, head_rate, embedding_rate=1.0, at=None, resume=False, only_heads=False):
    """Return the parameters after all steps, and the metrics of each step."""
    made = learner(folder, head_rate=head_rate, embedding_rate=embedding_rate)
    for name, parameter in made.policy.named_parameters():
        parameter.requires_grad_(name.startswith(LATER) or not only_heads)
    reports = Reports(at or {})
    with Checkpoints(folder=folder, table=CheckpointTable(every=0), log=print) as checkpoints:
        train(
            made,
            TABLE,
            batch_of=batch,
            reporter=reports,
            checkpoints=checkpoints,
            resume=checkpoints.newest() if resume else None,
        )
    return dict(made.policy.named_parameters()), reports.found


def by_hand(folder, *, head_learning_rate):
    """Return the parameters after all steps with two of torch's optimisers, one for heads 2..K."""
    made = learner(folder, head_rate=1.0)
    named = dict(made.policy.named_parameters())
    later = [each for name, each in named.items() if name.startswith(LATER)]
    others = [each for name, each in named.items() if not name.startswith(LATER)]
    pairs = [(TABLE.learning_rate, others), (head_learning_rate, later)]
    optimisers = [
        (rate, torch.optim.AdamW(members, betas=(0.9, 0.95), weight_decay=0.0, fused=True))
        for rate, members in pairs
    ]
    for step in range(TABLE.steps):
        made.learn(batch(step), step=step)
        for rate, optimiser in optimisers:
            (group,) = optimiser.param_groups
            group["lr"] = rate * learning_rate(TABLE, step) / TABLE.learning_rate
            optimiser.step()
            optimiser.zero_grad()
    return named


def test_heads_and_all_others_learn_at_their_own_rates(tmp_path):
    found = trained(tmp_path, head_rate=5.0)

    torch.testing.assert_close(found, by_hand(tmp_path, head_learning_rate=0.05), rtol=1e-4, atol=1e-6)


def test_a_resumed_run_has_the_same_rates(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = trained(tmp_path / "whole", head_rate=5.0)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, head_rate=5.0, at={2: lambda: os.kill(os.getpid(), signal.SIGINT)})

    resumed = trained(tmp_path, head_rate=5.0, resume=True)

    for name, parameter in whole.items():
        assert torch.equal(resumed[name], parameter), name


RATE, HEAD_RATE = "policy_learning_rate", "policy_head_learning_rate"


@pytest.mark.parametrize(
    ("head_rate", "only_heads", "recorded"),
    [
        (1.0, False, {RATE: 0.01}),
        (5.0, False, {RATE: 0.01, HEAD_RATE: 0.05}),
        (5.0, True, {RATE: 0.05}),
        (1.0, True, {RATE: 0.01}),
    ],
)
def test_the_recorded_rates_are_those_that_parameters_learn_at(tmp_path, head_rate, only_heads, recorded):
    _, metrics = parameters_and_metrics(tmp_path, head_rate=head_rate, only_heads=only_heads)

    found = metrics[TABLE.warmup_steps]
    assert {name: found[name] for name in found if name.endswith("learning_rate")} == pytest.approx(recorded)


def test_embeddings_and_unembedding_have_a_rate_of_their_own(tmp_path):
    found, metrics = parameters_and_metrics(tmp_path, head_rate=5.0, embedding_rate=1e-30)

    start = dict(learner(tmp_path, head_rate=1.0).policy.named_parameters())
    still = {name for name, parameter in found.items() if torch.equal(parameter, start[name])}
    assert still == {"trunk.embed_tokens.weight", "unembedding.weight"}
    recorded = {name: value for name, value in metrics[TABLE.warmup_steps].items() if "learning_rate" in name}
    assert recorded == pytest.approx({RATE: 0.01, HEAD_RATE: 0.05, "policy_embedding_learning_rate": 1e-32})


def test_equal_rates_are_one_rate(tmp_path):
    equal, other = (learner(tmp_path, head_rate=rate) for rate in (1.0, 5.0))
    parts = equal.parts()
    later = other.parts()

    (one,) = make_optimisers(equal.parameters(), TABLE, parts=parts)

    assert [len(group["params"]) for group in one.param_groups] == [
        sum(p.ndim >= 2 for p in equal.parameters()),
        sum(p.ndim < 2 for p in equal.parameters()),
    ]
    assert {id(parameter) for parameter in later} == {
        id(parameter) for name, parameter in other.policy.named_parameters() if name.startswith(LATER)
    }
