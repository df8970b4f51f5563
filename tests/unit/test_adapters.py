"""`model.train = "adapters"`: low-rank adapters of a base model that stays bitwise unchanged.

Shape letters: B rows, T positions, K heads.
"""

import copy
import functools
import hashlib
import json
import sys

import bitsandbytes
import pytest
import torch
from attrs import evolve
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    CTRLConfig,
    CTRLLMHeadModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from weighted_mtp_core.api import Batch, Signal, WeightingStrategy, Weights, WmtpError, add_adapters
from weighted_mtp_core.api.tensors import align_weights
from weighted_mtp_core.checkpointing.best_model import load_model, save_model
from weighted_mtp_core.checkpointing.manager import Checkpoints
from weighted_mtp_core.checkpointing.snapshot import Snapshot
from weighted_mtp_core.checkpointing.state import module_state
from weighted_mtp_core.export.adapter import write_adapter
from weighted_mtp_core.model.adapters import adapt, adapted_layers, merge_adapters
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.loss import weighted_mtp_loss
from weighted_mtp_core.model.stored_base import restore_base
from weighted_mtp_core.model.targets import batch_labels, target_mask
from weighted_mtp_core.model.trunk import frozen_trunk, trainable_trunk
from weighted_mtp_core.recipe.schema import AdaptersTable, CheckpointTable, LossTable, ModelTable, TrainTable
from weighted_mtp_core.runtime.state_digest import BASE_SHA256
from weighted_mtp_core.training.loop import train
from weighted_mtp_core.training.optimisers import make_optimisers
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.weighting_inputs import Weighting

V, K, T = 31, 3, 12
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32, num_key_value_heads=1)),
    "tied": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SMALL, intermediate_size=32, num_key_value_heads=1, tie_word_embeddings=True)
    ),
    "opt": lambda: OPTForCausalLM(  # the only model type here that can compute everything in float64
        OPTConfig(
            vocab_size=V,
            hidden_size=16,
            word_embed_proj_dim=16,
            ffn_dim=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            dropout=0,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=16, n_layer=3, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ),
}
HEADS = ("parallel", "medusa", "sequential")
LATER = ("heads.1.", "heads.2.")
PLAIN = AdaptersTable(rank=2)
NF4 = [  # the values of NormalFloat, QLoRA (Dettmers et al. 2023), appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
]  # fmt: skip


@functools.cache
def base(name):
    torch.manual_seed(0)
    made = BASES[name]()
    for parameter in made.parameters():  # far from the initial scale, where gradients are all alike
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def new_policy(name="llama", *, head="parallel", n_future=K):
    return make_policy(copy.deepcopy(base(name)), n_future=n_future, head_kind=head)


def adapted(name="llama", *, head="parallel", options=PLAIN, n_future=K, base_dtype="float32", moved=False):
    """Return a policy with adapters; if `moved`, the adapters no longer have their initial values."""
    policy = new_policy(name, head=head, n_future=n_future)
    torch.manual_seed(1)
    adapt(policy, ModelTable(train="adapters", adapters=options, base_dtype=base_dtype))
    if moved:
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape)
    return policy


def batch_of(step):
    ids_BT = torch.randint(2, V, (4, T), generator=torch.Generator().manual_seed(step))
    zero_BT = torch.zeros_like(ids_BT)
    return Batch(
        ids_BT=ids_BT,
        document_BT=zero_BT,
        response_BT=(torch.arange(T) >= 3).expand(4, -1),
        reward_BT=zero_BT.float(),
        group_BT=zero_BT,
    )


class Uneven(WeightingStrategy):
    def weigh(self, view):
        return Weights(weight=(0.1 + view.ids_BT % 5).where(view.response_BT, 0.0))


class Watching(WeightingStrategy):
    """Keeps the token losses that it is given."""

    def __init__(self):
        self.seen = []

    def weigh(self, view):
        self.seen.append(view.token_loss_BTK)
        return Weights(weight=view.response_BT.float())


def learner(policy, *, weighting=None, loss=None, best=None, steps=10):
    needs = frozenset({Signal.TOKEN_LOSS}) if weighting else frozenset()
    return PolicyLearner(
        policy=policy,
        weighting=Weighting(strategy=weighting or Uneven(), needs=needs, critic=None, label="uneven"),
        loss=loss or LossTable(),
        steps=steps,
        pairs_per_step=(36.0,) * policy.n_future,
        accumulation=1,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        validation=lambda: [batch_of(100)],
        best=best,
    )


