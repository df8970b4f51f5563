"""A run computes in one precision, except for probes, so no difference of losses is due to rounding alone."""

import os
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.api import Scores
from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.generation.generate import generate
from weighted_mtp_core.generation.samplers import token_logprobs
from weighted_mtp_core.generation.sampling import whole_cumulative
from weighted_mtp_core.model import packing_probe, probe
from weighted_mtp_core.model.language_model import LanguageModel, frozen_losses
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.runtime.device import Compute, full_precision
from weighted_mtp_core.testing.documents import APART
from weighted_mtp_core.training.critic_scores import critic_scores

BFLOAT16 = Compute.resolve(device="cpu", dtype="bfloat16")
PROBES = {probe.observe.__name__, probe.compare.__name__, packing_probe.check_packing.__name__, "_find"}

PLUGIN = """
    import torch
    from attrs import frozen
    from torch import nn
    from weighted_mtp_core.api import (
        Component, Critic, CriticLoss, Scores, Signal, WeightingStrategy, Weights, hookimpl
    )

    @frozen(kw_only=True)
    class NoOptions:
        pass

    class Reference(Critic):
        reads_policy = False
        cacheable = True

        def __init__(self, context):
            self.losses = context.model.frozen_losses(None)

        def score(self, batch, hidden_BTH):
            return Scores(reference_loss_BT=self.losses(batch))

    class Excess(WeightingStrategy):
        def weigh(self, view):
            excess_BT = view.to_targets(view.token_loss_BTK)[..., 0] - view.reference_loss_BT
            size_BT = view.reference_loss_BT
            return Weights(
                weight=view.response_BT.float(),
                metrics={"largest_excess": excess_BT.abs().max(), "largest_loss": size_BT.max()},
            )

    class Probe(Critic):
        trainable = True

        def __init__(self, context):
            self.layer = nn.Linear(context.model.hidden_size, 1)

        def score(self, batch, hidden_BTH):
            with torch.no_grad():
                return Scores(value_BT=self.layer(hidden_BTH).squeeze(-1).float().sigmoid())

        def loss(self, batch, hidden_BTH):
            logit_BT = self.layer(hidden_BTH).squeeze(-1).float()
            loss_BT = nn.functional.binary_cross_entropy_with_logits(
                logit_BT, batch.reward_BT, reduction="none"
            )
            return CriticLoss(loss=loss_BT.mean())

        def parameters(self):
            return self.layer.parameters()

        def state_dict(self):
            return dict(self.layer.state_dict())

        def load_state_dict(self, state):
            self.layer.load_state_dict(state)

    class Valued(WeightingStrategy):
        def weigh(self, view):
            return Weights(weight=view.value_BT.where(view.response_BT, 0.0))

    def critic(cls):
        return lambda options, context: cls(context)

    @hookimpl
    def wmtp_critics():
        yield Component(
            name="reference", summary="The policy.", options=NoOptions, build=critic(Reference),
            provides=frozenset({Signal.REFERENCE_LOSS}),
        )
        yield Component(
            name="probe", summary="A linear value.", options=NoOptions, build=critic(Probe),
            provides=frozenset({Signal.VALUE}),
        )

    @hookimpl
    def wmtp_weighting_strategies():
        yield Component(
            name="excess", summary="Ones.", options=NoOptions, build=lambda options, context: Excess(),
            needs=frozenset({Signal.TOKEN_LOSS, Signal.REFERENCE_LOSS}),
        )
        yield Component(
            name="valued", summary="Values.", options=NoOptions, build=lambda options, context: Valued(),
            needs=frozenset({Signal.VALUE}),
        )
"""


@pytest.fixture
def _plugin(wmtp_install_plugin):
    wmtp_install_plugin("precise", PLUGIN)


