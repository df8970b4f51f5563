"""Checkpoints are complete or absent, are found by step, and cannot execute code when they are loaded."""

import copy
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from weighted_mtp_core.checkpointing.best_model import load_model, save_model
from weighted_mtp_core.checkpointing.manager import Checkpoints, _lower_priority
from weighted_mtp_core.checkpointing.snapshot import Snapshot
from weighted_mtp_core.checkpointing.state import (
    copy_state,
    load_module_state,
    load_optimiser_state,
    module_state,
    optimiser_state,
    random_state,
    restore_random_state,
)
from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.recipe.schema import CheckpointTable
from weighted_mtp_core.recipe.train_table import OptimiserTable, TrainTable
from weighted_mtp_core.storage.atomic import atomic_write
from weighted_mtp_core.storage.manifest import write_manifest
from weighted_mtp_core.training.optimisers import make_optimisers


@pytest.fixture
def said():
    return []


@pytest.fixture
def open_checkpoints(tmp_path, said):
    def open_checkpoints(**table):
        return Checkpoints(folder=tmp_path, table=CheckpointTable(**table), log=said.append)

    return open_checkpoints


def snapshot(folder, step, *, stage="policy", numbers=1000):
    best = folder / "best_model.pt"
    atomic_write(best, b"best at %d" % step)  # never in place: older checkpoints link to it
    return Snapshot(
        stage=stage,
        step=step,
        tensors={"learner.weight": torch.full((numbers,), float(step))},
        values={"learner": {"count": step}},
        best=best,
    )


def saved(checkpoints, *steps, stage="policy"):
    with checkpoints:
        for step in steps:
            checkpoints.save(snapshot(checkpoints.folder, step, stage=stage))
            checkpoints.wait()
    return checkpoints


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_a_snapshot_is_read_back_as_it_was(open_checkpoints):
    read = saved(open_checkpoints(), 7).newest()

    assert (read.stage, read.step) == ("policy", 7)
    assert torch.equal(read.part("learner")["weight"], torch.full((1000,), 7.0))
    assert read.part("learner")["count"] == 7
    assert read.best.read_bytes() == b"best at 7"


def test_the_last_ones_stay_and_those_at_every_so_many_steps(open_checkpoints, tmp_path):
    saved(open_checkpoints(keep=2, keep_every=20), 10, 20, 30, 40, 50, 60, 70)

    assert names(tmp_path) == [f"policy-{step:08d}" for step in (20, 40, 60, 70)]


def test_the_newest_is_the_one_of_the_latest_stage_and_step_whatever_the_clock_says(
    open_checkpoints, tmp_path
):
    checkpoints = open_checkpoints(keep=5)
    with checkpoints:
        for stage, step in (("critic", 300), ("policy", 10), ("policy", 9)):
            checkpoints.save(snapshot(tmp_path, step, stage=stage))
    hour_ago = (tmp_path / "policy-00000010").stat().st_mtime - 3600
    os.utime(tmp_path / "policy-00000010", (hour_ago, hour_ago))

    assert (checkpoints.newest().stage, checkpoints.newest().step) == ("policy", 10)


FILES = ["state.safetensors", "state.json", "manifest.json", "best/best_model.pt"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", ["flipped bit", "truncated", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    open_checkpoints, tmp_path, said, file, harm
):
    checkpoints = saved(open_checkpoints(), 1, 2)
    path = tmp_path / "policy-00000002" / file
    content = bytearray(path.read_bytes())
    path.unlink()  # the best state is a hard link: the file under the other name does not change
    if harm == "flipped bit":
        content[len(content) // 2] ^= 1
    elif harm == "truncated":
        del content[len(content) // 2 :]
    if harm != "missing":
        path.write_bytes(content)

    assert checkpoints.newest().step == 1
    assert len(said) == 1
    assert "policy-00000002" in said[0]
    assert "going back" in said[0]
    assert names(tmp_path) == ["policy-00000001", "policy-00000002.damaged"]


def test_without_a_whole_checkpoint_there_is_none(open_checkpoints, tmp_path):
    checkpoints = saved(open_checkpoints(), 1)
    (tmp_path / "policy-00000001" / "state.json").write_text("{}")

    assert checkpoints.newest() is None


def test_a_checkpoint_of_a_newer_release_is_an_error_that_says_which(open_checkpoints, tmp_path):
    checkpoints = saved(open_checkpoints(), 1, 2)
    path = tmp_path / "policy-00000002" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99, "core": "9.1.0"}))
    write_manifest(path.parent)

    with pytest.raises(WmtpError, match=r"written by weighted-mtp-core 9\.1\.0, which is newer"):
        checkpoints.newest()


