"""The heads' shares of the loss, compared with numbers worked out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weighted_mtp_core.model.loss_shares import loss_shares
from weighted_mtp_core.recipe.schema import LossTable

SCHEDULES = ("constant", "linear", "step", "forward", "reverse")


def shares(n_future, progress=0.0, **keys):
    return loss_shares(LossTable(**keys), n_future, progress=progress).tolist()


def test_shares_are_equal_by_default():
    assert shares(1) == [1.0]
    assert shares(4) == [0.25, 0.25, 0.25, 0.25]


def test_decay_is_a_power_of_the_distance():
    assert shares(3, head_decay=0.5) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert shares(3, head_decay=2.0) == pytest.approx([1 / 7, 2 / 7, 4 / 7])


def test_listed_weights_are_divided_by_their_sum():
    assert shares(3, head_weights=(2.0, 1.0, 1.0)) == [0.5, 0.25, 0.25]
    assert shares(2, head_weights=(0.0, 3.0)) == [0.0, 1.0]


def test_decay_multiplies_listed_weights():
    assert shares(2, head_weights=(1.0, 2.0), head_decay=0.25) == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        ("constant", {0.0: [1 / 4] * 4, 0.9: [1 / 4] * 4}),
        # weight of heads 2..4: 0, 1/4, 1/2 and 1; of head 1: 1
        (
            "linear",
            {
                0.0: [1, 0, 0, 0],
                0.125: [4 / 7, 1 / 7, 1 / 7, 1 / 7],
                0.25: [2 / 5, 1 / 5, 1 / 5, 1 / 5],
                0.5: [1 / 4] * 4,
                0.99: [1 / 4] * 4,
            },
        ),
        ("step", {0.0: [1, 0, 0, 0], 0.49: [1, 0, 0, 0], 0.5: [1 / 4] * 4, 0.99: [1 / 4] * 4}),
        # four phases that begin at 0, 0.125, 0.25 and 0.375
        (
            "forward",
            {
                0.0: [1, 0, 0, 0],
                0.12: [1, 0, 0, 0],
                0.125: [1 / 2, 1 / 2, 0, 0],
                0.25: [1 / 3, 1 / 3, 1 / 3, 0],
                0.375: [1 / 4] * 4,
                0.99: [1 / 4] * 4,
            },
        ),
        (
            "reverse",
            {
                0.0: [1 / 4] * 4,
                0.125: [1 / 3, 1 / 3, 1 / 3, 0],
                0.25: [1 / 2, 1 / 2, 0, 0],
                0.375: [1, 0, 0, 0],
                0.99: [1, 0, 0, 0],
            },
        ),
    ],
)
def test_a_schedule_adds_or_removes_heads(schedule, at):
    found = {progress: shares(4, progress, head_schedule=schedule) for progress in at}

    assert found == {progress: pytest.approx(expected) for progress, expected in at.items()}


def test_a_schedule_may_last_the_whole_training_and_scales_the_weights():
    def found(progress):
        return shares(
            2,
            progress,
            head_schedule="linear",
            head_schedule_end=1.0,
            head_weights=(1.0, 4.0),
            head_decay=0.5,
        )

    assert found(0.0) == [1, 0]
    assert found(0.5) == pytest.approx([1 / 2, 1 / 2])  # 1 and 4 * 0.5 * 0.5
    assert found(1.0) == pytest.approx([1 / 3, 2 / 3])


@given(
    st.sampled_from(SCHEDULES),
    st.integers(1, 16),
    st.floats(0, 1),
    st.floats(0.01, 100),
    st.floats(0.01, 1),
)
def test_shares_sum_to_1_and_head_1_always_has_a_share(schedule, n_future, progress, decay, end):
    length = {} if schedule == "constant" else {"head_schedule_end": end}
    table = LossTable(head_schedule=schedule, head_decay=decay, **length)
    share_K = loss_shares(table, n_future, progress=progress)

    assert share_K.dtype == torch.float32
    assert float(share_K.sum()) == pytest.approx(1, abs=1e-5)
    assert share_K[0] > 0
    assert (share_K >= 0).all()