def policy(n_future=3, head_kind="parallel"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return make_policy(LlamaForCausalLM(config).eval(), n_future=n_future, head_kind=head_kind)


@pytest.mark.usefixtures("_plugin")
def test_a_policy_that_is_its_reference_has_no_excess_loss(wmtp_tiny_run):
    run = wmtp_tiny_run(
        {
            "model": {"dtype": "bfloat16"},
            "train": {"steps": 1},
            "critic": {"use": "precise.reference"},
            "weighting": {"use": "precise.excess"},
        }
    )

    assert run.metrics["largest_loss"] > 1.0
    assert run.metrics["largest_excess"] == 0.0


def test_the_same_reference_in_another_precision_has_an_excess_loss():
    learning = policy(n_future=1)
    losses = frozen_losses(LanguageModel.copy_of(learning))
    with BFLOAT16.autocast():
        rounded = losses(APART.batch())

    assert float((losses(APART.batch()) - rounded).abs().max()) > 1e-4


@pytest.mark.usefixtures("_plugin")
def test_every_layer_of_a_run_computes_in_its_dtype_but_for_the_probes(wmtp_tiny_run, monkeypatch):
    seen = set()
    forward = nn.Linear.forward

    def watched(self, x):
        output = forward(self, x)
        frame = sys._getframe()
        names = set()
        while frame is not None:
            names.add(frame.f_code.co_name)
            frame = frame.f_back
        kind = "probe" if names & PROBES else "pass"
        stages = {"learn", "validate", "measure", "score", "loss", "generate", "evaluate", "measure_tokens"}
        seen.add((kind, output.dtype))
        seen.update(names & stages)
        return output

    monkeypatch.setattr(nn.Linear, "forward", watched)
    wmtp_tiny_run(
        {
            "model": {"dtype": "bfloat16"},
            "critic": {"use": "precise.probe"},
            "weighting": {"use": "precise.valued"},
        }
    )

    assert {each for each in seen if isinstance(each, tuple)} == {
        ("pass", torch.bfloat16),
        ("probe", torch.float32),
    }
    assert {"learn", "validate", "measure", "score", "loss", "generate", "evaluate"} <= seen


class Rounded:
    def score(self, batch, hidden_BTH):
        return Scores(value_BT=batch.reward_BT.bfloat16())


def test_a_critic_whose_scores_are_not_float32_is_refused_by_name():
    with pytest.raises(
        RunFailedError, match=r"critic `a\.b` failed: `score` returned `value_BT` as torch\.bfloat16"
    ):
        critic_scores(Rounded(), APART.batch(), None, autocast=BFLOAT16.autocast, label="critic `a.b`")


# ------------------------------------------------------------------ generation


@pytest.mark.parametrize("decoding", ["plain", "self_speculative"])
@pytest.mark.parametrize("head_kind", ["parallel", "medusa", "sequential"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_texts_are_generated_in_the_dtype_of_the_policy(head_kind, decoding, temperature):
    writing, seen = policy(head_kind=head_kind), set()
    generate(writing, [[5]], max_new_tokens=1, eos_id=-1)  # runs the probe that chooses how to decode
    for module in writing.trunk.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, __, output: seen.add(output.dtype))

    found = generate(
        writing,
        [[5, 6, 7], [8, 9]],
        max_new_tokens=9,
        eos_id=-1,
        temperature=temperature,
        decoding=decoding,
        autocast=BFLOAT16.autocast,
    )

    assert [len(text) for text in found.tokens] == [9, 9]
    assert seen == {torch.bfloat16}


class Conversions(TorchDispatchMode):
    """Counts for each tensor how often it is converted to bfloat16."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
            self.of[args[0].data_ptr()] += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("decoding", ["plain", "self_speculative"])
def test_a_parameter_is_converted_once_for_a_text_also_if_it_is_frozen(decoding):
    writing = policy()
    writing.freeze_base()
    frozen = [each.requires_grad for each in writing.parameters()]

    with Conversions() as seen:
        generate(
            writing, [[5, 6]], max_new_tokens=9, eos_id=-1, decoding=decoding, autocast=BFLOAT16.autocast
        )

    matrices = [each for layer in writing.trunk.layers for each in layer.parameters() if each.ndim == 2]
    assert {seen.of[each.data_ptr()] for each in matrices} == {1}
    assert [each.requires_grad for each in writing.parameters()] == frozen
    assert all(each.grad is None for each in writing.parameters())


def test_log_probabilities_are_those_of_the_precision():
    writing, rows = policy(), [([3, 4], [5, 6, 7])]

    rounded = token_logprobs(writing, rows, batch_size=1, autocast=BFLOAT16.autocast)[0]
    with torch.no_grad(), BFLOAT16.autocast():
        logits_BTV = writing.logits(1, writing.trunk_states(torch.tensor([[3, 4, 5, 6, 7]]))).float()

    expected = [logits_BTV.log_softmax(-1)[0, t, id_].item() for t, id_ in ((1, 5), (2, 6), (3, 7))]
    assert rounded == pytest.approx(expected, abs=1e-6)
    assert rounded != token_logprobs(writing, rows, batch_size=1)[0]


# ------------------------------------------------------------------ TF32 and determinism


@pytest.fixture
def _switches():
    yield
    Compute.resolve(device="cpu", dtype="auto").apply()
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.usefixtures("_switches")
@pytest.mark.parametrize("on", [True, False])
def test_the_switches_of_torch_are_those_of_the_recipe(on):
    Compute.resolve(device="cpu", dtype="auto", tf32=on, deterministic=on).apply()

    assert torch.backends.cuda.matmul.allow_tf32 is on
    assert torch.are_deterministic_algorithms_enabled() is on
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if on else None)


@pytest.mark.usefixtures("_switches")
def test_a_setting_of_cublas_that_is_not_reproducible_is_refused(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")

    with pytest.raises(WmtpError, match="another value of CUBLAS_WORKSPACE_CONFIG than `:0:0`"):
        Compute.resolve(device="cpu", dtype="auto", deterministic=True).apply()


@pytest.mark.usefixtures("_switches")
def test_a_probe_computes_in_float32_and_the_run_does_not_notice():
    Compute.resolve(device="cpu", dtype="auto", tf32=True).apply()
    one = torch.ones(2, 2)
    with BFLOAT16.autocast():
        with full_precision(torch.device("cpu")):
            inside = (one @ one).dtype, torch.backends.cuda.matmul.allow_tf32
        outside = (one @ one).dtype, torch.backends.cuda.matmul.allow_tf32

    assert inside == (torch.float32, False)
    assert outside == (torch.bfloat16, True)


@pytest.mark.usefixtures("_plugin", "_switches")
def test_on_a_cpu_neither_switch_changes_a_digit(wmtp_tiny_run, tmp_path):
    recipe = {"critic": {"use": "precise.probe"}, "weighting": {"use": "precise.valued"}}
    plain = wmtp_tiny_run(recipe).metrics
    (tmp_path / "tiny").rename(tmp_path / "plain")

    assert wmtp_tiny_run(recipe | {"model": {"tf32": True, "deterministic": True}}).metrics == plain


def test_whole_numbers_add_up_to_the_same_distribution():
    probability = torch.rand(3, 1000, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)

    torch.testing.assert_close(
        whole_cumulative(probability), probability.double().cumsum(dim=-1), rtol=0, atol=1e-9
    )