def all_logits(policy, ids_BT):
    """Return the logits of all heads, `[K, B, T, V]`."""
    policy.eval()
    with torch.no_grad():
        hidden_BTH = policy.trunk_states(ids_BT)
        return torch.stack(
            [policy.logits(k, hidden_BTH, ids_BT=ids_BT) for k in range(1, policy.n_future + 1)]
        )


def sha256(tensor):
    return hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()


def digests(policy):
    return {name: sha256(tensor) for name, tensor in policy.state_dict().items()}


OPTIONS = {
    "plain": PLAIN,
    "rslora": AdaptersTable(rank=3, alpha=5.0, rslora=True),
    "dora": AdaptersTable(rank=2, dora=True),
    "few": AdaptersTable(rank=2, targets=("q_proj", "up_proj")),
    "adapted": AdaptersTable(rank=2, heads="adapted"),
}


COMBINATIONS = [
    (head, options) for head in HEADS for options in OPTIONS if (head, options) != ("medusa", "adapted")
]


@pytest.mark.parametrize(("head", "options"), COMBINATIONS)
def test_new_adapters_change_no_logit(head, options):
    expected = all_logits(new_policy(head=head), batch_of(0).ids_BT)

    found = all_logits(adapted(head=head, options=OPTIONS[options]), batch_of(0).ids_BT)

    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(
    ("head", "options"), [("parallel", "plain"), ("sequential", "adapted"), ("medusa", "plain")]
)
def test_only_adapters_and_heads_get_gradients_and_optimiser_state(name, head, options):
    policy = adapted(name, head=head, options=OPTIONS[options])
    before = digests(policy)
    training = learner(policy)
    (optimiser,) = make_optimisers(training.parameters(), TrainTable(learning_rate=0.1, weight_decay=0.5))

    for step in range(3):
        training.learn(batch_of(step), step=step)
        assert all(each.grad is None for each in policy.parameters() if not each.requires_grad)
        optimiser.step()
        optimiser.zero_grad()

    after = digests(policy)
    changed = {name for name in before if after[name] != before[name]}
    trained = {name for name, each in policy.named_parameters() if each.requires_grad}
    assert changed == trained
    assert len(optimiser.state) == len(trained)
    assert any("trunk." in name for name in trained)
    assert all("lora_" in name or name.startswith(LATER) for name in trained)
    whole = {name for name in trained if "lora_" not in name}
    assert any("mlp" in name or "linear" in name or "fc1" in name for name in whole) == (options == "plain")
    if head != "medusa" and options == "adapted":
        assert any(name.startswith(LATER) for name in trained - whole)


