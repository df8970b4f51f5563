"""The forecast of a run's memory: counted on tensors without values, compared with what torch allocates."""

import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ApertusConfig, Gemma3nTextConfig, LlamaConfig, LlamaForCausalLM, MixtralConfig
from weighted_mtp_core.cli import main
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.memory.available import free_main_memory, left_in_group
from weighted_mtp_core.memory.components import UniformWeights
from weighted_mtp_core.memory.documents import Documents
from weighted_mtp_core.memory.fit import lacks, refuse_too_large
from weighted_mtp_core.memory.forecast import forecast, parse_size
from weighted_mtp_core.memory.live_tensors import without_values
from weighted_mtp_core.memory.parts import Target
from weighted_mtp_core.memory.savings import savings
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.stored_base import store_base
from weighted_mtp_core.plan import make_plan
from weighted_mtp_core.recipe.schema import DataTable, LossTable
from weighted_mtp_core.recipe.train_table import PolicyTrainTable
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS
from weighted_mtp_core.training.optimisers import clip_gradients, make_optimisers
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.weighting_inputs import Weighting

SHAPE = {
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
RECIPE = """
    tracker = []
    [run]
    name = "memory"
    [model]
    base = "base"
    n_future = 3
    [data]
    use = "core.jsonl"
    options = { path = "nowhere.jsonl" }
    max_tokens = 128
    [weighting]
    use = "flat_weights"
    [train]
    batch_size = 4
    [checkpoint]
    every = 0
    [evaluate]
    batch_size = 2
    max_new_tokens = 16
"""
CPU = Target(device="cpu", dtype=torch.float32)
GPU = Target(device="cuda", dtype=torch.float32)
pytestmark = pytest.mark.usefixtures("flat_weights")


@pytest.fixture
def plan(write_recipe):
    """Return a function that plans `RECIPE` with overrides, for a base model that is only a config."""
    path = write_recipe(RECIPE)
    LlamaConfig(**SHAPE).save_pretrained("base")

    def plan(*overrides):
        return make_plan(path, overrides=overrides)

    return plan


FOUND = {}
"""Cache of the forecasts by target, overrides and phase, because each forecast takes a second."""


def _forecast(plan, target=CPU, *overrides, only="policy training"):
    key = target, overrides, only
    if key not in FOUND:
        made = plan(*overrides)
        FOUND[key] = forecast(made, Documents.longest(made.recipe.data), target, only=only)
    return FOUND[key]


def _part(found, phase, part):
    return next(each for each in found.device if each.name == phase).parts.get(part, 0)


def test_tensors_without_values_are_counted_while_they_exist():
    with without_values() as live:
        first = torch.empty(1000)
        second = first * 2
        view = second[:10]
        assert live.live == 8000
        del first, second
        assert live.live == 4000
        del view
        assert (live.live, live.peak) == (0, 8000)


def test_what_code_reads_from_tensors_without_values_is_zero():
    with without_values():
        zero, positions = float(torch.ones(()).sum()), torch.ones(2, 3).nonzero()

    assert (zero, tuple(positions.shape)) == (0.0, (6, 2))


@pytest.mark.parametrize("kind", ["parallel", "medusa", "sequential"])
def test_the_forecast_counts_the_parameters_of_the_policy_exactly(plan, kind):
    base = LlamaForCausalLM(LlamaConfig(**SHAPE))
    policy = make_policy(base, n_future=3, head_kind=kind)

    found = _forecast(plan, CPU, f"model.heads.kind={kind}")

    assert found.parameters == sum(each.numel() for each in policy.parameters())
    assert _part(found, "policy training", "parameters") // 4 == pytest.approx(found.parameters, rel=1e-3)


def test_adamw_holds_two_moments_of_each_trained_parameter(plan):
    found = _forecast(plan)

    moments = _part(found, "policy training", "optimiser")

    assert moments == pytest.approx(8 * found.parameters, rel=1e-3)


def _allocated_peak(train):
    """Return the peak of the bytes that torch's CPU allocator holds during a function, without its inputs."""
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as seen:
        train()
    events = [each for each in seen.profiler.kineto_results.events() if each.name() == "[memory]"]
    sizes = [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())]
    return int(np.cumsum(sizes).max())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kind", "train", "checkpointing"),
    [
        ("parallel", "all", False),
        ("parallel", "all", True),
        ("sequential", "all", True),
        ("medusa", "heads", False),
    ],
)
def test_the_peak_of_a_step_is_what_torch_allocates_for_it(plan, kind, train, checkpointing, tied):
    config = LlamaConfig(**SHAPE | {"vocab_size": 4096 if tied else 640}, tie_word_embeddings=tied)
    config.save_pretrained("base")
    documents = Documents.longest(plan().recipe.data)
    base = LlamaForCausalLM(config)
    policy = make_policy(base, n_future=3, head_kind=kind)
    if train == "heads":
        policy.freeze_base()
    if checkpointing:
        policy.recompute_activations()
    learner = PolicyLearner(
        policy=policy,
        weighting=Weighting(strategy=UniformWeights(), needs=frozenset(), critic=None, label="test"),
        loss=LossTable(),
        steps=10,
        pairs_per_step=[1.0] * 3,
        accumulation=1,
        autocast=nullcontext,
        validation=list,
        best=Path(),
    )
    parameters = [each for each in policy.parameters() if each.requires_grad]
    (optimiser,) = make_optimisers(parameters, PolicyTrainTable())
    batch = documents.batch(plan().recipe.data, rows=4, packed=False)

    def step():
        learner.learn(batch, step=0)
        clip_gradients(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()

    step()  # makes the moments
    held = sum(each.nbytes for each in policy.parameters())
    held += sum(x.nbytes for state in optimiser.state.values() for x in state.values())

    made = plan(
        f"model.heads.kind={kind}",
        f"model.train={train}",
        f"model.activation_checkpointing={str(checkpointing).lower()}",
    )
    found = forecast(made, documents, CPU, only="policy training")

    expected = held + _allocated_peak(step)
    total = next(each.total for each in found.device if each.name == "policy training")
    assert total == pytest.approx(expected, rel=0.05)


def test_activation_checkpointing_of_a_frozen_base_takes_no_more_memory(plan):
    without, with_it = (
        _forecast(plan, CPU, "model.train=heads", f"model.activation_checkpointing={value}")
        for value in ("false", "true")
    )

    assert with_it.peak <= 1.01 * without.peak


FEW_KEYS = ("model.train=heads", "model.n_future=2", "evaluate.decoding=plain", "evaluate.batch_size=1")
"""Overrides after which few keys could lower the memory: `savings` tries each such key, which takes time."""


def test_each_key_is_listed_with_what_it_saves(plan):
    made, before = plan(*FEW_KEYS), _forecast(plan, CPU, *FEW_KEYS, only=None)

    found = {each.change: each for each in savings(made, Documents.longest(made.recipe.data), before)}

    after = _forecast(plan, CPU, *FEW_KEYS, "train.accumulation=4", only=None)
    assert {"train.accumulation = 4", "data.max_tokens = 64"} <= found.keys()
    assert found["train.accumulation = 4"].saved == pytest.approx(before.peak - after.peak, rel=0.01)
    assert [each.same_result for each in found.values()] == sorted(
        (each.same_result for each in found.values()), reverse=True
    )


@pytest.mark.parametrize(("temperature", "same"), [(0, True), (0.8, False)])
def test_plain_decoding_keeps_the_result_only_without_random_tokens(plan, temperature, same):
    keys = "model.train=heads", "evaluate.batch_size=64", f"evaluate.temperature={temperature}"
    made, before = plan(*keys), _forecast(plan, CPU, *keys, only=None)

    found = {each.change: each for each in savings(made, Documents.longest(made.recipe.data), before)}

    assert found['evaluate.decoding = "plain"'].same_result is same


def test_validation_reads_no_more_rows_at_a_time_than_a_micro_batch(plan):
    one, four = (_forecast(plan, CPU, f"train.accumulation={parts}", only="validation") for parts in (1, 4))

    trunks = [_part(each, "validation", "activations of the trunk") for each in (one, four)]
    assert trunks[0] / trunks[1] == pytest.approx(4, rel=0.1)


def test_a_run_on_a_cpu_counts_the_copies_that_it_writes_to_files(plan):
    often = _forecast(plan, CPU, "checkpoint.every=5")
    at_the_end = _forecast(plan)

    copied = _part(often, "policy training", "copies for files")
    state = sum(_part(often, "policy training", part) for part in ("parameters", "optimiser"))
    assert copied == pytest.approx(state, rel=1e-3)
    assert _part(at_the_end, "policy training", "copies for files") == 0


def test_bfloat16_on_a_gpu_halves_activations_but_not_the_state(plan):
    full, half = _forecast(plan, GPU), _forecast(plan, Target(device="cuda", dtype=torch.bfloat16))

    trunks = [_part(each, "policy training", "activations of the trunk") for each in (half, full)]
    assert 0.4 < trunks[0] / trunks[1] < 0.8
    assert _part(half, "policy training", "optimiser") == _part(full, "policy training", "optimiser")


def test_adapters_hold_moments_of_what_they_train_only(plan):
    pytest.importorskip("peft")
    adapted, whole = _forecast(plan, CPU, "model.train=adapters"), _forecast(plan)

    moments = [_part(each, "policy training", "optimiser") for each in (adapted, whole)]
    assert moments[0] < 0.7 * moments[1]  # heads 2..K are trained whole


def test_a_forecast_does_not_change_what_is_computed_after_it(plan):
    """torchao and bitsandbytes keep the first tables of codes that they make."""
    from bitsandbytes.backends import utils as bitsandbytes
    from bitsandbytes.backends.default import ops
    from torchao.optim import subclass_8bit as torchao

    def computed():
        torchao.get_qmap_signed.cache_clear()
        torchao.get_qmap_unsigned.cache_clear()
        bitsandbytes._code_4bit_cache.clear()
        ops._get_4bit_quantize_bounds.cache_clear()
        yield
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 64 * 64).view(64, 64))
        (optimiser,) = make_optimisers([parameter], made.recipe.train)
        for step in range(2):
            parameter.grad = (parameter * (3 + step)).sin().detach()
            optimiser.step()
        layer = torch.nn.Linear(64, 64, bias=False).requires_grad_(False)
        layer.weight.copy_(torch.linspace(-1, 1, 64 * 64).view(64, 64))
        base = torch.nn.Sequential(layer)
        store_base(base, "nf4")
        yield parameter.detach(), base(torch.eye(64))

    adapters = ('model.train="adapters"', 'model.base_dtype="nf4"')
    made = plan(*adapters, "train.optimiser={name='adamw_8bit'}")
    alone = computed()
    next(alone)
    expected = next(alone)
    after = computed()
    next(after)
    random_state = torch.get_rng_state()
    forecast(made, Documents.longest(made.recipe.data), CPU)

    assert torch.equal(torch.get_rng_state(), random_state)
    for actual, value in zip(next(after), expected, strict=True):
        assert torch.equal(actual, value)


