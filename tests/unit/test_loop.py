"""The training loop on a model small enough to follow by hand."""

import json
import os
import resource
import signal
import time
from contextlib import suppress

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from weighted_mtp_core.checkpointing.manager import Checkpoints
from weighted_mtp_core.errors import RunFailedError, Terminated
from weighted_mtp_core.recipe.schema import CheckpointTable, TrainTable
from weighted_mtp_core.runtime.interrupts import raise_on_termination
from weighted_mtp_core.storage.atomic import atomic_write
from weighted_mtp_core.training.loop import Learner, StepResult, Validation, train
from weighted_mtp_core.training.optimisers import make_optimisers
from weighted_mtp_core.training.schedules import learning_rate


def test_the_rate_warms_up_linearly_and_falls_to_its_final_share():
    table = TrainTable(steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)

    assert learning_rate(table, 0) == pytest.approx(0.1)
    assert learning_rate(table, 9) == pytest.approx(1.0)
    assert learning_rate(table, 55) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(table, 100) == pytest.approx(0.1)


def test_only_matrices_are_decayed():
    (optimiser,) = make_optimisers(nn.Linear(3, 2).parameters(), TrainTable(weight_decay=0.5))

    decay = {p.ndim: group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}

    assert decay == {2: 0.5, 1: 0.0}


class Seen:
    """Collects what the loop reports; calls `at[step]` when a step's scalars are reported first."""

    def __init__(self, at=None):
        self.logged, self.timed, self.shown = [], [], []
        self.at = dict(at or {})

    def metrics(self, stage, step, values):
        self.logged.append((stage, step, dict(values)))
        self.at.pop(step, lambda: None)()

    def timings(self, stage, step, values):
        self.timed.append((stage, step, dict(values)))

    def progress(self, step, values):
        self.shown.append((step, dict(values)))


class Fit(Learner):
    """Fits one number to 3, with noise from the global generator; its score gets worse after step 4."""

    stage, loss_name = "policy", "train_loss"

    def __init__(self, folder, bad=()):
        self.number = nn.Parameter(torch.zeros(1))
        self.best = folder / "best.safetensors"
        self.bad = bad

    def parameters(self):
        return [self.number]

    def learn(self, batch, *, step):
        loss = (self.number - 3 + 0.01 * torch.randn(1)).square().sum()
        if step in self.bad:
            loss = loss * float("nan")
        loss.backward()
        return StepResult(loss=loss.detach(), metrics=dict)

    def validate(self, *, step):
        return Validation(metrics={"validation": float(step)}, score=-abs(step - 4))

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        with torch.no_grad():
            self.number.copy_(state["number"])

    def save_best(self):
        temporary = self.best.with_suffix(".new")
        save_file({"number": self.number.detach().clone()}, temporary)
        temporary.replace(self.best)

    def load_best(self):
        self.load_state_dict(load_file(self.best))


class Row:
    ids_BT = torch.zeros(1, 5)

    def __init__(self, step):
        self.example_ids = (f"example {step}",)


TABLE = TrainTable(
    steps=10, validate_every=2, log_every=5, learning_rate=0.1, warmup_steps=0, max_bad_steps=3
)


@pytest.fixture
def checkpoints(tmp_path):
    said = []
    with Checkpoints(folder=tmp_path, table=CheckpointTable(every=3, keep=2), log=said.append) as checkpoints:
        yield checkpoints
    assert said == []


def run(learner, checkpoints, *, table=TABLE, at=None, resume=None):
    seen = Seen(at)
    if resume is None:
        torch.manual_seed(1)
    best = train(learner, table, batch_of=Row, reporter=seen, checkpoints=checkpoints, resume=resume)
    return best, seen


def kill_myself(number):
    return lambda: os.kill(os.getpid(), number)


def test_training_lowers_the_loss(tmp_path, checkpoints):
    _, seen = run(Fit(tmp_path), checkpoints)
    losses = [values["train_loss"] for _, _, values in seen.logged if "train_loss" in values]

    assert losses[-1] < losses[0]


def test_the_best_validated_state_is_kept_and_restored(tmp_path, checkpoints):
    learner = Fit(tmp_path)
    best, _ = run(learner, checkpoints)

    assert best.best_step == 4
    assert best.start.metrics == {"validation": 0.0}
    assert torch.equal(learner.number, load_file(learner.best)["number"])
    assert learner.number.item() != 0


