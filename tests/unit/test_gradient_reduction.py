"""Gradients summed over processes in buckets equal those of one call per tensor, and those of one process."""

import multiprocessing
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.api import Batch, Signal, WeightingStrategy, Weights
from weighted_mtp_core.errors import RunFailedError
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.recipe.schema import LossTable
from weighted_mtp_core.runtime.device import LEAST_BUCKET, bucket_bytes, memory_of
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS, Distributed
from weighted_mtp_core.runtime.gradient_reduction import GradientReduction
from weighted_mtp_core.training import policy_learner
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.weighting_inputs import Weighting

V, K = 31, 3
ONE_A_TENSOR, SOME, ALL = 1, 6000, 1 << 30  # bytes of a bucket
CASES = {
    "parallel": {"needs": frozenset({Signal.TOKEN_LOSS})},
    "medusa": {"head_kind": "medusa", "frozen": True, "loss": LossTable(detach_trunk=True)},
    "sequential": {"head_kind": "sequential", "shared": True, "serve": "vllm"},
    "tied": {"tie": True, "checkpointing": True, "accumulation": 2},
    "fewer rows than micro-batches": {"accumulation": 2, "rows": 3},
    "heads": {"train": "heads"},
}


class Uneven(WeightingStrategy):
    def weigh(self, view):
        return Weights(weight=(0.1 + view.ids_BT % 5).where(view.response_BT, 0.0))


def batch(rows):
    ids_BT = torch.randint(2, V, (rows, 12), generator=torch.Generator().manual_seed(1))
    zero_BT = torch.zeros_like(ids_BT)
    return Batch(
        ids_BT=ids_BT,
        document_BT=zero_BT,
        response_BT=(torch.arange(12) >= 3).expand(rows, -1),
        reward_BT=zero_BT.float(),
        group_BT=zero_BT,
    )


def new_policy(*, tie=False, checkpointing=False, train="all", frozen=False, **options):
    heads = {name: value for name, value in options.items() if name in ("head_kind", "shared", "serve")}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        tie_word_embeddings=tie,
    )
    policy = make_policy(LlamaForCausalLM(config), n_future=K, **{"head_kind": "parallel", **heads})
    if train == "heads":
        policy.freeze_base()
    if checkpointing:
        policy.recompute_activations()
    if frozen:
        next(iter(policy.trunk.layers)).requires_grad_(requires_grad=False)
    return policy


def gradients(policy, distributed, *, accumulation=1, rows=4, needs=frozenset(), loss=None, **_):
    """Return the gradients of one step of a policy."""
    policy.zero_grad()
    learner = PolicyLearner(
        policy=policy,
        weighting=Weighting(strategy=Uneven(), needs=needs, critic=None, label="uneven"),
        loss=loss or LossTable(),
        steps=1,
        pairs_per_step=(36.0,) * K,
        accumulation=accumulation,
        distributed=distributed,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        validation=list,
        best=None,
    )
    learner.learn(batch(rows), step=0)
    assert not any(each._post_accumulate_grad_hooks for each in policy.parameters())
    return {name: each.grad for name, each in policy.named_parameters()}


class Calls:
    """Notes the bytes of each tensor that is sent."""

    def __init__(self, patch):
        self.tensors, send = [], dist.all_reduce

        def counted(tensor, **options):
            self.tensors.append(tensor.nbytes)
            return send(tensor, **options)

        patch.setattr(dist, "all_reduce", counted)


def as_process(rank, folder, work, results):
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=100))
    distributed = Distributed(rank=rank, size=2, control_group=dist.new_group(backend="gloo"))
    try:
        results.put((rank, work(distributed)))
    finally:
        distributed.shutdown()


def in_two_processes(folder, work):
    """Return the results of both processes."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=as_process, args=(rank, folder, work, results)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = sorted((results.get(timeout=200) for _ in processes), key=lambda pair: pair[0])
    for process in processes:
        process.join(60)
    return [result for _, result in found]


def plain(tensors):
    return {name: None if each is None else each.numpy().copy() for name, each in tensors.items()}


def every_case(policies, distributed):
    found = {}
    for name, case in CASES.items():
        for size in (ONE_A_TENSOR, SOME, ALL):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(policy_learner, "bucket_bytes", lambda _, size=size: size)
                calls = Calls(patch)
                found[name, size] = plain(gradients(policies[name], distributed, **case)), calls.tensors
    return found


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_buckets_change_no_bit_and_the_sum_is_that_of_one_process(tmp_path):
    policies = {name: new_policy(**case) for name, case in CASES.items()}
    one, two = in_two_processes(tmp_path, partial(every_case, policies))

    for name, case in CASES.items():
        alone = gradients(policies[name], SINGLE_PROCESS, **case)
        trained = {key: each for key, each in alone.items() if each is not None}
        unbucketed, calls = one[name, ONE_A_TENSOR]
        for size in (ONE_A_TENSOR, SOME, ALL):
            (first, sent), (second, _) = one[name, size], two[name, size]
            assert {key for key, each in first.items() if each is not None} == set(trained), name
            for key, gradient in trained.items():
                assert (first[key] == second[key]).all(), (name, size, key)
                assert (first[key] == unbucketed[key]).all(), (name, size, key)
                torch.testing.assert_close(torch.from_numpy(first[key]), gradient, rtol=1e-5, atol=1e-5)
            assert sum(sent) == sum(calls), (name, size)
        # With the largest buckets, the gradients of the heads are sent in one call, and those of a trained
        # trunk in another call. With the smallest buckets, each tensor is sent in a separate call.
        buckets = 1 if case.get("train") == "heads" else 2
        assert len(calls) - len(one[name, ALL][1]) == len(trained) - buckets
        assert len(one[name, ALL][1]) < len(one[name, SOME][1]) < len(calls)


# ------------------------------------------------------------------ when a bucket is sent


class Tower(nn.Module):
    """Layers that a process can leave out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(4))

    def forward(self, x, leave_out=()):
        for number, layer in enumerate(self.layers):
            x = x if number in leave_out else layer(x)
        return x