def test_each_process_holds_its_share_of_the_matrices(plan):
    policy = make_policy(LlamaForCausalLM(LlamaConfig(**SHAPE)), n_future=3, head_kind="parallel")
    matrices = sum(each.numel() for each in policy.parameters() if each.ndim >= 2)
    others = sum(each.numel() for each in policy.parameters() if each.ndim < 2)

    four = Target(device="cpu", dtype=torch.float32, processes=4)
    found = _forecast(plan, four, "model.shard=true")

    held = _part(found, "policy training", "parameters")
    assert held == pytest.approx(4 * (matrices / 4 + others), rel=1e-3)
    assert _part(found, "policy training", "optimiser") == pytest.approx(2 * held, rel=1e-2)


def test_packed_rows_are_filled_with_documents():
    table = DataTable(use="x", max_tokens=100, packing="documents", pack_tokens=250)

    batch = Documents.longest(table).batch(table, rows=3, packed=True)

    assert tuple(batch.ids_BT.shape) == (3, 200)
    assert batch.document_BT.max() == 1


def test_documents_longer_than_the_limit_are_left_out():
    documents = Documents(length_D=np.array([9, 7, 4]), prompt_D=np.array([3, 2, 1]), measured=True)

    kept = documents.within(7)

    assert (kept.length_D.tolist(), kept.longest_prompt) == ([7, 4], 2)