def test_a_checkpoint_of_an_earlier_format_is_an_error_and_not_damaged(open_checkpoints, tmp_path):
    checkpoints = saved(open_checkpoints(), 1, 2)
    path = tmp_path / "policy-00000002" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
    write_manifest(path.parent)

    with pytest.raises(WmtpError, match=r"by an earlier release, in format 1; this one reads format 3"):
        checkpoints.newest()

    assert names(tmp_path) == ["policy-00000001", "policy-00000002"]


class Payload:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("file", FILES)
def test_a_payload_in_a_checkpoint_never_runs(open_checkpoints, tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    checkpoints = saved(open_checkpoints(), 1)
    (tmp_path / "policy-00000001" / file).write_bytes(pickle.dumps(Payload()))
    if file != "manifest.json":
        write_manifest(tmp_path / "policy-00000001")

    found = checkpoints.newest()
    if found is not None:  # the payload is in the best state, which only its own loader reads
        with pytest.raises(WmtpError, match="is not a checkpoint of tensors"):
            load_model(nn.Linear(1, 1), found.best)

    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_the_checkpoints_before_and_says_how_much_is_needed(tmp_path):
    code = """
import sys
from pathlib import Path
import torch
from weighted_mtp_core.errors import RunFailedError
from weighted_mtp_core.recipe.schema import CheckpointTable
from weighted_mtp_core.checkpointing.manager import Checkpoints
from weighted_mtp_core.checkpointing.snapshot import Snapshot
folder = Path(sys.argv[1])
(folder / "best_model.pt").write_bytes(b"best")
with Checkpoints(folder=folder, table=CheckpointTable(), log=print) as checkpoints:
    for step, count in ((1, 100), (2, 10_000_000)):
        tensors = {"learner.weight": torch.zeros(count)}
        checkpoints.save(
            Snapshot(stage="policy", step=step, tensors=tensors, values={}, best=folder / "best_model.pt")
        )
        try:
            checkpoints.wait()
        except RunFailedError as error:
            print(error)
    print("newest:", checkpoints.newest().step, sorted(path.name for path in folder.iterdir()))
"""
    mount = f'mount -t tmpfs -o size=40m tmpfs {tmp_path} && exec {sys.executable} -c "$CODE" {tmp_path}'
    ran = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount],
        env={**os.environ, "CODE": code},
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in ran.stderr or "mount" in ran.stderr:
        pytest.skip(f"this machine lets nobody mount a small file system: {ran.stderr.strip()}")

    assert ran.returncode == 0, ran.stderr
    assert (
        "not enough space; it needs 57 MB, 42 MB are free; the checkpoints before it are whole" in ran.stdout
    )
    assert "newest: 1 ['best_model.pt', 'policy-00000001']" in ran.stdout


def test_a_write_that_fails_half_way_leaves_the_checkpoints_before(open_checkpoints, tmp_path):
    checkpoints = open_checkpoints()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with checkpoints:
        checkpoints.save(snapshot(tmp_path, 1))
        checkpoints.wait()
        too_large = snapshot(tmp_path, 2, numbers=100_000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            checkpoints.save(too_large)
            with pytest.raises(RunFailedError, match=r"cannot write the checkpoint .*policy-00000002"):
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert checkpoints.newest().step == 1
    assert names(tmp_path) == ["policy-00000001"]


def test_saving_returns_before_the_checkpoint_is_on_disk(open_checkpoints, tmp_path, monkeypatch):
    may_write = threading.Event()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: may_write.wait() and os.statvfs(path) and Free)
    with open_checkpoints() as checkpoints:
        checkpoints.save(snapshot(tmp_path, 1))
        before = names(tmp_path)
        may_write.set()
        checkpoints.wait()

    assert before == []
    assert names(tmp_path) == ["policy-00000001"]


