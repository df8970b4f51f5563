"""Recorded weights are replayed bit for bit, and only for the batch with which they were recorded."""

import pytest
import torch
from attrs import evolve
from weighted_mtp_core.api import StepView, WeightingStrategy, Weights, WmtpError

from weighted_mtp_controls._recorded import Record, Replay


class Drawn(WeightingStrategy):
    """Returns different weights at every call."""

    def __init__(self, *, by_pair=False):
        self.generator = torch.Generator().manual_seed(3)
        self.by_pair = by_pair

    def weigh(self, view):
        shape = view.target_BTK.shape if self.by_pair else view.response_BT.shape
        mask = view.target_BTK if self.by_pair else view.response_BT
        return Weights(weight=torch.rand(shape, generator=self.generator) * mask)


@pytest.fixture
def view():
    response_BT = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)
    return StepView(
        ids_BT=torch.tensor([[5, 6, 7, 8], [5, 9, 6, 0]]),
        document_BT=torch.tensor([[0, 0, 0, 0], [0, 0, 0, -1]]),
        response_BT=response_BT,
        target_BTK=response_BT[:, :, None].expand(-1, -1, 2),
        n_future=2,
        step=0,
        training=True,
        reward_BT=None,
        group_BT=None,
        value_BT=None,
        token_loss_BTK=None,
        reference_loss_BT=None,
    )


@pytest.mark.parametrize("by_pair", [False, True])
def test_each_step_gets_its_recorded_weights(tmp_path, view, by_pair):
    record = Record(Drawn(by_pair=by_pair), folder=tmp_path / "kept")
    steps = [evolve(view, step=step) for step in range(4)]
    had = [record.weigh(step).weight for step in steps]

    replay = Replay(folder=tmp_path / "kept")

    for step in (2, 0, 3, 1):
        assert torch.equal(replay.weigh(steps[step]).weight, had[step])


def test_a_mixture_of_the_weights_of_two_runs_is_refused(tmp_path, view):
    """A second run records under the same name and ends early."""
    first, second = Record(Drawn(), folder=tmp_path), Record(Drawn(by_pair=True), folder=tmp_path)
    for step in range(4):
        first.weigh(evolve(view, step=step))
    for step in range(2):
        second.weigh(evolve(view, step=step))
    replay = Replay(folder=tmp_path)

    for step in (0, 1):
        replay.weigh(evolve(view, step=step))
    for each in (replay, Replay(folder=tmp_path)):  # a replay that resumes at step 2 also refuses step 2
        with pytest.raises(WmtpError, match="two runs recorded the weights of the steps 1 and 2 in"):
            each.weigh(evolve(view, step=2))
    Replay(folder=tmp_path).weigh(evolve(view, step=3))


def test_a_resumed_run_continues_its_record(tmp_path, view):
    first = Record(Drawn(), folder=tmp_path)
    for step in range(3):
        first.weigh(evolve(view, step=step))
        if step == 1:
            state = first.state_dict()
    resumed = Record(Drawn(), folder=tmp_path)
    resumed.load_state_dict(state)
    for step in range(2, 4):
        resumed.weigh(evolve(view, step=step))

    replay = Replay(folder=tmp_path)
    for step in range(4):
        replay.weigh(evolve(view, step=step))


def test_validation_is_not_recorded(tmp_path, view):
    Record(Drawn(), folder=tmp_path / "kept").weigh(evolve(view, training=False))

    assert not (tmp_path / "kept").exists()


def test_another_batch_is_refused(tmp_path, view):
    Record(Drawn(), folder=tmp_path).weigh(view)
    replay = Replay(folder=tmp_path)

    for other in (view.ids_BT + 1, torch.cat([view.ids_BT, view.ids_BT])):
        rows = len(other) // 2
        document_BT = view.document_BT.repeat(rows, 1)
        with pytest.raises(WmtpError, match=r"step 0 in .* belong to another batch"):
            replay.weigh(evolve(view, ids_BT=other, document_BT=document_BT))


def test_padding_does_not_identify_a_batch(tmp_path, view):
    Record(Drawn(), folder=tmp_path).weigh(view)
    otherwise_padded = view.ids_BT.where(view.document_BT >= 0, 39)

    Replay(folder=tmp_path).weigh(evolve(view, ids_BT=otherwise_padded))


def test_a_step_that_was_not_recorded_is_an_error(tmp_path, view):
    Record(Drawn(), folder=tmp_path).weigh(view)

    with pytest.raises(WmtpError, match="the weights of step 1 were not recorded"):
        Replay(folder=tmp_path).weigh(evolve(view, step=1))


def test_a_damaged_file_is_an_error_that_names_it(tmp_path, view):
    Record(Drawn(), folder=tmp_path).weigh(view)
    (tmp_path / "step-00000000.safetensors").write_bytes(b"something else")

    with pytest.raises(WmtpError, match=r"step-00000000\.safetensors` holds no recorded weights"):
        Replay(folder=tmp_path).weigh(view)


def test_a_name_without_recorded_weights_is_an_error(tmp_path):
    with pytest.raises(WmtpError, match="there are no recorded weights in"):
        Replay(folder=tmp_path / "absent")