def test_scalars_are_logged_every_log_every_steps_and_timings_apart(tmp_path, checkpoints):
    _, seen = run(Fit(tmp_path), checkpoints)

    assert [step for _, step, values in seen.logged if "train_loss" in values] == [5, 10]
    assert [step for _, step, _ in seen.timed] == [5, 10]
    assert all("tokens_per_second" not in name for _, _, values in seen.logged for name in values)


def test_other_scalars_than_the_loss_are_computed_only_for_steps_that_are_logged(tmp_path, checkpoints):
    computed = []

    class Measured(Fit):
        def learn(self, batch, *, step):
            def metrics():
                computed.append(step + 1)
                return {"costly": float(step)}

            return attrs.evolve(super().learn(batch, step=step), metrics=metrics)

    _, seen = run(Measured(tmp_path), checkpoints)

    assert computed == [5, 10]
    assert [values["costly"] for _, _, values in seen.logged if "train_loss" in values] == [4, 9]


def test_a_training_goes_on_from_each_checkpoint_to_the_same_bits(tmp_path, checkpoints):
    whole = Fit(tmp_path)
    best, seen = run(whole, checkpoints, table=TABLE)
    last = load_file(tmp_path / "policy-00000010" / "state.safetensors")
    snapshot = checkpoints.newest()
    while snapshot.step != 9:  # the one before the last
        (tmp_path / f"policy-{snapshot.step:08d}").rename(tmp_path / "aside")
        snapshot = checkpoints.newest()

    again, resumed = run(Fit(tmp_path), checkpoints, resume=snapshot)

    assert load_file(tmp_path / "policy-00000010" / "state.safetensors").keys() == last.keys()
    assert all(
        torch.equal(tensor, last[name])
        for name, tensor in load_file(tmp_path / "policy-00000010" / "state.safetensors").items()
    )
    assert again == best
    assert resumed.logged == [each for each in seen.logged if each[1] > 9]


def test_the_best_state_of_a_checkpoint_outlives_a_better_one_that_was_lost(tmp_path, checkpoints):
    def after_step_4():
        raise RuntimeError("the node is gone")

    with pytest.raises(RuntimeError, match="gone"):
        run(Fit(tmp_path), checkpoints, at={5: after_step_4})
    snapshot = checkpoints.newest()
    lost = load_file(tmp_path / "best.safetensors")["number"]

    assert (snapshot.step, snapshot.values["trained"]["best_step"]) == (3, 2)
    snapshot.restore_best(tmp_path / "best.safetensors")
    assert not torch.equal(load_file(tmp_path / "best.safetensors")["number"], lost)


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated), (signal.SIGHUP, Terminated)],
)
def test_a_signal_ends_training_after_the_step_with_a_checkpoint(tmp_path, checkpoints, number, raised):
    with pytest.raises(raised) as caught:
        run(Fit(tmp_path), checkpoints, at={4: kill_myself(number)})

    assert type(caught.value) is raised
    assert checkpoints.newest().step == 4


def test_a_second_signal_ends_training_at_once(tmp_path, checkpoints):
    def twice():
        kill_myself(signal.SIGTERM)()
        kill_myself(signal.SIGTERM)()

    with pytest.raises(Terminated):
        run(Fit(tmp_path), checkpoints, at={4: twice})

    checkpoints.wait()
    assert checkpoints.newest().step == 3


def test_sigusr1_takes_a_checkpoint_and_training_goes_on(tmp_path, checkpoints):
    taken = []

    def look():
        checkpoints.wait()
        taken.extend(path.name for path in tmp_path.glob("policy-*"))

    run(Fit(tmp_path), checkpoints, at={4: kill_myself(signal.SIGUSR1), 5: look})

    assert "policy-00000004" in taken


def test_sigusr1_before_training_takes_a_checkpoint_after_the_first_step(tmp_path, checkpoints):
    taken = []

    def look():
        checkpoints.wait()
        taken.extend(path.name for path in tmp_path.glob("policy-*"))

    with raise_on_termination():
        kill_myself(signal.SIGUSR1)()
    run(Fit(tmp_path), checkpoints, at={2: look})

    assert taken == ["policy-00000001"]


def test_a_step_without_a_finite_loss_changes_nothing_and_is_counted(tmp_path, checkpoints):
    learner = Fit(tmp_path, bad={0, 1})
    after = {}

    def look():
        after[2] = learner.number.item()

    _, seen = run(learner, checkpoints, at={2: look})

    assert after == {2: 0.0}
    assert [v["policy_skipped_steps"] for _, _, v in seen.logged if "policy_skipped_steps" in v] == [2, 2]