class Free:
    free = 1 << 40


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no priorities for single threads")
@pytest.mark.parametrize(("own", "expected"), [(0, 10), (15, 15)])
def test_a_run_may_have_a_lower_priority_than_the_writer(own, expected):
    found = []

    def lower():
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(own, os.getpriority(os.PRIO_PROCESS, thread)))
        _lower_priority()
        found.append(os.getpriority(os.PRIO_PROCESS, thread))

    inherited = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    thread = threading.Thread(target=lower)
    thread.start()
    thread.join()

    assert found == [max(expected, inherited)]


def test_copies_go_where_the_last_ones_were_unless_they_grew():
    state = {"weight": torch.arange(4.0), "bias": torch.zeros(2), "count": 1}
    first, _ = copy_state(state, "learner", over={})
    state = {"weight": torch.arange(4.0).flip(0), "bias": torch.ones(3), "count": 2}

    second, values = copy_state(state, "learner", over=first)

    assert second["learner.weight"].data_ptr() == first["learner.weight"].data_ptr()
    assert second["learner.weight"].tolist() == [3, 2, 1, 0]
    assert second["learner.bias"].tolist() == [1, 1, 1]
    assert values == {"count": 2}


def test_shared_parameters_are_kept_once_and_restored_everywhere():
    first = nn.ModuleDict({"embedding": nn.Embedding(4, 3), "unembedding": nn.Linear(3, 4, bias=False)})
    first["unembedding"].weight = first["embedding"].weight
    state = {name: tensor.detach().clone() for name, tensor in module_state(first).items()}
    nn.init.zeros_(first["embedding"].weight)

    load_module_state(first, state)

    assert list(state) == ["embedding.weight"]
    assert torch.equal(first["unembedding"].weight, state["embedding.weight"])


def test_another_model_s_state_is_refused():
    with pytest.raises(WmtpError, match="another model than the recipe describes"):
        load_module_state(nn.Linear(2, 2), module_state(nn.Linear(3, 2)))


def test_an_optimiser_goes_on_as_if_it_had_not_stopped():
    def stepped(count, state=None, start=None):
        torch.manual_seed(3)
        module = nn.Linear(4, 4) if start is None else start
        optimiser = torch.optim.AdamW(module.parameters(), fused=True)
        if state is not None:
            load_optimiser_state([optimiser], list(module.parameters()), state)
        for _ in range(count):
            module(torch.ones(4)).square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()
        moments = optimiser_state([optimiser], list(module.parameters()))
        return module, {name: tensor.clone() for name, tensor in moments.items()}

    whole, _ = stepped(4)
    half, state = stepped(2)
    resumed, _ = stepped(2, state, half)

    assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("shapes", [[(64, 64), (5, 3)], [(64, 64)], [(5, 3), (64, 64)]])
def test_an_optimisers_state_of_other_parameters_is_refused(name, shapes):
    def made(*shapes):
        parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        return parameters, make_optimisers(parameters, TrainTable(optimiser=OptimiserTable(name=name)))

    parameters, optimisers = made((64, 64), (3, 5))
    sum(each.sum() for each in parameters).backward()
    for optimiser in optimisers:
        optimiser.step()
    state = optimiser_state(optimisers, parameters)
    others, again = made(*shapes)

    with pytest.raises(WmtpError, match="another model than the recipe describes"):
        load_optimiser_state(again, others, state)