def weighted_loss(policy, batch, labels_BTK, weight_BTK, share_K):
    """Return the loss from whole logits, in float64."""
    hidden_BTH = policy.trunk_states(batch.ids_BT)
    states = policy.each_head_states(hidden_BTH, ids_BT=batch.ids_BT, position_BT=None)
    total = torch.zeros((), dtype=torch.float64)
    for k, states_BTH in enumerate(states):
        logits_BVT = policy.unembedding(states_BTH).transpose(1, 2)
        ce_BT = torch.nn.functional.cross_entropy(
            logits_BVT, labels_BTK[:, :, k], ignore_index=-100, reduction="none"
        )
        total = total + share_K[k] * (weight_BTK[:, :, k] * ce_BT).sum()
    return total


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("options", ["plain", "rslora", "dora"])
def test_gradients_of_adapters_equal_finite_differences(head, options):
    policy = adapted("opt", head=head, options=OPTIONS[options], moved=True).double()
    batch, share_K = batch_of(0), torch.tensor([0.5, 0.3, 0.2])
    labels_BTK = batch_labels(batch, K)
    weight_BTK = align_weights(0.1 + (batch.ids_BT % 5).float(), target_mask(labels_BTK))
    weighted_mtp_loss(
        policy,
        policy.trunk_states(batch.ids_BT),
        labels_BTK=labels_BTK,
        weight_BTK=weight_BTK,
        normaliser_K=torch.ones(K),
        head_share_K=share_K,
        ids_BT=batch.ids_BT,
    )

    # DoRA takes the norms of the adapted rows as constants in the gradients of A and B (section 4.3).
    kind = "lora_magnitude" if options == "dora" else "lora_"
    adapters = [name for name, _ in policy.named_parameters() if kind in name]
    generator = torch.Generator().manual_seed(0)
    for name in adapters[:: len(adapters) // 8]:
        parameter = policy.get_parameter(name)
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        ends = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                parameter.data += step * direction
                ends.append(float(weighted_loss(policy, batch, labels_BTK, weight_BTK, share_K)))
            parameter.data += 1e-5 * direction
        expected = float((parameter.grad * direction).sum())
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(expected, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    ("name", "head", "options"),
    [("llama", *each) for each in COMBINATIONS] + [("gpt2", "parallel", "plain"), ("tied", "medusa", "dora")],
)
def test_merged_adapters_give_the_same_logits(name, head, options):
    policy = adapted(name, head=head, options=OPTIONS[options], moved=True)
    expected = all_logits(policy, batch_of(0).ids_BT)

    merge_adapters(policy)

    assert {*policy.state_dict()} == {*new_policy(name, head=head).state_dict()}
    assert float((all_logits(policy, batch_of(0).ids_BT) - expected).abs().max()) <= 1e-5


def test_a_target_without_a_linear_layer_of_this_name_is_refused():
    with pytest.raises(WmtpError, match="no linear layer `query` to adapt") as caught:
        adapted(options=AdaptersTable(targets=("q_proj", "query")))

    assert "`q_proj`" in caught.value.hint


def test_signals_are_computed_without_the_dropout_of_adapters():
    policy, watching = adapted(options=AdaptersTable(rank=2, dropout=0.5), moved=True), Watching()
    training = learner(policy, weighting=watching)

    losses = {float(training.learn(batch_of(0), step=0).loss) for _ in range(3)}

    assert len(losses) == 3
    assert torch.equal(watching.seen[0], watching.seen[1])
    assert torch.equal(watching.seen[0], watching.seen[2])


def test_detached_heads_train_no_adapter_of_the_trunk():
    policy = adapted(moved=True)
    only_later = LossTable(head_weights=(0.0, 1.0, 1.0), detach_trunk=True)

    learner(policy, loss=only_later).learn(batch_of(0), step=0)

    touched = {name for name, each in policy.named_parameters() if each.grad is not None and each.grad.any()}
    assert touched
    assert all(name.startswith(LATER) for name in touched)


# ------------------------------------------------------------------ checkpoints


class Losses:
    def __init__(self):
        self.by_step = {}

    def metrics(self, stage, step, values):
        if "train_loss" in values:
            self.by_step[step] = values["train_loss"]

    def timings(self, stage, step, values):
        pass

    def progress(self, step, values):
        pass


def trained(policy, folder, *, resume=None, steps=6):
    """Train with a checkpoint every 3 steps; return the loss of each step."""
    folder.mkdir(exist_ok=True)
    reporter = Losses()
    table = TrainTable(steps=steps, learning_rate=0.02, warmup_steps=0, validate_every=steps, log_every=1)
    checkpoint = CheckpointTable(every=3, keep=5)
    with Checkpoints(folder=folder, table=checkpoint, log=print) as checkpoints:
        train(
            learner(policy, best=folder / "best.pt", steps=steps),
            table,
            batch_of=batch_of,
            reporter=reporter,
            checkpoints=checkpoints,
            resume=resume,
        )
    return reporter.by_step


@pytest.mark.parametrize("options", ["plain", "dora", "adapted"])
def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(options, tmp_path):
    chosen = evolve(OPTIONS[options], dropout=0.1)
    torch.manual_seed(5)
    expected = adapted(options=chosen)
    losses = trained(expected, tmp_path / "whole")
    resumed = adapted(options=chosen)

    later = trained(
        resumed, tmp_path / "resumed", resume=Snapshot.read(tmp_path / "whole" / "policy-00000003")
    )

    assert later == {step: losses[step] for step in (4, 5, 6)}
    assert digests(resumed) == digests(expected)


def test_a_checkpoint_holds_adapters_heads_and_the_digest_of_the_base(tmp_path):
    policy = adapted()
    trained(policy, tmp_path)

    names = {name for name, each in policy.named_parameters() if each.requires_grad} | {BASE_SHA256}
    assert {*torch.load(tmp_path / "best.pt", weights_only=True)} == names
    tensors = Snapshot.read(tmp_path / "policy-00000003").part("learner")
    assert {name.removeprefix("policy.") for name in tensors if name.startswith("policy.")} == names


def test_a_checkpoint_of_another_base_is_refused(tmp_path):
    trained(adapted(), tmp_path)
    other = new_policy()
    other.trunk.embed_tokens.weight.data[3, 0] += 1e-6
    adapt(other, ModelTable(train="adapters", adapters=PLAIN))

    with pytest.raises(WmtpError, match="was trained on another base model"):
        load_model(other, tmp_path / "best.pt")
    with pytest.raises(WmtpError, match="was trained on another base model"):
        trained(other, tmp_path, resume=Snapshot.read(tmp_path / "policy-00000003"))


def test_the_best_state_is_loaded_onto_the_same_base(tmp_path):
    policy, fresh = adapted(moved=True), adapted()
    save_model(policy, tmp_path / "best.pt")

    load_model(fresh, tmp_path / "best.pt")

    assert digests(fresh) == digests(policy)
    assert len(module_state(policy)) < len(policy.state_dict())


# ------------------------------------------------------------------ the stored base


@pytest.mark.parametrize(("name", "head"), [("llama", "parallel"), ("tied", "medusa"), ("opt", "sequential")])
@pytest.mark.parametrize("base_dtype", ["bfloat16", "nf4"])
def test_a_stored_base_computes_like_its_float32_values(name, head, base_dtype):
    policy = adapted(name, head=head, base_dtype=base_dtype, moved=True)
    restored = copy.deepcopy(policy)
    restore_base(restored)

    assert torch.equal(all_logits(policy, batch_of(0).ids_BT), all_logits(restored, batch_of(0).ids_BT))
    for each in (policy, restored):
        learner(each).learn(batch_of(0), step=0)
    for own, other in zip(policy.parameters(), restored.parameters(), strict=True):
        assert own.requires_grad == other.requires_grad
        if own.requires_grad:
            torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_matrices_of_a_bfloat16_base_are_the_nearest_bfloat16_values_and_norms_stay_float32(name):
    exact = dict(new_policy(name).named_parameters())
    restored = adapted(name, base_dtype="bfloat16")
    restore_base(restored)

    for own_name, own in restored.named_parameters():
        if own.requires_grad:
            continue
        expected = exact[own_name.replace(".base_layer", "")].detach()
        if expected.ndim == 2:
            assert not torch.equal(own, expected), own_name
            expected = expected.bfloat16().float()
        assert torch.equal(own, expected), own_name


def test_an_nf4_base_holds_the_nearest_of_16_values_in_half_a_byte():
    policy = adapted(base_dtype="nf4")
    layer = policy.trunk.layers[0].mlp.up_proj.base_layer
    exact = new_policy().trunk.layers[0].mlp.up_proj.weight.detach().flatten().view(-1, 64)
    scale = exact.abs().amax(dim=1, keepdim=True)
    stored = layer.matrix(torch.float32).flatten().view(-1, 64) / scale

    assert layer.weight.nbytes == exact.numel() // 2
    distance = ((exact / scale)[:, :, None] - torch.tensor(NF4)).abs()
    torch.testing.assert_close(stored, torch.tensor(NF4)[distance.argmin(dim=2)], rtol=1e-5, atol=1e-6)


def test_matrices_that_bitsandbytes_reads_back_wrongly_are_refused(monkeypatch):
    quantize = bitsandbytes.functional.quantize_4bit

    def rotated(matrix, **options):
        return quantize(matrix.roll(1), **options)

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", rotated)

    with pytest.raises(WmtpError, match="does not read its own 4-bit matrices correctly"):
        adapted(base_dtype="nf4")


@pytest.mark.parametrize("base_dtype", ["bfloat16", "nf4"])
def test_a_stored_base_computes_in_the_dtype_of_autocast(base_dtype):
    policy = adapted(base_dtype=base_dtype, moved=True).eval()
    ids_BT = batch_of(0).ids_BT
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        projected = policy.trunk.layers[0].mlp.up_proj(torch.randn(2, 16))
        hidden_BTH = policy.trunk_states(ids_BT)
        logits = policy.logits(1, hidden_BTH)

    assert projected.dtype == torch.bfloat16
    exact = all_logits(policy, ids_BT)[0]
    assert float((logits - exact).abs().max()) <= 0.03 * float(exact.abs().max())


def test_a_model_with_other_layers_than_linear_ones_cannot_be_stored_in_fewer_bits():
    with pytest.raises(
        WmtpError, match="cannot be stored in bfloat16: they are in layers of the class `Conv1D`"
    ):
        adapted("gpt2", base_dtype="bfloat16")


def test_nf4_without_bitsandbytes_is_an_error_that_names_the_command_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)

    with pytest.raises(WmtpError, match="needs the package `bitsandbytes`, which is not installed") as caught:
        adapted(base_dtype="nf4")

    assert caught.value.hint == "pip install 'weighted-mtp-core[nf4]'"


