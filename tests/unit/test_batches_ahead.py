"""The next batch is made while an accelerator computes; which batch a step gets never changes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weighted_mtp_core.runtime.device import to_device
from weighted_mtp_core.training.batches_ahead import BatchesAhead

ACCELERATOR, CPU = torch.device("meta"), torch.device("cpu")


def batches(device, steps=3):
    made = []

    def batch_of(step):
        made.append(step)
        return f"batch {step}"

    return BatchesAhead(batch_of, steps, device), made


def test_on_an_accelerator_each_batch_is_made_once_and_a_step_ahead():
    ahead, made = batches(ACCELERATOR)
    when = []
    for step in range(3):
        assert ahead(step) == f"batch {step}"
        ahead.prepare(step + 1)
        when.append(list(made))

    assert when == [[0, 1], [0, 1, 2], [0, 1, 2]]  # the stage has no step 3


def test_on_a_cpu_a_batch_is_made_when_its_step_begins():
    ahead, made = batches(CPU)
    ahead(0)
    ahead.prepare(1)

    assert made == [0]


@pytest.mark.parametrize("device", [ACCELERATOR, CPU], ids=str)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9))))
def test_a_step_gets_its_own_batch_whatever_was_prepared(device, calls):
    ahead, _ = batches(device, steps=10)
    for prepares, step in calls:
        if prepares:
            ahead.prepare(step)
        else:
            assert ahead(step) == f"batch {step}"


def test_on_a_cpu_a_copy_to_the_device_copies_nothing():
    tensor = torch.ones(3)

    assert to_device(tensor, CPU).data_ptr() == tensor.data_ptr()
