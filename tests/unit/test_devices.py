"""Stage 2 on each device: what holds on the CPU also holds on a GPU (`make gpu` runs tests marked `gpu`)."""

import copy
import math
from contextlib import nullcontext
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.api import Signal, WeightingStrategy, Weights
from weighted_mtp_core.checkpointing.manager import Checkpoints
from weighted_mtp_core.checkpointing.snapshot import Snapshot
from weighted_mtp_core.data.batches import collate
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.generation.generate import generate
from weighted_mtp_core.model.adapters import adapt
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.stored_base import restore_base
from weighted_mtp_core.recipe.schema import CheckpointTable, LossTable, ModelTable
from weighted_mtp_core.recipe.train_table import OptimiserTable, TrainTable
from weighted_mtp_core.runtime.cost import forget_peak, matrix_rate, peak_memory
from weighted_mtp_core.runtime.device import Compute
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS, Distributed, on_one_device
from weighted_mtp_core.runtime.fsdp import callable_
from weighted_mtp_core.runtime.sharding import mesh_of, shard_matrices
from weighted_mtp_core.training.loop import train
from weighted_mtp_core.training.nonfinite_steps import NonfiniteSteps
from weighted_mtp_core.training.optimisers import clip_gradients, make_optimisers
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.weighting_inputs import Weighting

V, K, STEPS, CHECKPOINT = 31, 3, 6, 3
HEADS = ("parallel", "medusa", "sequential")
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
TOLERANCE = {"cpu": 0.0, "cuda": 1e-5}  # sums on a GPU may be ordered differently from run to run
MIB = 1 << 20


class ByLoss(WeightingStrategy):
    """More weight where the policy's loss is high."""

    def weigh(self, view):
        return Weights(weight=torch.sigmoid(view.token_loss_BTK).where(view.target_BTK, 0.0))


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    return torch.device(request.param)


def batch_of(step, device):
    generator, lengths = np.random.default_rng(step), (12, 7, 9, 6)
    some = TokenSet(
        ids_N=generator.integers(2, V, size=sum(lengths)).astype(np.int32),
        start_D1=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_D=np.array([2, 5, 3, 0]),
        reward_D=np.ones(4, dtype=np.float32),
        problem_D=np.arange(4),
        example_ids=("a", "b", "c", "d"),
    )
    return collate(some, range(4), device=device)


