"""`sequential` heads compute DeepSeek-V3's formula, in the form of the server that will draft with them.

Shape letters: B rows, T positions, K heads, H hidden, N attention heads, W width of one attention head.
"""

import functools
import weakref
from collections import Counter

import pytest
import torch
from torch.nn.functional import cross_entropy, embedding, silu
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.loss import normalisers, weighted_mtp_loss
from weighted_mtp_core.model.targets import IGNORED, target_mask

V, H, N, W, K = 23, 16, 2, 8, 4
SMALL = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": N,
    "num_key_value_heads": 1,
}
SERVERS = [("transformers", "llama"), ("vllm", "qwen2")]
each_form = pytest.mark.parametrize("shared", [False, True], ids=["a module each", "one module"])
each_server = pytest.mark.parametrize(("serve", "base"), SERVERS, ids=[name for name, _ in SERVERS])


@functools.cache
def policy(serve, base, *, shared, tied=False, n_future=K):
    """A policy with parameters far from their initial scale, at which heads are alike."""
    torch.manual_seed(0)
    kind, config = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}[base]
    model = kind(config(**SMALL, tie_word_embeddings=tied))
    made = make_policy(model, n_future=n_future, head_kind="sequential", shared=shared, serve=serve)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.train()


def case(*, rows=2, length=7):
    """Return ids, and the loss's arguments with labels on a part of the pairs and uneven weights."""
    generator = torch.Generator().manual_seed(3)
    shape = rows, length, K
    labels_BTK = torch.randint(V, shape, generator=generator)
    labels_BTK[torch.rand(shape, generator=generator) >= 0.6] = IGNORED
    for k in range(1, K + 1):
        labels_BTK[:, length - k :, k - 1] = IGNORED
    target_BTK = target_mask(labels_BTK)
    weight_BTK = torch.rand(shape, generator=generator).mul(3).where(target_BTK, 0.0)
    return torch.randint(V, shape[:2], generator=generator), {
        "labels_BTK": labels_BTK,
        "weight_BTK": weight_BTK,
        "normaliser_K": normalisers(weight_BTK, target_BTK, normalise="weights"),
        "head_share_K": torch.tensor([0.1, 0.2, 0.3, 0.4]),
    }


# ------------------------------------------------------------------ the formula, written a second time


def normed(x, weight):
    return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * weight


def rotated(x_BTNW, position_T):
    """Rotate the pairs (i, i + W / 2) by position x 10000^(-2i / W)."""
    angle_TW = position_T[:, None] * 10000.0 ** (-torch.arange(0, W, 2) / W)
    cos_T1W, sin_T1W = angle_TW.cos()[:, None], angle_TW.sin()[:, None]
    one, two = x_BTNW.chunk(2, dim=-1)
    return torch.cat([one * cos_T1W - two * sin_T1W, two * cos_T1W + one * sin_T1W], dim=-1)