def reduction(distributed, tower, size=ONE_A_TENSOR):
    return GradientReduction(
        tower.parameters(), last=tower.parameters(), distributed=distributed, bucket_bytes=size
    )


def while_backward_runs(distributed):
    """Return which layers have a gradient whenever a bucket is sent."""
    tower, seen = Tower(), []
    with pytest.MonkeyPatch.context() as patch, reduction(distributed, tower) as reducing:
        send = dist.all_reduce

        def watched(tensor, **options):
            seen.append([layer.weight.grad is not None for layer in tower.layers])
            return send(tensor, **options)

        patch.setattr(dist, "all_reduce", watched)
        reducing.begin()
        tower(torch.ones(1, 4)).sum().backward()
    return seen


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_bucket_is_sent_as_soon_as_its_gradients_are_there(tmp_path):
    no, yes = False, True

    seen, _ = in_two_processes(tmp_path, while_backward_runs)

    buckets = [[no, no, no, yes], [no, no, yes, yes], [no, yes, yes, yes], [yes, yes, yes, yes]]
    assert seen == [*buckets, [yes, yes, yes, yes]]  # the last sum counts the users of each parameter


def with_layers_left_out(leave_out, size, distributed):
    tower = Tower()
    with reduction(distributed, tower, size) as reducing:
        reducing.begin()
        tower(torch.ones(1, 4), leave_out=leave_out[distributed.rank]).sum().backward()
    return plain({str(number): layer.weight.grad for number, layer in enumerate(tower.layers)})


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_may_leave_out_other_parameters(tmp_path):
    left_out = ((1,), (2, 3))
    first, second = in_two_processes(tmp_path, partial(with_layers_left_out, left_out, ONE_A_TENSOR))

    tower = Tower()
    for leave_out in left_out:
        tower(torch.ones(1, 4), leave_out=leave_out).sum().backward()
    for number, layer in enumerate(tower.layers):
        assert (first[str(number)] == second[str(number)]).all()
        torch.testing.assert_close(torch.from_numpy(first[str(number)]), layer.weight.grad)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("size", [ONE_A_TENSOR, ALL])
def test_a_parameter_that_no_process_uses_has_no_gradient(tmp_path, size):
    """A gradient of zeros would let the optimiser's weight decay and momentum change the parameter."""
    left_out = ((1, 2), (1, 3))
    for found in in_two_processes(tmp_path, partial(with_layers_left_out, left_out, size)):
        assert [found[str(number)] is not None for number in range(4)] == [True, False, True, True]


def twice(distributed):
    tower = Tower()
    try:
        with reduction(distributed, tower) as reducing:
            reducing.begin()
            for _ in range(2):
                tower(torch.ones(1, 4)).sum().backward()
    except RunFailedError as error:
        hooks = [each._post_accumulate_grad_hooks for each in tower.parameters()]
        return str(error), any(hooks)
    return None


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_gradient_that_comes_after_the_sum_ends_the_run_instead_of_being_lost(tmp_path):
    found = in_two_processes(tmp_path, twice)

    assert {text.partition(",")[0] for text, _ in found} == {
        "a backward pass added a gradient to the same parameter twice"
    }
    assert [hooks for _, hooks in found] == [False, False]


def test_one_process_sends_nothing_and_leaves_gradients_as_they_are():
    tower = Tower()
    with reduction(SINGLE_PROCESS, tower) as reducing:
        reducing.begin()
        tower(torch.ones(1, 4), leave_out=(0,)).sum().backward()

    assert [layer.weight.grad is not None for layer in tower.layers] == [False, True, True, True]


def test_a_cpu_has_buckets_of_a_fixed_size():
    assert memory_of(torch.device("cpu")) is None
    assert bucket_bytes(torch.device("cpu")) == LEAST_BUCKET
