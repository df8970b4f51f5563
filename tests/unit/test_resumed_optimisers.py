"""A run that is interrupted ends with the same bits, for each optimiser and each schedule."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from weighted_mtp_core.checkpointing.manager import Checkpoints
from weighted_mtp_core.checkpointing.snapshot import Snapshot
from weighted_mtp_core.checkpointing.state import load_optimiser_state, optimiser_state
from weighted_mtp_core.recipe.schema import CheckpointTable
from weighted_mtp_core.recipe.train_table import OptimiserTable, TrainTable
from weighted_mtp_core.training.loop import Learner, StepResult, Validation, train
from weighted_mtp_core.training.optimisers import make_optimisers

STEPS, CHECKPOINT = 6, 3


class Small(Learner):
    """Learns a permutation; the last state is the best."""

    stage, loss_name = "policy", "train_loss"

    def __init__(self, folder):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Embedding(96, 64), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 96))
        self.best = folder / "best"

    def parameters(self):
        return self.module.parameters()

    def embeddings(self):
        return [*self.module[0].parameters(), *self.module[3].parameters()]

    def learn(self, batch, *, step):
        ids_N = torch.randint(0, 96, (64,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(self.module(ids_N), (ids_N * 7 + 3) % 96)
        loss.backward()
        return StepResult(loss=loss.detach(), metrics=dict)

    def validate(self, *, step):
        return Validation(metrics={}, score=float(step))

    def state_dict(self):
        return self.module.state_dict()

    def load_state_dict(self, state):
        self.module.load_state_dict(dict(state))

    def save_best(self):
        self.best.write_text("")

    def load_best(self):
        pass


class Rates:
    """Keeps the learning rate of each step."""

    def __init__(self):
        self.by_step = {}

    def metrics(self, stage, step, values):
        if "policy_learning_rate" in values:
            self.by_step[step] = values["policy_learning_rate"]

    def timings(self, stage, step, values):
        pass

    def progress(self, step, values):
        pass


def trained(folder, table, *, resume=None):
    """Train; return the tensors of the last snapshot, and the learning rate of each step."""
    folder.mkdir()
    rates = Rates()
    checkpoint = CheckpointTable(every=CHECKPOINT, keep=5)
    with Checkpoints(folder=folder, table=checkpoint, log=print) as checkpoints:
        train(
            Small(folder),
            table,
            batch_of=lambda _: type("Row", (), {"ids_BT": torch.zeros(1, 1)}),
            reporter=rates,
            checkpoints=checkpoints,
            resume=resume,
        )
    return load_file(folder / f"policy-{STEPS:08d}" / "state.safetensors"), rates.by_step


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("adamw", "cosine"),
        ("adamw", "linear"),
        ("adamw", "constant"),
        ("adamw", "wsd"),
        ("adamw_8bit", "wsd"),
        ("muon", "wsd"),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, name, schedule):
    table = TrainTable(
        steps=STEPS,
        optimiser=OptimiserTable(name=name),
        schedule=schedule,
        warmup_steps=2,
        learning_rate=0.01,
        log_every=1,
    )
    whole, rates = trained(tmp_path / "whole", table)

    snapshot = Snapshot.read(tmp_path / "whole" / f"policy-{CHECKPOINT:08d}")
    resumed, later = trained(tmp_path / "resumed", table, resume=snapshot)

    assert resumed.keys() == whole.keys()
    for key, tensor in whole.items():
        assert torch.equal(resumed[key], tensor), key
    assert later == {step: rate for step, rate in rates.items() if step > CHECKPOINT}
    kinds = {
        "adamw": {"step", "exp_avg", "exp_avg_sq"},
        "adamw_8bit": {"exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale"},
        "muon": {"momentum_buffer"},
    }
    assert {key.rpartition(".")[2] for key in whole if key.startswith("optimiser.")} >= kinds[name]


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
def test_a_state_that_is_loaded_is_a_copy(tmp_path, name):
    learner = Small(tmp_path)
    table = TrainTable(optimiser=OptimiserTable(name=name))
    parameters = list(learner.parameters())
    first, second = (
        make_optimisers(parameters, table, embeddings=learner.embeddings()) for _ in ("first", "second")
    )
    learner.learn(None, step=0)
    for each in first:
        each.step()
    state = {key: tensor.clone() for key, tensor in optimiser_state(first, parameters).items()}
    given = {key: tensor.clone() for key, tensor in state.items()}

    load_optimiser_state(second, parameters, given)
    for each in second:
        each.step()

    assert all(torch.equal(given[key], tensor) for key, tensor in state.items())
    assert optimiser_state(second, parameters).keys() == state.keys()
