"""Decisions that several processes must make alike, although their numbers differ by rounding."""

import multiprocessing
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from weighted_mtp_core.checkpointing.manager import Checkpoints
from weighted_mtp_core.recipe.schema import CheckpointTable, TrainTable
from weighted_mtp_core.runtime.distributed import Distributed
from weighted_mtp_core.training.loop import Learner, StepResult, Validation, train


class Together(Learner):
    """Saves with all processes; its scores go up in the first process and down in the second one."""

    stage, loss_name = "policy", "train_loss"

    def __init__(self, folder, distributed):
        self.number, self.distributed = nn.Parameter(torch.zeros(1)), distributed
        self.best = folder / "best"
        self.saved = 0
        self.drawn = []

    def parameters(self):
        return [self.number]

    def learn(self, batch, *, step):
        self.drawn.append(float(torch.rand(1 + self.distributed.rank)[0]))  # like dropout on uneven parts
        loss = (self.number - 3).square().sum()
        loss.backward()
        return StepResult(loss=loss.detach(), metrics=dict)

    def validate(self, *, step):
        return Validation(metrics={}, score=step * 1e-9 * (1 - 2 * self.distributed.rank))

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        raise AssertionError

    def save_best(self):
        self.distributed.barrier()
        self.saved += 1
        if self.distributed.is_rank_zero:
            self.best.write_text(str(self.saved))

    def load_best(self):
        pass


class Silence:
    def metrics(self, stage, step, values):
        pass

    timings = metrics

    def progress(self, step, values):
        pass


def train_as(rank, folder, results):
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    distributed = Distributed(rank=rank, size=2, control_group=dist.new_group(backend="gloo"))
    learner = Together(folder, distributed)
    table = TrainTable(steps=4, validate_every=2)
    with Checkpoints(
        folder=folder, table=CheckpointTable(), log=print, distributed=distributed
    ) as checkpoints:
        trained = train(
            learner,
            table,
            batch_of=lambda _: type("Row", (), {"ids_BT": torch.zeros(1, 1)}),
            reporter=Silence(),
            checkpoints=checkpoints,
            distributed=distributed,
        )
    results.put((rank, learner.saved, trained.best_step, learner.drawn))
    distributed.shutdown()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What each of two processes reports after training: its rank, saves, best step and random numbers."""
    context, folder = multiprocessing.get_context("fork"), tmp_path_factory.mktemp("together")
    results = context.Queue()
    processes = [context.Process(target=train_as, args=(rank, folder, results)) for rank in (0, 1)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        for process in processes:
            process.start()
    found = sorted(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    return found


def test_the_first_process_decides_for_all_which_state_is_the_best(trained):
    assert [each[:3] for each in trained] == [(0, 3, 4), (1, 3, 4)]


def test_each_step_begins_with_the_same_random_state_in_all_processes(trained):
    first, second = (drawn for *_, drawn in trained)

    assert first == second
    assert len(set(first)) == len(first) == 4


@given(st.integers(1, 40), st.integers(1, 9))
def test_shares_hold_each_item_once_and_are_filled_up_to_the_same_number(count, size):
    items = list(range(count))
    shares = [Distributed(rank=rank, size=size).shard_evenly(items, spare=-1) for rank in range(size)]

    assert len({len(share) for share in shares}) == 1
    assert [item for share in shares for item in share if item >= 0] == items
    assert all(share.count(-1) <= 1 for share in shares)