@pytest.mark.parametrize("base_dtype", ["float32", "nf4"])
def test_recomputed_activations_give_the_same_gradients(base_dtype):
    found = []
    for recomputes in (False, True):
        policy = adapted(base_dtype=base_dtype, moved=True)
        if recomputes:
            policy.recompute_activations()
        learner(policy).learn(batch_of(0), step=0)
        found.append({name: each.grad for name, each in policy.named_parameters() if each.requires_grad})

    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16", "nf4"])
def test_a_critic_of_its_own_gets_a_float32_copy_of_the_trunk_with_merged_adapters(base_dtype):
    policy = adapted(base_dtype=base_dtype, moved=True)
    ids_BT = batch_of(0).ids_BT

    trunk = trainable_trunk(policy, None, storage=None, tokenizer=None)

    assert not any("lora" in name for name, _ in trunk.named_parameters())
    assert all(each.requires_grad and each.dtype == torch.float32 for each in trunk.parameters())
    expected = policy.eval().trunk_states(ids_BT)
    torch.testing.assert_close(trunk.body(input_ids=ids_BT).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(frozen_trunk(policy)(batch_of(0)), expected)


# ------------------------------------------------------------------ export --adapter


@pytest.mark.parametrize(
    ("name", "head", "options"),
    [
        ("llama", "parallel", "plain"),
        ("llama", "medusa", "few"),
        ("tied", "sequential", "dora"),
        ("tied", "sequential", "adapted"),
        ("gpt2", "parallel", "rslora"),
    ],
)
def test_plain_peft_loads_an_exported_adapter_onto_the_base_with_the_same_logits(
    name, head, options, tmp_path
):
    policy = adapted(name, head=head, options=evolve(OPTIONS[options], dropout=0.1), moved=True)
    base(name).save_pretrained(tmp_path / "base")
    ids_BT = batch_of(0).ids_BT
    expected = all_logits(policy, ids_BT)[0]

    write_adapter(policy, tmp_path / "adapter", dtype=torch.float32, recipe=b"")

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.no_grad():
        before = plain(ids_BT).logits
        loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        found = loaded(ids_BT).logits
    assert float((found - expected).abs().max()) <= 1e-5
    assert float((found - before).abs().max()) > 1e-2
    assert torch.equal(all_logits(policy, ids_BT)[0], expected)


def test_an_adapter_is_exported_with_whole_names_if_another_module_has_the_same_last_part(tmp_path):
    """In CTRL, `0` is the name of a linear layer in each decoder layer, and of a decoder layer."""
    torch.manual_seed(0)
    config = CTRLConfig(vocab_size=V, n_embd=16, dff=32, n_layer=3, n_head=2, n_positions=32)
    model = CTRLLMHeadModel(config).eval()
    policy = make_policy(copy.deepcopy(model), n_future=2, head_kind="medusa")
    adapt(policy, ModelTable(train="adapters", adapters=PLAIN))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids_BT = batch_of(0).ids_BT

    write_adapter(policy, tmp_path / "adapter", dtype=torch.float32, recipe=b"")

    with torch.no_grad():
        found = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()(ids_BT).logits
    torch.testing.assert_close(found, all_logits(policy, ids_BT)[0], rtol=1e-4, atol=1e-4)


def test_an_exported_adapter_names_its_base_and_the_last_parts_of_its_layers(tmp_path):
    base("llama").save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    policy = make_policy(model, n_future=2, head_kind="parallel")
    adapt(policy, ModelTable(train="adapters", adapters=AdaptersTable(targets=("q_proj", "up_proj"))))

    write_adapter(policy, tmp_path / "adapter", dtype=torch.bfloat16, recipe=b"x = 1\n")

    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert sorted(config["target_modules"]) == ["q_proj", "up_proj"]
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (8, 16, "CAUSAL_LM")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 3 * 2 * 2
    assert {each.dtype for each in tensors.values()} == {torch.bfloat16}
    assert (tmp_path / "adapter" / "recipe.toml").read_bytes() == b"x = 1\n"


def test_an_adapter_that_peft_would_load_as_another_one_is_refused(tmp_path):
    shape = SMALL | {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
    small = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
    latent = {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    config = DeepseekV3Config(**shape, **small, **latent, first_k_dense_replace=1, topk_group=1)
    policy = make_policy(DeepseekV3ForCausalLM(config), n_future=2, head_kind="medusa")
    adapt(policy, ModelTable(train="adapters", adapters=PLAIN))

    with pytest.raises(WmtpError, match="peft would load the adapter of this `deepseek_v3` model as another"):
        write_adapter(policy, tmp_path / "adapter", dtype=torch.float32, recipe=b"")
    assert not (tmp_path / "adapter").exists()


# ------------------------------------------------------------------ layers that cannot be adapted


class Fused(torch.nn.Module):
    """Reads the matrix of one of its layers, as fused kernels do."""

    def __init__(self):
        super().__init__()
        self.called = torch.nn.Linear(4, 4)
        self.bypassed = torch.nn.Linear(4, 4)

    def forward(self, input_NI):
        return self.called(input_NI) @ self.bypassed.weight.to(self.called.weight.dtype)


def test_a_layer_whose_matrix_is_read_without_a_call_is_refused():
    with pytest.raises(WmtpError, match="an adapter of `bypassed` would have no effect") as caught:
        add_adapters(torch.nn.Sequential(Fused()), rank=2)

    assert caught.value.hint == "set the targets to `called`, or to some of them"
    add_adapters(torch.nn.Sequential(Fused()), rank=2, targets=("called",))


def test_an_attention_of_torch_that_reads_the_matrix_of_its_last_layer_is_refused():
    module = torch.nn.ModuleDict(
        {"attention": torch.nn.MultiheadAttention(8, 2), "out": torch.nn.Linear(8, 8)}
    )

    with pytest.raises(WmtpError, match="an adapter of `out_proj` would have no effect") as refused:
        add_adapters(module, rank=2)

    assert refused.value.hint == "set the targets to `out`, or to some of them"


def test_only_the_given_layers_are_adapted_although_a_longer_name_ends_like_theirs():
    layer, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    module = torch.nn.ModuleDict({"own": layer, "more": torch.nn.ModuleDict({"own": other})})

    add_adapters(module, rank=2, layers=[layer])

    assert [name for name, _ in adapted_layers(module)] == ["own"]


def test_adapters_of_layers_that_share_a_matrix_are_refused():
    """Merging both adapters would add each of them to both layers."""
    made = copy.deepcopy(base("llama"))
    first, second, _ = made.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    policy = make_policy(made, n_future=K, head_kind="medusa")

    with pytest.raises(
        WmtpError,
        match=r"`trunk\.layers\.0\.mlp\.up_proj` and `trunk\.layers\.1\.mlp\.up_proj` share a matrix",
    ):
        adapt(policy, ModelTable(train="adapters", adapters=PLAIN))


def test_layers_directly_in_the_module_are_adapted():
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))

    add_adapters(module, rank=2)

    trained = {name for name, each in module.named_parameters() if each.requires_grad}
    assert trained == {f"{layer}.lora_{kind}.default.weight" for layer in (0, 2) for kind in "AB"}


@pytest.mark.parametrize("base_dtype", ["bfloat16", "nf4"])
def test_experts_that_would_stay_float32_are_refused(base_dtype):
    config = MixtralConfig(**SMALL, intermediate_size=32, num_key_value_heads=1, num_local_experts=4)
    policy = make_policy(MixtralForCausalLM(config), n_future=2, head_kind="parallel")

    with pytest.raises(WmtpError, match="they are in layers of the class `MixtralExperts`"):
        adapt(policy, ModelTable(train="adapters", adapters=PLAIN, base_dtype=base_dtype))