def test_every_tensor_of_an_optimiser_comes_back_on_its_parameters_device():
    host = nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(host.parameters(), fused=True)
    host(torch.ones(3)).sum().backward()
    optimiser.step()
    state = optimiser_state([optimiser], list(host.parameters()))

    with FakeTensorMode(allow_non_fake_inputs=True):  # a GPU that need not be there
        parameters = [nn.Parameter(torch.empty(p.shape, device="cuda")) for p in host.parameters()]
        optimiser = torch.optim.AdamW(parameters, fused=True)
        load_optimiser_state([optimiser], parameters, state)
        devices = {name: value.device.type for p in parameters for name, value in optimiser.state[p].items()}

    assert devices == {"step": "cuda", "exp_avg": "cuda", "exp_avg_sq": "cuda"}


def test_a_parameter_whose_first_gradient_is_still_to_come_goes_on_to_the_same_bits():
    def step(module, optimiser, *, both):
        loss = module[0](torch.ones(3)).sum() + (module[1](torch.ones(3)).square().sum() if both else 0)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))
    optimiser = torch.optim.AdamW(module.parameters(), fused=True)
    step(module, optimiser, both=False)
    resumed = copy.deepcopy(module)
    again = torch.optim.AdamW(resumed.parameters(), fused=True)
    state = optimiser_state([optimiser], list(module.parameters()))
    load_optimiser_state([again], list(resumed.parameters()), copy.deepcopy(state))
    for _ in range(2):
        step(module, optimiser, both=True)
        step(resumed, again, both=True)

    assert {name.partition(".")[0] for name in state} == {"0", "1"}
    for one, other in zip(module.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_options_of_an_optimiser_are_those_of_the_recipe_that_goes_on():
    parameters = [nn.Parameter(torch.ones(2, 2))]
    first = torch.optim.AdamW(parameters, lr=0.5, weight_decay=0.5, fused=True)
    parameters[0].sum().backward()
    first.step()
    first.zero_grad()
    second = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.2, fused=True)

    load_optimiser_state([second], parameters, optimiser_state([first], parameters))

    assert (second.param_groups[0]["lr"], second.param_groups[0]["weight_decay"]) == (0.1, 0.2)
    assert second.state[parameters[0]]["step"] == 1


def test_the_generators_of_more_than_ten_gpus_come_back_in_their_order(monkeypatch):
    states = [torch.tensor([i], dtype=torch.uint8) for i in range(12)]
    restored = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(states))
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.extend)
    tensors, values = random_state()

    restore_random_state(dict(sorted(tensors.items())), values)

    assert [int(state) for state in restored] == list(range(12))


def test_random_generators_go_on_where_they_were():
    import random

    import numpy as np

    tensors, values = random_state()
    values = json.loads(json.dumps(values))
    drawn = torch.rand(3).tolist(), random.random(), np.random.rand()  # noqa: NPY002 - the global one
    restore_random_state(tensors, values)

    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == drawn  # noqa: NPY002


def test_the_best_model_is_a_plain_dict_of_tensors(tmp_path):
    model = nn.Linear(2, 3)
    save_model(model, tmp_path / "best_model.pt")

    state = torch.load(tmp_path / "best_model.pt", weights_only=True)
    twin = nn.Linear(2, 3)
    load_model(twin, tmp_path / "best_model.pt")

    assert type(state) is dict
    assert torch.equal(twin.weight, model.weight)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save_model(nn.Linear(2, 3), tmp_path / "best_model.pt")

    with pytest.raises(WmtpError, match="does not fit this model"):
        load_model(nn.Linear(5, 3), tmp_path / "best_model.pt")
    with pytest.raises(WmtpError, match="there is no checkpoint"):
        load_model(nn.Linear(5, 3), tmp_path / "absent.pt")


def test_a_file_of_something_other_than_a_dict_is_refused(tmp_path):
    torch.save([torch.ones(2, 2)], tmp_path / "best_model.pt")

    with pytest.raises(WmtpError, match="is not a checkpoint of tensors: it contains a `list`"):
        load_model(nn.Linear(2, 2), tmp_path / "best_model.pt")
