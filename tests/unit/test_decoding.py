"""Cached, batched and self-speculative decoding gives the text of one forward pass per token."""

import copy
import functools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.generation.decoding_probe import manner_of
from weighted_mtp_core.generation.generate import generate
from weighted_mtp_core.model.load import make_policy

V, K = 40, 4
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def windowed(window):
    """A model with one layer of full attention and two with a sliding window."""
    layers = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, intermediate_size=32, num_key_value_heads=1, **layers))


BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32, num_key_value_heads=1)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, intermediate_size=32, num_key_value_heads=1)),
    "qwen2, narrow windows": lambda: windowed(5),
    "qwen2, wide windows": lambda: windowed(100),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=3, n_head=2)),
}
HEADS = {
    "parallel": {"head_kind": "parallel"},
    "medusa": {"head_kind": "medusa"},
    "sequential": {"head_kind": "sequential"},
    "sequential for vllm": {"head_kind": "sequential", "shared": True, "serve": "vllm"},
}
POLICIES = [
    (name, head)
    for name in BASES
    for head in HEADS
    if not (head == "sequential for vllm" and "windows" in name)
]
DECODINGS = ("plain", "self_speculative")
PROMPTS = ((5, 9, 4, 31), (7,), (3, 3, 8, 1, 2, 39, 6), (12, 30), (20, 21, 22))
EOS = 0


@functools.cache
def models(name, head):
    """A base model and a policy of it; heads 2..K are untrained and differ from head 1."""
    torch.manual_seed(1)
    base = BASES[name]().eval()
    for parameter in base.parameters():  # far from the initial scale, at which all positions are alike
        torch.nn.init.normal_(parameter, std=0.2)
    policy = make_policy(copy.deepcopy(base), n_future=K, **HEADS[head]).eval()
    for parameter in policy.heads[2 if head != "sequential for vllm" else 1 :].parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return base, policy