def reference_states(model, ids_BT, hidden_BTH, *, serve, detach=False):
    """Return the states of heads 2..K at the positions with a token to read; `hidden_BTH` is the trunk's."""
    parameters, found, past = dict(model.named_parameters()), [], []
    source_BTH, count = hidden_BTH, ids_BT.shape[1]
    for d in range(1, K):
        start = f"heads.{min(d, len(model.heads) - 1)}."
        own = {name.removeprefix(start): p for name, p in parameters.items() if name.startswith(start)}
        layer = {name.removeprefix("body.layers.0."): p for name, p in own.items()}
        table_VH = model.trunk.embed_tokens.weight
        token_BTH = embedding(ids_BT[:, d:], table_VH.detach() if detach else table_VH)
        source_BTH = source_BTH[:, : count - d]
        if serve == "vllm" and d == 1:  # no embedding where the position is 0
            token_BTH = torch.cat([torch.zeros_like(token_BTH[:, :1]), token_BTH[:, 1:]], dim=1)
        pair = normed(token_BTH, own["token_norm.weight"]), normed(source_BTH, own["hidden_norm.weight"])
        x_BTH = torch.cat(pair[::-1] if serve == "vllm" else pair, dim=-1) @ own["projection.weight"].T
        seen_BTH = normed(x_BTH, layer["input_layernorm.weight"])
        q, k, v = (
            (seen_BTH @ layer[f"self_attn.{n}.weight"].T + layer.get(f"self_attn.{n}.bias", 0)).unflatten(
                -1, (-1, W)
            )
            for n in ("q_proj", "k_proj", "v_proj")
        )
        place_T = torch.arange(count - d) + (d - 1 if serve == "vllm" else 0)
        past.append((rotated(k, place_T), v))
        q, attended = rotated(q, place_T), []
        for t in range(count - d):
            first, *later = past if serve == "vllm" else [past[-1]]
            keys, values = (
                torch.cat([first[i][:, : t + 1], *(each[i][:, t : t + 1] for each in later)], 1)
                for i in (0, 1)
            )
            p = torch.softmax(torch.einsum("bnw,bskw->bns", q[:, t], keys) / W**0.5, dim=-1)
            attended.append(torch.einsum("bns,bskw->bnw", p, values).flatten(1))
        x_BTH = x_BTH + torch.stack(attended, dim=1) @ layer["self_attn.o_proj.weight"].T
        seen_BTH = normed(x_BTH, layer["post_attention_layernorm.weight"])
        gate = silu(seen_BTH @ layer["mlp.gate_proj.weight"].T)
        x_BTH = x_BTH + (gate * (seen_BTH @ layer["mlp.up_proj.weight"].T)) @ layer["mlp.down_proj.weight"].T
        source_BTH = normed(x_BTH, own["final_norm.weight"])
        found.append(source_BTH)
    return found


def reference_loss(
    model, ids_BT, *, serve, labels_BTK, weight_BTK, normaliser_K, head_share_K, detach_trunk=False
):
    """Return the loss of all logits at once."""
    hidden_BTH = model.trunk_states(ids_BT)
    first_BTH = hidden_BTH
    if serve == "vllm":  # the trunk ends before the final norm
        first_BTH = normed(hidden_BTH, dict(model.named_parameters())["heads.0.weight"])
    source_BTH = hidden_BTH.detach() if detach_trunk else hidden_BTH
    later = reference_states(model, ids_BT, source_BTH, serve=serve, detach=detach_trunk)
    loss = 0
    for k, state_BTH in enumerate([first_BTH, *later]):
        fixed = detach_trunk and k
        matrix_VH = model.unembedding.weight.detach() if fixed else model.unembedding.weight
        label_BT = labels_BTK[:, : state_BTH.shape[1], k]
        ce_BT = cross_entropy((state_BTH @ matrix_VH.T).mT, label_BT, ignore_index=IGNORED, reduction="none")
        summed = (ce_BT * weight_BTK[:, : state_BTH.shape[1], k]).sum()
        loss = loss + head_share_K[k] / normaliser_K[k] * summed
    return loss


def gradients(model):
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


@each_form
@each_server
@torch.no_grad()
def test_states_are_those_of_the_formula(serve, base, shared):
    model = policy(serve, base, shared=shared)
    ids_BT, _ = case(length=9)
    hidden_BTH = model.trunk_states(ids_BT)

    _, *found = model.each_head_states(hidden_BTH, ids_BT=ids_BT, position_BT=None)

    expected = reference_states(model, ids_BT, hidden_BTH, serve=serve)
    for k, (actual_BTH, expected_BTH) in enumerate(zip(found, expected, strict=True), start=2):
        torch.testing.assert_close(actual_BTH[:, : 10 - k], expected_BTH, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.head_states(k, hidden_BTH, ids_BT=ids_BT), actual_BTH)