def test_too_many_steps_in_a_row_without_a_finite_loss_stop_the_run_and_name_the_examples(
    tmp_path, checkpoints
):
    with pytest.raises(
        RunFailedError, match="3 steps in a row, up to step 7 of stage `policy`, had no finite"
    ):
        run(Fit(tmp_path, bad={1, 4, 5, 6}), checkpoints)

    assert json.loads((tmp_path / "bad_steps.json").read_text()) == {
        "5": ["example 4"],
        "6": ["example 5"],
        "7": ["example 6"],
    }


def test_fifty_resumes_in_a_row_change_nothing(tmp_path):
    folders = tmp_path / "whole", tmp_path / "resumed"
    table = TrainTable(steps=50, validate_every=7, log_every=1, learning_rate=0.1, warmup_steps=5)
    logged = []
    for folder in folders:
        folder.mkdir()
    with Checkpoints(folder=folders[0], table=CheckpointTable(), log=print) as checkpoints:
        _, seen = run(Fit(folders[0]), checkpoints, table=table)

    for step in range(1, 51):
        with Checkpoints(folder=folders[1], table=CheckpointTable(), log=print) as checkpoints:
            at = {step: kill_myself(signal.SIGTERM)} if step < 50 else {}
            torch.manual_seed(1 if step == 1 else 99)
            resumed = Seen(at)
            with suppress(Terminated):
                train(
                    Fit(folders[1]),
                    table,
                    batch_of=Row,
                    reporter=resumed,
                    checkpoints=checkpoints,
                    resume=checkpoints.newest(),
                )
            logged += resumed.logged

    assert logged == seen.logged
    assert (folders[1] / "best.safetensors").read_bytes() == (folders[0] / "best.safetensors").read_bytes()


class Scores(Fit):
    """Has the given scores at steps 0, 2, 4, ..."""

    def __init__(self, folder, scores, seconds=0.0):
        super().__init__(folder)
        self.scores, self.seconds = scores, seconds

    def validate(self, *, step):
        time.sleep(self.seconds if step == 0 else 0)
        return Validation(metrics={"validation": float(step)}, score=self.scores[step // 2])


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ((NAN, -3.0, -2.0, NAN, -2.5, NAN), 4),
        ((NAN, NAN, NAN, NAN, NAN, -9.0), 10),
        ((-INFINITE, -3.0, -4.0, -5.0, -6.0, -7.0), 2),
        ((INFINITE, -3.0, -4.0, -5.0, -6.0, -7.0), 2),
        ((-1.0, INFINITE, NAN, -2.0, -INFINITE, -1.5), 0),
    ],
)
def test_a_score_that_is_not_finite_loses_against_any_finite_one(tmp_path, checkpoints, scores, best):
    trained, _ = run(Scores(tmp_path, scores), checkpoints)

    assert trained.best_step == best
    assert trained.best.score == scores[best // 2]


def test_a_run_resumed_after_a_score_of_nan_still_finds_the_best(tmp_path, checkpoints):
    scores = (NAN, NAN, -4.0, -3.0, -5.0, -6.0)
    whole, _ = run(
        Scores(tmp_path, scores), checkpoints, at={5: lambda: os.kill(os.getpid(), signal.SIGUSR1)}
    )
    resumed, _ = run(Scores(tmp_path, scores), checkpoints, resume=checkpoints.newest())

    assert (whole.best_step, resumed.best_step) == (6, 6)


def test_without_any_finite_score_the_run_fails(tmp_path, checkpoints):
    with pytest.raises(
        RunFailedError, match=r"no validation of stage `policy` gave a finite score, .* the first gave nan"
    ):
        run(Scores(tmp_path, (NAN, -INFINITE, NAN, NAN, NAN, NAN)), checkpoints)


def test_the_first_validation_is_not_part_of_the_tokens_per_second(tmp_path, checkpoints):
    _, seen = run(Scores(tmp_path, (0.0,) * 6, seconds=1.0), checkpoints)

    tokens = 5 * TABLE.log_every
    assert seen.timed[0][2]["policy_tokens_per_second"] > 2 * tokens / 1.0  # the steps take milliseconds


def test_a_best_state_that_cannot_be_written_ends_the_run_with_the_way_to_continue(tmp_path, checkpoints):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    learner = Fit(tmp_path)
    learner.save_best = lambda: atomic_write(learner.best, bytes(200_000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(RunFailedError, match=r"cannot write the checkpoint `.*best") as caught:
            train(learner, TABLE, batch_of=Row, reporter=Seen(), checkpoints=checkpoints)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert f"run RECIPE --resume {tmp_path.parent.name}" in caught.value.hint
    assert not learner.best.exists()
