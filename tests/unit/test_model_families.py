"""A sample of the families of `docs/models.md`: each works as its row says, or is refused with a reason."""

import copy

import pytest
import torch
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.generation.decoding_probe import manner_of
from weighted_mtp_core.model.load import make_policy

# Kinds of heads, and whether drafts work.
FAMILIES = {
    "llama": ("parallel medusa sequential", True),
    "llama4_text": ("parallel medusa", True),
    "gemma2": ("parallel medusa sequential", True),
    "granite": ("parallel medusa", True),
    "cohere2": ("parallel medusa", True),
    "gptj": ("parallel medusa", True),
    "olmo": ("parallel medusa sequential", True),
    "opt": ("parallel medusa sequential", True),
    "bloom": ("medusa", True),
    "mpt": ("parallel medusa", False),
    "gpt_neo": ("parallel medusa", False),
    "qwen3_next": ("parallel medusa", False),
    "jamba": ("medusa", False),
    "mamba": ("parallel medusa sequential", False),
}


@pytest.fixture
def sweep(monkeypatch, repository):
    monkeypatch.syspath_prepend(repository / "tests" / "models")
    import sweep

    return sweep


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_right_with_the_heads_of_its_row(sweep, name):
    heads, drafts = FAMILIES[name]
    base = sweep.tiny_model(name)
    for kind in heads.split():
        policy = make_policy(copy.deepcopy(base), n_future=sweep.K, head_kind=kind).eval()

        assert sweep.differences(base, policy) == []
        assert (manner_of(policy).no_drafts is None) == drafts


@pytest.mark.parametrize(("name", "hint"), [("jamba", 'set `model.heads.kind = "medusa"`'), ("bloom", None)])
def test_heads_that_do_not_fit_are_refused_with_those_that_do(sweep, name, hint):
    with pytest.raises(WmtpError) as caught:
        make_policy(sweep.tiny_model(name), n_future=2, head_kind="parallel")

    assert caught.value.hint == (hint or 'set `model.heads.kind = "medusa"`')


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert", "a `bert` model cannot be a trunk: its predictions depend on later tokens"),
        ("rwkv", "a `rwkv` model cannot be a trunk: it rescales its own weights"),
        ("modernbert-decoder", "there is more than a matrix, a bias, a scale and a soft-cap"),
    ],
)
def test_a_model_that_cannot_be_a_trunk_is_refused(sweep, name, message):
    with pytest.raises(WmtpError) as caught:
        make_policy(sweep.tiny_model(name), n_future=2, head_kind="medusa")

    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_heads_whose_states_have_another_shape_are_refused(sweep, kind):
    with pytest.raises(WmtpError, match=r"have the shape \[2, 24, 4, 32\]"):
        make_policy(sweep.tiny_model("deepseek_v4"), n_future=3, head_kind=kind)


def test_an_error_while_heads_are_made_is_a_refusal(sweep, monkeypatch):
    from weighted_mtp_core.model.heads.sequential import SequentialModule

    def broken(*_, **__):
        raise AttributeError("no such part")

    monkeypatch.setattr(SequentialModule, "__init__", broken)

    with pytest.raises(WmtpError, match=r"cannot have `sequential` heads \(AttributeError: no such part\)"):
        make_policy(sweep.tiny_model("llama"), n_future=3, head_kind="sequential")


def test_two_layers_of_different_kinds_keep_their_own(sweep):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    kinds = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    base = Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=1, num_hidden_layers=2, **kinds))
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    ids_BT = torch.arange(3, 23)[None]

    policy = make_policy(copy.deepcopy(base), n_future=2, head_kind="parallel").eval()

    assert policy.trunk.config.layer_types == ["full_attention"]
    assert policy.heads[0].config.layer_types == ["sliding_attention"]
    torch.testing.assert_close(
        policy.logits(1, policy.trunk_states(ids_BT)), base.eval()(input_ids=ids_BT).logits
    )
