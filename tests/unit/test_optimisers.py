"""Each optimiser against an independent computation; skipped steps; frozen and trained parameters."""

import copy
import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.recipe.structure import structure
from weighted_mtp_core.recipe.train_table import OptimiserTable, TrainTable
from weighted_mtp_core.training.nonfinite_steps import NonfiniteSteps
from weighted_mtp_core.training.optimisers import (
    Part,
    check_optimisers,
    clip_gradients,
    make_optimisers,
    set_learning_rate,
)

NAMES = ("adamw", "adamw_8bit", "muon")
CPU = torch.device("cpu")


def table(name, **options):
    return TrainTable(
        optimiser=OptimiserTable(name=name),
        **{"steps": 10, "warmup_steps": 0, "learning_rate": 0.01} | options,
    )


class Small(nn.Module):
    """Has an embedding, a hidden matrix, a norm with a bias, an unembedding, and an unused matrix."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(96, 64)  # 6144 values: enough for moments of 8 bits
        self.hidden = nn.Linear(64, 80, bias=False)
        self.norm = nn.LayerNorm(80)
        self.unembedding = nn.Linear(80, 96)
        self.unused = nn.Linear(8, 8, bias=False)

    def forward(self, ids_N):
        return self.unembedding(self.norm(self.hidden(self.embedding(ids_N)).tanh()))

    def embeddings(self):
        return [*self.embedding.parameters(), *self.unembedding.parameters()]


def accumulate(module, step, *, scale=1.0):
    """Add the gradient of a step; return the loss."""
    ids_N = torch.randint(0, 96, (256,), generator=torch.Generator().manual_seed(step))
    loss = nn.functional.cross_entropy(module(ids_N), (ids_N * 7 + 3) % 96)
    (scale * loss).backward()
    return loss.detach()


def made(module, options):
    return make_optimisers(module.parameters(), options, embeddings=module.embeddings())


def step(module, optimisers, options, number, *, loss=None):
    """Train for one step, as the training loop does; return the loss."""
    set_learning_rate(optimisers, options, number)
    found = accumulate(module, number)
    norm = clip_gradients(list(module.parameters()), options.max_grad_norm)
    bad = NonfiniteSteps(limit=3, device=CPU)
    bad.skip_if_not_finite(optimisers, found if loss is None else loss, norm)
    for each in optimisers:
        each.step()
        each.zero_grad()
    return found


def tensors_of(module, optimisers):
    """Return copies of all parameters and of all states."""
    found = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    for each in optimisers:
        for name, parameter in module.named_parameters():
            found |= {f"{name}.{k}": x.clone() for k, x in each.state.get(parameter, {}).items()}
    return found


# ------------------------------------------------------------------ Muon


def newton_schulz(matrix):
    """Iterate X -> a X + (b A + c A A) X with A = X X' five times, here on the singular values of X."""
    left, singular, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    singular = singular / singular.square().sum().sqrt()
    for _ in range(5):
        singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
    return (left * singular) @ right


@pytest.mark.parametrize("shape", [(24, 24), (12, 30), (30, 12)])
def test_muon_equals_a_reference_with_momentum_newton_schulz_and_the_scale_of_adamw(shape):
    torch.manual_seed(1)
    matrix, decay, rate = nn.Parameter(torch.randn(shape)), 0.1, 0.02
    start, momentum = matrix.detach().double(), torch.zeros(shape).double()
    expected = start.clone()
    options = table("muon", learning_rate=rate, weight_decay=decay, schedule="constant")
    (muon,) = make_optimisers([matrix], options)

    for _ in range(4):
        gradient = torch.randn(shape)
        matrix.grad = gradient.clone()
        muon.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        update = newton_schulz(0.05 * gradient + 0.95 * momentum)
        expected = (1 - rate * decay) * expected - rate * 0.2 * math.sqrt(max(shape)) * update

    moved = (expected - start).norm()
    assert (matrix.detach() - expected).norm() <= 0.015 * moved  # torch iterates in bfloat16; measured: 0.008