def test_sizes_are_read_in_powers_of_ten_and_of_two():
    assert [parse_size(each) for each in ("80GB", "24 GiB", "1.5mb")] == [80 * 10**9, 24 << 30, 1_500_000]
    with pytest.raises(WmtpError, match="cannot read the size `lots`"):
        parse_size("lots")


def test_a_lack_is_certain_only_beyond_the_tolerance_of_the_forecast(plan):
    found = _forecast(plan, GPU)

    (slight,) = lacks(found, device=round(0.9 * found.peak), host=None)
    (clear,) = lacks(found, device=round(0.8 * found.peak), host=1 << 50)

    assert (slight.is_certain, clear.is_certain) == (False, True)
    assert lacks(found, device=found.peak, host=found.host_peak) == []


def test_main_memory_is_what_a_container_may_still_take(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 250\nactive_file 50\n")
    files = str(tmp_path / "memory.max"), str(tmp_path / "memory.current")

    assert left_in_group(files) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert left_in_group(files) is None
    assert free_main_memory() > 0


@pytest.fixture
def huge():
    """Overrides with so many rows that their activations take several times the free memory."""
    rows = 1 << (free_main_memory() // (4096 * 3_000)).bit_length()
    return f"train.batch_size={rows}", "data.max_tokens=4096", "train.validation_examples=2", *FEW_KEYS


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(plan, huge, capsys):
    plan()
    code = main(["run", "recipe.toml", *(word for each in huge for word in ("--set", each))])

    error, hint = capsys.readouterr().err.splitlines()[-2:]
    rows = huge[0].partition("=")[2]
    at_a_time = f"of main memory for {rows} x 4096 tokens at a time"
    assert code == 2
    assert re.fullmatch(rf"error: the run needs [\d.]+ GB {at_a_time}, and [\d.]+ GB are free", error)
    assert f"`train.accumulation = {rows}` saves" in hint
    assert '`run.over_memory = "warn"`' in hint
    assert not Path("storage").exists()


def test_the_recipe_can_start_a_run_against_the_forecast(plan, huge):
    warning = refuse_too_large(plan(*huge, "run.over_memory=warn"), SINGLE_PROCESS)

    assert warning is not None
    assert warning.startswith("WARNING: the run needs ")


def test_a_small_run_starts_without_a_forecast(plan):
    assert refuse_too_large(plan(), SINGLE_PROCESS) is None


def test_a_run_with_experts_does_not_start_without_a_forecast(plan):
    """The bound for small models does not count experts."""
    from weighted_mtp_core.memory import fit

    made = plan()
    assert fit._is_small(LlamaConfig(**SHAPE), made, least=1 << 40)
    assert not fit._is_small(MixtralConfig(**SHAPE, num_local_experts=4), made, least=1 << 40)


def test_a_small_model_in_many_processes_of_a_machine_is_refused(plan, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000000")

    with pytest.raises(WmtpError, match="of main memory for 4 x 128 tokens at a time"):
        refuse_too_large(plan(*FEW_KEYS), SINGLE_PROCESS)


def test_the_bound_of_a_small_model_reads_a_width_of_each_layer(plan):
    from weighted_mtp_core.memory import fit

    made = plan()
    config = Gemma3nTextConfig(**SHAPE | {"intermediate_size": [160] * 4}, layer_types=["full_attention"] * 4)

    assert fit._is_small(config, made, least=1 << 40)
    assert not fit._is_small(config, made, least=1 << 20)


def test_a_model_whose_memory_cannot_be_forecast_is_an_error_that_says_so(plan):
    """Tensors without values that are not parameters cannot be copied."""
    made = plan("model.heads.kind=parallel")
    ApertusConfig(**SHAPE).save_pretrained("base")

    with pytest.raises(WmtpError, match="cannot be forecast for a `apertus` model"):
        forecast(made, Documents.longest(made.recipe.data), CPU)


def test_a_run_of_which_a_phase_cannot_be_forecast_starts_with_a_warning(plan):
    made = plan()
    MixtralConfig(**SHAPE, num_local_experts=4).save_pretrained("base")

    warning = refuse_too_large(made, SINGLE_PROCESS)

    assert warning is not None
    assert warning.startswith("WARNING: the forecast of the run's memory does not count policy training (")


def test_a_small_run_with_a_critic_starts_without_a_forecast(plan, example_plugin):
    from weighted_mtp_core.memory import fit

    made = plan("weighting.use=example.valued", "critic.use=example.judge")
    assert fit._is_small(LlamaConfig(**SHAPE), made, least=1 << 40)


def test_check_prints_the_forecast_and_the_keys(plan, capsys):
    plan()

    keys = [word for each in FEW_KEYS for word in ("--set", each)]
    assert main(["check", "recipe.toml", "--memory", "--device-memory", "3MB", *keys]) == 0

    printed = capsys.readouterr().out
    assert "on `cuda` (1 process, bfloat16)" in printed
    assert re.search(r"^`cuda`: [\d.]+ MB of 3.0 MB, [\d.]+ MB too much", printed, re.MULTILINE)
    assert re.search(
        r"^  train.accumulation = 4 +-[\d.]+ MB +to [\d.]+ MB +same result$", printed, re.MULTILINE
    )