@torch.no_grad()
def naive(base, prompt, *, limit, eos_id=EOS):
    """Greedy text of transformers' own model, without a cache and without EOS; and whether EOS ended it."""
    ids = list(prompt)
    for _ in range(limit):
        ids.append(int(base(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == eos_id:
            return tuple(ids[len(prompt) : -1]), True
    return tuple(ids[len(prompt) :]), False


@pytest.mark.parametrize(("name", "head"), POLICIES)
def test_each_kind_of_heads_drafts(name, head):
    _, policy = models(name, head)

    written = generate(policy, PROMPTS[:1], max_new_tokens=3, eos_id=-1, decoding="self_speculative")

    assert len(written.accepted) == (0 if "narrow" in name else K - 1)


@pytest.mark.parametrize(("name", "head"), POLICIES)
@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("limit", [1, 2, 11])
def test_greedy_text_is_that_of_a_loop_without_a_cache(name, head, decoding, limit):
    base, policy = models(name, head)
    expected = [naive(base, prompt, limit=limit) for prompt in PROMPTS]

    written = generate(policy, PROMPTS, max_new_tokens=limit, eos_id=EOS, decoding=decoding, batch_size=3)

    assert list(zip(written.tokens, written.finished, strict=True)) == expected


@pytest.mark.parametrize(("name", "head"), POLICIES)
@pytest.mark.parametrize("decoding", DECODINGS)
def test_any_token_of_a_text_can_be_the_eos(name, head, decoding):
    base, policy = models(name, head)
    for eos_id in set(naive(base, PROMPTS[0], limit=8, eos_id=-1)[0]):
        written = generate(policy, PROMPTS[:1], max_new_tokens=9, eos_id=eos_id, decoding=decoding)

        assert (written.tokens[0], written.finished[0]) == naive(base, PROMPTS[0], limit=9, eos_id=eos_id)


@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_text_ends_at_the_models_last_position(decoding):
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=V, n_embd=16, n_layer=3, n_head=2, n_positions=16)
    base = GPT2LMHeadModel(config).eval()
    policy = make_policy(copy.deepcopy(base), n_future=K, head_kind="parallel").eval()
    lengths = [16 - (K - 1) - len(prompt) for prompt in PROMPTS]

    written = generate(policy, PROMPTS, max_new_tokens=50, eos_id=-1, decoding=decoding)

    assert list(written.tokens) == [
        naive(base, prompt, limit=length, eos_id=-1)[0]
        for prompt, length in zip(PROMPTS, lengths, strict=True)
    ]
    assert not any(written.finished)


@pytest.mark.parametrize(("name", "drafts"), [("qwen2, narrow windows", 0), ("qwen2, wide windows", K - 1)])
def test_nothing_is_drafted_if_rejected_drafts_would_fill_a_window(name, drafts):
    _, policy = models(name, "parallel")

    written = generate(policy, PROMPTS, max_new_tokens=11, eos_id=EOS, decoding="self_speculative")

    assert len(written.accepted) == drafts


def test_logits_that_are_nan_at_the_first_step_only_are_not_decoded_with_a_cache():
    policy = copy.deepcopy(models("llama", "parallel")[1])
    lengths = []

    def spoil(_, inputs, logits):
        lengths.append(inputs[0].shape[1])
        is_first_step = lengths[-1] == 1 and lengths[-2] > 1
        return logits * float("nan") if is_first_step else None

    policy.unembedding.register_forward_hook(spoil)

    assert "differ with a cache (by nan)" in manner_of(policy).no_cache


def test_a_prompt_that_leaves_no_position_is_an_error():
    _, policy = models("gpt2", "medusa")

    with pytest.raises(
        WmtpError,
        match=r"a prompt of 1021 tokens is too long: prompt and text can have 1021 tokens with",
    ):
        generate(policy, [[1] * 1021], max_new_tokens=1, eos_id=EOS)


def test_generation_that_fails_restores_the_mode_of_the_policy():
    _, policy = models("gpt2", "medusa")
    policy.train()

    with pytest.raises(RuntimeError, match="interrupted"):
        generate(policy, [[1, 2]], max_new_tokens=1, eos_id=EOS, on_done=interrupt)

    assert policy.training


def interrupt(done):
    raise RuntimeError("interrupted")


def sample(policy, prompts, streams, *, decoding, batch_size=32, seed=3, limit=9):
    return generate(
        policy,
        prompts,
        max_new_tokens=limit,
        eos_id=EOS,
        temperature=1.0,
        seed=seed,
        streams=streams,
        decoding=decoding,
        batch_size=batch_size,
    ).tokens


@pytest.mark.parametrize(("name", "head"), POLICIES)
@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_sampled_text_does_not_depend_on_its_batch(name, head, decoding):
    _, policy = models(name, head)
    streams = [f"stream {i}" for i in range(len(PROMPTS))]
    alone = [
        sample(policy, [prompt], [stream], decoding=decoding)[0]
        for prompt, stream in zip(PROMPTS, streams, strict=True)
    ]

    assert list(sample(policy, PROMPTS, streams, decoding=decoding)) == alone
    assert list(sample(policy, PROMPTS, streams, decoding=decoding, batch_size=2)) == alone
    assert list(sample(policy, PROMPTS[::-1], streams[::-1], decoding=decoding))[::-1] == alone


@pytest.mark.parametrize("decoding", DECODINGS)
def test_seed_and_stream_fix_a_sampled_text(decoding):
    _, policy = models("llama", "medusa")
    prompts = [PROMPTS[0]] * 3

    twice = sample(policy, prompts, ["a", "a", "b"], decoding=decoding)
    other_seed = sample(policy, prompts, ["a", "a", "b"], decoding=decoding, seed=4)

    assert twice[0] == twice[1]
    assert twice[0] != twice[2]
    assert twice[0] != other_seed[0]


@functools.cache
def coin(head):
    """A model of four tokens and its policy; head 1 accepts some of the drafts."""
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
    )
    base = LlamaForCausalLM(config).eval()
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    policy = make_policy(copy.deepcopy(base), n_future=3, **HEADS[head]).eval()
    for parameter in policy.heads[1:].parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return base, policy


@torch.no_grad()
def exact_distribution(base, prompt, *, length, temperature):
    """Probability of each text of `length` tokens, `[4 ** length]`, from the model's own conditionals."""
    texts = torch.cartesian_prod(*[torch.arange(4)] * length)
    rows = torch.cat([torch.tensor([prompt]).expand(len(texts), -1), texts], dim=1)
    log_p = (base(input_ids=rows).logits / temperature).log_softmax(dim=-1)[:, len(prompt) - 1 : -1]
    return log_p.gather(2, texts[:, :, None]).sum(dim=(1, 2)).exp().double().numpy()


@pytest.mark.parametrize(
    ("decoding", "head"), [("plain", "parallel"), *(("self_speculative", head) for head in HEADS)]
)
def test_sampled_texts_follow_exactly_the_models_distribution(decoding, head):
    base, policy = coin(head)
    prompt, count, length = (1, 3, 2), 6000, 4
    expected = exact_distribution(base, prompt, length=length, temperature=0.8)
    written = generate(
        policy,
        [prompt] * count,
        max_new_tokens=length,
        eos_id=-1,
        temperature=0.8,
        seed=11,
        decoding=decoding,
        batch_size=2000,
    )
    numbers = np.array(written.tokens) @ (4 ** np.arange(length)[::-1])
    observed = np.bincount(numbers, minlength=len(expected))

    assert (expected * count).min() >= 5  # the chi-squared approximation needs this
    assert chisquare(observed, expected / expected.sum() * count).pvalue > 0.01
    if decoding == "self_speculative":
        assert all(0.2 < share < 0.95 for share in written.acceptance)