def test_an_update_of_muon_has_singular_values_near_one_and_the_size_of_an_update_of_adamw():
    torch.manual_seed(1)
    matrix = nn.Parameter(torch.zeros(64, 128))
    (muon,) = make_optimisers([matrix], table("muon", learning_rate=1.0))
    matrix.grad = torch.randn(64, 128)
    muon.step()

    update = matrix.detach() / (0.2 * math.sqrt(128))
    singular = torch.linalg.svdvals(update)

    assert 0.6 < singular.min() < singular.max() < 1.3
    assert 0.1 < matrix.detach().square().mean().sqrt() < 0.3  # AdamW: 0.2 to 0.4 (Liu et al. 2025)


def test_muon_trains_hidden_matrices_and_adamw_all_other_parameters():
    module = Small()

    muon, adamw = made(module, table("muon"))

    trained = {
        kind: {
            name
            for name, parameter in module.named_parameters()
            for group in optimiser.param_groups
            if any(parameter is each for each in group["params"])
        }
        for kind, optimiser in (("muon", muon), ("adamw", adamw))
    }
    assert type(adamw) is torch.optim.AdamW
    assert trained == {
        "muon": {"hidden.weight", "unused.weight"},
        "adamw": {"embedding.weight", "norm.weight", "norm.bias", "unembedding.weight", "unembedding.bias"},
    }


def test_stacked_matrices_are_left_to_adamw():
    (optimiser,) = make_optimisers([nn.Parameter(torch.ones(4, 8, 8))], table("muon"))

    assert type(optimiser) is torch.optim.AdamW


# ------------------------------------------------------------------ 8 bits


def test_adamw_8bit_follows_adamw_within_the_error_of_eight_bits():
    modules = {name: Small() for name in ("adamw", "adamw_8bit")}
    start = copy.deepcopy(modules["adamw"])
    for name, module in modules.items():
        options = table(name, schedule="constant")
        optimisers = made(module, options)
        losses = [step(module, optimisers, options, number) for number in range(30)]
        assert losses[-1] < 0.8 * losses[0]

    for (name, exact), found, first in zip(
        modules["adamw"].named_parameters(),
        modules["adamw_8bit"].parameters(),
        start.parameters(),
        strict=True,
    ):
        moved = (exact - first).norm()
        assert (found - exact).norm() <= 0.06 * moved, name  # measured: 0.043 at most