@pytest.mark.parametrize("detach_trunk", [False, True], ids=["", "detached"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@each_form
@each_server
def test_loss_and_every_gradient_are_those_of_the_formula(serve, base, shared, tied, detach_trunk):
    model = policy(serve, base, shared=shared, tied=tied)
    ids_BT, arguments = case()
    arguments["detach_trunk"] = detach_trunk

    model.zero_grad()
    found = weighted_mtp_loss(model, model.trunk_states(ids_BT), ids_BT=ids_BT, **arguments)
    found_gradients = gradients(model)
    model.zero_grad()
    expected = reference_loss(model, ids_BT, serve=serve, **arguments)
    expected.backward()

    torch.testing.assert_close(found.loss, expected.detach())
    torch.testing.assert_close(found_gradients, gradients(model), rtol=1e-3, atol=1e-5)
    moved = {name for name, grad in found_gradients.items() if grad.any()}
    assert {name for name, _ in model.named_parameters()} == moved


@each_server
def test_heads_read_tokens(serve, base):
    model = policy(serve, base, shared=False)
    ids_BT, _ = case()

    with pytest.raises(ValueError, match="read tokens"):
        model.logits(2, model.trunk_states(ids_BT))


# ------------------------------------------------------------------ initial weights, memory


@each_form
@each_server
@torch.no_grad()
def test_at_first_a_module_ignores_tokens_and_its_layer_is_the_last_one(serve, base, shared):
    torch.manual_seed(0)
    kind, config = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}[base]
    made = make_policy(
        kind(config(**SMALL)), n_future=K, head_kind="sequential", shared=shared, serve=serve
    ).eval()
    ids_BT, _ = case()
    hidden_BTH = made.trunk_states(ids_BT)

    last = made.trunk.layers[-1].state_dict()
    for k in range(2, K + 1):
        own = made.heads.layer(k).state_dict()
        assert {name: tensor.tolist() for name, tensor in own.items()} == {
            name: tensor.tolist() for name, tensor in last.items()
        }
        one, other = (made.head_states(k, hidden_BTH, ids_BT=each) for each in (ids_BT, ids_BT.flip(0)))
        torch.testing.assert_close(one, other)
    assert len({id(made.heads.module(k)) for k in range(2, K + 1)}) == (1 if shared else K - 1)


def held_for_backward(serve, base, n_future):
    """Return the most bytes that autograd holds at a time, over the bytes of `[B, T, H]` states."""
    model = policy(serve, base, shared=True, n_future=n_future)
    ids_BT, arguments = case(length=40)
    arguments |= {name: arguments[name][..., :n_future] for name in arguments}
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    held, most = Counter(), [0]  # how often a tensor is held, by its address and size

    def pack(tensor):
        kept, key = tensor.detach(), (tensor.data_ptr(), tensor.nbytes)
        if tensor.data_ptr() not in parameters:
            held[key] += 1
            weakref.finalize(kept, held.subtract, [key])
        most.append(max(most[-1], sum(size for (_, size), times in held.items() if times)))
        return kept

    with torch.no_grad():
        hidden_BTH = model.trunk_states(ids_BT)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        weighted_mtp_loss(model, hidden_BTH.requires_grad_(), ids_BT=ids_BT, **arguments)
    return most[-1] / hidden_BTH.nbytes


@each_server
def test_backward_needs_one_more_state_for_each_head_and_for_vllm_its_keys_and_values(serve, base):
    growth = held_for_backward(serve, base, 4) - held_for_backward(serve, base, 2)

    keys_and_values = 2 * W / H  # of a module with one key-value head
    assert growth <= 2 * (1 + (keys_and_values if serve == "vllm" else 0))


@each_server
def test_all_modules_read_one_lookup_because_each_has_a_gradient_of_the_embeddings_size(serve, base):
    model = policy(serve, base, shared=False)
    ids_BT, arguments = case()
    hidden_BTH, lookups = model.trunk_states(ids_BT), []
    hook = model.trunk.embed_tokens.register_forward_hook(lambda *_: lookups.append(1))

    weighted_mtp_loss(model, hidden_BTH, ids_BT=ids_BT, **arguments)

    hook.remove()
    assert len(lookups) == 1