def new_policy(device, head="parallel"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return make_policy(LlamaForCausalLM(config), n_future=K, head_kind=head).to(device)


def learner(policy, device, *, dtype=torch.float32, distributed=SINGLE_PROCESS, best=None):
    return PolicyLearner(
        policy=policy,
        weighting=Weighting(
            strategy=ByLoss(), needs=frozenset({Signal.TOKEN_LOSS}), critic=None, label="weighting `my.own`"
        ),
        loss=LossTable(),
        steps=STEPS,
        pairs_per_step=(20.0,) * K,
        accumulation=1,
        distributed=distributed,
        autocast=nullcontext if dtype is torch.float32 else lambda: torch.autocast(device.type, dtype=dtype),
        validation=lambda: [batch_of(100, device)],
        best=best,
    )


OPTIMISERS = ("adamw", "adamw_8bit", "muon")


def optimisers_of(training, name="adamw"):
    table = TrainTable(optimiser=OptimiserTable(name=name))
    return make_optimisers(training.parameters(), table, embeddings=training.embeddings())


def take_step(training, optimisers, bad, batch):
    parameters = list(training.parameters())
    result = training.learn(batch, step=0)
    norm = clip_gradients(parameters, 1.0)
    bad.skip_if_not_finite(optimisers, result.loss, norm)
    for each in optimisers:
        each.step()
    return result


# ------------------------------------------------------------------ one step


class OneDevice(TorchDispatchMode):
    """Fails if an operation other than a copy has tensors of two devices; 0-dim tensors are exempt."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        devices = {each.device.type for each in tensors if each.ndim}
        name = func._schema.name.removeprefix("aten::")
        assert name in {"_to_copy", "copy_"} or len(devices) < 2, f"`{name}` has tensors on {devices}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("head", HEADS)
def test_a_step_has_every_tensor_on_its_device_and_reads_none(head):
    meta = torch.device("meta")  # a device without data, from which no value can be read
    training = learner(new_policy(meta, head), meta)
    bad = NonfiniteSteps(limit=5, device=meta)

    with OneDevice():
        result = training.learn(batch_of(0, meta), step=0)
        norm = clip_gradients(list(training.parameters()), 1.0)
        bad.skip_if_not_finite([torch.optim.AdamW(training.parameters())], result.loss, norm)

    assert {each.device for each in (result.loss, norm, *result.metrics().values())} == {meta}
    assert all(each.grad is None or each.grad.device == meta for each in training.parameters())


def test_bfloat16_rounds_the_loss_and_leaves_parameters_and_gradients_in_float32(device):
    exact, rounded = (
        learner(new_policy(device), device, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    losses = [float(each.learn(batch_of(0, device), step=0).loss) for each in (exact, rounded)]

    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
    for parameter in rounded.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is None or parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_changes_nothing_in_a_step_that_is_skipped(device, name):
    training = learner(new_policy(device), device)
    optimisers = optimisers_of(training, name)
    bad = NonfiniteSteps(limit=5, device=device)
    take_step(training, optimisers, bad, batch_of(0, device))

    def state():
        leaves = tree_leaves([each.state_dict() for each in optimisers])
        return [each for each in leaves if isinstance(each, torch.Tensor)]

    before = [each.clone() for each in state()]
    before += [each.detach().clone() for each in training.parameters()]

    next(iter(training.parameters())).grad[0] = math.inf
    norm = clip_gradients(list(training.parameters()), 1.0)
    bad.skip_if_not_finite(optimisers, torch.zeros((), device=device), norm)
    for each in optimisers:
        each.step()

    after = state()
    after += list(training.parameters())
    assert bad.total == 1
    assert len(after) == len(before)
    assert all(map(torch.equal, after, before))


@pytest.mark.parametrize("base_dtype", ["bfloat16", "nf4"])
def test_a_stored_base_computes_on_its_device_as_its_float32_values_on_the_cpu(device, base_dtype):
    cpu = torch.device("cpu")
    stored = new_policy(cpu)
    adapt(stored, ModelTable(train="adapters", base_dtype=base_dtype))
    whole = copy.deepcopy(stored)
    restore_base(whole)
    policies = stored.to(device), whole
    losses = [
        float(learner(each, place).learn(batch_of(0, place), step=0).loss)
        for each, place in zip(policies, (device, cpu), strict=True)
    ]

    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for own, other in zip(*(each.parameters() for each in policies), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(own.grad.cpu(), other.grad, rtol=1e-2, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("head", HEADS)
def test_a_step_on_a_gpu_has_the_loss_and_the_gradients_of_a_cpu(head):
    devices = torch.device("cpu"), torch.device("cuda")
    both = [learner(new_policy(each, head), each) for each in devices]
    losses = [
        float(one.learn(batch_of(0, each), step=0).loss) for one, each in zip(both, devices, strict=True)
    ]

    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for own, other in zip(*(each.parameters() for each in both), strict=True):
        if own.grad is not None:
            torch.testing.assert_close(other.grad.cpu(), own.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head", "name"),
    [*((head, "adamw") for head in HEADS), *(("parallel", name) for name in OPTIMISERS[1:])],
)
def test_the_host_never_waits_for_a_gpu_in_a_step(head, name):
    """`test_no_waiting.py` forbids the operations that wait; here, the driver reports each wait."""
    cuda = torch.device("cuda")
    training = learner(new_policy(cuda, head), cuda, dtype=torch.bfloat16)
    optimisers = optimisers_of(training, name)
    bad = NonfiniteSteps(limit=5, device=cuda)
    for step in range(2):
        take_step(training, optimisers, bad, batch_of(step, cuda))  # loads kernels and makes states

    torch.cuda.set_sync_debug_mode("error")
    try:
        take_step(training, optimisers, bad, batch_of(2, cuda)).metrics()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------ a whole stage


class Losses:
    """Keeps the losses of the steps and the timings."""

    def __init__(self):
        self.by_step, self.timed = {}, {}

    def metrics(self, stage, step, values):
        if "train_loss" in values:
            self.by_step[step] = float(values["train_loss"])

    def timings(self, stage, step, values):
        self.timed |= values

    def progress(self, step, values):
        pass


def trained(device, folder, *, distributed=SINGLE_PROCESS, resume=None, sharded=False):
    """Train; return what the loop reports."""
    folder.mkdir(exist_ok=True)
    policy, reporter = new_policy(device), Losses()
    if sharded:
        shard_matrices([policy], mesh_of(distributed, device))
        callable_(policy)
    table = TrainTable(steps=STEPS, learning_rate=0.02, warmup_steps=0, validate_every=STEPS, log_every=1)
    checkpoint = CheckpointTable(every=CHECKPOINT, keep=5)
    with Checkpoints(folder=folder, table=checkpoint, log=print, distributed=distributed) as checkpoints:
        train(
            learner(policy, device, distributed=distributed, best=folder / "best.pt"),
            table,
            batch_of=lambda step: batch_of(step, device),
            reporter=reporter,
            checkpoints=checkpoints,
            resume=resume,
            distributed=distributed,
        )
    return reporter


def test_a_stage_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(device, tmp_path):
    whole = trained(device, tmp_path / "whole").by_step
    snapshot = Snapshot.read(tmp_path / "whole" / f"policy-{CHECKPOINT:08d}")
    resumed = trained(device, tmp_path / "resumed", resume=snapshot).by_step

    assert list(resumed) == list(range(CHECKPOINT + 1, STEPS + 1))
    rest = {step: whole[step] for step in resumed}
    assert resumed == pytest.approx(rest, rel=TOLERANCE[device.type], abs=0)


@pytest.fixture
def alone(device):
    """A group of one process, with the backend of the device."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60)
    )
    yield Distributed(control_group=dist.new_group(backend="gloo"))
    dist.destroy_process_group()