def test_moments_take_a_byte_per_value():
    module, options = Small(), table("adamw_8bit")
    (optimiser,) = made(module, options)
    step(module, [optimiser], options, 0)

    state = optimiser.state[module.embedding.weight]
    held = sum(tensor.numel() * tensor.element_size() for tensor in state.values())

    assert {name: tensor.dtype for name, tensor in state.items() if name.endswith("codes")} == {
        "exp_avg_codes": torch.uint8,
        "exp_avg_sq_codes": torch.uint8,
    }
    assert held == 2 * (6144 + 6144 // 256 * 4) + 4  # codes, a float32 per block of 256, and the step
    assert set(optimiser.state[module.norm.bias]) == {"step", "exp_avg", "exp_avg_sq"}  # too small


# ------------------------------------------------------------------ all optimisers


@pytest.mark.parametrize("name", NAMES)
def test_betas_and_epsilon_are_those_of_the_recipe(name):
    options = TrainTable(optimiser=OptimiserTable(name=name, betas=(0.5, 0.75), epsilon=1e-3))

    adamw = make_optimisers([nn.Parameter(torch.zeros(3))], options)[-1]

    assert (adamw.defaults["betas"], adamw.defaults["eps"]) == ((0.5, 0.75), 1e-3)


@pytest.mark.parametrize("bad", ["gradient", "loss", "first gradient"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_with_a_gradient_or_loss_that_is_not_finite_changes_no_parameter_and_no_state(name, bad):
    module, options = Small(), table(name)
    optimisers = made(module, options)
    if bad != "first gradient":
        for number in range(2):
            step(module, optimisers, options, number)
    before = tensors_of(module, optimisers)

    if bad != "loss":
        module.hidden.weight.register_hook(lambda gradient: gradient * float("nan"))
    step(module, optimisers, options, 2, loss=float("inf") if bad == "loss" else None)

    after = tensors_of(module, optimisers)
    for key, tensor in after.items():
        assert torch.equal(tensor, before.get(key, torch.zeros_like(tensor))), key


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_after_a_skipped_step_as_if_it_had_not_been(name):
    found = []
    for skips in (False, True):
        module, options = Small(), table(name)
        optimisers = made(module, options)
        for number in range(4):
            if skips:
                step(module, optimisers, options, number, loss=float("nan"))
            step(module, optimisers, options, number)
        found.append(tensors_of(module, optimisers))

    for key, tensor in found[0].items():
        assert torch.equal(tensor, found[1][key]), key


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_and_those_without_a_gradient_stay_and_have_no_state(name):
    module, options = Small(), table(name, weight_decay=0.5)
    module.embedding.requires_grad_(requires_grad=False)
    before = copy.deepcopy(module)
    optimisers = made(module, options)

    step(module, optimisers, options, 0)

    for still in ("embedding", "unused"):
        parameter = module.get_parameter(f"{still}.weight")
        assert torch.equal(parameter, before.get_parameter(f"{still}.weight"))
        assert not any(each.state.get(parameter) for each in optimisers)
    assert not torch.equal(module.hidden.weight, before.hidden.weight)


@pytest.mark.parametrize("name", NAMES)
def test_accumulated_gradients_are_one_step(name):
    found = []
    for parts in (1, 4):
        module, options = Small(), table(name)
        optimisers = made(module, options)
        for _ in range(parts):
            accumulate(module, 0, scale=1 / parts)
        for each in optimisers:
            each.step()
        found.append(tensors_of(module, optimisers))

    for key, tensor in found[0].items():
        torch.testing.assert_close(found[1][key].float(), tensor.float(), atol=1e-6, rtol=1e-4, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_each_part_learns_at_its_own_rate_in_every_optimiser(name):
    module, options = Small(), table(name, schedule="constant")
    parts = dict.fromkeys(module.embeddings(), Part(name="embedding", rate=0.0))
    before = copy.deepcopy(module)
    optimisers = make_optimisers(module.parameters(), options, parts=parts, embeddings=module.embeddings())

    step(module, optimisers, options, 0)
    rates = set_learning_rate(optimisers, options, 0)

    assert rates == {"": 0.01, "embedding": 0.0}
    assert torch.equal(module.embedding.weight, before.embedding.weight)
    assert not torch.equal(module.hidden.weight, before.hidden.weight)
    assert not torch.equal(module.norm.weight, before.norm.weight)


@pytest.mark.parametrize("betas", [[0.9, 1.0], [-0.1, 0.9]])
def test_betas_out_of_range_are_refused(betas):
    _, faults = structure(TrainTable, {"optimiser": {"betas": betas}})

    assert [(fault.path, fault.text) for fault in faults] == [
        (("optimiser", "betas"), f"must be >= 0 and < 1: {betas}")
    ]


def recipe_with(name, *, device="cpu"):
    return SimpleNamespace(critic=None, train=table(name), model=SimpleNamespace(device=device))


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ((), "needs Triton on CUDA"),
        (("triton",), "needs a C compiler on CUDA, which Triton calls"),
    ],
)
def test_what_compiles_the_update_of_moments_of_8_bits_on_cuda_is_needed_there(monkeypatch, found, text):
    for name in ("torchao", "triton"):
        known = name in found or name == "torchao"
        monkeypatch.setitem(sys.modules, name, ModuleType(name) if known else None)
        if known:
            sys.modules[name].__spec__ = ModuleSpec(name, None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)

    check_optimisers(recipe_with("adamw_8bit"))
    check_optimisers(recipe_with("muon", device="cuda"))
    with pytest.raises(WmtpError, match=text):
        check_optimisers(recipe_with("adamw_8bit", device="cuda"))


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)  # Python then finds no such package

    with pytest.raises(WmtpError) as caught:
        check_optimisers(recipe_with("adamw_8bit"))

    assert str(caught.value) == '`train.optimiser.name = "adamw_8bit"` needs the package torchao'
    assert caught.value.hint == "pip install 'weighted-mtp-core[eightbit]'"
