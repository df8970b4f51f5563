"""Checkpoints whose tensors are split over processes."""

import pickle

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from weighted_mtp_core.api import WmtpError
from weighted_mtp_core.checkpointing.shards import Shards, write_shards
from weighted_mtp_core.checkpointing.snapshot import Snapshot
from weighted_mtp_core.checkpointing.state import load_optimiser_state, optimiser_state
from weighted_mtp_core.checkpointing.whole_files import write_safetensors, write_torch
from weighted_mtp_core.runtime.distributed import Distributed
from weighted_mtp_core.storage.manifest import write_manifest

WHOLE = {
    "learner.matrix": torch.arange(35.0).view(7, 5),
    "learner.half": torch.ones(3, dtype=torch.bfloat16),
    "optimiser.0.step": torch.tensor(4.0),
    "rng.torch": torch.arange(16, dtype=torch.uint8),
}


@pytest.fixture(scope="module")
def distributed():
    """Return a group of one process; groups of several are in tests/e2e/test_processes.py."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Distributed(control_group=dist.group.WORLD)
    dist.destroy_process_group()


@pytest.fixture
def tensors(distributed):
    mesh = init_device_mesh("cpu", (1,))
    return {**WHOLE, "learner.matrix": distribute_tensor(WHOLE["learner.matrix"], mesh, [Shard(0)])}


def test_each_tensor_comes_back_whole_with_its_type(distributed, tensors, tmp_path):
    write_shards(tensors, tmp_path / "shards", distributed)

    read = Shards(tmp_path / "shards")

    assert read.keys() == WHOLE.keys()
    for name, tensor in WHOLE.items():
        assert torch.equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype


def test_an_optimisers_state_is_sharded_again_as_its_parameters_are(tensors):
    parameter = nn.Parameter(tensors["learner.matrix"])
    optimiser = torch.optim.AdamW([parameter], fused=True)
    state = {"0.step": torch.tensor(4.0), "0.exp_avg": torch.ones(7, 5), "0.exp_avg_sq": torch.ones(7, 5)}

    load_optimiser_state([optimiser], [parameter], state)

    found = optimiser_state([optimiser], [parameter])
    assert found.keys() == state.keys()
    assert found["0.step"] == 4
    for name in ("0.exp_avg", "0.exp_avg_sq"):
        assert isinstance(found[name], DTensor)
        assert found[name].placements == parameter.placements
        assert torch.equal(found[name].full_tensor(), state[name])


def test_a_part_that_cannot_be_written_is_an_error_of_the_system(distributed, tensors, tmp_path):
    (tmp_path / "shards").write_text("in the way")

    with pytest.raises(OSError, match="could not write its part"):
        write_shards(tensors, tmp_path / "shards", distributed)


@pytest.fixture
def snapshot(distributed, tensors, tmp_path):
    best = tmp_path / "best_model.pt"
    best.write_bytes(b"the best")
    folder = tmp_path / "policy-00000004"
    folder.mkdir()
    taken = Snapshot(stage="policy", step=4, tensors=tensors, values={"learner": {"n": 3}}, best=best)
    taken.write(folder, distributed)
    write_manifest(folder)
    return folder


def test_a_snapshot_of_split_tensors_gives_its_parts_by_name(snapshot):
    part = Snapshot.read(snapshot).part("learner")

    assert set(part) == {"matrix", "half", "n"}
    assert part["n"] == 3
    assert torch.equal(part["matrix"], WHOLE["learner.matrix"])


def test_a_payload_in_place_of_a_part_never_runs(snapshot, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (part,) = (snapshot / "shards").iterdir()
    part.write_bytes(pickle.dumps(Payload()))
    write_manifest(snapshot)

    with pytest.raises(WmtpError, match="cannot be read"):
        Snapshot.read(snapshot)

    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("write", "read"),
    [(write_torch, lambda path: torch.load(path, weights_only=True)), (write_safetensors, load_file)],
)
def test_one_file_has_each_tensor_whole_under_all_its_names(write, read, distributed, tensors, tmp_path):
    given = {**tensors, "tied": tensors["learner.matrix"], "empty": torch.zeros(0, 3)}

    write(given, tmp_path / "file", distributed)

    found = read(tmp_path / "file")
    assert found.keys() == given.keys()
    for name, tensor in {**WHOLE, "tied": WHOLE["learner.matrix"], "empty": torch.zeros(0, 3)}.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
