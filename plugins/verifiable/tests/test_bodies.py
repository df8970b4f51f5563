"""`verifiable.value_head` learns with each body and each objective, and changes only the right parameters."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.api import Batch, BuildContext, ModelContext, WmtpError

from weighted_mtp_verifiable import ValueHeadOptions, build_value_head

VOCAB, RIGHT, WRONG = 16, 14, 15
BODIES = {
    "policy": {"body": "policy"},
    "frozen": {"body": "frozen"},
    "own": {"body": "own"},
    "trunk": {"body": "trunk", "layers": 0},
    "lora": {"body": "trunk", "layers": 0, "lora_rank": 4},
}


class Trunk(nn.Module):
    """A policy's trunk, as `ModelContext.trainable_trunk` describes it."""

    hidden_size = 16

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=self.hidden_size,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.25,
        )
        self.model = LlamaForCausalLM(config).model
        del self.model.layers[-1]  # the policy's heads take the last layer and the norm
        self.model.norm = nn.Identity()

    def forward(self, batch):
        return self.model(batch.ids_BT).last_hidden_state


@pytest.fixture(scope="module")
def trunk():
    return Trunk()


def build(trunk, *, requested=None, **options):
    def trainable_trunk(base):
        if requested is not None:
            requested.append(base)
        return copy.deepcopy(trunk)

    model = ModelContext(
        n_future=2,
        hidden_size=trunk.hidden_size,
        vocab_size=VOCAB,
        device=torch.device("cpu"),
        frozen_trunk=lambda: torch.no_grad()(copy.deepcopy(trunk)),
        trainable_trunk=trainable_trunk,
    )
    context = BuildContext(seed=0, storage=Path("storage"), model=model)
    small = {"layers": 1, "hidden_size": 16, "heads": 2, "lm_loss_weight": 0.0}
    return build_value_head(ValueHeadOptions(**(small | options)), context)


def planted(rows, *, seed):
    """Return rows of random tokens, in which one response token decides the reward.

    This token is `RIGHT` in even rows (reward 1) and `WRONG` in odd rows (reward 0).
    """
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(0, 14, (rows, 8), generator=generator)
    place_B = torch.randint(2, 8, (rows,), generator=generator)
    right_B = torch.arange(rows) % 2 == 0
    ids_BT[torch.arange(rows), place_B] = torch.where(right_B, RIGHT, WRONG)
    response_BT = torch.tensor([False] * 2 + [True] * 6).expand(rows, 8)
    return Batch(
        ids_BT=ids_BT,
        document_BT=torch.zeros(rows, 8, dtype=torch.long),
        response_BT=response_BT,
        reward_BT=right_B[:, None] * response_BT.float(),
        group_BT=torch.arange(rows)[:, None].div(2, rounding_mode="floor").expand(rows, 8),
    )


def loss(critic, trunk, batch):
    hidden_BTH = trunk(batch).detach() if critic.reads_policy else None
    return critic.loss(batch, hidden_BTH).loss


def train(critic, trunk, *, steps):
    optimiser = torch.optim.AdamW(critic.parameters(), lr=1e-2)
    for step in range(steps):
        loss(critic, trunk, planted(32, seed=step)).backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("objective", ["monte_carlo", "lambda_return", "bradley_terry"])
@pytest.mark.parametrize("body", BODIES)
def test_every_objective_learns_on_every_body(trunk, body, objective):
    critic, held_out = build(trunk, objective=objective, **BODIES[body]), planted(128, seed=10_000)
    before = float(loss(critic, trunk, held_out).detach())

    train(critic, trunk, steps=80)

    after = float(loss(critic, trunk, held_out).detach())
    # Before the deciding token, nothing predicts the reward, and the states of a random trunk carry little
    # information about this token.
    assert after < 0.95 * before


def states(critic):
    return {name: tensor.clone() for name, tensor in critic.state_dict().items()}


def moved(critic, trunk):
    """Return the names of the parts of the state that three steps of training change."""
    before = states(critic)
    train(critic, trunk, steps=3)
    return {name for name, tensor in critic.state_dict().items() if not torch.equal(tensor, before[name])}


def test_all_of_an_own_trunk_learns_and_the_policy_does_not(trunk):
    was = copy.deepcopy(trunk.state_dict())
    critic = build(trunk, **BODIES["trunk"])

    changed = moved(critic, trunk)

    assert {name for name in critic.state_dict() if name.startswith("trunk.")} <= changed
    assert all(torch.equal(tensor, was[name]) for name, tensor in trunk.state_dict().items())


def test_with_adapters_only_they_and_the_head_learn(trunk):
    critic = build(trunk, **BODIES["lora"])

    changed = moved(critic, trunk)

    assert {name for name in changed if name.startswith("trunk.")} == {
        name for name in critic.state_dict() if "lora_" in name
    }
    assert any(name.startswith("net.") for name in changed)


def test_adapters_start_as_the_trunk_that_they_adapt(trunk):
    batch = planted(4, seed=0)
    values = []
    for body in ("trunk", "lora"):
        critic = build(trunk, **BODIES[body])
        critic.load_state_dict(
            {
                name: torch.full_like(tensor, 0.1) if name.startswith("net.") else tensor
                for name, tensor in critic.state_dict().items()
            }
        )
        values.append(critic.score(batch, None).value_BT)

    torch.testing.assert_close(values[0], values[1])


def test_a_trunk_of_another_model_is_requested_by_its_name(trunk):
    requested = []

    build(trunk, requested=requested, body="trunk", base="other/model")
    build(trunk, requested=requested, body="trunk")

    assert requested == ["other/model", None]


def test_the_layers_of_its_own_trunk_may_be_split_over_processes(trunk):
    assert len(build(trunk, **BODIES["trunk"]).blocks) == len(trunk.model.layers)
    assert len(build(trunk, body="frozen").blocks) == 1


def test_adapters_without_peft_are_an_error_that_says_how_to_get_it(trunk, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)

    with pytest.raises(WmtpError, match=r"adapters need the package `peft`") as caught:
        build(trunk, **BODIES["lora"])

    assert caught.value.hint == "pip install 'weighted-mtp-core[adapters]'"
