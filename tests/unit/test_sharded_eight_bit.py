"""AdamW with 8-bit moments on sharded parameters: equal to one process, which can resume from the shards."""

import multiprocessing
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from weighted_mtp_core.checkpointing.shards import Shards, write_shards
from weighted_mtp_core.checkpointing.state import load_optimiser_state, optimiser_state
from weighted_mtp_core.recipe.train_table import OptimiserTable, TrainTable
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS, Distributed
from weighted_mtp_core.runtime.fsdp import shard
from weighted_mtp_core.runtime.sharding import local, mesh_of, whole
from weighted_mtp_core.training.optimisers import make_optimisers

TABLE = TrainTable(optimiser=OptimiserTable(name="adamw_8bit"), learning_rate=0.01, weight_decay=0.1)
SHAPES = {"even": (64, 128), "odd": (65, 256), "small": (64, 64)}
"""`even` has two shards of 4096 values. The shards of `odd` differ in size.

The shards of `small` have fewer than the 4096 values that moments of 8 bits need.
"""


class Tensors(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, step):
        """A loss whose gradient is noise, the same in each process."""
        generator = torch.Generator().manual_seed(step)
        drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        return sum((self.get_parameter(name) * noise).sum() for name, noise in drawn.items())


def stepped(module, optimiser, steps, distributed=SINGLE_PROCESS):
    for step in steps:
        (module(step) / distributed.size).backward()
        optimiser.step()
        optimiser.zero_grad()


def train_as(rank, folder):
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    distributed = Distributed(rank=rank, size=2, control_group=dist.new_group(backend="gloo"))
    try:
        torch.set_num_threads(1)
        module = Tensors()
        shard([module], mesh_of(distributed, torch.device("cpu")))
        (optimiser,) = make_optimisers(module.parameters(), TABLE)
        stepped(module, optimiser, range(3), distributed)
        parameters = list(module.parameters())
        state = optimiser_state([optimiser], parameters)
        write_shards(state, folder / "state" if rank == 0 else None, distributed)
        at_three = {name: whole(each.detach()).clone() for name, each in module.named_parameters()}
        stepped(module, optimiser, range(3, 6), distributed)
        last = {name: whole(each.detach()).clone() for name, each in module.named_parameters()}
        (again,) = make_optimisers(parameters, TABLE)
        load_optimiser_state([again], parameters, Shards(folder / "state"))
        loaded = optimiser_state([again], parameters)
        assert {name: each.shape for name, each in loaded.items()} == {
            name: each.shape for name, each in state.items()
        }
        assert all(local(loaded[name]).shape == local(each).shape for name, each in state.items())
        codes = [name for name, each in module.named_parameters() if "exp_avg_codes" in again.state[each]]
        if rank == 0:
            torch.save((at_three, last, codes), folder / "results.pt")
    finally:
        distributed.shutdown()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_sharded_processes_train_as_one_does_and_one_goes_on_with_their_checkpoint(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=train_as, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    at_three, last, codes = torch.load(tmp_path / "results.pt")

    alone = Tensors()
    (optimiser,) = make_optimisers(alone.parameters(), TABLE)
    stepped(alone, optimiser, range(6))
    resumed = Tensors()
    resumed.load_state_dict(at_three)
    (again,) = make_optimisers(resumed.parameters(), TABLE)
    load_optimiser_state([again], list(resumed.parameters()), Shards(tmp_path / "state"))
    stepped(resumed, again, range(3, 6))

    assert codes == ["even"]
    assert [process.exitcode for process in processes] == [0, 0]
    assert torch.equal(last["even"], alone.even)  # the same blocks as in one process
    assert torch.equal(resumed.even, alone.even)
    for name in ("odd", "small"):  # these have moments of 32 bits
        moved = (alone.get_parameter(name) - Tensors().get_parameter(name)).norm()
        assert (last[name] - alone.get_parameter(name)).norm() < 0.05 * moved
        torch.testing.assert_close(resumed.get_parameter(name).detach(), last[name], rtol=0, atol=1e-6)


def test_moments_of_8_bits_become_32_bits_where_shards_cut_their_blocks(tmp_path):
    one = Tensors()
    (optimiser,) = make_optimisers(one.parameters(), TABLE)
    stepped(one, optimiser, range(2))
    state = {name: tensor.clone() for name, tensor in optimiser.state[one.even].items()}
    cut = nn.Parameter(torch.zeros(63, 130))  # its size is no multiple of 256

    found = optimiser.adopt(cut, state)

    assert set(found) == {"step", "exp_avg", "exp_avg_sq"}
    noise = [torch.randn(SHAPES["even"], generator=torch.Generator().manual_seed(step)) for step in range(2)]
    mean = 0.9 * 0.1 * noise[0] + 0.1 * noise[1]
    assert (found["exp_avg"] - mean).norm() < 0.02 * mean.norm()
    assert optimiser.adopt(one.even, state) is state