def test_a_sharded_policy_of_one_process_trains_as_a_whole_one(device, alone, tmp_path):
    whole = trained(device, tmp_path / "whole").by_step
    sharded = trained(device, tmp_path / "sharded", distributed=alone, sharded=True).by_step

    assert sharded == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_drafts_do_not_change_a_text(device, head):
    policy = new_policy(device, head).eval()
    for parameter in policy.parameters():  # far from the initial scale, at which all positions are alike
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    prompts = ((5, 9, 4, 30), (7,), (3, 3, 8, 1, 2, 29, 6))

    plain, drafted = (
        generate(policy, prompts, max_new_tokens=12, eos_id=0, decoding=decoding, batch_size=2)
        for decoding in ("plain", "self_speculative")
    )

    assert drafted.tokens == plain.tokens
    assert len(drafted.accepted) == K - 1


def test_scalars_are_put_on_the_device_of_the_loss():
    loss = torch.zeros((), device="meta")

    stacked = on_one_device([0.5, loss, torch.ones(())])

    assert (stacked.device.type, stacked.shape) == ("meta", (3,))
    torch.testing.assert_close(on_one_device([0.5, torch.ones(())]), torch.tensor([0.5, 1.0]))


@pytest.mark.gpu
def test_a_stage_on_a_gpu_records_its_peak_memory(tmp_path):
    cuda = torch.device("cuda")
    timed = trained(cuda, tmp_path / "run").timed

    assert timed["system/policy_peak_device_memory_megabytes"] > 0


@pytest.mark.gpu
def test_the_peak_of_a_gpu_contains_a_tensor_that_is_gone_until_it_is_forgotten():
    cuda = torch.device("cuda")
    torch.ones(64 * MIB // 4, device=cuda)

    assert peak_memory(cuda)["device"] >= 64 * MIB
    forget_peak(cuda)
    assert peak_memory(cuda)["device"] < 64 * MIB


@pytest.mark.gpu
def test_products_in_bfloat16_are_faster_on_a_gpu_that_has_them():
    cuda = torch.device("cuda")
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU does not compute in bfloat16")
    exact, rounded = (
        matrix_rate(Compute(device=cuda, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)
    )

    assert rounded > exact > 0
