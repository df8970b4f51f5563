"""The training loop on a model small enough to follow by hand."""

import pytest
import torch
from torch import nn
from weighted_mtp_core.recipe.schema import TrainTable
from weighted_mtp_core.stages.loop import Learner, Validation, learning_rate, make_optimiser, train


def test_the_rate_warms_up_linearly_and_falls_to_its_final_share():
    table = TrainTable(steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)

    assert learning_rate(table, 0) == pytest.approx(0.1)
    assert learning_rate(table, 9) == pytest.approx(1.0)
    assert learning_rate(table, 55) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(table, 100) == pytest.approx(0.1)


def test_only_matrices_are_decayed():
    optimiser = make_optimiser(nn.Linear(3, 2).parameters(), TrainTable(weight_decay=0.5))

    decay = {p.ndim: group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}

    assert decay == {2: 0.5, 1: 0.0}


class Seen:
    def __init__(self):
        self.logged, self.timed, self.shown = [], [], []

    def metrics(self, stage, step, values):
        self.logged.append((stage, step, dict(values)))

    def timings(self, stage, step, values):
        self.timed.append((stage, step, dict(values)))

    def progress(self, step, values):
        self.shown.append((step, dict(values)))


class Fit(Learner):
    """Fits one number to 3; its validation score gets worse after step 4."""

    stage, headline = "policy", "train_loss"

    def __init__(self):
        self.number = nn.Parameter(torch.zeros(1))
        self.saved = None

    def parameters(self):
        return [self.number]

    def learn(self, batch, *, step):
        loss = (self.number - 3).square().sum()
        loss.backward()
        return {"train_loss": loss.detach()}

    def validate(self, *, step):
        return Validation(metrics={"validation": float(step)}, score=-abs(step - 4))

    def save_best(self):
        self.saved = self.number.detach().clone()

    def load_best(self):
        with torch.no_grad():
            self.number.copy_(self.saved)


class Row:
    ids_BT = torch.zeros(1, 5)


TABLE = TrainTable(steps=10, validate_every=2, log_every=5, learning_rate=0.1, warmup_steps=0)


def run(learner):
    seen = Seen()
    best = train(learner, TABLE, batch_of=lambda step: Row, reporter=seen)
    return best, seen


def test_training_lowers_the_loss():
    _, seen = run(Fit())
    losses = [values["train_loss"] for _, _, values in seen.logged if "train_loss" in values]

    assert losses[-1] < losses[0]


def test_the_best_validated_state_is_kept_and_restored():
    learner = Fit()
    best, _ = run(learner)

    assert best.best_step == 4
    assert best.start.metrics == {"validation": 0.0}
    assert torch.equal(learner.number, learner.saved)
    assert learner.number.item() != 0


def test_scalars_are_logged_every_log_every_steps_and_timings_apart():
    _, seen = run(Fit())

    assert [step for _, step, values in seen.logged if "train_loss" in values] == [5, 10]
    assert [step for _, step, _ in seen.timed] == [5, 10]
    assert all("tokens_per_second" not in name for _, _, values in seen.logged for name in values)
