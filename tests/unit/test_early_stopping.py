"""Training ends after `patience` validations in a row without a better state, also in a resumed run."""

import pytest
import torch
from torch import nn
from weighted_mtp_core.checkpointing.manager import Checkpoints
from weighted_mtp_core.recipe.schema import CheckpointTable
from weighted_mtp_core.recipe.train_table import TrainTable
from weighted_mtp_core.training.loop import Learner, StepResult, Validation, train

NAN = float("nan")


class Scored(Learner):
    """Counts its steps; has the given scores at the validations."""

    stage, loss_name = "policy", "train_loss"

    def __init__(self, folder, scores):
        self.number = nn.Parameter(torch.zeros(1))
        self.best, self.scores = folder / "best", scores
        self.steps = []

    def parameters(self):
        return [self.number]

    def learn(self, batch, *, step):
        self.steps.append(step)
        loss = self.number.square().sum()
        loss.backward()
        return StepResult(loss=loss.detach(), metrics=dict)

    def validate(self, *, step):
        return Validation(metrics={"validation": float(step)}, score=self.scores[-(-step // 2)])

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        pass

    def save_best(self):
        self.best.write_text("")

    def load_best(self):
        pass


class Lines:
    """Keeps the steps of the journal's lines."""

    def __init__(self):
        self.logged, self.validated = [], []

    def metrics(self, stage, step, values):
        (self.validated if "validation" in values else self.logged).append(step)

    def timings(self, stage, step, values):
        pass

    def progress(self, step, values):
        pass


def trained(folder, scores, *, resume=False, **options):
    """Train, validating every two steps by default; the last result is the step of the last snapshot."""
    learner, lines = Scored(folder, scores), Lines()
    table = TrainTable(**{"steps": 11, "validate_every": 2, "log_every": 3, "warmup_steps": 0} | options)
    with Checkpoints(folder=folder, table=CheckpointTable(every=0), log=print) as checkpoints:
        result = train(
            learner,
            table,
            batch_of=lambda _: type("Row", (), {"ids_BT": torch.zeros(1, 1)}),
            reporter=lines,
            checkpoints=checkpoints,
            resume=checkpoints.newest() if resume else None,
        )
        return learner, result, lines, checkpoints.newest().step


@pytest.mark.parametrize(
    ("patience", "scores", "last", "best"),
    [
        (1, (0, -1, 9, 9, 9, 9, 9), 2, 0),
        (2, (0, 3, 2, 1, 9, 9, 9), 6, 2),
        (2, (0, 3, 2, 4, 3, 3, 9), 10, 6),  # a better state starts the count anew
        (2, (0, 3, 3, 3, 9, 9, 9), 6, 2),  # an equal score is not better
        (2, (0, 3, NAN, NAN, 9, 9, 9), 6, 2),
        (3, (0, 3, 2, 1, 4, 3, 2), 11, 8),  # steps 9 to 11 end with the second validation after the best
        (9, (0, 3, 2, 1, 1, 1, 1), 11, 2),
        (None, (0, -1, -2, -3, -4, -5, -6), 11, 0),
    ],
)
def test_training_ends_when_the_patience_is_exhausted(tmp_path, patience, scores, last, best):
    learner, result, lines, snapshot = trained(tmp_path, scores, patience=patience)

    assert learner.steps == list(range(last))
    assert (result.last_step, result.steps, result.best_step, snapshot) == (last, 11, best, last)
    assert lines.validated == [*range(0, last, 2), last]
    assert lines.logged == sorted({*range(3, last + 1, 3), last})


def test_the_summary_says_so(tmp_path):
    _, early, _, _ = trained(tmp_path, (0, -3, -4, 9, 9, 9, 9), patience=2)
    (tmp_path / "whole").mkdir()
    _, whole, _, _ = trained(tmp_path / "whole", (0, -3, -4, 9, 9, 9, 9))

    assert early.summary() == [
        ("policy", "held-out loss 0.000 -> 0.000 at step 0; stopped early after step 4 of 11")
    ]
    assert whole.summary() == [("policy", "held-out loss 0.000 -> 9.000 at step 6")]


def test_a_resumed_run_ends_at_the_same_step(tmp_path):
    scores = (0, 3, 2, 1, 9, 9, 9)
    trained(tmp_path, scores, steps=5)  # ends with a validation of its own
    again, result, _, _ = trained(tmp_path, scores, patience=2, resume=True)

    assert again.steps == [5]
    assert result.last_step == 6


def test_a_run_that_stopped_early_goes_on_with_more_patience_only(tmp_path):
    scores = (0, 3, 2, 1, 1, 1, 1)
    trained(tmp_path, scores, patience=2)
    same, ended, _, _ = trained(tmp_path, scores, patience=2, steps=90, resume=True)
    more, longer, _, _ = trained(tmp_path, scores, patience=3, resume=True)

    assert (same.steps, ended.last_step) == ([], 6)
    assert (more.steps, longer.last_step) == ([6, 7], 8)
