"""A checkpoint holds adapters, heads and the base's digest, and resumes bit for bit on this base only."""

import pytest
import torch
from adapted_policies import OPTIONS, PLAIN, adapted, batch_of, digests, learner, new_policy
from attrs import evolve
from weighted_mtp_core.api import WmtpError
from weighted_mtp_core.checkpointing.best_model import load_model, save_model
from weighted_mtp_core.checkpointing.manager import Checkpoints
from weighted_mtp_core.checkpointing.snapshot import Snapshot
from weighted_mtp_core.checkpointing.state import module_state
from weighted_mtp_core.model.adapters import adapt
from weighted_mtp_core.recipe.schema import CheckpointTable, ModelTable, TrainTable
from weighted_mtp_core.runtime.state_digest import BASE_SHA256
from weighted_mtp_core.training.loop import train


class Losses:
    def __init__(self):
        self.by_step = {}

    def metrics(self, stage, step, values):
        if "train_loss" in values:
            self.by_step[step] = values["train_loss"]

    def timings(self, stage, step, values):
        pass

    def progress(self, step, values):
        pass


def trained(policy, folder, *, resume=None, steps=6):
    """Train with a checkpoint every 3 steps; return the loss of each step."""
    folder.mkdir(exist_ok=True)
    reporter = Losses()
    table = TrainTable(steps=steps, learning_rate=0.02, warmup_steps=0, validate_every=steps, log_every=1)
    checkpoint = CheckpointTable(every=3, keep=5)
    with Checkpoints(folder=folder, table=checkpoint, log=print) as checkpoints:
        train(
            learner(policy, best=folder / "best.pt", steps=steps),
            table,
            batch_of=batch_of,
            reporter=reporter,
            checkpoints=checkpoints,
            resume=resume,
        )
    return reporter.by_step


@pytest.mark.parametrize("options", ["plain", "dora", "adapted"])
def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(options, tmp_path):
    chosen = evolve(OPTIONS[options], dropout=0.1)
    torch.manual_seed(5)
    expected = adapted(options=chosen)
    losses = trained(expected, tmp_path / "whole")
    resumed = adapted(options=chosen)

    later = trained(
        resumed, tmp_path / "resumed", resume=Snapshot.read(tmp_path / "whole" / "policy-00000003")
    )

    assert later == {step: losses[step] for step in (4, 5, 6)}
    assert digests(resumed) == digests(expected)


def test_a_checkpoint_holds_adapters_heads_and_the_digest_of_the_base(tmp_path):
    policy = adapted()
    trained(policy, tmp_path)

    names = {name for name, each in policy.named_parameters() if each.requires_grad} | {BASE_SHA256}
    assert {*torch.load(tmp_path / "best.pt", weights_only=True)} == names
    tensors = Snapshot.read(tmp_path / "policy-00000003").part("learner")
    assert {name.removeprefix("policy.") for name in tensors if name.startswith("policy.")} == names


def test_a_checkpoint_of_another_base_is_refused(tmp_path):
    trained(adapted(), tmp_path)
    other = new_policy()
    other.trunk.embed_tokens.weight.data[3, 0] += 1e-6
    adapt(other, ModelTable(train="adapters", adapters=PLAIN))

    with pytest.raises(WmtpError, match="was trained on another base model"):
        load_model(other, tmp_path / "best.pt")
    with pytest.raises(WmtpError, match="was trained on another base model"):
        trained(other, tmp_path, resume=Snapshot.read(tmp_path / "policy-00000003"))


def test_the_best_state_is_loaded_onto_the_same_base(tmp_path):
    policy, fresh = adapted(moved=True), adapted()
    save_model(policy, tmp_path / "best.pt")

    load_model(fresh, tmp_path / "best.pt")

    assert digests(fresh) == digests(policy)
    assert len(module_state(policy)) < len(policy.state_dict())
